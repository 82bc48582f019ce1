"""What the cases of PostgreSQL do to it and to the nodes on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg

from notify_server.store.postgres.store import PostgresStore
from tests.support.postgres import fetch
from tests.support.waiting import eventually

T = TypeVar("T")

SECONDS = 30.0


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[PostgresStore]:
    """A node on the database."""
    store = await PostgresStore.open(url, **options)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def locked(url: str, *tables: str, readable: bool = False) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """Keep everybody else out of these tables, or, when they are to stay readable, from writing. Inside, the connection
    that does it may end others. What comes by COPY looks at the table's columns first.
    """
    mode = "EXCLUSIVE" if readable else "ACCESS EXCLUSIVE"
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            await connection.execute(f"LOCK TABLE {', '.join(tables)} IN {mode} MODE")
            yield connection
    finally:
        await connection.close()


async def until_waiting(connection: asyncpg.Connection[asyncpg.Record], number: int = 1) -> list[int]:
    """The sessions that wait to write where this one keeps them out, once there are so many."""
    waiting = (
        "SELECT DISTINCT waiting.pid FROM pg_locks AS waiting JOIN pg_locks AS held USING (relation)"
        " WHERE NOT waiting.granted AND held.pid = pg_backend_pid() AND waiting.database = held.database"
        " AND waiting.mode <> 'AccessShareLock'"
    )

    async def enough() -> list[int]:
        # The view of locks within a transaction is not kept from one look to the next.
        pids = [pid for (pid,) in await connection.fetch(waiting)]
        return pids if len(pids) >= number else []

    return await eventually(enough)


async def until_behind(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Return once somebody waits for the end of this connection's transaction, because of a row that it has locked."""
    behind = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pg_backend_pid() = ANY(pg_blocking_pids(pid)))"

    async def somebody() -> bool:
        waits: bool = await connection.fetchval(behind)
        return waits

    await eventually(somebody)


async def cut(connection: asyncpg.Connection[asyncpg.Record], number: int = 1) -> None:
    """End the sessions that wait to write, in the middle of what they are doing."""
    for pid in await until_waiting(connection, number):
        await connection.execute("SELECT pg_terminate_backend($1)", pid)


async def expire(url: str, store: PostgresStore) -> None:
    """Let the lease of this node run out, as if nothing had been heard of it for so long."""
    await fetch(url, "UPDATE node SET alive_until = clock_timestamp() - interval '1 s' WHERE id = $1", store.node.id)
