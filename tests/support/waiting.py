"""How tests wait: for a signal, or for a condition that is checked again and again; never for a fixed time."""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, overload

T = TypeVar("T")

# No test needs this long; a test that waits longer has failed.
SECONDS = 30.0


@overload
async def eventually(check: Callable[[], Coroutine[Any, Any, T]], seconds: float = SECONDS) -> T: ...
@overload
async def eventually(check: Callable[[], T], seconds: float = SECONDS) -> T: ...
async def eventually(check: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Call `check`, a function or a coroutine function, until it returns something true, and return that.

    Raises TimeoutError.
    """
    async with asyncio.timeout(seconds):
        while True:
            result = check()
            value = await result if inspect.isawaitable(result) else result
            if value:
                return value
            await asyncio.sleep(0.005)


def free_port() -> int:
    """Return a loopback port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Bell:
    """Wakes those who wait for something to come true. Ring it whenever anything has happened."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def ring(self) -> None:
        """Something has happened."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def until(self, true: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Return once `true()`. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not true():
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(future)
                await future
