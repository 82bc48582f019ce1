"""The one connection that writes, and the order in which work reaches it.

SQLite up to 3.51.2 can corrupt a WAL database when two connections write or checkpoint at once, so nothing else in the
daemon writes. Callers who wait for an ack come first, all of them in one group; other jobs run one by one while nobody
waits, and have a share of the time when somebody always does.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import operator
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import structlog

from notify_server.errors import NotifyServerError, StoreRefusedError, StoreUnavailableError
from notify_server.model import FileState, Reason, ReportedStatus, Verdict
from notify_server.store.batching import GROUP_LIMIT, LATELY_SECONDS, answer, fail
from notify_server.store.sql import load_migrations, unfinished
from notify_server.supervise import let_end, start_task

T = TypeVar("T")
Item = TypeVar("Item")
Answer = TypeVar("Answer")

log = structlog.get_logger("notify_server.store")

# "ntfy": lets `file` and this program tell the database from any other.
APPLICATION_ID = 0x6E746679
BUSY_TIMEOUT_MS = 3_000
# So many callers within the time of patience are a crowd: when these have got their acks, others are about to come for
# theirs, and are waited for so long, because a job that has begun would keep them waiting for longer. Jobs get a share
# of the time, and a larger one of what is spent on waiting: callers who leave time must not let the files fall behind.
CROWD = 8
PATIENCE_SECONDS = 0.01
JOB_SHARE = 0.1
IDLE_SHARE = 0.6
OLDEST_SQLITE = (3, 35, 0)
# How long the lock of a daemon that is no more is waited for.
ORPHAN_SECONDS = 10.0
ORPHAN_PAUSE = 0.02
# What the writer's connection remembers of the database.
CACHE_KIB = 8_192
# Pages of the WAL at which it is written back, and begun anew.
CHECKPOINT_PAGES = 1000
PAGE_BYTES = 4096
# Of the free space, what the WAL may take for itself at a start.
RESERVED_SHARE = 0.1

# The connection is as good as before after these; after any other error of the engine it is opened anew.
READ_ONLY = "{}: is read-only: make the file and its directory writable for this user"
_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_INTERRUPT}


# What is no int, float, str or bytes, None included, is looked for among these; not to find it costs three times as
# much, which was a tenth of what it costs to record a file.
sqlite3.register_adapter(type(None), cast("Callable[[None], None]", {}.get))
for _kind in (FileState, Reason, ReportedStatus, Verdict):
    sqlite3.register_adapter(_kind, operator.attrgetter("_value_"))


class FileLock:
    """An advisory lock beside the database: a second daemon on the same file is refused, a crash leaves nothing
    behind. `owner` is the process that others are told of, by default this one.
    """

    def __init__(self, database: Path, owner: int | None = None) -> None:
        # Of the file itself, by whichever link it was named.
        actual = database.resolve()
        self._path = actual.with_name(actual.name + ".lock")
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreRefusedError(
                f"{self._path}: cannot be created ({error.strerror}): make the directory writable for this user"
            ) from error
        deadline = time.monotonic() + ORPHAN_SECONDS
        while not self._taken():
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            # Of a daemon that was killed, what wrote for it finishes its transaction, and goes.
            if _runs(holder) or time.monotonic() > deadline:
                os.close(self._fd)
                raise StoreRefusedError(
                    f"{database}: in use by another notify_server (process {holder}): "
                    "stop that one, or give this one a file of its own in [store] url"
                )
            time.sleep(ORPHAN_PAUSE)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{owner or os.getpid()}\n".encode(), 0)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def close(self) -> None:
        # The file stays: removing it would let two daemons lock two different files of the same name.
        os.close(self._fd)


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        pass  # Not yet written, or another user's.
    return True


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
        # Debian's SQLite overwrites what is deleted, at the cost of writing it once more: a large body three times.
        connection.execute("PRAGMA secure_delete = FAST")
        # Pages that are written again and again reach the file once for all; the WAL stays around 4 MiB.
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
    """Let the WAL have the size at once that it would come to.

    Telling the disk to keep what overwrites a file costs a tenth of what it costs when the file grows, because its size
    need not be kept too. What has been written and is rolled back leaves the file as large as it was.
    """
    size = CHECKPOINT_PAGES * PAGE_BYTES
    disk = os.statvfs(path.parent)
    if size > RESERVED_SHARE * disk.f_bavail * disk.f_frsize:
        return
    try:
        connection.execute("PRAGMA busy_timeout = 0")
        # A small cache has to be written out before the end of the transaction.
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


def copied_from(connection: sqlite3.Connection) -> str | None:
    """What the database is an unfinished copy of; None when it is whole."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'copying'").fetchone():
        return None
    (source,) = connection.execute("SELECT source FROM copying").fetchone()
    return str(source)


def check_whole(connection: sqlite3.Connection, path: Path) -> None:
    """Raises StoreRefusedError when the database is an unfinished copy."""
    if (source := copied_from(connection)) is not None:
        raise unfinished(str(path), source)


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


class Group(Generic[Item, Answer]):
    """Callers that share the next transaction. An answer that is an exception is raised to its own caller alone."""

    def __init__(
        self,
        writer: Writer,
        write: Callable[[sqlite3.Connection, Sequence[Item]], Sequence[Answer | NotifyServerError]],
        committed: Callable[[Item, Answer], object],
        size: Callable[[Item], int],
    ) -> None:
        self._writer = writer
        self._write = write
        self._committed = committed
        self._size = size
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []

    def __call__(self, item: Item) -> asyncio.Future[Answer]:
        """Have the item written with those that are waiting."""
        future: asyncio.Future[Answer] = self._writer.future()
        if not future.done():
            self._waiting.append((item, future))
            self._writer.wake()
        return future

    @property
    def waiting(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiting)

    def commit(self) -> int:
        """Write what waits, in one transaction, as far as a group may be large; how many waited for it."""
        group, self._waiting = self._waiting[:GROUP_LIMIT], self._waiting[GROUP_LIMIT:]
        items = [item for item, _ in group]
        try:
            answers = self._writer.transact(lambda connection: self._write(connection, items))
        except Exception as error:
            fail(group, _for_caller(error))
            return len(group)
        answer(group, answers, self._committed)
        return sum(map(self._size, items))


class Writer:
    """Owns the connection. What it does it does at once, in the caller's thread, which does nothing else meanwhile:
    beside a busy event loop a thread of its own would spend as much again on waiting for Python's lock.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = connection
        self._loop = asyncio.get_running_loop()
        self._groups: list[Group[Any, Any]] = []
        self._jobs: deque[tuple[Callable[[], object], asyncio.Future[Any]]] = deque()
        # Seconds that jobs may take from a crowd; below zero it is owed to it. And until when a crowd is waited for.
        self._credit = 0.0
        self._credited_at = 0.0
        self._crowd_until = 0.0
        # Callers, and since when they are counted.
        self._counted = 0
        self._counted_from = 0.0
        self._came_at = -math.inf
        self._news = asyncio.Event()
        self._closing = False
        self._task = start_task(self._run(), "SQLite writer")

    def future(self) -> asyncio.Future[Answer]:
        """A future for a caller; it has failed already when the store is closing."""
        future: asyncio.Future[Answer] = self._loop.create_future()
        if self._closing:
            future.set_exception(StoreUnavailableError("the store is closing"))
        return future

    def group(
        self,
        write: Callable[[sqlite3.Connection, Sequence[Item]], Sequence[Answer | NotifyServerError]],
        committed: Callable[[Item, Answer], object] = lambda item, answer: None,
        size: Callable[[Item], int] = lambda item: 1,
    ) -> Group[Item, Answer]:
        """A group of callers of one kind. `write` answers for each item in its order; `committed` is called for each
        that was written, in that order, whatever became of its caller. `size` tells for how many callers an item
        counts.
        """
        group = Group(self, write, committed, size)
        self._groups.append(group)
        return group

    async def transaction(
        self, job: Callable[[sqlite3.Connection], T], committed: Callable[[], object] | None = None
    ) -> T:
        """Run the job in a transaction of its own. What it returns is returned once the commit is durable, and
        `committed` has been called before anything else is done."""

        def run() -> T:
            result = self.transact(job)
            if committed is not None:
                committed()
            return result

        return await self._submit(run)

    async def read(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run a short read on the writer's connection, which sees exactly what has been committed so far."""
        return await self._submit(lambda: self._call(job))

    def call(self, job: Callable[[], object]) -> None:
        """Run the job in its turn, without waiting for it, and whether or not there is a database to be had. Nothing
        is run once the store is closing.
        """
        if not self._closing:
            self._jobs.append((job, self._loop.create_future()))
            self.wake()

    async def _submit(self, job: Callable[[], T]) -> T:
        future: asyncio.Future[T] = self.future()
        if not future.done():
            self._jobs.append((job, future))
            self.wake()
        return await future

    def wake(self) -> None:
        """There is something to do."""
        self._news.set()

    async def _run(self) -> None:
        while True:
            self._news.clear()
            group = next((group for group in self._groups if group.waiting), None)
            if group is not None:
                self._came(group.commit())
            elif self._jobs:
                if self._may_do_job() or not await self._crowd_comes():
                    self._do_job(*self._jobs.popleft())
            elif self._closing:
                return
            else:
                await self._news.wait()
            # What has arrived meanwhile is seen.
            await asyncio.sleep(0)

    @property
    def callers_lately(self) -> bool:
        """Whether somebody has waited for an ack a moment ago."""
        return self._loop.time() - self._came_at < LATELY_SECONDS

    def _came(self, callers: int) -> None:
        self._came_at = now = self._loop.time()
        if now - self._counted_from > PATIENCE_SECONDS:
            self._counted_from, self._counted = now, 0
        self._counted += callers
        if self._counted >= CROWD:
            self._crowd_until = now + PATIENCE_SECONDS

    def _may_do_job(self) -> bool:
        now = self._loop.time()
        passed, self._credited_at = now - self._credited_at, now
        self._credit = min(self._credit + JOB_SHARE * passed, JOB_SHARE * PATIENCE_SECONDS)
        return self._credit > 0 or now >= self._crowd_until

    async def _crowd_comes(self) -> bool:
        """Wait for the crowd, until a job has its share of the time; whether somebody has come."""
        began = self._loop.time()
        until = min(self._crowd_until, began - self._credit / IDLE_SHARE)
        try:
            while (patience := until - self._loop.time()) > 0:
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        await self._news.wait()
                if any(group.waiting for group in self._groups):
                    return True
            return False
        finally:
            self._credit += (IDLE_SHARE - JOB_SHARE) * (self._loop.time() - began)

    def _do_job(self, job: Callable[[], object], future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            return
        began = self._loop.time()
        try:
            answer = job()
        except Exception as error:
            future.set_exception(_for_caller(error))
        else:
            future.set_result(answer)
        finally:
            self._credit -= self._loop.time() - began

    def transact(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run the job in a transaction, now. Raises what the engine raises."""
        return self._call(lambda connection: _transact(connection, job))

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
        let_end(self._task)
        self.wake()
        await asyncio.wait([self._task])
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
    if isinstance(error, StoreRefusedError | sqlite3.OperationalError | sqlite3.DatabaseError):
        if isinstance(error, sqlite3.ProgrammingError | sqlite3.IntegrityError):
            return error
        unavailable = StoreUnavailableError(str(error))
        unavailable.__cause__ = error
        return unavailable
    return error
