"""The store on SQLite: one file, one writer. See base.Store for the meaning of each verb.

Claims are held in memory, not on disk: after a crash every claimed file is simply still pending. Each verb blocks the
event loop for as long as the disk takes, so the daemon has this store in a process of its own (processes/keeper.py).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Self

import msgspec

from notify_server.errors import NotifyServerError, StoreRefusedError
from notify_server.model import BatchVerdict, Delivery, DueFile, FileResult, HostDue, InboxItem, Rejection, Restart
from notify_server.store.base import CLOSE_SECONDS, SESSION_PREFIX, Expansion, Nodes
from notify_server.store.merge import first_of_each
from notify_server.store.sql import load_queries
from notify_server.store.sqlite import writes
from notify_server.store.sqlite.claims import Claims, Due, Position
from notify_server.store.sqlite.database import connect, refusal, reserve_log
from notify_server.store.sqlite.expectations import SqliteExpectations
from notify_server.store.sqlite.inbox import InboxQueue
from notify_server.store.sqlite.journal import SqliteJournal
from notify_server.store.sqlite.lock import FileLock
from notify_server.store.sqlite.outbox import SqliteOutbox
from notify_server.store.sqlite.writer import Writer

# A delivery of this size counts as another caller when the writer looks for a crowd: it takes as much of its time.
CALLER_BYTES = 32 * 1024

SQL = load_queries("sqlite")

_decode_due = msgspec.json.Decoder(list[tuple[int, int, str, int, str, int | None, int]]).decode
_decode_hosts = msgspec.json.Decoder(list[HostDue]).decode


class SqliteStore:
    """Open it with `open`; close it when done."""

    def __init__(self, lock: FileLock, path: Path, connection: sqlite3.Connection) -> None:
        self._lock = lock
        (expanded_through,) = connection.execute(SQL["inbox_start"]).fetchone()
        (on_disk_through,) = connection.execute(SQL["inbox_end"]).fetchone()
        (in_inbox,) = connection.execute(SQL["inbox_files"], (expanded_through,)).fetchone()
        (pending,) = connection.execute(SQL["backlog"]).fetchone()
        self._backlog: int = in_inbox + pending
        self._inbox = InboxQueue(expanded_through, on_disk_through)
        self._inbox_news = asyncio.Event()
        self._inbox_news.set()
        self._claims = Claims()
        self._rejections = writes.Rejections()
        self._writer = Writer(path, connection)
        self.outbox = SqliteOutbox(self._writer, connection)
        self.expectations = SqliteExpectations(self._writer, self.outbox)
        self.journal = SqliteJournal(self._writer)
        self._accept = self._writer.group(self._write_deliveries, self._accepted, _bytes, _callers)
        self._reject = self._writer.group(self._rejections.write, size=lambda rejection: len(rejection.body))

    @classmethod
    async def open(cls, path: Path, *, owner: int | None = None) -> Self:
        """Open or create the database at `path`, its directory included. `owner` is the process that it is opened for
        (see FileLock).

        Raises StoreRefusedError when another daemon has it, or the file cannot be used; the text says what to do.
        """
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreRefusedError(
                f"{path.parent}: cannot be created ({error.strerror}): name another directory in [store] url"
            ) from error
        lock = FileLock(path, owner)
        try:
            connection = connect(path)
            try:
                reserve_log(connection, path)
                return cls(lock, path, connection)
            except sqlite3.DatabaseError as error:
                connection.close()
                raise refusal(path, error) from error
        except BaseException:
            lock.close()
            raise

    @property
    def backlog(self) -> int:
        return self._backlog

    @property
    def prefers_small_batches(self) -> bool:
        return self._writer.acked_recently

    @property
    def nodes(self) -> Nodes:
        return Nodes(0, (0,), (0,))

    async def close(self, grace: float = CLOSE_SECONDS) -> None:
        await self._writer.close()
        self._lock.close()

    # The inbox

    async def accept(self, delivery: Delivery) -> int:
        (answer,) = await self.accept_all([delivery])
        if isinstance(answer, NotifyServerError):
            raise answer
        return answer

    def accept_all(self, deliveries: Sequence[Delivery]) -> asyncio.Future[list[int | NotifyServerError]]:
        """Accept several at once: the id of each, or why it alone was refused."""
        return self._accept(deliveries)

    def _write_deliveries(
        self, connection: sqlite3.Connection, groups: Sequence[Sequence[Delivery]]
    ) -> list[list[int | NotifyServerError]]:
        deliveries = [delivery for group in groups for delivery in group]
        answers = iter(writes.write_deliveries(connection, deliveries, self._rejections))
        return [[next(answers) for _ in group] for group in groups]

    def _accepted(self, deliveries: Sequence[Delivery], answers: Sequence[int | NotifyServerError]) -> None:
        for delivery, answer in zip(deliveries, answers, strict=True):
            if isinstance(answer, int):
                self._inbox.add(delivery, answer)
                self._backlog += delivery.files
        self._inbox_news.set()

    async def reject(self, rejection: Rejection) -> None:
        await self._reject(rejection)

    async def wait_inbox(self) -> None:
        await self._inbox_news.wait()

    async def inbox(self, limit: int) -> list[InboxItem]:
        inbox = self._inbox
        self._inbox_news.clear()
        inbox.drop_expanded()
        if not inbox.must_read:
            items = inbox.first(limit)
        else:
            bounds = (inbox.expanded_through, inbox.on_disk_through, limit)
            # Set before the part that may fail: then it is tried again.
            self._inbox_news.set()
            rows = await self._writer.read(lambda connection: connection.execute(SQL["inbox"], bounds).fetchall())
            self._inbox_news.clear()
            items = [InboxItem(id, body.encode(), *rest) for id, body, *rest in rows]
            if not items:
                inbox.skip_disk()
        if items or inbox:
            self._inbox_news.set()
        return items

    async def expand(self, expansions: Sequence[Expansion], now: int) -> list[BatchVerdict]:
        # An item that was expanded to its end is not expanded again, whatever its caller remembers.
        expansions = [each for each in expansions if each.item.id > self._inbox.expanded_through]

        reset: set[int] = set()

        def write(connection: sqlite3.Connection) -> tuple[int, list[BatchVerdict]]:
            nonlocal reset
            pending, reset, verdicts = writes.write_expansions(connection, self.outbox, expansions, now)
            return pending, verdicts

        pending, verdicts = await self._writer.transaction(write, on_commit=lambda: self._claims.reset(reset))
        self._backlog += pending
        for item in [expansion.item for expansion in expansions if expansion.last]:
            self._inbox.expanded_through = item.id
            self._backlog -= item.files
        return verdicts

    async def discard(self, item: InboxItem, detail: str, now: int) -> list[BatchVerdict]:
        verdicts = await self._writer.transaction(
            partial(
                writes.write_discard, outbox=self.outbox, item=item, detail=detail, now=now, rejections=self._rejections
            )
        )
        self._backlog -= item.files
        self._inbox.expanded_through = item.id
        return verdicts

    # Due files

    async def due_hosts(self, after: str, limit: int) -> list[HostDue]:
        parameters = {"after": after, "limit": limit}
        (answer,) = await self._writer.read(
            lambda connection: connection.execute(SQL["due_hosts"], parameters).fetchone()
        )
        return _decode_hosts(answer)

    async def claim(self, wanted: Sequence[tuple[str, int]], now: int) -> list[DueFile]:
        def take(connection: sqlite3.Connection) -> list[DueFile]:
            return self._claims.take(wanted, now, partial(_read_due, connection, now))

        return await self._writer.read(take)

    def release(self, files: Sequence[DueFile]) -> None:
        self._writer.call(lambda: self._claims.release(files))

    async def record(self, results: Sequence[FileResult], now: int) -> list[BatchVerdict]:
        def write(connection: sqlite3.Connection) -> tuple[int, list[BatchVerdict]]:
            current = first_of_each(result for result in results if self._claims.holds(result.file.id))
            return writes.write_results(connection, self.outbox, current, now)

        settled, verdicts = await self._writer.transaction(
            write, on_commit=lambda: self._claims.end(result.file for result in results)
        )
        self._backlog -= settled
        return verdicts

    async def recheck(self, files: Sequence[int], now: int) -> Restart:
        reset: set[int] = set()

        def write(connection: sqlite3.Connection) -> tuple[int, Restart]:
            nonlocal reset
            reopened, reset, restart = writes.write_recheck(connection, files, now)
            return reopened, restart

        reopened, restart = await self._writer.transaction(write, on_commit=lambda: self._claims.reset(reset))
        self._backlog += reopened
        return restart

    # Housekeeping

    async def ping(self, now: int) -> None:
        await self._writer.transaction(lambda connection: connection.execute(SQL["heartbeat"], (now,)))

    async def make_due(self, beyond: int, now: int, limit: int) -> Restart:
        reset: set[int] = set()

        def write(connection: sqlite3.Connection) -> Restart:
            nonlocal reset
            reset, restart = writes.make_due(connection, beyond, now, limit)
            return restart

        return await self._writer.transaction(write, on_commit=lambda: self._claims.reset(reset))

    async def end_session(self, session: str, ends_at: int) -> None:
        row = (SESSION_PREFIX + session, ends_at)
        await self._writer.transaction(lambda connection: connection.execute(SQL["nonce_consume"], row))

    async def prune(self, completed_before: int, rejected_before: int, limit: int) -> int:
        def write(connection: sqlite3.Connection) -> int:
            self._rejections.forget()
            return writes.prune(connection, completed_before, rejected_before, limit)

        return await self._writer.transaction(write)


def _bytes(deliveries: Sequence[Delivery]) -> int:
    return sum(len(delivery.body) for delivery in deliveries)


def _callers(deliveries: Sequence[Delivery]) -> int:
    return sum(1 + len(delivery.body) // CALLER_BYTES for delivery in deliveries)


def _read_due(connection: sqlite3.Connection, now: int, host: str, after: Position, most: int) -> list[Due]:
    due, id = after
    parameters = {"host": host, "due": due, "id": id, "now": now, "most": most}
    (answer,) = connection.execute(SQL["claim"], parameters).fetchone()
    return [
        (at, DueFile(id, batch, host, url, attempts, name, expires_at))
        for id, batch, url, attempts, name, expires_at, at in _decode_due(answer)
    ]
