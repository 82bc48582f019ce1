"""Events and their payloads (`{"type","timestamp","data"}`): the types, how a payload is made, and its size limit.

The store calls `batch_payload` in the transaction that changes the batch. Nothing here does I/O.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, TypeVar

import msgspec

from notify_server.contract.object_key import decode_object_key
from notify_server.events.texts import reason_text
from notify_server.model import FileState

T = TypeVar("T")

# A payload is smaller than 20 kB, so that every receiver's default limit lets it pass.
MAX_BYTES = 20_000
MAX_MISSING = 50


class EventType(StrEnum):
    """Every type of event."""

    BATCH_COMPLETE = "batch.complete"
    BATCH_INCOMPLETE = "batch.incomplete"
    BATCH_AT_RISK = "batch.at_risk"
    BATCH_LATE = "batch.late"
    BATCH_SHORT = "batch.short"
    BATCH_EXPIRING = "batch.expiring"
    ENDPOINT_FAILING = "endpoint.failing"
    ENDPOINT_RECOVERED = "endpoint.recovered"
    TEST_PING = "test.ping"


# Of one batch the newest of these supersedes those before it.
SUPERSEDING = (EventType.BATCH_AT_RISK, EventType.BATCH_COMPLETE, EventType.BATCH_INCOMPLETE)
VERDICTS = (EventType.BATCH_COMPLETE, EventType.BATCH_INCOMPLETE)
PROBLEMS = (
    EventType.BATCH_INCOMPLETE,
    EventType.BATCH_AT_RISK,
    EventType.BATCH_LATE,
    EventType.BATCH_SHORT,
    EventType.BATCH_EXPIRING,
    EventType.ENDPOINT_FAILING,
)


class ReasonText(msgspec.Struct, frozen=True):
    """The meaning of a reason, in words."""

    zh: str
    en: str


class MissingFile(msgspec.Struct, frozen=True):
    """A file that is not available. `source_path` is as much of the source's path as the object key holds."""

    oss_object_name: str
    source_path: str | None
    state: FileState
    reason: str | None
    reason_text: ReasonText
    http_status: int | None
    attempts: int
    last_attempt_at: datetime | None
    vendor_request_id: str | None = None


class BatchData(msgspec.Struct, frozen=True):
    """`data` of the events of a batch."""

    batch_id: str
    api_code: str
    reference: str | None
    verdict: str
    previous: str | None
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
    next_attempt_at: datetime | None
    final_by: datetime | None = None
    cause: str | None = None
    url: str | None = None


class EndingFile(msgspec.Struct, frozen=True):
    """A file that ends soon: `what` is `address` (its signature) or `object` (a lifecycle rule deletes it)."""

    oss_object_name: str
    source_path: str | None
    what: Literal["address", "object"]
    ends_at: datetime


class ExpiringData(BatchData, frozen=True, kw_only=True):
    """`data` of batch.expiring: the files that end soon, the first of them at `ends_at`."""

    ending: list[EndingFile]
    ending_total: int
    ends_at: datetime


class ExpectationData(msgspec.Struct, frozen=True):
    """`data` of batch.late and batch.short: the submission, and the limit that has passed. `limit` is `notify_within`;
    `files` for one with too few files; `quiet` when no notification of the api_code (or of the pattern of `[alert]
    quiet`) has come since `last_received_at`, then there is no submission. `away_seconds` is for how long no server was
    ready since the registration or that notification: the limit was later by as much.
    """

    batch_id: str | None
    api_code: str
    reference: str | None
    expected_files: int | None
    files: int | None
    limit: str
    limit_at: datetime
    url: str | None = None
    away_seconds: float = 0.0
    last_received_at: datetime | None = None


class EndpointData(msgspec.Struct, frozen=True):
    """`data` of the events of a forwarding endpoint."""

    endpoint: str
    failures: int
    last_status: int | None
    last_error: str | None
    pending: int
    stopped: bool = False


class PingData(msgspec.Struct, frozen=True):
    """`data` of a test."""

    endpoint: str
    text: str = "test"


DATA_TYPES: dict[EventType, type[msgspec.Struct]] = {
    EventType.BATCH_COMPLETE: BatchData,
    EventType.BATCH_INCOMPLETE: BatchData,
    EventType.BATCH_AT_RISK: BatchData,
    EventType.BATCH_EXPIRING: ExpiringData,
    EventType.BATCH_LATE: ExpectationData,
    EventType.BATCH_SHORT: ExpectationData,
    EventType.ENDPOINT_FAILING: EndpointData,
    EventType.ENDPOINT_RECOVERED: EndpointData,
    EventType.TEST_PING: PingData,
}


class BatchRow(msgspec.Struct, frozen=True, array_like=True):
    """A batch as the store reads it for an event. Times are Unix ms. `previous` is the verdict of the last event that
    had one, `revision` that of the event to be written; `reference` and `expected_files` are those of its expectation.
    """

    id: int
    batch_id: str
    api_code: str
    verdict: str
    previous: str | None
    revision: int
    files: int
    pending: int
    available: int
    unavailable: int
    blocked: int
    upload_failed: int
    first_received_at: int
    completed_at: int | None
    reference: str | None = None
    expected_files: int | None = None
    next_attempt_at: int | None = None


class MissingRow(msgspec.Struct, frozen=True, array_like=True):
    """A file that is not available, as the store reads it. Times are Unix ms."""

    batch: int
    oss_object_name: str
    state: FileState
    reason: str | None
    http_status: int | None
    attempts: int
    last_attempt_at: int | None
    vendor_request_id: str | None = None


class Ending(NamedTuple):
    """A file whose address or object ends at a time (Unix ms)."""

    at: int
    oss_object_name: str
    what: Literal["address", "object"]


class Event(msgspec.Struct, frozen=True, array_like=True):
    """An event to be written. `batch` is None and `revision` 0 for events of no batch."""

    key: str
    type: str
    batch: int | None
    revision: int
    occurred_at: int
    payload: bytes


def new_key() -> str:
    """Return a key that no other event has: `evt_` and 26 characters of base32, which have no dot."""
    return "evt_" + base64.b32encode(os.urandom(16)).decode().rstrip("=").lower()


def utc(at: int | None) -> datetime | None:
    """Return a time in Unix ms as a datetime."""
    return None if at is None else datetime.fromtimestamp(at / 1000, UTC)


def rfc3339(at: int) -> str:
    """Return a time in Unix ms as RFC 3339 with milliseconds and Z."""
    return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def matching_types(patterns: Sequence[str]) -> list[EventType]:
    """Return the types that match any of the patterns, such as `batch.*`, in their order."""
    return [kind for kind in EventType if any(fnmatchcase(kind, pattern) for pattern in patterns)]


def verdict_type(verdict: str) -> EventType:
    """Return the type of the event of a verdict."""
    return EventType(f"batch.{verdict}")


def _encode_times(value: object) -> object:
    if isinstance(value, datetime):
        return rfc3339(round(value.timestamp() * 1000))
    raise TypeError(type(value).__name__)


class _Payload(msgspec.Struct, frozen=True):
    type: str
    timestamp: str
    data: object


_encode = msgspec.json.Encoder().encode


def encode_payload(type: str, occurred_at: int, data: msgspec.Struct) -> bytes:
    """Return the bytes of a payload."""
    # Builtin times keep microseconds; receivers get milliseconds, always three digits.
    plain = msgspec.to_builtins(data, builtin_types=(datetime,))
    return _encode(_Payload(type, rfc3339(occurred_at), _with_text_times(plain)))


def _with_text_times(value: object) -> object:
    if isinstance(value, dict):
        return {name: _with_text_times(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_text_times(part) for part in value]
    return _encode_times(value) if isinstance(value, datetime) else value


def missing_file(row: MissingRow) -> MissingFile:
    """Return a file as payloads and answers show it."""
    key = decode_object_key(row.oss_object_name)
    return MissingFile(
        row.oss_object_name,
        key.source_path if key is not None else None,
        row.state,
        row.reason,
        ReasonText(reason_text("zh", row.reason, row.state), reason_text("en", row.reason, row.state)),
        row.http_status,
        row.attempts,
        utc(row.last_attempt_at),
        row.vendor_request_id,
    )


def batch_event(
    kind: EventType,
    row: BatchRow,
    missing: Sequence[MissingRow],
    now: int,
    *,
    cause: str | None = None,
    final_by: int | None = None,
    url: str | None = None,
    ending: Sequence[Ending] = (),
) -> Event:
    """Return the event of a batch. `missing` holds its first files that are not available, `ending` all that end soon,
    the first to end first (batch.expiring alone): as many of them are listed as a payload has room for.
    """
    shown = [missing_file(each) for each in missing[:MAX_MISSING]]
    ends = [_ending_file(each) for each in ending[:MAX_MISSING]]
    while True:
        data = BatchData(
            row.batch_id,
            row.api_code,
            row.reference,
            row.verdict,
            row.previous,
            row.revision,
            row.files,
            row.available,
            row.unavailable,
            row.blocked,
            row.upload_failed,
            row.pending,
            row.expected_files,
            shown,
            row.files - row.available,
            datetime.fromtimestamp(row.first_received_at / 1000, UTC),
            utc(row.completed_at),
            utc(row.next_attempt_at),
            utc(final_by),
            cause,
            url,
        )
        if ending:
            first = datetime.fromtimestamp(ending[0].at / 1000, UTC)
            data = ExpiringData(*msgspec.structs.astuple(data), ending=ends, ending_total=len(ending), ends_at=first)
        payload = encode_payload(kind, now, data)
        if len(payload) < MAX_BYTES or not (shown or ends):
            return Event(new_key(), kind, row.id, row.revision, now, payload)
        shown, ends = _fewer(shown, len(payload)), _fewer(ends, len(payload))


def _fewer(listed: list[T], size: int) -> list[T]:
    """Return the first of the items: keys may be 1,024 characters long. As many are left out as the excess suggests."""
    return listed[: max(0, min(len(listed) - 1, len(listed) * MAX_BYTES // size))]


def _ending_file(ending: Ending) -> EndingFile:
    key = decode_object_key(ending.oss_object_name)
    source_path = key.source_path if key is not None else None
    return EndingFile(ending.oss_object_name, source_path, ending.what, datetime.fromtimestamp(ending.at / 1000, UTC))


def plain_event(kind: EventType, data: msgspec.Struct, now: int) -> Event:
    """Return an event of no batch."""
    return Event(new_key(), kind, None, 0, now, encode_payload(kind, now, data))


def json_schema(kind: EventType) -> dict[str, object]:
    """Return the JSON Schema (2020-12) of a type's payload."""
    (data,), components = msgspec.json.schema_components([DATA_TYPES[kind]], ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind.value,
        "type": "object",
        "properties": {
            "type": {"const": kind.value},
            "timestamp": {"type": "string", "format": "date-time"},
            "data": data,
        },
        "required": ["type", "timestamp", "data"],
        "$defs": dict(components),
    }
