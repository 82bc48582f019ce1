"""One daemon per record: a lock on the database, by whichever name it is opened."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from notify_server.errors import StoreRefusedError

# How long to wait for a dead daemon's lock: its keeper finishes a transaction and ends.
ORPHAN_SECONDS = 10.0
ORPHAN_PAUSE = 0.02
# Bodies hold signed addresses, and anyone who can read the database can lock it: no other user may.
PRIVATE = 0o600


class FileLock:
    """The lock on a database: a second daemon is refused; a crash leaves no lock behind. `owner` is the process named
    to others, by default this one.

    Two advisory locks are held: one on a file beside the database, which names the owner and can be looked at without
    touching the database, and one on the database itself, which a hard link of another name leads to as well.
    """

    def __init__(self, database: Path, owner: int | None = None) -> None:
        self._path = lock_path(database)
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
        except OSError as error:
            raise StoreRefusedError(
                f"{self._path}: cannot be created ({error.strerror}): make the directory writable for this user"
            ) from error
        self._database_fd: int | None = None
        try:
            self._take(database, self._fd)
            # Opening it for writing reports what is wrong with the file.
            with contextlib.suppress(OSError):
                self._database_fd = os.open(database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
            if self._database_fd is not None:
                self._take(database, self._database_fd)
        except BaseException:
            self.close()
            raise
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{owner or os.getpid()}\n".encode(), 0)

    def _take(self, database: Path, descriptor: int) -> None:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while not _try(descriptor):
            if descriptor == self._fd:
                holder = f"process {os.pread(self._fd, 32, 0).decode('ascii', 'replace').strip() or 'unknown'}"
                alive = _runs(holder.removeprefix("process "))
            else:
                holder, alive = "by a hard link of another name", False
            if alive or time.monotonic() > deadline:
                raise StoreRefusedError(
                    f"{database}: in use by another notify_server ({holder}): "
                    "stop that one, or give this one a file of its own in [store] url"
                )
            time.sleep(ORPHAN_PAUSE)

    def close(self) -> None:
        """Release the lock, after every connection to the database was closed: closing any descriptor of the database
        drops SQLite's own locks. The files stay: removing the lock's file would let two daemons lock two files of one
        name.
        """
        if self._database_fd is not None:
            os.close(self._database_fd)
        os.close(self._fd)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def lock_path(database: Path) -> Path:
    """Return the lock's file: beside the database itself, whichever symbolic link it was named by."""
    actual = database.resolve()
    return actual.with_name(actual.name + ".lock")


def holder(database: Path) -> str | None:
    """Return the process that holds the lock on the database, None when no process does."""
    try:
        descriptor = os.open(lock_path(database), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
    finally:
        os.close(descriptor)
    return None


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        pass  # Not written yet, or the process of another user.
    return True
