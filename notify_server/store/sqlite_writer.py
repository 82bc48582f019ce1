"""The one connection that writes, its thread, and the order in which work reaches it.

SQLite up to 3.51.2 can corrupt a WAL database when two connections write or checkpoint at once, so nothing else in the
daemon writes. Work is given to the thread one transaction at a time: callers who wait for an ack come first, all of
them in one group; other jobs run one by one while nobody waits, and have a share of the time when somebody always does.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from notify_server.errors import NotifyServerError, StoreRefusedError, StoreUnavailableError
from notify_server.store.queries import load_migrations

T = TypeVar("T")
Item = TypeVar("Item")
Answer = TypeVar("Answer")

log = structlog.get_logger("notify_server.store")

# "ntfy": lets `file` and this program tell the database from any other.
APPLICATION_ID = 0x6E746679
BUSY_TIMEOUT_MS = 3_000
# While callers wait for acks, jobs get so much of the thread's time for each second of theirs.
JOB_SHARE = 0.1
OLDEST_SQLITE = (3, 35, 0)

# The connection is as good as before after these; after any other error of the engine it is opened anew.
READ_ONLY = "{}: is read-only: make the file and its directory writable for this user"
_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_INTERRUPT}


class FileLock:
    """An advisory lock beside the database: a second daemon on the same file is refused, a crash leaves nothing
    behind.
    """

    def __init__(self, database: Path) -> None:
        # Of the file itself, by whichever link it was named.
        actual = database.resolve()
        self._path = actual.with_name(actual.name + ".lock")
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreRefusedError(
                f"{self._path}: cannot be created ({error.strerror}): make the directory writable for this user"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._fd, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise StoreRefusedError(
                f"{database}: in use by another notify_server (process {holder}): "
                "stop that one, or give this one a file of its own in [store] url"
            ) from error
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{os.getpid()}\n".encode())

    def close(self) -> None:
        # The file stays: removing it would let two daemons lock two different files of the same name.
        os.close(self._fd)


def holder(database: Path) -> str | None:
    """The process whose FileLock is on the database, None when there is none."""
    actual = database.resolve()
    try:
        descriptor = os.open(actual.with_name(actual.name + ".lock"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
    finally:
        os.close(descriptor)
    return None


def connect(path: Path) -> sqlite3.Connection:
    """Open the database for writing and bring its schema up to date.

    Raises StoreRefusedError when the file is not ours, corrupt, or newer than this program.
    """
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        needed = ".".join(map(str, OLDEST_SQLITE))
        raise StoreRefusedError(
            f"SQLite {sqlite3.sqlite_version} is too old: a Python with SQLite {needed} or newer is needed"
        )
    _check_writable(path)
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=512)
    except sqlite3.DatabaseError as error:
        raise refusal(path, error) from error
    try:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        _check_identity(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -32768")
        # Debian's SQLite overwrites what is deleted, at the cost of writing it once more: a large body three times.
        connection.execute("PRAGMA secure_delete = FAST")
        # Pages that are written again and again reach the file once for all; the WAL stays around 16 MiB.
        connection.execute("PRAGMA wal_autocheckpoint = 4000")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        connection.execute("PRAGMA temp_store = MEMORY")
        migrate(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise refusal(path, error) from error
    except StoreRefusedError:
        connection.close()
        raise
    return connection


def _check_writable(path: Path) -> None:
    # SQLite opens a file that it may only read without a word. Before there is a connection: closing any descriptor of
    # the file would drop the locks that SQLite holds on it.
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as error:
        if os.access(path, os.R_OK, effective_ids=True):
            raise StoreRefusedError(READ_ONLY.format(path)) from error
    except OSError:
        return  # Not there yet, or SQLite says better what is wrong with it.


def refusal(path: Path, error: sqlite3.DatabaseError) -> StoreRefusedError:
    """What to tell of a database that cannot be opened: what is wrong, and what to do."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return StoreRefusedError(
            f"{path}: is damaged or not a SQLite database ({error}): restore it from a backup, "
            f'or save what can be read with `sqlite3 {path} ".recover"`, and move the file away'
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreRefusedError(
            f"{path}: is locked by another program: close what has it open for writing, and start again"
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
    """The number of the last migration applied, 0 for an empty database."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Apply the migrations that are missing, each in a transaction of its own. Raises StoreRefusedError on a newer
    schema.
    """
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


class _Group(Generic[Item, Answer]):
    """Callers that share the next transaction. An answer that is an exception is raised to its own caller alone."""

    def __init__(
        self,
        write: Callable[[sqlite3.Connection, Sequence[Item]], Sequence[Answer | NotifyServerError]],
        committed: Callable[[Item, Answer], object] | None,
    ) -> None:
        self.write = write
        self.committed = committed
        self.items: list[Item] = []
        self.waiting: list[asyncio.Future[Answer]] = []

    def take(self, most: int) -> tuple[list[Item], list[asyncio.Future[Answer]]]:
        items, self.items = self.items[:most], self.items[most:]
        waiting, self.waiting = self.waiting[:most], self.waiting[most:]
        return items, waiting


class GroupCommit(Generic[Item, Answer]):
    """Hands single items to the writer so that those which arrive together are committed together."""

    def __init__(self, writer: Writer, group: _Group[Item, Answer]) -> None:
        self._writer = writer
        self._group = group

    def __call__(self, item: Item) -> asyncio.Future[Answer]:
        future: asyncio.Future[Answer] = self._writer.future()
        if future.done():
            return future
        self._group.items.append(item)
        self._group.waiting.append(future)
        self._writer.wake()
        return future


class Writer:
    """Owns the connection and the thread. All methods are for the event loop's thread.

    `on_commit` is told what each group's transaction took, in seconds.
    """

    GROUP_LIMIT = 256

    def __init__(self, path: Path, connection: sqlite3.Connection, on_commit: Callable[[float], object]) -> None:
        self._on_commit = on_commit
        self._path = path
        self._connection: sqlite3.Connection | None = connection
        self._thread = ThreadPoolExecutor(1, "sqlite-writer")
        self._loop = asyncio.get_running_loop()
        self._groups: list[_Group[object, object]] = []
        self._jobs: deque[tuple[Callable[[], object], asyncio.Future[object]]] = deque()
        # Seconds that jobs may take from callers who wait for an ack; below zero it is owed to them.
        self._credit = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._closing = False
        self._task = asyncio.create_task(self._run(), name="sqlite-writer")

    def future(self) -> asyncio.Future[Answer]:
        future: asyncio.Future[Answer] = self._loop.create_future()
        if self._closing:
            future.set_exception(StoreUnavailableError("the store is closing"))
        return future

    def group(
        self,
        write: Callable[[sqlite3.Connection, Sequence[Item]], Sequence[Answer | NotifyServerError]],
        committed: Callable[[Item, Answer], object] | None = None,
    ) -> GroupCommit[Item, Answer]:
        """A group of callers of one kind. `write` runs in the writer's thread, and answers for each item in its order;
        `committed` is called on the event loop for each that was written, in that order, whatever became of its caller.
        """
        group = _Group(write, committed)
        self._groups.append(group)  # type: ignore[arg-type]
        return GroupCommit(self, group)

    async def transaction(
        self, job: Callable[[sqlite3.Connection], T], committed: Callable[[], object] | None = None
    ) -> T:
        """Run the job in a transaction of its own. What it returns is returned once the commit is durable, and
        `committed` has been called, in the writer's thread, before anything else runs there."""

        def run(connection: sqlite3.Connection) -> T:
            result = _transact(connection, job)
            if committed is not None:
                committed()
            return result

        return await self._submit(run)

    async def read(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run a short read on the writer's connection, which sees exactly what has been committed so far."""
        return await self._submit(job)

    def call(self, job: Callable[[], object]) -> None:
        """Run the job in its turn in the writer's thread, without waiting for it, and whether or not there is a
        database to be had. Nothing is run once the store is closing.
        """
        if not self._closing:
            self._jobs.append((job, self._loop.create_future()))
            self.wake()

    async def _submit(self, job: Callable[[sqlite3.Connection], T]) -> T:
        future: asyncio.Future[T] = self.future()
        if not future.done():
            self._jobs.append((lambda: self._call(job), future))  # type: ignore[arg-type]
            self.wake()
        return await future

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _run(self) -> None:
        while True:
            started = self._loop.time()
            committed = False
            for group in self._groups:
                if group.items:
                    committed = True
                    await self._commit_group(group)
            self._credit += JOB_SHARE * (self._loop.time() - started)
            waiting = any(group.items for group in self._groups)
            if self._jobs and (self._credit > 0 or not waiting):
                await self._do_job(*self._jobs.popleft())
            elif not committed and not self._jobs:
                if self._closing:
                    return
                self._waiter = self._loop.create_future()
                await self._waiter
                self._waiter = None

    async def _commit_group(self, group: _Group[Item, Answer]) -> None:
        items, waiting = group.take(self.GROUP_LIMIT)
        began = time.perf_counter()
        try:
            answers = await self._in_thread(lambda: self._call(lambda c: _transact(c, lambda c: group.write(c, items))))
        except Exception as error:
            for future in waiting:
                if not future.done():
                    future.set_exception(_for_caller(error))
            return
        self._on_commit(time.perf_counter() - began)
        for item, future, answer in zip(items, waiting, answers, strict=True):
            if isinstance(answer, NotifyServerError):
                if not future.done():
                    future.set_exception(answer)
                continue
            if group.committed is not None:
                group.committed(item, answer)
            if not future.done():
                future.set_result(answer)

    async def _do_job(self, job: Callable[[], object], future: asyncio.Future[object]) -> None:
        if future.cancelled():
            return
        started = self._loop.time()
        try:
            answer = await self._in_thread(job)
        except Exception as error:
            if not future.done():
                future.set_exception(_for_caller(error))
            return
        finally:
            self._credit = min(0.0, self._credit - (self._loop.time() - started))
        if not future.done():
            future.set_result(answer)

    async def _in_thread(self, job: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._thread, job)

    def _call(self, job: Callable[[sqlite3.Connection], T]) -> T:
        if self._connection is None:
            self._connection = connect(self._path)
            log.info("store reopened", store=str(self._path))
        try:
            return job(self._connection)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _PASSING:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.close()
                self._connection = None
            raise

    async def close(self) -> None:
        """Finish what was handed in, then close. Closing checkpoints the WAL into the database file."""
        self._closing = True
        self.wake()
        await self._task
        await self._loop.run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _transact(connection: sqlite3.Connection, job: Callable[[sqlite3.Connection], T]) -> T:
    try:
        # IMMEDIATE: a read that turns into a write fails at once and ignores the busy timeout.
        connection.execute("BEGIN IMMEDIATE")
        result = job(connection)
        connection.execute("COMMIT")
    except BaseException:
        # A full disk has already rolled back by itself.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result


def _for_caller(error: Exception) -> Exception:
    # Each caller gets an exception of its own: a shared one would gather the tracebacks of all of them.
    if isinstance(error, StoreRefusedError | sqlite3.OperationalError | sqlite3.DatabaseError):
        if isinstance(error, sqlite3.ProgrammingError | sqlite3.IntegrityError):
            return error
        unavailable = StoreUnavailableError(str(error))
        unavailable.__cause__ = error
        return unavailable
    return error
