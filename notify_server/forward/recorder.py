"""Records the outcomes of deliveries, as many as have come in one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog

from notify_server.errors import StoreUnavailableError
from notify_server.store.outbox import DeliveryResult, Notice, Outbox

log = structlog.get_logger("notify_server.forward")

RETRY_SECONDS = 1.0
MAX_RESULTS = 256


class _Entry(NamedTuple):
    results: Sequence[DeliveryResult]
    recorded: asyncio.Future[None]


class Recorder:
    """Keeps outcomes until they are recorded: until then their deliveries count as in flight."""

    def __init__(self, outbox: Outbox, now: Callable[[], int], on_notice: Callable[[Notice], None]) -> None:
        self._outbox = outbox
        self._now = now
        self._on_notice = on_notice
        self._waiting: list[_Entry] = []
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, results: Sequence[DeliveryResult]) -> asyncio.Future[None]:
        """Have the results recorded together; the future is done when they are."""
        entry = _Entry(results, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._idle.clear()
        self._news.set()
        return entry.recorded

    async def run(self) -> None:
        """Record until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                await self._record(self._waiting[:MAX_RESULTS])
            self._idle.set()

    async def flush(self) -> None:
        """Return when everything that was added is recorded."""
        await self._idle.wait()

    async def _record(self, entries: Sequence[_Entry]) -> None:
        results = [result for entry in entries for result in entry.results]
        try:
            notices = await self._outbox.record_deliveries(results, self._now())
        except StoreUnavailableError as error:
            log.warning("cannot record deliveries, trying again", deliveries=len(results), error=str(error))
            await asyncio.sleep(RETRY_SECONDS)
            return
        del self._waiting[: len(entries)]
        for entry in entries:
            if not entry.recorded.done():
                entry.recorded.set_result(None)
        for notice in notices:
            self._on_notice(notice)
