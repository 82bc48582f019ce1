"""The tables and views that users' scripts rely on, column by column."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from notify_server.store.base import Engine
from tests.store.backends import Backend
from tests.store.builders import API_CODE, HOST, NOW, blocked, claim, failed, finished, found, missing, take_in

# As promised, in the order promised.
PROMISED = {
    "notification": "id, batch_id, api_code, body, received_at, remote_addr, signature, expanded_at",
    "batch": "id, batch_id, api_code, first_received_at, last_received_at, deliveries, verdict, completed_at",
    "file": "id, batch, oss_object_name, target_url, host, reported_status, state, reason, attempts, next_attempt_at,"
    " http_status, content_length, content_type, etag, last_modified, final_url, remote_addr, elapsed_ms, verified_at,"
    " vendor_request_id, vendor_code, expires_at, headers, flags",
    "attempt": "id, file, started_at, method, http_status, reason, dns_ms, connect_ms, tls_ms, first_byte_ms,"
    " total_ms, remote_addr, vendor_request_id, vendor_code",
    "rejection": "id, received_at, remote_addr, code, detail, body",
    "event": "id, key, type, batch, revision, occurred_at, payload",
    "forward": "id, event, endpoint, state, attempts, next_attempt_at, last_status, last_error, last_response,"
    " delivered_at",
    "action": "id, at, who, what, filter, files",
    "batch_summary": "batch_id, api_code, verdict, files, pending, available, unavailable, blocked, upload_failed,"
    " first_received_at, completed_at",
    "file_result": "batch_id, api_code, oss_object_name, target_url, state, reason, http_status, content_length,"
    " content_type, attempts, verified_at, vendor_request_id, vendor_code, expires_at",
}
# What the project adds of its own.
ADDED = {
    "notification": "files, request_id, traceparent",
    "batch": "available, blocked, expanding, files, last_notification, pending, probed_again_at, unavailable,"
    " upload_failed, revision, last_event, last_verdict, at_risk_at, retrying, acknowledged_at, acknowledgement,"
    " ends_at, expiring_at",
    "forward": "batch",
    "attempt": "url",
    "rejection": "request_id",
}


VENDOR = ("5F7C0A1B2C3D4E5F60718293", "NoSuchKey")
NONE = (None, None, None)


def names(columns: str) -> list[str]:
    return [column.strip() for column in columns.split(",") if column]


@pytest.mark.parametrize("table", PROMISED)
@pytest.mark.usefixtures("store")
async def test_a_table_or_view_has_the_columns_promised_and_those_known_to_be_added(
    backend: Backend, table: str
) -> None:
    columns = await backend.columns(table)
    promised, added = names(PROMISED[table]), names(ADDED.get(table, ""))
    # About the servers that share the database.
    columns = [column for column in columns if column not in ("xid", "claimed_by")]
    assert sorted(columns) == sorted(promised + added)
    if table in ("batch_summary", "file_result"):
        assert columns == promised


async def test_the_views_show_every_field_of_batches_and_files(store: Engine, backend: Backend) -> None:
    files = [finished("a", expires_at=NOW + 5), finished("b"), finished("c"), blocked("d"), failed("e")]
    await take_in(store, *files, received_at=NOW, now=NOW + 1)
    first, second, _ = await claim(store, now=NOW + 1)
    await store.record([found(first, verified_at=NOW + 2), missing(second, verified_at=NOW + 3)], NOW + 4)
    assert await backend.rows("SELECT * FROM batch_summary") == [
        ("batch", API_CODE, "pending", 5, 1, 1, 1, 1, 1, "2025-10-09T08:53:20.123Z", None)
    ]
    shown = [
        (
            f"https://{HOST}/a",
            "available",
            None,
            200,
            12_345,
            "image/jpeg",
            1,
            "2025-10-09T08:53:20.125Z",
            *VENDOR,
            "2025-10-09T08:53:20.128Z",
        ),
        (
            f"https://{HOST}/b",
            "unavailable",
            "http_410",
            410,
            None,
            "image/jpeg",
            1,
            "2025-10-09T08:53:20.126Z",
            *VENDOR,
            None,
        ),
        (f"https://{HOST}/c", "pending", None, None, None, None, 0, None, None, None, None),
        ("https://127.0.0.1/key", "blocked", "private_address", None, None, None, 0, "2025-10-09T08:53:20.124Z", *NONE),
        (None, "upload_failed", None, None, None, None, 0, "2025-10-09T08:53:20.124Z", *NONE),
    ]
    assert await backend.rows("SELECT * FROM file_result ORDER BY oss_object_name") == [
        ("batch", API_CODE, name, *row) for name, row in zip("abcde", shown, strict=True)
    ]


async def test_times_in_the_views_are_exact_to_the_millisecond_and_end_in_z(store: Engine, backend: Backend) -> None:
    chance = random.Random(1)
    times = [0, 1, 999, 1000, 59_999, NOW - NOW % 1000, NOW - NOW % 1000 + 999, 4_102_444_799_999]
    times += [chance.randrange(4_102_444_800_000) for _ in range(100)]
    for n, time in enumerate(times):
        await take_in(store, batch_id=str(n), received_at=time, now=time)
    expected = [
        (datetime.fromtimestamp(time // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{time % 1000:03}Z",) * 2
        for time in times
    ]
    shown = {
        batch_id: (first_received_at, completed_at)
        for batch_id, first_received_at, completed_at in await backend.rows(
            "SELECT batch_id, first_received_at, completed_at FROM batch_summary"
        )
    }
    assert [shown[str(n)] for n in range(len(times))] == expected


async def test_counters_of_a_batch_are_those_of_its_files(store: Engine, backend: Backend) -> None:
    chance = random.Random(2)
    kinds = (finished, failed, blocked)
    for _ in range(40):
        batch_id = chance.choice("xyz")
        files = [chance.choice(kinds)(f"k{chance.randrange(30)}") for _ in range(chance.randrange(12))]
        await take_in(store, *files, batch_id=batch_id)
        some = await claim(store, n=5)
        await store.record([chance.choice((found, missing))(file) for file in some], NOW)
    states = ("pending", "available", "unavailable", "blocked", "upload_failed")
    counted = ", ".join(f"sum(CASE WHEN state = '{state}' THEN 1 ELSE 0 END)" for state in states)
    assert await backend.rows(f"SELECT id, files, {', '.join(states)} FROM batch ORDER BY id") == await backend.rows(
        f"SELECT batch, count(*), {counted} FROM file GROUP BY batch ORDER BY batch"
    )
