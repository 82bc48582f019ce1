"""Silence of api_codes, `[alert] quiet`: reported once, after its limit, by a clock that stands still during outages.
Both stores are held to the same.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec

from notify_server.expect.quiet import QuietLimit
from notify_server.store.base import Engine
from notify_server.store.expectations import MAX_API_CODES
from notify_server.store.outbox import Subscription
from notify_server.submissions.metrics import SubmissionMetrics
from notify_server.telemetry.metrics import Metrics
from tests.store.backends import Backend
from tests.store.builders import NOW, chunk, deliver, failed
from tests.store.test_conformance_expectations import new as submission

SECOND = 1_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
LIMITS = [QuietLimit("rent.*", 10 * SECOND)]
ARRIVALS = "SELECT api_code, received_at, told_at FROM arrival ORDER BY api_code"


async def come(store: Engine, api_code: str, at: int, batch_id: str = "batch") -> None:
    """Take in a notification."""
    item = await deliver(store, batch_id=batch_id, api_code=api_code, received_at=at)
    expansion = msgspec.structs.replace(chunk(item, failed(), batch_id=batch_id), api_code=api_code)
    await store.expand([expansion], at)


async def watch(store: Engine, start: int, seconds: int, limits: list[QuietLimit] = LIMITS) -> int:
    """Be ready every second from `start` on; return how many silences were reported."""
    return sum([await store.expectations.check_quiet(limits, start + n * SECOND) for n in range(seconds + 1)])


async def reported(backend: Backend) -> list[dict[str, Any]]:
    rows = await backend.rows("SELECT payload FROM event WHERE type = 'batch.late' ORDER BY id")
    return [json.loads(payload)["data"] for (payload,) in rows]


async def test_silence_is_reported_once_and_again_only_after_a_notification(store: Engine, backend: Backend) -> None:
    await watch(store, NOW, 0)
    await come(store, "rent.add", NOW + SECOND)
    assert await watch(store, NOW + SECOND, 9) == 0
    assert await watch(store, NOW + 11 * SECOND, 0) == 1
    assert await watch(store, NOW + 12 * SECOND, 30) == 0
    (data,) = await reported(backend)
    assert (data["api_code"], data["batch_id"], data["reference"], data["limit"]) == ("rent.add", None, None, "quiet")
    assert (data["last_received_at"], data["limit_at"]) == ("2025-10-09T08:53:21.123Z", "2025-10-09T08:53:31.123Z")
    await come(store, "rent.add", NOW + 45 * SECOND)
    assert await watch(store, NOW + 45 * SECOND, 9) == 0
    assert await watch(store, NOW + 55 * SECOND, 30) == 1


async def test_redelivery_ends_a_silence_too(store: Engine) -> None:
    await watch(store, NOW, 0)
    await come(store, "rent.add", NOW)
    await watch(store, NOW + SECOND, 7)
    await come(store, "rent.add", NOW + 8 * SECOND)
    assert await watch(store, NOW + 9 * SECOND, 8) == 0
    assert await watch(store, NOW + 18 * SECOND, 0) == 1


async def test_each_api_code_has_its_own_silence_and_most_specific_limit(store: Engine, backend: Backend) -> None:
    limits = [*LIMITS, QuietLimit("rent.slow", MINUTE), QuietLimit("*", HOUR)]
    await watch(store, NOW, 0, limits)
    for api_code in ("rent.add", "rent.slow", "sale.add"):
        await come(store, api_code, NOW)
    assert await watch(store, NOW, 59, limits) == 1
    assert await watch(store, NOW + MINUTE, 5, limits) == 1
    assert [each["api_code"] for each in await reported(backend)] == ["rent.add", "rent.slow"]


async def test_pattern_without_any_notification_is_reported_once_and_then_by_api_code(
    store: Engine, backend: Backend
) -> None:
    assert await watch(store, NOW, 9) == 0
    assert await watch(store, NOW + 10 * SECOND, 30) == 1
    (data,) = await reported(backend)
    assert (data["api_code"], data["last_received_at"]) == ("rent.*", None)
    await come(store, "rent.add", NOW + 41 * SECOND)
    assert await watch(store, NOW + 41 * SECOND, 30) == 1
    assert [each["api_code"] for each in await reported(backend)] == ["rent.*", "rent.add"]


async def test_clock_of_silence_stands_still_during_an_outage_and_the_event_says_how_long(
    store: Engine, backend: Backend
) -> None:
    await watch(store, NOW, 0)
    await come(store, "rent.add", NOW)
    await watch(store, NOW + SECOND, 4)
    back = NOW + 5 * SECOND + HOUR
    assert await watch(store, back, 4) == 0
    assert await watch(store, back + 5 * SECOND, 0) == 1
    (data,) = await reported(backend)
    assert data["away_seconds"] == 3600


async def test_notification_before_the_first_check_after_an_outage_starts_a_whole_limit(store: Engine) -> None:
    await watch(store, NOW, 5)
    back = NOW + HOUR
    await come(store, "rent.add", back)
    assert await watch(store, back + SECOND, 8) == 0
    assert await watch(store, back + 11 * SECOND, 0) == 1


async def test_clock_that_was_set_back_raises_no_alarm(store: Engine) -> None:
    await watch(store, NOW, 5)
    back = NOW - HOUR
    await come(store, "rent.add", back)
    assert await watch(store, back + SECOND, 8) == 0
    assert await watch(store, back + 11 * SECOND, 0) == 1


async def test_time_before_the_watch_began_is_no_silence(store: Engine) -> None:
    await come(store, "rent.add", NOW)
    start = NOW + 7 * 24 * HOUR
    assert await watch(store, start, 9) == 0
    assert await watch(store, start + 10 * SECOND, 0) == 1


async def test_notification_in_the_inbox_is_no_silence(store: Engine) -> None:
    await watch(store, NOW, 0)
    await come(store, "rent.add", NOW)
    await watch(store, NOW + SECOND, 7)
    await deliver(store, batch_id="next", api_code="rent.add", received_at=NOW + 9 * SECOND)
    assert await watch(store, NOW + 9 * SECOND, 60) == 0


async def test_report_survives_a_restart_and_goes_to_endpoints_of_its_api_code(backend: Backend) -> None:
    store = await backend.open()
    mine = Subscription("mine", ["batch.late"], ["rent.add"])
    other = Subscription("other", ["batch.late"], ["sale.add"])
    await store.outbox.subscribe([mine, other], None, NOW)
    await watch(store, NOW, 0)
    await come(store, "rent.add", NOW)
    assert await watch(store, NOW, 15) == 1
    store = await backend.reopen()
    assert await watch(store, NOW + 16 * SECOND, 30) == 0
    assert await backend.rows("SELECT endpoint FROM forward WHERE batch IS NULL") == [("mine",)]


async def test_latest_api_codes_are_kept(store: Engine, backend: Backend) -> None:
    for start in range(0, MAX_API_CODES + 20, 60):
        expansions = []
        for n in range(start, start + 60):
            item = await deliver(store, batch_id=f"b{n}", api_code=f"c{n}", received_at=NOW + n)
            expansions.append(msgspec.structs.replace(chunk(item, failed(), batch_id=f"b{n}"), api_code=f"c{n}"))
        await store.expand(expansions, NOW)
    ((count, first),) = await backend.rows("SELECT count(*), min(received_at) FROM arrival")
    assert (count, first) == (MAX_API_CODES, NOW + 20)


async def test_arrivals_are_read_with_the_latest_first(store: Engine, backend: Backend) -> None:
    await watch(store, NOW, 0, [QuietLimit("never.*", SECOND)])
    for n, api_code in enumerate(("a", "b", "c")):
        await come(store, api_code, NOW + n)
    await watch(store, NOW + SECOND, 5, [QuietLimit("never.*", SECOND)])
    found = await (await backend.records()).expectations.arrivals()
    assert [(each.api_code, each.received_at is None, each.told_at is None) for each in found] == [
        ("c", False, True), ("b", False, True), ("a", False, True), ("never.*", True, False),
    ]  # fmt: skip


async def test_of_several_nodes_that_check_together_one_reports(store: Engine, backend: Backend) -> None:
    await watch(store, NOW, 0)
    await come(store, "rent.add", NOW)
    await watch(store, NOW + SECOND, 8)
    at = NOW + 10 * SECOND
    counts = await asyncio.gather(*(store.expectations.check_quiet(LIMITS, at) for _ in range(5)))
    assert sum(counts) == 1
    assert len(await reported(backend)) == 1


async def test_metrics_have_the_latest_notifications_and_count_what_is_silent(store: Engine, backend: Backend) -> None:
    limits = [QuietLimit("rent.*", 10 * SECOND), QuietLimit("never", 10 * SECOND), QuietLimit("once.*", 10 * SECOND)]
    await watch(store, NOW, 0, limits)
    await come(store, "rent.add", NOW)
    await come(store, 'odd"\\code', NOW + SECOND)
    await store.expectations.register([submission("r"), submission("s", batch_id="elsewhere")], NOW)
    assert await watch(store, NOW, 12, limits) == 3
    # A pattern is not silent any more when one of its api_codes has come.
    await come(store, "once.more", NOW + 13 * SECOND)
    metrics = Metrics()
    await SubmissionMetrics(metrics, limits).refresh((await backend.records()).expectations)
    lines = metrics.render()[0].decode().splitlines()
    assert [line for line in lines if line.startswith("notify_server_expectations{")] == [
        'notify_server_expectations{state="waiting"} 2.0',
        'notify_server_expectations{state="late"} 0.0',
        'notify_server_expectations{state="short"} 0.0',
    ]
    assert [line for line in lines if line.startswith("notify_server_last_notification_timestamp_seconds{")] == [
        'notify_server_last_notification_timestamp_seconds{api_code="once.more"} 1.760000013123e+09',
        'notify_server_last_notification_timestamp_seconds{api_code="odd\\"\\\\code"} 1.760000001123e+09',
        'notify_server_last_notification_timestamp_seconds{api_code="rent.add"} 1.760000000123e+09',
    ]
    assert "notify_server_quiet_api_codes 2.0" in lines
