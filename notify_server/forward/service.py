"""Serves the forwarding calls of the API and the dashboard: events, verdicts, endpoints and their deliveries."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Literal

import msgspec
from msgspec import Struct

from notify_server.errors import NotifyServerError
from notify_server.events.payload import Ending, MissingFile, matching_types, utc
from notify_server.forward.news import News
from notify_server.forward.sender import Sender
from notify_server.model import CircuitState, Verdict
from notify_server.store.outbox import DeliveryState, Outbox
from notify_server.store.reading.expectations import ExpectationItem, ExpectationRecords
from notify_server.store.reading.outbox import BatchGate, DeliveryAttempt, DeliveryRow, EventItem, OutboxRecords
from notify_server.store.reading.types import Page

MAX_WAIT_SECONDS = 60.0
# Other nodes write events too.
POLL_SECONDS = 1.0


class UnknownEndpointError(NotifyServerError):
    """No endpoint of this name is configured."""


class EndpointStoppedError(NotifyServerError):
    """The endpoint is stopped."""


class EventPage(Struct, frozen=True):
    """Events, and the cursor to go on from: the id of the last one, or the caller's own when there are none."""

    items: list[EventItem]
    next: int


class GateAnswer(Struct, frozen=True):
    """A batch's verdict. `provisional` is true while it has none and is at risk; then `next_attempt_at` is the time of
    the next check, and `final_by` the latest moment of the verdict. `expected` is a batch that was registered and has
    not come.
    """

    batch_id: str
    api_code: str
    reference: str | None
    verdict: Literal["pending", "complete", "incomplete", "expected"]
    provisional: bool
    revision: int
    files: int
    available: int
    unavailable: int
    blocked: int
    upload_failed: int
    pending: int
    expected_files: int | None
    missing: list[MissingFile]
    missing_total: int
    first_received_at: datetime | None
    completed_at: datetime | None
    next_attempt_at: datetime | None
    final_by: datetime | None


class ForwardEndpointItem(Struct, frozen=True):
    """A forwarding endpoint. `target` is its address without what is secret, or its program."""

    name: str
    kind: str
    target: str
    events: tuple[str, ...]
    api_codes: tuple[str, ...]
    state: str
    circuit: CircuitState
    failures: int
    pending: int
    oldest_pending_at: datetime | None
    last_success_at: datetime | None
    stopped_at: datetime | None
    stopped_reason: str | None


class DeliveryDetail(Struct, frozen=True):
    """A delivery with the event as it is sent, and its attempts."""

    delivery: DeliveryRow
    request: msgspec.Raw
    attempts: list[DeliveryAttempt]


class ForwardTested(Struct, frozen=True):
    """The result of a test: `delivered`, or `error`; with the beginning of the answer."""

    delivered: bool
    status: int | None
    error: str | None
    response: str | None
    elapsed_ms: float


class ForwardReplayed(Struct, frozen=True):
    """The number of deliveries that were (or with `dry_run` would be) sent again."""

    deliveries: int


class ForwardChanged(Struct, frozen=True):
    """The endpoint's state after the change."""

    name: str
    state: str


class ForwardService:
    """`now` gives Unix ms; `news` rings at every commit."""

    def __init__(
        self,
        sender: Sender,
        outbox: Outbox,
        records: OutboxRecords,
        expectations: ExpectationRecords,
        news: News,
        now: Callable[[], int],
    ) -> None:
        self._sender = sender
        self._outbox = outbox
        self._records = records
        self._expectations = expectations
        self._news = news
        self._now = now

    # --- Pulling ---

    async def events(
        self, after: int, patterns: Sequence[str], api_code: str | None, wait: float, limit: int
    ) -> EventPage:
        """Return events behind `after`; wait for the first one up to `wait` seconds."""
        types = [str(kind) for kind in matching_types(patterns)]
        deadline = time.monotonic() + min(wait, MAX_WAIT_SECONDS)
        while True:
            items = await self._records.events(after, types, api_code, limit)
            left = deadline - time.monotonic()
            if items or left <= 0:
                return EventPage(items, items[-1].id if items else after)
            await self._news.wait(min(left, POLL_SECONDS))

    async def gate(self, batch_id: str, api_code: str | None, wait: float) -> list[GateAnswer]:
        """Return what is known of the batches of this batch_id; wait for the verdict up to `wait` seconds."""
        deadline = time.monotonic() + min(wait, MAX_WAIT_SECONDS)
        while True:
            found = await self._records.gate(batch_id, api_code)
            left = deadline - time.monotonic()
            if (found and all(each.verdict is not Verdict.PENDING for each in found)) or left <= 0:
                if not found:
                    return [_expected(each) for each in await self._expectations.expected(batch_id, api_code)]
                return [_answer(each) for each in found]
            await self._news.wait(min(left, POLL_SECONDS))

    async def of_batch(self, batch: int) -> tuple[BatchGate | None, list[DeliveryRow]]:
        """Return what is known of a batch, and the deliveries of its events."""
        return await self._records.gate_of(batch), await self._records.of_batch(batch)

    async def ending(self, batch: int, seconds: float) -> list[Ending]:
        """Return the files of a batch whose address or object ends within so many seconds."""
        now = self._now()
        return await self._records.ending(batch, now + round(seconds * 1000), now) if seconds else []

    # --- Endpoints ---

    def names(self) -> list[str]:
        """Return the names of the endpoints."""
        return list(self._sender.endpoints)

    async def endpoint(self, name: str) -> ForwardEndpointItem:
        """Return one endpoint. Raises UnknownEndpointError."""
        self._check(name)
        return next(each for each in await self.endpoints() if each.name == name)

    async def endpoints(self) -> list[ForwardEndpointItem]:
        """Return the endpoints in the order of the configuration."""
        states = {state.name: state for state in await self._outbox.endpoint_states()}
        waiting = {row.name: row for row in await self._records.waiting()}
        items = []
        for name, endpoint in self._sender.endpoints.items():
            state, row, queue = states.get(name), waiting.get(name), self._sender.queue(name)
            stopped = state is not None and state.stopped_at is not None
            failures = state.failures if state is not None else 0
            items.append(
                ForwardEndpointItem(
                    name,
                    endpoint.kind,
                    endpoint.target,
                    endpoint.events,
                    endpoint.api_codes,
                    "stopped" if stopped else "failing" if failures else "ok",
                    queue.circuit.state(self._now()) if queue is not None else CircuitState.CLOSED,
                    failures,
                    row.pending if row is not None else 0,
                    utc(row.oldest_at) if row is not None else None,
                    utc(state.last_success_at) if state is not None else None,
                    utc(state.stopped_at) if state is not None else None,
                    state.stopped_reason if state is not None else None,
                )
            )
        return items

    async def deliveries(self, name: str, state: DeliveryState | None, before: int, limit: int) -> Page[DeliveryRow]:
        """Return deliveries of an endpoint, newest first. `next` of the page is the id to go on from."""
        self._check(name)
        rows = await self._records.deliveries(name, state, before, limit + 1)
        return Page(rows[:limit], str(rows[limit - 1].id) if len(rows) > limit else None)

    async def delivery(self, id: int) -> DeliveryDetail | None:
        """Return a delivery, None when there is none with this id."""
        row = await self._records.delivery(id)
        payload = await self._records.payload(row.event) if row is not None else None
        if row is None or payload is None:
            return None
        return DeliveryDetail(row, msgspec.Raw(payload), await self._records.attempts(id))

    async def test(self, name: str) -> ForwardTested:
        """Send test.ping and return the answer. Raises EndpointStoppedError when the endpoint is stopped."""
        self._check(name)
        if any(each.name == name and each.stopped_at is not None for each in await self._outbox.endpoint_states()):
            raise EndpointStoppedError(f"{name} is stopped: start it first, with `notify-server forward start {name}`")
        attempt = await self._sender.test(name)
        if attempt is None:
            return ForwardTested(False, None, "no attempt was made in time: the endpoint is busy", None, 0.0)
        return ForwardTested(attempt.delivered, attempt.status, attempt.error, attempt.response, attempt.elapsed_ms)

    async def replay(self, name: str, since: int, until: int | None, *, dry_run: bool) -> ForwardReplayed:
        """Send the events of [since, until) again."""
        self._check(name)
        now = self._now()
        count = await self._outbox.replay_deliveries(name, since, now + 1 if until is None else until, now, dry_run)
        self._sender.wake()
        return ForwardReplayed(count)

    async def stop(self, name: str) -> ForwardChanged:
        """Stop the endpoint; its deliveries stay pending."""
        self._check(name)
        await self._outbox.stop_endpoint(name, "stopped by hand", self._now())
        return ForwardChanged(name, "stopped")

    async def start(self, name: str) -> ForwardChanged:
        """Start the endpoint; its pending deliveries are due."""
        self._check(name)
        await self._outbox.stop_endpoint(name, None, self._now())
        if (queue := self._sender.queue(name)) is not None:
            queue.try_now()
        return ForwardChanged(name, "ok")

    def _check(self, name: str) -> None:
        if name not in self._sender.endpoints:
            known = ", ".join(self._sender.endpoints) or "none"
            raise UnknownEndpointError(f"no endpoint is called {name}: there are {known}")


def _answer(gate: BatchGate) -> GateAnswer:
    return GateAnswer(**{name: getattr(gate, name) for name in GateAnswer.__struct_fields__})


def _expected(item: ExpectationItem) -> GateAnswer:
    assert item.batch_id is not None
    return GateAnswer(
        item.batch_id, item.api_code, item.reference, "expected", False, 0, 0, 0, 0, 0, 0, 0, item.files, [], 0, None,
        None, None, None,
    )  # fmt: skip
