"""The one connection that writes, and the order in which work reaches it.

SQLite up to 3.51.2 can corrupt a WAL database when two connections write or checkpoint at once, so nothing else in the
daemon writes. Callers that wait for an ack come first, a group of them in one transaction; background jobs run one by
one when the scheduler allows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog

from notify_server.errors import NotifyServerError, StoreRefusedError, StoreUnavailableError
from notify_server.store.batching import Batcher
from notify_server.store.sqlite.database import FileIdentity, connect
from notify_server.store.sqlite.scheduler import JobScheduler
from notify_server.supervise import let_end, start_task

T = TypeVar("T")
Item = TypeVar("Item")
Answer = TypeVar("Answer")

log = structlog.get_logger("notify_server.store")

# The connection stays usable after these errors; after any other error of the engine it is reopened.
_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_INTERRUPT}


class Group(Generic[Item, Answer]):
    """Callers of one kind, who share the next transaction. `weight` returns how many callers an item counts as."""

    def __init__(
        self,
        writer: Writer,
        write: Callable[[sqlite3.Connection, Sequence[Item]], Sequence[Answer | NotifyServerError]],
        batcher: Batcher[Item, Answer],
        weight: Callable[[Item], int],
    ) -> None:
        self._writer = writer
        self._write = write
        self._weight = weight
        self.batcher = batcher

    def __call__(self, item: Item) -> asyncio.Future[Answer]:
        """Write the item with those that wait; return the future of its answer."""
        future = self.batcher.add(item)
        self._writer.wake()
        return future

    def commit(self) -> int:
        """Write a group in one transaction and answer it; return for how many callers it counts."""
        group = self.batcher.take()
        items = [item for item, _ in group]
        try:
            answers = self._writer.transact(lambda connection: self._write(connection, items))
        except Exception as error:
            self.batcher.fail(group, _for_caller(error))
            return len(group)
        self.batcher.answer(group, answers)
        return sum(map(self._weight, items))


class Writer:
    """Owns the connection. It works in the thread of its callers, which does nothing else: beside a busy event loop a
    thread of its own would spend as much time again on waiting for Python's lock.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = connection
        self._identity = FileIdentity(path)
        self._problem: str | None = None
        self._loop = asyncio.get_running_loop()
        self._groups: list[Group[Any, Any]] = []
        self._jobs: deque[tuple[Callable[[], object], asyncio.Future[Any]]] = deque()
        self._scheduler = JobScheduler()
        self._work = asyncio.Event()
        self._closing = False
        self._task = start_task(self._run(), "SQLite writer")

    def group(
        self,
        write: Callable[[sqlite3.Connection, Sequence[Item]], Sequence[Answer | NotifyServerError]],
        on_written: Callable[[Item, Answer], object] = lambda item, answer: None,
        size: Callable[[Item], int] = lambda item: 0,
        weight: Callable[[Item], int] = lambda item: 1,
    ) -> Group[Item, Answer]:
        """Add a group of callers of one kind. `write` answers each item in order; `size` and `on_written` are those of
        Batcher.
        """
        group = Group(self, write, Batcher[Item, Answer](size, on_written), weight)
        self._groups.append(group)
        return group

    async def transaction(
        self, job: Callable[[sqlite3.Connection], T], on_commit: Callable[[], object] = lambda: None
    ) -> T:
        """Run the job in its own transaction and return its result once the commit is durable. `on_commit` is called
        before anything else is done."""

        def run() -> T:
            result = self.transact(job)
            on_commit()
            return result

        return await self._submit(run)

    async def read(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run a short read on the writer's connection, which sees exactly what has been committed so far."""
        return await self._submit(lambda: self._call(job))

    def call(self, job: Callable[[], object]) -> None:
        """Run the job in its turn without waiting for it, whether or not the database can be used. Ignored once the
        store is closing.
        """
        if not self._closing:
            self._jobs.append((job, self._loop.create_future()))
            self.wake()

    async def _submit(self, job: Callable[[], T]) -> T:
        if self._closing:
            raise StoreUnavailableError("the store is closing")
        future: asyncio.Future[T] = self._loop.create_future()
        self._jobs.append((job, future))
        self.wake()
        return await future

    def wake(self) -> None:
        """Look for work."""
        self._work.set()

    @property
    def acked_recently(self) -> bool:
        """True if a caller has waited for an ack a moment ago."""
        return self._scheduler.acked_recently(self._loop.time())

    async def _run(self) -> None:
        while True:
            self._work.clear()
            group = next((group for group in self._groups if group.batcher), None)
            if group is not None:
                self._scheduler.acked(group.commit(), self._loop.time())
            elif self._jobs:
                if self._scheduler.may_run_job(self._loop.time()) or not await self._crowd_comes():
                    self._run_job(*self._jobs.popleft())
            elif self._closing:
                return
            else:
                await self._work.wait()
            # Let input that has arrived meanwhile be read.
            await asyncio.sleep(0)

    async def _crowd_comes(self) -> bool:
        """Wait for the crowd until a job may run; return True if callers have come."""
        began = self._loop.time()
        until = self._scheduler.wait_until(began)
        try:
            while (patience := until - self._loop.time()) > 0:
                self._work.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        await self._work.wait()
                if any(group.batcher for group in self._groups):
                    return True
            return False
        finally:
            self._scheduler.waited(self._loop.time() - began)

    def _run_job(self, job: Callable[[], object], future: asyncio.Future[Any]) -> None:
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
            self._scheduler.ran_job(self._loop.time() - began)

    def transact(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run the job in a transaction now. Raises what the engine raises, and StoreUnavailableError when the file has
        been taken away, so that what was committed to it is lost.
        """
        result = self._call(lambda connection: _transact(connection, job))
        self._check_identity()
        return result

    def _check_identity(self) -> None:
        problem = self._identity.problem()
        if problem != self._problem:
            self._problem = problem
            if problem is not None:
                log.error("callbacks are refused: the database file was deleted, moved or replaced", error=problem)
            else:
                log.info("the database file is usable again", store=str(self._path))
        if problem is not None:
            raise StoreUnavailableError(problem)

    def _call(self, job: Callable[[sqlite3.Connection], T]) -> T:
        if self._connection is None:
            self._check_identity()
            self._connection = connect(self._path)
            self._identity = FileIdentity(self._path)
            log.info("store reopened", store=str(self._path))
        try:
            return job(self._connection)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _PASSING:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.close()
                self._connection = None
                self._identity.forget_wal()
            raise

    async def close(self) -> None:
        """Finish what was submitted, then close, which checkpoints the WAL into the database file."""
        self._closing = True
        for group in self._groups:
            group.batcher.close()
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
