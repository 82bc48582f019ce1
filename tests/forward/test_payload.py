"""Payloads: their schemas and samples under docs/events, their size, and what they never contain."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from notify_server.events.payload import (
    DATA_TYPES,
    MAX_BYTES,
    BatchRow,
    Ending,
    EndpointData,
    Event,
    EventType,
    ExpectationData,
    MissingRow,
    PingData,
    batch_event,
    json_schema,
    matching_types,
    new_key,
    plain_event,
    rfc3339,
    utc,
)
from notify_server.model import FileState

DOCS = Path(__file__).parents[2] / "docs" / "events"
AT = 1_764_259_200_123
KEY = "8ZAFUPII49GQN2AB/IMAGE/-1203985127/L3VwbG9hZC8yMDI2LzExL2xpdmluZ3Jv"


def row(**changes: Any) -> BatchRow:
    fields: dict[str, Any] = {
        "id": 7,
        "batch_id": "20261127-0001",
        "api_code": "rent.dcentralize.room.add",
        "verdict": "incomplete",
        "previous": None,
        "revision": 1,
        "files": 7,
        "pending": 0,
        "available": 5,
        "unavailable": 1,
        "blocked": 0,
        "upload_failed": 1,
        "first_received_at": AT - 90_000,
        "completed_at": AT,
    }
    return BatchRow(**fields | changes)


MISSING = [
    MissingRow(7, KEY, FileState.UNAVAILABLE, "http_404", 404, 8, AT - 1_000),
    MissingRow(7, "b.jpg", FileState.UPLOAD_FAILED, None, None, 0, None),
]


ENDING = [Ending(AT + 3_600_000, KEY, "address"), Ending(AT + 43_200_000, "c.jpg", "object")]


def sample(kind: EventType) -> Event:
    match kind:
        case EventType.BATCH_COMPLETE:
            event = batch_event(
                kind, row(verdict="complete", available=7, unavailable=0, upload_failed=0, revision=2,
                          previous="incomplete"), [], AT, url="https://notify.example.com/ui/batches/7",
            )  # fmt: skip
        case EventType.BATCH_AT_RISK:
            pending = row(verdict="pending", pending=2, unavailable=0, upload_failed=0, completed_at=None,
                          next_attempt_at=AT + 60_000)  # fmt: skip
            waiting = [MissingRow(7, KEY, FileState.PENDING, "timeout", None, 3, AT - 1_000)]
            event = batch_event(kind, pending, waiting, AT, cause="age", final_by=AT + 3_600_000)
        case EventType.BATCH_INCOMPLETE:
            event = batch_event(kind, row(), MISSING, AT)
        case EventType.BATCH_EXPIRING:
            event = batch_event(kind, row(), MISSING, AT, ending=ENDING)
        case EventType.BATCH_LATE | EventType.BATCH_SHORT:
            at = utc(AT)
            assert at is not None
            short = kind is EventType.BATCH_SHORT
            limit = "verdict_within" if short else "notify_within"
            batch_id, files = ("20261127-0001", 7) if short else (None, None)
            data = ExpectationData(batch_id, "rent.dcentralize.room.add", "order-1", 12, files, limit, at)
            event = plain_event(kind, data, AT)
        case EventType.ENDPOINT_FAILING:
            event = plain_event(kind, EndpointData("listings", 4, 500, "answered HTTP 500", 12), AT)
        case EventType.ENDPOINT_RECOVERED:
            event = plain_event(kind, EndpointData("listings", 0, 200, None, 11), AT)
        case EventType.TEST_PING:
            event = plain_event(kind, PingData("listings"), AT)
    return event


@pytest.mark.parametrize("kind", EventType)
def test_schema_and_sample_in_docs_are_current(kind: EventType) -> None:
    schema = json_schema(kind)
    assert json.loads((DOCS / f"{kind}.schema.json").read_text("utf-8")) == schema
    payload = json.loads(sample(kind).payload)
    jsonschema.validate(payload, schema, jsonschema.Draft202012Validator)
    assert json.loads((DOCS / "samples" / f"{kind}.json").read_text("utf-8")) == payload


def test_docs_have_no_other_schemas() -> None:
    assert {path.name.removesuffix(".schema.json") for path in DOCS.glob("*.schema.json")} == set(EventType)
    assert set(DATA_TYPES) == set(EventType)


@pytest.mark.parametrize("kind", EventType)
def test_schema_refuses_a_payload_without_a_field(kind: EventType) -> None:
    payload = json.loads(sample(kind).payload)
    payload["data"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(payload, json_schema(kind), jsonschema.Draft202012Validator)


def test_times_are_rfc3339_with_milliseconds() -> None:
    payload = json.loads(sample(EventType.BATCH_INCOMPLETE).payload)
    for text in (payload["timestamp"], payload["data"]["first_received_at"], payload["data"]["completed_at"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    assert rfc3339(1_000) == "1970-01-01T00:00:01.000Z"


def test_missing_file_has_words_in_both_languages() -> None:
    first, second = json.loads(sample(EventType.BATCH_INCOMPLETE).payload)["data"]["missing"]
    assert first["reason"] == "http_404"
    assert re.search("[\u4e00-\u9fff]", first["reason_text"]["zh"])
    assert first["reason_text"]["en"].isascii()
    assert first["source_path"] == "/upload/2026/11/livingro"
    assert (second["reason"], second["source_path"], second["last_attempt_at"]) == (None, None, None)


@pytest.mark.parametrize("name", ["k" * 1024, "文" * 1024, "\x00" * 1024, "\U0001f600" * 512])
def test_payload_stays_under_its_limit(name: str) -> None:
    many = [MissingRow(7, name, FileState.UNAVAILABLE, "http_404", 404, 8, AT) for _ in range(60)]
    big = row(batch_id="批" * 80, api_code="码" * 50, files=10_000, available=0)
    event = batch_event(EventType.BATCH_INCOMPLETE, big, many, AT, url="https://example.com/" + "u" * 300)
    assert len(event.payload) < MAX_BYTES
    data = json.loads(event.payload)["data"]
    assert 0 < len(data["missing"]) < 50
    assert data["missing_total"] == 10_000


def test_at_most_fifty_missing_files_are_listed() -> None:
    many = [MissingRow(7, f"{n}.jpg", FileState.PENDING, None, None, 0, None) for n in range(60)]
    assert len(json.loads(batch_event(EventType.BATCH_AT_RISK, row(), many, AT).payload)["data"]["missing"]) == 50


def test_keys_are_unique_and_have_no_dot() -> None:
    keys = {new_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert all(re.fullmatch(r"evt_[a-z2-7]{26}", key) for key in keys)


def test_no_payload_type_has_an_address_field() -> None:
    # A signed target_url is a credential, and payloads end in chats and logs.
    for kind in EventType:
        assert "target_url" not in json.dumps(json_schema(kind))


def test_patterns_match_types() -> None:
    assert matching_types(["*"]) == list(EventType)
    assert matching_types(["batch.complete"]) == [EventType.BATCH_COMPLETE]
    assert matching_types(["endpoint.*"]) == [EventType.ENDPOINT_FAILING, EventType.ENDPOINT_RECOVERED]
    assert matching_types(["nothing"]) == []


def write_docs() -> None:
    """Rewrite schemas and samples: `python -m tests.forward.test_payload`."""
    for kind in EventType:
        schema = json.dumps(json_schema(kind), indent=2, ensure_ascii=False)
        (DOCS / f"{kind}.schema.json").write_text(schema + "\n", "utf-8")
        pretty = msgspec.json.format(sample(kind).payload, indent=2).decode()
        (DOCS / "samples" / f"{kind}.json").write_text(pretty + "\n", "utf-8")


if __name__ == "__main__":
    write_docs()
