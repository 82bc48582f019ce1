"""The outbox of every store: events, and which endpoint each of them is delivered to.

An event is written in the transaction of the change that it is about, with a delivery (a row of `forward`) for each
endpoint that subscribes to it. The sender may end at any moment: the deliveries that it had claimed are claimed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

import msgspec

from notify_server.events.payload import Event, EventType

# Attempts kept of one delivery, the latest.
MAX_ATTEMPT_ROWS = 50


class DeliveryState(StrEnum):
    """The state of a delivery. `superseded`: a newer event of its batch took its place; `cancelled`: its endpoint was
    removed from the configuration.
    """

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"
    SUPERSEDED = "superseded"
    CANCELLED = "cancelled"


class Subscription(msgspec.Struct, frozen=True, array_like=True):
    """The events that an endpoint receives: those of `types`, of batches with one of `api_codes` (empty: all batches).
    Deliveries become due `delay_ms` after their event. With `recoveries` the endpoint also receives batch.complete of
    batches whose problems were delivered to it, and endpoint.recovered.
    """

    name: str
    types: Sequence[str]
    api_codes: Sequence[str] = ()
    delay_ms: int = 0
    recoveries: bool = False

    def wants(self, type: str, api_code: str | None) -> bool:
        """Return whether an event is delivered to it, apart from recoveries."""
        return type in self.types and (api_code is None or not self.api_codes or api_code in self.api_codes)

    def wants_recovery(self, type: str) -> bool:
        """Return whether it gets this event if it has had a problem of the same batch, or gets those of endpoints."""
        if not self.recoveries or type in self.types:
            return False
        if type == EventType.ENDPOINT_RECOVERED:
            return EventType.ENDPOINT_FAILING in self.types
        return type == EventType.BATCH_COMPLETE


class NewEvent(msgspec.Struct, frozen=True, array_like=True):
    """An event to be written, with the api_code of its batch. `to` restricts its deliveries to one endpoint, `not_to`
    excludes one.
    """

    event: Event
    api_code: str | None = None
    to: str | None = None
    not_to: str | None = None


def is_wanted(subscription: Subscription, new: NewEvent) -> bool:
    """Return whether the event is delivered to the endpoint, apart from recoveries."""
    if new.to is not None:
        return subscription.name == new.to
    return subscription.name != new.not_to and subscription.wants(new.event.type, new.api_code)


def due_at(subscription: Subscription, new: NewEvent) -> int:
    """Return when the delivery of the event becomes due. A test comes before all that waits."""
    return 0 if new.event.type == EventType.TEST_PING else new.event.occurred_at + subscription.delay_ms


class Outgoing(msgspec.Struct, frozen=True, array_like=True):
    """A claimed delivery. `subject` is the batch_id, None for an event of no batch."""

    id: int
    event: int
    key: str
    type: str
    endpoint: str
    batch: int | None
    revision: int
    occurred_at: int
    payload: bytes
    attempts: int
    subject: str | None


class Claimed(msgspec.Struct, frozen=True, array_like=True):
    """The claimed deliveries, and by endpoint the time at which the next delivery becomes due, if one waits."""

    deliveries: list[Outgoing]
    next_at: dict[str, int]


class DeliveryResult(msgspec.Struct, frozen=True, array_like=True):
    """The outcome of an attempt. `state` is pending with `next_attempt_at`, delivered, failed or superseded. With
    `stop` the endpoint is stopped until a person starts it. With `sent` False the attempt is neither kept nor counted
    for the endpoint: nothing was sent, the robot throttled it, or another delivery of the same message is counted.
    """

    id: int
    endpoint: str
    state: DeliveryState
    attempts: int
    next_attempt_at: int | None
    status: int | None
    error: str | None
    response: str | None
    started_at: int
    elapsed_ms: float
    stop: bool = False
    sent: bool = True


class Notice(msgspec.Struct, frozen=True, array_like=True):
    """A change of an endpoint: `what` is failing, recovered or stopped."""

    endpoint: str
    what: str
    error: str | None = None


class EndpointState(msgspec.Struct, frozen=True, array_like=True):
    """An endpoint's state as it is kept. Times are Unix ms."""

    name: str
    stopped_at: int | None
    stopped_reason: str | None
    failures: int
    first_failed_at: int | None
    last_success_at: int | None


class Outbox(Protocol):
    """The verbs of the outbox. Each is one transaction, and raises StoreUnavailableError when it cannot commit."""

    async def subscribe(self, subscriptions: Sequence[Subscription], public_url: str | None, now: int) -> None:
        """Set the endpoints of this daemon. A new one gets the events from now on. One that no daemon has any more is
        removed and its pending deliveries are cancelled: on SQLite at once, on PostgreSQL, where daemons with another
        configuration may run, after ten minutes. `public_url` is the dashboard's address in payloads.
        """

    async def claim_deliveries(self, wanted: Sequence[tuple[str, int]], now: int) -> Claimed:
        """Claim due deliveries: for each (endpoint, n) at most n, longest due first. Of a batch the oldest pending
        event comes first, and no other while it is claimed. A stopped endpoint has none."""

    def release_deliveries(self, deliveries: Sequence[int]) -> None:
        """Give claims back untouched."""

    async def record_deliveries(self, results: Sequence[DeliveryResult], now: int) -> list[Notice]:
        """Write outcomes with their attempts, end the claims, and return the changes of the endpoints' states. Events
        about endpoints are written in the same transaction. A delivery that would be pending again becomes superseded
        if a newer event supersedes it.
        """

    async def find_at_risk(self, received_before: int, waits: Sequence[int], now: int) -> int:
        """Write batch.at_risk, once, for each pending batch that was first received before `received_before` and has a
        file whose latest attempt failed; return the number of events. `waits[n]` is the longest time, in ms, from
        attempt n + 1 to the verdict.
        """

    async def find_expiring(self, until: int, now: int) -> int:
        """Write batch.expiring of the batches with files that end after `now` and by `until`, once for each: pending
        ones and available ones whose address or object ends. Return how many batches were looked at.
        """

    async def ping_endpoint(self, endpoint: str, now: int) -> int | None:
        """Write test.ping for the endpoint alone; return the delivery's id, None when there is no such endpoint."""

    async def replay_deliveries(self, endpoint: str, since: int, until: int, now: int, dry_run: bool) -> int:
        """Deliver the events of [since, until) again; of the superseding events of a batch only the newest. Return the
        number of deliveries. Pending deliveries are left unchanged and are not counted.
        """

    async def stop_endpoint(self, endpoint: str, reason: str | None, now: int) -> bool:
        """Stop the endpoint for `reason`, or start it with None; return False when there is none of this name."""

    async def endpoint_states(self) -> list[EndpointState]:
        """Return the state of every endpoint, by name."""

    async def open_problems(self, endpoint: str) -> list[bytes]:
        """Return the payloads of the problems delivered to the endpoint that have not ended."""
