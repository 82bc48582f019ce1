"""The outbox on SQLite from the daemon's side: the keeper carries out every verb."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from notify_server.store.outbox import Claimed, DeliveryResult, EndpointState, Notice, Subscription


class SqliteOutboxClient:
    """The verbs of store.outbox.Outbox. `call` sends one to the keeper."""

    def __init__(self, call: Callable[..., asyncio.Future[Any]]) -> None:
        self._call = call
        self._subscribed: tuple[Sequence[Subscription], str | None, int] | None = None

    def on_up(self) -> None:
        """Set the endpoints of a keeper that has just started: it knows them from the record, but not the address."""
        if self._subscribed is not None:
            self._call("subscribe", *self._subscribed).add_done_callback(ignore_result)

    async def subscribe(self, subscriptions: Sequence[Subscription], public_url: str | None, now: int) -> None:
        self._subscribed = subscriptions, public_url, now
        await self._call("subscribe", subscriptions, public_url, now)

    async def claim_deliveries(self, wanted: Sequence[tuple[str, int]], now: int) -> Claimed:
        claimed: Claimed = await self._call("claim_deliveries", wanted, now)
        return claimed

    def release_deliveries(self, deliveries: Sequence[int]) -> None:
        # A keeper that has ended holds no claims.
        self._call("release_deliveries", deliveries).add_done_callback(ignore_result)

    async def record_deliveries(self, results: Sequence[DeliveryResult], now: int) -> list[Notice]:
        notices: list[Notice] = await self._call("record_deliveries", results, now)
        return notices

    async def find_at_risk(self, received_before: int, waits: Sequence[int], now: int) -> int:
        found: int = await self._call("find_at_risk", received_before, waits, now)
        return found

    async def find_expiring(self, until: int, now: int) -> int:
        found: int = await self._call("find_expiring", until, now)
        return found

    async def ping_endpoint(self, endpoint: str, now: int) -> int | None:
        delivery: int | None = await self._call("ping_endpoint", endpoint, now)
        return delivery

    async def replay_deliveries(self, endpoint: str, since: int, until: int, now: int, dry_run: bool) -> int:
        count: int = await self._call("replay_deliveries", endpoint, since, until, now, dry_run)
        return count

    async def stop_endpoint(self, endpoint: str, reason: str | None, now: int) -> bool:
        found: bool = await self._call("stop_endpoint", endpoint, reason, now)
        return found

    async def endpoint_states(self) -> list[EndpointState]:
        states: list[EndpointState] = await self._call("endpoint_states")
        return states

    async def open_problems(self, endpoint: str) -> list[bytes]:
        problems: list[bytes] = await self._call("open_problems", endpoint)
        return problems


def ignore_result(answer: asyncio.Future[Any]) -> None:
    """Retrieve the exception of a call that has no caller waiting, as its done callback."""
    if not answer.cancelled():
        answer.exception()
