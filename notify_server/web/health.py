"""For load balancers and monitors: is it alive, and can it accept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from aiohttp import web

from notify_server.errors import StoreUnavailableError
from notify_server.observe import Metrics
from notify_server.store.base import Store

# An answer is good for this long, so that asking often costs the store nothing.
FRESH_SECONDS = 1.0


class Health:
    """`probers_up` tells whether every prober runs; `draining` whether the daemon is on its way out."""

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        now: Callable[[], int],
        probers_up: Callable[[], bool],
        draining: Callable[[], bool],
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._now = now
        self._probers_up = probers_up
        self._draining = draining
        self._lock = asyncio.Lock()
        self._store_state = ""
        self._checked_at = float("-inf")

    async def healthz(self, request: web.Request) -> web.Response:
        """200 as long as the event loop turns."""
        return web.Response(text="ok\n")

    async def readyz(self, request: web.Request) -> web.Response:
        """200 when a callback would be accepted and its files probed, else 503; the body says what is amiss."""
        store = await self._check_store()
        probers = "ok" if self._probers_up() else "down, restarting"
        state = {"store": store, "probers": probers, "server": "draining" if self._draining() else "ok"}
        ready = all(part == "ok" for part in state.values())
        return web.Response(
            body=msgspec.json.encode({"ready": ready, **state}),
            status=200 if ready else 503,
            content_type="application/json",
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """The Prometheus exposition."""
        body, content_type = self._metrics.render()
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _check_store(self) -> str:
        async with self._lock:
            loop = asyncio.get_running_loop()
            if loop.time() - self._checked_at >= FRESH_SECONDS:
                try:
                    await self._store.ping(self._now())
                    self._store_state = "ok"
                except StoreUnavailableError as error:
                    self._store_state = f"cannot commit: {error}"
                self._checked_at = loop.time()
            return self._store_state
