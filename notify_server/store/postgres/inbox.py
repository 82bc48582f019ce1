"""The inbox of the node that expands: when to read it, and which deliveries wait."""

from __future__ import annotations

import asyncio

from notify_server.model import InboxItem
from notify_server.store.postgres.expansion import ExpansionLock
from notify_server.store.sql import load_queries

SQL = load_queries("postgres")


class Inbox:
    """Reads deliveries while `lock` is held, and wakes the expander when some may have come.

    Calls of this node and of others wake it; `poll` finds what a lost call was about. A node that should not expand
    passes the lock on when the expander looks, which is between two expansions.
    """

    def __init__(self, lock: ExpansionLock) -> None:
        self._lock = lock
        self._news = asyncio.Event()
        self._news.set()
        # Tells whether a call came during a read.
        self._calls = 0

    def call(self) -> None:
        """Wake the expander of this node, if it is the one that expands."""
        if self._lock.held:
            self._calls += 1
            self._news.set()

    async def wait(self) -> None:
        """Return when deliveries may wait."""
        await self._news.wait()

    async def read(self, limit: int, *, expands: bool) -> list[InboxItem]:
        """Return the first deliveries that wait, at most `limit`. `expands` is False to pass the lock on."""
        calls = self._calls
        items: list[InboxItem] = []
        if not expands:
            await self._lock.give_up()
        if self._lock.held:
            async with self._lock.use() as connection:
                rows = await connection.fetch(SQL["inbox"], self._lock.first, limit)
                self._lock.saw([row[0] for row in rows])
            items = [InboxItem(id, body.encode(), *rest) for id, body, *rest in rows]
        # Only a read during which no call came proves that nothing waits.
        if not items and calls == self._calls:
            self._news.clear()
        return items

    async def poll(self, *, expands: bool) -> None:
        """Take the lock over if no node holds it, and look for deliveries whose call was lost."""
        if not self._lock.held:
            if expands and await self._lock.take():
                self.call()
        elif not expands:
            self.call()
        elif not self._news.is_set():
            async with self._lock.use() as connection:
                if await connection.fetchval(SQL["inbox_waits"], self._lock.first):
                    self.call()
