"""Serves on loopback what the simulator plays."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Self

from aiohttp import web


class LoopbackServer:
    """An aiohttp server on a free port of 127.0.0.1. Use it as an async context manager.

    It has no application's routing and middleware: it must not be the bottleneck of a run.
    """

    def __init__(self, answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> None:
        self._runner = web.ServerRunner(web.Server(answer, access_log=None), shutdown_timeout=1.0)

    async def start(self) -> None:
        """Listen."""
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024).start()

    async def stop(self) -> None:
        """Close all connections."""
        await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def address(self) -> str:
        """Return the address to which a path is appended. There is none before the start."""
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}/"
