"""The record on PostgreSQL for a command that runs beside the servers that share it.

It takes no callbacks, expands nothing and checks no files, so it is not a node: no node's share shrinks because of it,
and the right to expand stays in place. It notifies the nodes of its changes as they notify each other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Self, TypeVar

from notify_server.config import without_secrets
from notify_server.errors import NotifyServerError, StoreRefusedError
from notify_server.model import Delivery, Restart
from notify_server.store.limits import clamp
from notify_server.store.postgres.events import Events
from notify_server.store.postgres.journal import PostgresJournal
from notify_server.store.postgres.node import INBOX, WORK
from notify_server.store.postgres.schema import check_whole, schema_version
from notify_server.store.postgres.session import (
    Connection,
    Session,
    refuse_on_error,
    transact,
)
from notify_server.store.postgres.writes import prune, write_deliveries, write_recheck
from notify_server.store.sql import check_version, load_queries

T = TypeVar("T")

SQL = load_queries("postgres")


class PostgresAdmin:
    """Implements `base.Editable` on one connection. Open it with `open`; close it when done. `servers` are the names of
    those that were alive when it was opened.
    """

    def __init__(self, url: str) -> None:
        self._place = without_secrets(url)
        self._session = Session(url, self._place)
        self.journal = PostgresJournal(self._session.use)
        self.servers: list[str] = []

    @classmethod
    async def open(cls, url: str) -> Self:
        """Open the record; change nothing. Raises StoreRefusedError unless there is a whole record of this version."""
        return await refuse_on_error(url, cls._opened(url))

    @classmethod
    async def _opened(cls, url: str) -> Self:
        desk = cls(url)
        try:
            async with desk._session.use() as connection:
                await desk._look(connection)
        except BaseException:
            await desk.close()
            raise
        return desk

    async def _look(self, connection: Connection) -> None:
        version = await schema_version(connection)
        if not version:
            raise StoreRefusedError(f"{self._place}: there is no record: start the daemon, or name its database")
        check_version(self._place, "postgres", version)
        await check_whole(connection, self._place)
        self.servers = [name for name, _ in await connection.fetch(SQL["nodes_named"])]

    async def close(self) -> None:
        await self._session.close()

    async def accept(self, delivery: Delivery) -> int:
        (answer,) = await self._change(partial(write_deliveries, deliveries=[delivery]), INBOX)
        if isinstance(answer, NotifyServerError):
            raise answer
        return answer

    async def recheck(self, files: Sequence[int], now: int) -> Restart:
        _, restart = await self._change(partial(write_recheck, files=files, now=now), WORK)
        return restart

    async def prune(self, completed_before: int, rejected_before: int, limit: int) -> int:
        return await self._change(
            partial(
                prune,
                events=Events(),
                completed_before=clamp(completed_before),
                rejected_before=clamp(rejected_before),
                limit=limit,
            )
        )

    async def _change(self, job: Callable[[Connection], Awaitable[T]], channel: str | None = None) -> T:
        async def and_notify(connection: Connection) -> T:
            done = await job(connection)
            if channel is not None:
                # The notification is delivered when the transaction commits.
                await connection.execute(f"NOTIFY {channel}")
            return done

        async with self._session.use() as connection:
            return await transact(connection, and_notify)
