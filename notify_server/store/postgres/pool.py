"""The connections that verbs share, and the verbs that are running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import asyncpg

from notify_server.errors import StoreUnavailableError
from notify_server.store.postgres.session import Connection, create_pool, translate_errors

POOL_SIZE = 4
ACQUIRE_SECONDS = 5.0


class Pool:
    """Gives verbs their connections. From `refuse` on it refuses new verbs; `drained` waits for the running ones."""

    def __init__(self, url: str, place: str, **settings: str) -> None:
        self._place = place
        self._pool = create_pool(url, POOL_SIZE, **settings)
        self._refusing = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def open(self) -> None:
        """Get ready; makes no connection yet, and only a pool that was opened can be closed."""
        await self._pool

    @contextmanager
    def verb(self) -> Iterator[None]:
        """Mark the time in which a verb runs. Raises StoreUnavailableError after `refuse`."""
        if self._refusing:
            raise StoreUnavailableError("the store is closing")
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection."""
        with translate_errors(self._place):
            async with self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
                yield connection

    @asynccontextmanager
    async def verb_connection(self) -> AsyncIterator[Connection]:
        """Lend a connection to a verb that needs nothing else."""
        with self.verb():
            async with self.connection() as connection:
                yield connection

    def refuse(self) -> None:
        """Refuse new verbs."""
        self._refusing = True

    async def drained(self) -> None:
        """Return when no verb is running."""
        await self._idle.wait()

    async def close(self) -> None:
        try:
            async with asyncio.timeout(ACQUIRE_SECONDS):
                await self._pool.close()
        except (TimeoutError, OSError, asyncpg.InterfaceError):
            self._pool.terminate()
