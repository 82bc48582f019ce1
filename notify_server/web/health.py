"""Answers load balancers and monitors: liveness, readiness, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from notify_server.errors import StoreUnavailableError
from notify_server.store.base import Store
from notify_server.supervise import ended_tasks
from notify_server.telemetry.metrics import Metrics

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Cache the store's state for this long, so that frequent probes do not load it.
FRESH_SECONDS = 1.0
# Answer within this time, so that an orchestrator gets the reason before its own time-out.
CHECK_SECONDS = 0.8


class Health:
    """Checks the store and the probers. `probers_up` is None on a node without probers; `draining` returns True during
    shutdown; `takes_callbacks` is False on a node that only probes; `is_short` returns True when this
    machine has too few ports or descriptors for the probes.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        now: Callable[[], int],
        probers_up: Callable[[], bool] | None,
        draining: Callable[[], bool],
        takes_callbacks: bool,
        is_short: Callable[[], bool] = lambda: False,
        guard: Callable[[Handler], Handler] = lambda handler: handler,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._now = now
        self._probers_up = probers_up
        self._draining = draining
        self._takes_callbacks = takes_callbacks
        self._is_short = is_short
        self._exposition = guard(self._render)
        self._checking: asyncio.Future[None] | None = None
        self._store_state = ""
        self._checked_at = float("-inf")

    async def healthz(self, request: web.Request) -> web.Response:
        """Answer 200 as long as the event loop runs."""
        return web.Response(text="ok\n")

    async def readyz(self, request: web.Request) -> web.Response:
        """Answer 200 when callbacks are accepted and their files probed, else 503; the body names the failing part.

        A node that only probes is never ready: the probe comes from a load balancer that would send callbacks.
        """
        state = {"store": await self._check_store(), **self._parts()}
        ready = all(part == "ok" for part in state.values())
        if self._is_short():
            # Callbacks are accepted all the same; files are probed more slowly.
            state["machine"] = "short of ports or descriptors, fewer files are probed at a time"
        return web.Response(
            body=msgspec.json.encode({"ready": ready, **state}),
            status=200 if ready else 503,
            content_type="application/json",
        )

    def is_ready(self) -> bool:
        """Return True if callbacks are accepted and their files probed, as long as the store can commit."""
        return all(part == "ok" for part in self._parts().values())

    def _parts(self) -> dict[str, str]:
        state = {"server": "draining" if self._draining() else "ok"}
        if self._probers_up is not None:
            state["probers"] = "ok" if self._probers_up() else "down, restarting"
        if ended := ended_tasks():
            state["tasks"] = "ended, restart the server: " + ", ".join(ended)
        if not self._takes_callbacks:
            state["callbacks"] = "not taken here, see [server] roles"
        return state

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Return the Prometheus exposition, to those whom the guard lets in."""
        return await self._exposition(request)

    async def _render(self, request: web.Request) -> web.StreamResponse:
        body, content_type = self._metrics.render()
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _check_store(self) -> str:
        """Return the result of a test write within CHECK_SECONDS; concurrent requests share one write."""
        if self._checking is None and asyncio.get_running_loop().time() - self._checked_at >= FRESH_SECONDS:
            self._checking = asyncio.ensure_future(self._ping())
            self._checking.add_done_callback(self._checked)
        if self._checking is not None:
            done, _ = await asyncio.wait([self._checking], timeout=CHECK_SECONDS)
            if not done:
                return f"cannot commit: no answer within {CHECK_SECONDS:g} s"
        return self._store_state

    async def _ping(self) -> None:
        try:
            await self._store.ping(self._now())
            self._store_state = "ok"
        except StoreUnavailableError as error:
            self._store_state = f"cannot commit: {error}"

    def _checked(self, checking: asyncio.Future[None]) -> None:
        self._checking = None
        self._checked_at = asyncio.get_running_loop().time()
        if not checking.cancelled() and (error := checking.exception()) is not None:
            self._store_state = f"cannot commit: {error}"
