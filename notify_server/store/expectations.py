"""The expectations of every store: their verbs, their rows, and the events about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

import msgspec

from notify_server.events.payload import Event, EventType, ExpectationData, encode_payload, new_key, utc
from notify_server.expect.clock import ReadyClock
from notify_server.expect.expectation import Expectation, ExpectationState, MatchedBy, NewExpectation, limit_at
from notify_server.expect.quiet import QuietLimit, Silence

# Expectations that one transaction registers, and limits that one transaction takes.
MAX_REGISTERED = 500
MAX_DUE = 100
# The api_codes that silence is watched of: the latest.
MAX_API_CODES = 1_000

_encode = msgspec.json.Encoder().encode
_decode_keys = msgspec.json.Decoder(tuple[str, ...]).decode


class Registered(msgspec.Struct, frozen=True, array_like=True):
    """The result of a registration: the id, and True if it is new. With `conflict` it is known with another value of
    this field, and the call has written nothing.
    """

    id: int
    created: bool
    conflict: str | None = None


class Expectations(Protocol):
    """The verbs. Each is one transaction, and raises StoreUnavailableError when it cannot commit."""

    async def register(self, wanted: Sequence[NewExpectation], now: int) -> list[Registered]:
        """Register submissions, at most MAX_REGISTERED, and match the batches that have come already. The same again
        changes nothing. When one is in conflict with what is known, none is registered.
        """

    async def check_limits(self, waits: Sequence[int], now: int) -> int:
        """Note that a server is ready at `now`, and write the events of the limits that have passed, at most MAX_DUE:
        batch.late, and batch.at_risk as `Outbox.find_at_risk` does. Return how many limits were taken.

        A limit waits while the inbox holds a notification that may be the one expected.
        """

    async def check_quiet(self, limits: Sequence[QuietLimit], now: int) -> int:
        """Note that a server is ready at `now`, and write batch.late of each api_code that has been silent for longer
        than its limit, once until a notification of it has come. Return how many events were written.
        """

    async def remove(self, id: int) -> bool:
        """Delete an expectation; return False when there is none with this id."""


class Short(NamedTuple):
    """An expectation that has just become short: its batch lists `files` of the expected files."""

    expectation: Expectation
    files: int


def to_row(expectation: Expectation) -> tuple[Any, ...]:
    """Return the columns of an expectation, without its id."""
    keys = None if expectation.keys is None else _encode(expectation.keys).decode()
    e = expectation
    return (
        e.reference, e.api_code, e.batch_id, e.files, keys, e.notify_by, e.verdict_by, str(e.state),
        None if e.matched_by is None else str(e.matched_by), e.batch, e.created_at, e.away_ms, e.due_at,
    )  # fmt: skip


def from_row(row: Iterable[Any]) -> Expectation:
    """Return an expectation from its columns in their order."""
    id, reference, api_code, batch_id, files, keys, notify_by, verdict_by, state, matched_by, *rest = row
    return Expectation(
        id, reference, api_code, batch_id, files, None if keys is None else _decode_keys(keys), notify_by, verdict_by,
        ExpectationState(state), None if matched_by is None else MatchedBy(matched_by), *rest,
    )  # fmt: skip


def late_event(expectation: Expectation, clock: ReadyClock, now: int) -> Event:
    """Return batch.late."""
    data = ExpectationData(
        expectation.batch_id,
        expectation.api_code,
        expectation.reference,
        expectation.files,
        None,
        "notify_within",
        datetime.fromtimestamp(limit_at(expectation.notify_by, expectation, clock) / 1000, UTC),
        away_seconds=max(0, clock.away_ms - expectation.away_ms) / 1000,
    )
    return Event(new_key(), EventType.BATCH_LATE, None, 0, now, encode_payload(EventType.BATCH_LATE, now, data))


def short_event(short: Short, batch_id: str, revision: int, now: int, url: str | None) -> Event:
    """Return batch.short."""
    expectation = short.expectation
    data = ExpectationData(
        batch_id,
        expectation.api_code,
        expectation.reference,
        expectation.files,
        short.files,
        "files",
        datetime.fromtimestamp(now / 1000, UTC),
        url=url,
    )
    payload = encode_payload(EventType.BATCH_SHORT, now, data)
    return Event(new_key(), EventType.BATCH_SHORT, expectation.batch, revision, now, payload)


def quiet_event(silence: Silence, now: int) -> Event:
    """Return batch.late of an api_code that is silent."""
    arrival = silence.arrival
    received_at = arrival.received_at
    data = ExpectationData(
        None,
        arrival.api_code,
        None,
        None,
        None,
        "quiet",
        datetime.fromtimestamp((now - silence.silent_ms + silence.limit_ms) / 1000, UTC),
        away_seconds=0.0 if received_at is None else max(0, now - received_at - silence.silent_ms) / 1000,
        last_received_at=utc(received_at),
    )
    return Event(new_key(), EventType.BATCH_LATE, None, 0, now, encode_payload(EventType.BATCH_LATE, now, data))
