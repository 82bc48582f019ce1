"""One daemon per record: an advisory lock in a file beside the database."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from notify_server.errors import StoreRefusedError

# How long to wait for a dead daemon's lock: its keeper finishes a transaction and ends.
ORPHAN_SECONDS = 10.0
ORPHAN_PAUSE = 0.02


class FileLock:
    """The lock on a database: a second daemon is refused; a crash leaves no lock behind. `owner` is the process named
    to others, by default this one.
    """

    def __init__(self, database: Path, owner: int | None = None) -> None:
        self._path = lock_path(database)
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreRefusedError(
                f"{self._path}: cannot be created ({error.strerror}): make the directory writable for this user"
            ) from error
        deadline = time.monotonic() + ORPHAN_SECONDS
        while not self._try():
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            if _runs(holder) or time.monotonic() > deadline:
                os.close(self._fd)
                raise StoreRefusedError(
                    f"{database}: in use by another notify_server (process {holder}): "
                    "stop that one, or give this one a file of its own in [store] url"
                )
            time.sleep(ORPHAN_PAUSE)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{owner or os.getpid()}\n".encode(), 0)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Release the lock. The file stays: removing it would let two daemons lock two files of one name."""
        os.close(self._fd)


def lock_path(database: Path) -> Path:
    """Return the lock's file: beside the database itself, whichever symbolic link it was named by."""
    actual = database.resolve()
    return actual.with_name(actual.name + ".lock")


def holder(database: Path) -> str | None:
    """Return the process that holds the lock on the database, None when nobody does."""
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
