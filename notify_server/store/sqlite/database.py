"""Opens the database for writing: its settings, its identity, its migrations, and what to say when that fails."""

from __future__ import annotations

import contextlib
import operator
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import cast

import structlog

from notify_server.errors import StoreRefusedError
from notify_server.model import FileState, Reason, ReportedStatus, Verdict
from notify_server.store.sql import load_migrations, unfinished
from notify_server.store.sqlite.lock import PRIVATE

log = structlog.get_logger("notify_server.store")

# "ntfy": lets `file` and this program recognise the database.
APPLICATION_ID = 0x6E746679
BUSY_TIMEOUT_MS = 3_000
OLDEST_SQLITE = (3, 35, 0)
# The page cache of the writer's connection.
CACHE_KIB = 8_192
# Size of the WAL, in pages, at which it is checkpointed.
CHECKPOINT_PAGES = 1000
PAGE_BYTES = 4096
# Share of the free space that the WAL may reserve at start.
RESERVED_SHARE = 0.1

READ_ONLY = "{}: is read-only: make the file and its directory writable for this user"

# sqlite3 looks up an adapter for every value that is not int, float, str or bytes, None too. A registered adapter is
# three times faster than a miss, which was a tenth of the cost of recording a file.
sqlite3.register_adapter(type(None), cast("Callable[[None], None]", {}.get))
for _kind in (FileState, Reason, ReportedStatus, Verdict):
    sqlite3.register_adapter(_kind, operator.attrgetter("_value_"))


def connect(path: Path, *, whole: bool = True) -> sqlite3.Connection:
    """Open the database for writing and bring its schema up to date.

    Raises StoreRefusedError when the file is not ours, corrupt, newer than this program, or, unless `whole` is False,
    an unfinished copy.
    """
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        needed = ".".join(map(str, OLDEST_SQLITE))
        raise StoreRefusedError(
            f"SQLite {sqlite3.sqlite_version} is too old: a Python with SQLite {needed} or newer is needed"
        )
    _check_writable(path)
    # SQLite gives the WAL the mode of the database, whatever the umask is.
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE))
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=512)
    except sqlite3.DatabaseError as error:
        raise refusal(path, error) from error
    try:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        _check_identity(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA cache_size = {-CACHE_KIB}")
        # Debian's SQLite overwrites deleted content by default, which writes a large body three times.
        connection.execute("PRAGMA secure_delete = FAST")
        # Pages that change often reach the file once per checkpoint; the WAL stays around 4 MiB.
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        connection.execute("PRAGMA temp_store = MEMORY")
        if whole:
            check_whole(connection, path)
        migrate(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise refusal(path, error) from error
    except StoreRefusedError:
        connection.close()
        raise
    return connection


def reserve_log(connection: sqlite3.Connection, path: Path) -> None:
    """Grow the WAL to its usual size at once.

    Syncing what overwrites a file costs a tenth of syncing a file that grows, whose size must be synced too. A rolled
    back transaction leaves the WAL as large as it made it.
    """
    size = CHECKPOINT_PAGES * PAGE_BYTES
    disk = os.statvfs(path.parent)
    if size > RESERVED_SHARE * disk.f_bavail * disk.f_frsize:
        return
    try:
        connection.execute("PRAGMA busy_timeout = 0")
        # A small cache spills to the WAL before the transaction ends.
        connection.execute("PRAGMA cache_size = 16")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE reserve (bytes BLOB)")
        connection.execute("INSERT INTO reserve (bytes) VALUES (zeroblob(?))", (size,))
    except sqlite3.OperationalError as error:
        log.debug("the WAL grows as it is written", store=str(path), error=str(error))
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        connection.execute(f"PRAGMA cache_size = {-CACHE_KIB}")
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")


class FileIdentity:
    """Notices when the files of an open database are deleted, moved or replaced.

    SQLite keeps writing to deleted files, and loses what it commits there.
    """

    def __init__(self, path: Path) -> None:
        self._paths = [path, path.with_name(path.name + "-wal")]
        self._known = [_identity(each) for each in self._paths]

    def forget_wal(self) -> None:
        """Accept another WAL: closing the last connection deletes it."""
        self._known[1] = None

    def problem(self) -> str | None:
        """Return the error text when a file is not the one that was opened, None when all are."""
        for place, (path, known) in enumerate(zip(self._paths, self._known, strict=True)):
            found = _identity(path)
            if found == known:
                continue
            if known is None:
                # The WAL comes into being with the first write.
                self._known[place] = found
                continue
            what = "was deleted or moved" if found is None else "was replaced by another file"
            return f"{path}: {what} while it was in use: put it back, or restart the server to use the present file"
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _check_writable(path: Path) -> None:
    # SQLite opens a read-only file without an error. Checked before there is a connection: closing any descriptor of
    # the file would drop the locks that SQLite holds on it.
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as error:
        if os.access(path, os.R_OK, effective_ids=True):
            raise StoreRefusedError(READ_ONLY.format(path)) from error
    except OSError:
        return  # Missing, or SQLite has the better error.


def refusal(path: Path, error: sqlite3.DatabaseError) -> StoreRefusedError:
    """Return the error for a database that cannot be opened: the cause and the remedy."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return StoreRefusedError(
            f"{path}: is damaged or not a SQLite database ({error}): restore it from a backup, "
            f'or save what can be read with `sqlite3 {path} ".recover"`, and move the file away'
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreRefusedError(
            f"{path}: is locked by another program: close the program that has it open for writing, and start again"
        )
    if code == sqlite3.SQLITE_READONLY:
        return StoreRefusedError(READ_ONLY.format(path))
    return StoreRefusedError(
        f"{path}: cannot be opened ({error}): check the disk and the permissions of file and directory"
    )


def _check_identity(connection: sqlite3.Connection, path: Path) -> None:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application_id != APPLICATION_ID and objects:
        raise StoreRefusedError(f"{path}: is a SQLite database of another program: name another file in [store] url")


def schema_version(connection: sqlite3.Connection) -> int:
    """Return the number of the last migration applied, 0 for an empty database."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def copied_from(connection: sqlite3.Connection) -> str | None:
    """Return the source that the database is an unfinished copy of, None when it is whole."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'copying'").fetchone():
        return None
    (source,) = connection.execute("SELECT source FROM copying").fetchone()
    return str(source)


def check_whole(connection: sqlite3.Connection, path: Path) -> None:
    """Raise StoreRefusedError when the database is an unfinished copy."""
    if (source := copied_from(connection)) is not None:
        raise unfinished(str(path), source)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Apply the missing migrations, each in its own transaction. Raises StoreRefusedError on a newer schema."""
    migrations = load_migrations("sqlite")
    present = schema_version(connection)
    if present > len(migrations):
        raise StoreRefusedError(
            f"{path}: has schema version {present}, this program knows {len(migrations)}: "
            "run the newer notify_server that wrote it, or restore a backup from before the upgrade"
        )
    for step in migrations[present:]:
        connection.executescript(
            f"BEGIN IMMEDIATE;\n{step.script}\n"
            f"PRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {step.version};\nCOMMIT;"
        )
    if present < len(migrations):
        log.info("schema migrated", store=str(path), to=migrations[-1].name)
