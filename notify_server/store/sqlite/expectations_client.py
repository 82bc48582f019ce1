"""The expectations on SQLite as the daemon has them: every verb is carried out by the keeper."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from notify_server.expect.expectation import NewExpectation
from notify_server.expect.quiet import QuietLimit
from notify_server.store.expectations import Registered


class SqliteExpectationsClient:
    """The verbs of store.expectations.Expectations. `call` sends one to the keeper."""

    def __init__(self, call: Callable[..., asyncio.Future[Any]]) -> None:
        self._call = call

    async def register(self, wanted: Sequence[NewExpectation], now: int) -> list[Registered]:
        registered: list[Registered] = await self._call("register", wanted, now)
        return registered

    async def check_limits(self, waits: Sequence[int], now: int) -> int:
        taken: int = await self._call("check_limits", waits, now)
        return taken

    async def check_quiet(self, limits: Sequence[QuietLimit], now: int) -> int:
        written: int = await self._call("check_quiet", limits, now)
        return written

    async def remove(self, id: int) -> bool:
        removed: bool = await self._call("remove_expectation", id)
        return removed
