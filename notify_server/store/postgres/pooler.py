"""Finds out whether a connection pooler such as PgBouncer keeps a session on one backend of PostgreSQL.

Advisory locks, notifications and settings belong to a backend. In transaction mode a pooler hands the backend to other
clients after each transaction, so a lock would stay on a backend where it is never released.
"""

from __future__ import annotations

from typing import TypeAlias

import asyncpg

from notify_server.errors import StoreRefusedError
from notify_server.store.postgres.session import CONNECT_SECONDS, STATEMENT_SECONDS, close, split_settings

Raw: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


async def check_sessions(url: str, place: str) -> bool:
    """Return True when a pooler is in between. Raises StoreRefusedError unless a session keeps its backend.

    Uses connections of its own and sets nothing on them, because in transaction mode other programs would get those
    backends with our settings.
    """
    first = await _connect(url)
    try:
        second = await _connect(url)
        try:
            pooled, kept = await _probe(first, second)
        except asyncpg.PostgresConnectionError as error:
            # In statement mode PgBouncer refuses a transaction and closes the connection.
            if "pooling mode" not in str(error):
                raise
            pooled, kept = True, False
        finally:
            await close(second)
    finally:
        await close(first)
    if not kept:
        raise StoreRefusedError(
            f"{place}: is behind a connection pooler in transaction mode, where locks and notifications get lost: set "
            "pool_mode = session for this database in PgBouncer, or name PostgreSQL itself in [store] url"
        )
    return pooled


async def _connect(url: str) -> Raw:
    # Without the cache statements have no names, which would outlive their transaction on the backend.
    address, _ = split_settings(url)
    return await asyncpg.connect(
        address, timeout=CONNECT_SECONDS, command_timeout=STATEMENT_SECONDS, statement_cache_size=0
    )


async def _probe(first: Raw, second: Raw) -> tuple[bool, bool]:
    """Return whether a pooler is in between, and whether `first` keeps its backend.

    A pooler in transaction mode hands out the backend that was returned last, which `second` gets then, or takes turns,
    so that `first` gets another one the next time.
    """
    backends = {await _backend(first), await _backend(first)}
    async with second.transaction():
        other = await _fetch_backend(second)
        backends.add(await _backend(first))
    # A pooler makes up the process id that it announces at the start of a connection.
    pooled = backends != {first.get_server_pid()}
    return pooled, len(backends) == 1 and other not in backends


async def _backend(connection: Raw) -> int:
    async with connection.transaction():
        return await _fetch_backend(connection)


async def _fetch_backend(connection: Raw) -> int:
    return int(await connection.fetchval("SELECT pg_backend_pid()"))
