"""Reads events, deliveries and endpoints. The statements are in `outbox_records.sql` of each engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from notify_server.events.payload import MAX_MISSING, Ending, MissingFile, MissingRow, missing_file, utc
from notify_server.model import Verdict
from notify_server.store.ends import FileRow, judge
from notify_server.store.outbox import DeliveryState
from notify_server.store.sql import load_with_macros

T = TypeVar("T")

Run = Callable[[str, Mapping[str, object]], Awaitable[tuple[Any, ...] | None]]


class EventItem(Struct, frozen=True):
    """An event as callers pull it: `id` is the cursor, `key` the `webhook-id` under which it is forwarded."""

    id: int
    key: str
    type: str
    timestamp: str
    revision: int
    data: msgspec.Raw


class DeliveryAttempt(Struct, frozen=True):
    """An attempt at a delivery. `status` is the HTTP status, or the exit code of a program."""

    started_at: datetime
    status: int | None
    error: str | None
    total_ms: float


class DeliveryRow(Struct, frozen=True):
    """A delivery: an event on its way to an endpoint, with the beginning of the last answer."""

    id: int
    endpoint: str
    event: int
    key: str
    type: str
    batch: int | None
    batch_id: str | None
    revision: int
    occurred_at: datetime
    state: DeliveryState
    attempts: int
    next_attempt_at: datetime | None
    last_status: int | None
    last_error: str | None
    last_response: str | None
    delivered_at: datetime | None


class WaitingRow(Struct, frozen=True):
    """An endpoint's waiting deliveries and its health: `oldest_at` is the time of their oldest event, `failures` counts
    those in a row. Times are Unix ms.
    """

    name: str
    pending: int
    oldest_at: int | None
    failures: int
    stopped_at: int | None


class BatchGate(Struct, frozen=True):
    """A batch, by the name that the partner knows. `provisional` is true while it has no verdict and is at risk; only
    then are `next_attempt_at` (of its files) and `final_by` (the latest moment of the verdict) given.
    """

    id: int
    batch_id: str
    api_code: str
    reference: str | None
    verdict: Verdict
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
    first_received_at: datetime
    completed_at: datetime | None
    at_risk_at: datetime | None
    next_attempt_at: datetime | None
    final_by: datetime | None


class _Payload(Struct):
    timestamp: str
    data: msgspec.Raw


class _AtRiskData(Struct):
    final_by: datetime | None = None


class _AtRisk(Struct):
    data: _AtRiskData


class OutboxRecords:
    """`run` runs one statement that returns one row. Calls raise StoreUnavailableError as those of Records do."""

    def __init__(self, dialect: str, run: Run) -> None:
        self._queries = load_with_macros(dialect, "outbox_records", "delivery_array", "delivery_rows", "gate_array")
        self._run = run

    async def events(self, after: int, types: Sequence[str], api_code: str | None, limit: int) -> list[EventItem]:
        """Return events behind the id `after`, oldest first. None that is committed later has a smaller id."""
        rows = await self._list(
            list[tuple[int, str, str, int, str]],
            "events",
            after=after,
            types=msgspec.json.encode(list(types)).decode(),
            api_code=api_code or "",
            limit=limit,
        )
        items = []
        for id, key, type, revision, payload in rows:
            parts = msgspec.json.decode(payload, type=_Payload)
            items.append(EventItem(id, key, type, parts.timestamp, revision, parts.data))
        return items

    async def last_event(self) -> int:
        """Return the id of the newest event, 0 when there is none."""
        row = await self._run(self._queries["last_event"], {})
        assert row is not None
        return int(row[0])

    async def deliveries(
        self, endpoint: str, state: DeliveryState | None, before: int, limit: int
    ) -> list[DeliveryRow]:
        """Return the deliveries of an endpoint with ids below `before`, newest first."""
        parameters = {"endpoint": endpoint, "state": "" if state is None else str(state)}
        return _rows(await self._list(list[Any], "deliveries", before=before, limit=limit, **parameters))

    async def delivery(self, id: int) -> DeliveryRow | None:
        """Return one delivery."""
        found = _rows(await self._list(list[Any], "delivery", id=id))
        return found[0] if found else None

    async def payload(self, event: int) -> bytes | None:
        """Return the payload of an event."""
        row = await self._run(self._queries["payload"], {"id": event})
        return None if row is None else str(row[0]).encode()

    async def attempts(self, delivery: int) -> list[DeliveryAttempt]:
        """Return the attempts at a delivery, oldest first."""
        rows = await self._list(list[tuple[int, int | None, str | None, float]], "attempts", id=delivery)
        return [DeliveryAttempt(_time(at), status, error, ms) for at, status, error, ms in rows]

    async def of_batch(self, batch: int) -> list[DeliveryRow]:
        """Return the deliveries of a batch's events, oldest first, at most 100."""
        return _rows(await self._list(list[Any], "of_batch", batch=batch))

    async def waiting(self) -> list[WaitingRow]:
        """Return what waits, for each configured endpoint by name."""
        return await self._list(list[WaitingRow], "waiting")

    async def gate(self, batch_id: str, api_code: str | None) -> list[BatchGate]:
        """Return the batches of this batch_id (and api_code), with what is missing, at most 2."""
        found = await self._list(list[tuple[Any, ...]], "gate", batch_id=batch_id, api_code=api_code or "")
        return [await self._gate(row) for row in found]

    async def gate_of(self, batch: int) -> BatchGate | None:
        """Return what is known of the batch with this id."""
        found = await self._list(list[tuple[Any, ...]], "gate_of", id=batch)
        return await self._gate(found[0]) if found else None

    async def ending(self, batch: int, until: int, now: int) -> list[Ending]:
        """Return the files of the batch that end after `now` and by `until`, the first to end first."""
        return judge(await self._list(list[FileRow], "ending", id=batch, now=now), until, now).ending

    async def _gate(self, row: tuple[Any, ...]) -> BatchGate:
        id, batch_id, api_code, verdict, revision, files, available, unavailable, blocked, *rest = row
        upload_failed, pending, first_received_at, completed_at, at_risk_at, last_event, reference, expected = rest
        missing: list[MissingRow] = []
        if available < files:
            missing = await self._list(list[MissingRow], "missing", id=id, limit=MAX_MISSING)
        provisional = verdict == "pending" and last_event == "at_risk"
        next_attempt_at, final_by = await self._at_risk(id) if provisional else (None, None)
        return BatchGate(
            id, batch_id, api_code, reference, Verdict(verdict), provisional, revision,
            files, available, unavailable, blocked, upload_failed, pending, expected,
            [missing_file(each) for each in missing], files - available, _time(first_received_at),
            utc(completed_at), utc(at_risk_at), utc(next_attempt_at), final_by,
        )  # fmt: skip

    async def _at_risk(self, batch: int) -> tuple[int | None, datetime | None]:
        next_attempt_at, payload = await self._list(tuple[int | None, str | None], "at_risk", id=batch)
        event = None if payload is None else msgspec.json.decode(payload, type=_AtRisk)
        return next_attempt_at, None if event is None else event.data.final_by

    async def _list(self, kind: type[T], query: str, **parameters: object) -> T:
        row = await self._run(self._queries[query], parameters)
        # PostgreSQL makes no array of no rows.
        return msgspec.json.decode("[]" if row is None or row[0] is None else row[0], type=kind)


def _time(at: int) -> datetime:
    found = utc(at)
    assert found is not None
    return found


def _rows(rows: Sequence[Sequence[Any]]) -> list[DeliveryRow]:
    return [
        DeliveryRow(
            id, endpoint, event, key, type, batch, batch_id, revision, _time(occurred_at), DeliveryState(state),
            attempts, utc(next_attempt_at), status, error, response, utc(delivered_at),
        )
        for (
            id, endpoint, event, key, type, batch, batch_id, revision, occurred_at, state, attempts, next_attempt_at,
            status, error, response, delivered_at,
        ) in rows
    ]  # fmt: skip
