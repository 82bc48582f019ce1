"""Expectations: registration, matching, limits and their events. Both stores are held to the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from notify_server.events.payload import EventType
from notify_server.expect.expectation import NewExpectation
from notify_server.store.base import Engine
from notify_server.store.expectations import MAX_DUE, Registered
from notify_server.store.outbox import Subscription
from tests.store.backends import Backend
from tests.store.builders import API_CODE, NOW, again, chunk, claim, deliver, failed, finished, found, settle, take_in

SECOND = 1_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
WAITS = [HOUR] * 4

STATES = "SELECT reference, state, matched_by FROM expectation ORDER BY id"
TYPES = "SELECT type, revision FROM event ORDER BY id"
# The sample of the platform's document: its name holds the first 24 bytes of the path.
SOURCE_NAME = "0123456789abcdef/IMAGE/-5/L3Bob3Rvcy9yb29tLTEvYS1sb25nLW5h"


def new(reference: str = "r", **changes: Any) -> NewExpectation:
    fields: dict[str, Any] = {
        "api_code": API_CODE,
        "batch_id": "batch",
        "files": None,
        "keys": None,
        "notify_within_ms": 30 * MINUTE,
        "verdict_within_ms": 2 * HOUR,
    }
    return NewExpectation(reference, **fields | changes)


async def register(store: Engine, *wanted: NewExpectation, now: int = NOW) -> list[Registered]:
    return await store.expectations.register(wanted or (new(),), now)


async def watch(store: Engine, start: int, seconds: int) -> int:
    """Be ready every second from `start` on; return how many limits were taken."""
    return sum([await store.expectations.check_limits(WAITS, start + second * SECOND) for second in range(seconds + 1)])


async def payloads(backend: Backend) -> list[dict[str, Any]]:
    return [json.loads(payload) for (payload,) in await backend.rows("SELECT payload FROM event ORDER BY id")]


# Registration


async def test_registration_twice_is_one_expectation(store: Engine, backend: Backend) -> None:
    (first,) = await register(store)
    (second,) = await register(store, now=NOW + 5)
    assert (first.created, second.created, first.id == second.id) == (True, False, True)
    assert await backend.rows("SELECT created_at, notify_by, verdict_by FROM expectation") == [
        (NOW, NOW + 30 * MINUTE, NOW + 2 * HOUR)
    ]


async def test_same_reference_of_another_api_code_is_another_expectation(store: Engine, backend: Backend) -> None:
    await register(store, new(), new(api_code="other"))
    assert len(await backend.rows(STATES)) == 2


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("batch_id", {"batch_id": None}),
        ("files", {"files": 13}),
        ("files", {"files": 2, "keys": ("a", "b")}),
        ("notify_within", {"notify_within_ms": MINUTE}),
        ("verdict_within", {"verdict_within_ms": MINUTE}),
    ],
)
async def test_other_content_is_a_conflict_that_registers_nothing(
    store: Engine, backend: Backend, field: str, changes: dict[str, Any]
) -> None:
    await register(store)
    fresh, conflicting = await register(store, new("fresh"), new(**changes), now=NOW + MINUTE)
    assert (fresh.conflict, conflicting.conflict) == (None, field)
    assert await backend.rows(STATES) == [("r", "waiting", None)]


async def test_one_call_may_name_the_same_submission_twice(store: Engine, backend: Backend) -> None:
    first, second = await register(store, new(), new())
    assert (first.created, second.created, first.id == second.id) == (True, False, True)
    (_, conflict) = await register(store, new("s"), new("s", files=3))
    assert conflict.conflict == "files"
    assert await backend.rows(STATES) == [("r", "waiting", None)]


async def test_expectations_survive_a_restart(backend: Backend) -> None:
    store = await backend.open()
    await register(store)
    store = await backend.reopen()
    await take_in(store, failed("a"))
    assert await backend.rows(STATES) == [("r", "met", "batch_id")]


async def test_removed_expectation_is_gone(store: Engine, backend: Backend) -> None:
    (registered,) = await register(store)
    assert await store.expectations.remove(registered.id)
    assert not await store.expectations.remove(registered.id)
    assert await watch(store, NOW + 31 * MINUTE, 1) == 0
    assert await backend.rows(STATES) == []


# Matching


async def test_notification_after_registration_meets_it_with_its_verdict(store: Engine, backend: Backend) -> None:
    await register(store, new(files=1))
    await take_in(store, finished("a"))
    assert await backend.rows(STATES) == [("r", "waiting", "batch_id")]
    await settle(store)
    assert await backend.rows(STATES) == [("r", "met", "batch_id")]
    (event,) = await payloads(backend)
    assert (event["data"]["reference"], event["data"]["expected_files"]) == ("r", 1)


@pytest.mark.parametrize("by", ["batch_id", "order"])
async def test_notification_before_registration_meets_it(store: Engine, backend: Backend, by: str) -> None:
    await take_in(store, finished("a"))
    await settle(store)
    await register(store, new(batch_id="batch" if by == "batch_id" else None, files=1), now=NOW + MINUTE)
    assert await backend.rows(STATES) == [("r", "met", by)]


async def test_notification_of_another_api_code_meets_nothing(store: Engine, backend: Backend) -> None:
    await register(store, new(api_code="other"), new("s", api_code="other", batch_id=None))
    await take_in(store, failed("a"))
    assert [state for _, state, _ in await backend.rows(STATES)] == ["waiting", "waiting"]


async def test_without_a_batch_id_the_oldest_is_met_first(store: Engine, backend: Backend) -> None:
    await register(store, *(new(f"r{n}", batch_id=None) for n in range(3)))
    await take_in(store, failed("a"), batch_id="b1")
    await take_in(store, failed("a"), batch_id="b2", received_at=NOW + 1)
    assert await backend.rows(STATES) == [("r0", "met", "order"), ("r1", "met", "order"), ("r2", "waiting", None)]


async def test_several_batches_of_one_transaction_are_matched_in_the_order_of_their_arrival(
    store: Engine, backend: Backend
) -> None:
    await register(store, new("r0", batch_id=None), new("r1", batch_id=None))
    items = [await deliver(store, batch_id=f"b{n}", received_at=NOW - n) for n in range(2)]
    await store.expand([chunk(item, failed("a"), batch_id=f"b{n}") for n, item in enumerate(items)], NOW)
    rows = await backend.rows(
        "SELECT reference, batch.batch_id FROM expectation JOIN batch ON batch.id = expectation.batch"
        " ORDER BY reference"
    )
    assert rows == [("r0", "b1"), ("r1", "b0")]


async def test_batch_id_comes_before_order(store: Engine, backend: Backend) -> None:
    await register(store, new("ordered", batch_id=None), new("named"))
    await take_in(store, failed("a"))
    assert await backend.rows(STATES) == [("ordered", "waiting", None), ("named", "met", "batch_id")]


async def test_redelivery_of_an_unregistered_batch_takes_no_expectation_by_order(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, failed("a"))
    await register(store, new(batch_id=None), now=NOW + 2 * HOUR)
    await take_in(store, failed("a"), received_at=NOW + 2 * HOUR)
    assert await backend.rows(STATES) == [("r", "waiting", None)]


async def test_batches_that_came_before_are_taken_in_their_order_and_once(store: Engine, backend: Backend) -> None:
    for n in range(3):
        await take_in(store, failed("a"), batch_id=f"b{n}", received_at=NOW + n)
    await register(store, new("r0", batch_id=None), new("r1", batch_id=None), now=NOW + MINUTE)
    await register(store, new("r2", batch_id=None), new("r3", batch_id=None), now=NOW + MINUTE)
    rows = await backend.rows(
        "SELECT reference, batch.batch_id FROM expectation LEFT JOIN batch ON batch.id = expectation.batch"
        " ORDER BY reference"
    )
    assert rows == [("r0", "b0"), ("r1", "b1"), ("r2", "b2"), ("r3", None)]


async def test_every_submission_that_names_the_batch_is_met(store: Engine, backend: Backend) -> None:
    await register(store, new("a"), new("b"))
    await take_in(store, failed("a"))
    assert [state for _, state, _ in await backend.rows(STATES)] == ["met", "met"]
    (event,) = await payloads(backend)
    assert event["data"]["reference"] == "a"


# Too few files


async def test_fewer_files_than_submitted_raise_one_event_after_the_verdict(store: Engine, backend: Backend) -> None:
    await store.outbox.subscribe((Subscription("a", list(EventType)),), "https://n.example.com", NOW)
    await register(store, new(files=12))
    await take_in(store, *(finished(f"{n}") for n in range(7)))
    assert await backend.rows(STATES) == [("r", "waiting", "batch_id")]
    await settle(store)
    assert await backend.rows(STATES) == [("r", "short", "batch_id")]
    assert await backend.rows(TYPES) == [("batch.complete", 1), ("batch.short", 2)]
    data = (await payloads(backend))[1]["data"]
    assert (data["expected_files"], data["files"], data["reference"], data["batch_id"], data["limit"]) == (
        12, 7, "r", "batch", "files",
    )  # fmt: skip
    assert data["url"].startswith("https://n.example.com/ui/batches/")
    assert await backend.rows("SELECT count(*) FROM forward") == [(2,)]


async def test_redelivery_of_the_rest_raises_an_event_with_the_next_revision(store: Engine, backend: Backend) -> None:
    await register(store, new(files=2))
    await take_in(store, finished("a"))
    await settle(store)
    await take_in(store, finished("a"), finished("b"), received_at=NOW + MINUTE)
    assert await backend.rows(STATES) == [("r", "short", "batch_id")]
    await settle(store)
    assert await backend.rows(STATES) == [("r", "met", "batch_id")]
    assert await backend.rows(TYPES) == [("batch.complete", 1), ("batch.short", 2), ("batch.complete", 3)]


async def test_redelivery_that_is_still_short_raises_no_second_event(store: Engine, backend: Backend) -> None:
    await register(store, new(files=3))
    await take_in(store, finished("a"))
    await settle(store)
    await take_in(store, finished("b"), received_at=NOW + MINUTE)
    await settle(store)
    assert await backend.rows(TYPES) == [("batch.complete", 1), ("batch.short", 2)]


async def test_more_files_than_submitted_are_no_fault(store: Engine, backend: Backend) -> None:
    await register(store, new(files=1))
    await take_in(store, failed("a"), failed("b"))
    assert await backend.rows(STATES) == [("r", "met", "batch_id")]


async def test_order_decides_nothing_about_the_number_of_files(store: Engine, backend: Backend) -> None:
    await register(store, new(batch_id=None, files=12))
    await take_in(store, failed("a"))
    assert await backend.rows(STATES) == [("r", "met", "order")]
    (event,) = await payloads(backend)
    assert (event["data"]["reference"], event["data"]["expected_files"]) == ("r", None)


async def test_registration_of_a_batch_already_short_raises_an_event_at_once(store: Engine, backend: Backend) -> None:
    await take_in(store, failed("a"))
    await register(store, new(files=2), now=NOW + MINUTE)
    assert await backend.rows(TYPES) == [("batch.incomplete", 1), ("batch.short", 2)]


async def test_keys_are_found_by_name_and_by_source_path(store: Engine, backend: Backend) -> None:
    keys = ("one", "/photos/room-1/a-long-name.jpg", "two")
    await register(store, new(files=3, keys=keys))
    await take_in(store, failed("one"), failed(SOURCE_NAME), failed("extra"))
    assert await backend.rows(STATES) == [("r", "short", "batch_id")]
    assert (await payloads(backend))[1]["data"]["files"] == 2


# Limits


async def test_missing_notification_raises_one_event_when_its_limit_has_passed(store: Engine, backend: Backend) -> None:
    await store.outbox.subscribe((Subscription("a", list(EventType)),), None, NOW)
    await register(store, new(notify_within_ms=3 * SECOND, files=5))
    assert await watch(store, NOW, 2) == 0
    assert await watch(store, NOW + 3 * SECOND, 5) == 1
    assert await backend.rows(STATES) == [("r", "late", None)]
    assert await backend.rows(TYPES) == [("batch.late", 0)]
    assert await backend.rows("SELECT count(*) FROM forward") == [(1,)]
    (event,) = await payloads(backend)
    assert event["data"] == {
        "batch_id": "batch", "api_code": API_CODE, "reference": "r", "expected_files": 5, "files": None,
        "limit": "notify_within", "limit_at": "2025-10-09T08:53:23.123Z", "url": None, "away_seconds": 0.0,
        "last_received_at": None,
    }  # fmt: skip


async def test_notification_after_its_limit_meets_it(store: Engine, backend: Backend) -> None:
    await register(store, new(notify_within_ms=SECOND))
    await watch(store, NOW, 2)
    await take_in(store, failed("a"))
    assert await backend.rows(STATES) == [("r", "met", "batch_id")]
    assert await backend.rows(TYPES) == [("batch.late", 0), ("batch.incomplete", 1)]


async def test_limit_waits_for_a_notification_that_is_in_the_inbox(store: Engine, backend: Backend) -> None:
    await register(store, new(notify_within_ms=SECOND), new("s", batch_id=None, notify_within_ms=SECOND))
    item = await deliver(store, 1)
    assert await watch(store, NOW, 5) == 0
    await store.expand([chunk(item, failed("a"))], NOW)
    assert await watch(store, NOW + 6 * SECOND, 1) == 1
    assert await backend.rows(STATES) == [("r", "met", "batch_id"), ("s", "late", None)]


async def test_open_files_at_verdict_within_put_the_batch_at_risk_once(store: Engine, backend: Backend) -> None:
    await register(store, new(verdict_within_ms=3 * SECOND))
    await take_in(store, finished("a"))
    (file,) = await claim(store)
    await store.record([again(file, NOW + HOUR)], NOW)
    assert await watch(store, NOW, 6) == 1
    assert await backend.rows(TYPES) == [("batch.at_risk", 1)]
    (event,) = await payloads(backend)
    assert (event["data"]["cause"], event["data"]["reference"], event["data"]["pending"]) == ("verdict_within", "r", 1)
    assert event["data"]["final_by"] is not None
    assert await store.outbox.find_at_risk(NOW + 10, WAITS, NOW + HOUR) == 0


async def test_batch_already_at_risk_raises_no_second_event(store: Engine, backend: Backend) -> None:
    await register(store, new(verdict_within_ms=3 * SECOND))
    await take_in(store, finished("a"))
    (file,) = await claim(store)
    await store.record([again(file, NOW + HOUR)], NOW)
    assert await store.outbox.find_at_risk(NOW + 10, WAITS, NOW + SECOND) == 1
    await watch(store, NOW, 6)
    assert await backend.rows(TYPES) == [("batch.at_risk", 1)]


async def test_verdict_before_its_limit_is_no_risk(store: Engine, backend: Backend) -> None:
    await register(store, new(verdict_within_ms=3 * SECOND))
    await take_in(store, finished("a"))
    await settle(store)
    assert await watch(store, NOW, 6) == 0
    assert await backend.rows(TYPES) == [("batch.complete", 1)]


async def test_limits_stand_still_during_an_outage_and_the_event_says_how_long(store: Engine, backend: Backend) -> None:
    await register(store, new(notify_within_ms=10 * SECOND))
    assert await watch(store, NOW, 5) == 0
    # No server is ready for an hour; then five seconds are left.
    back = NOW + 5 * SECOND + HOUR
    assert await watch(store, back, 4) == 0
    assert await watch(store, back + 5 * SECOND, 1) == 1
    (event,) = await payloads(backend)
    assert event["data"]["away_seconds"] == 3600.0
    assert event["data"]["limit_at"] == "2025-10-09T09:53:30.123Z"


async def test_outage_before_the_registration_does_not_count(store: Engine, backend: Backend) -> None:
    await register(store, new("old"))
    await watch(store, NOW, 1)
    # Registered in the first moments after an outage, before a server has been ready again.
    back = NOW + HOUR
    await register(store, new(notify_within_ms=10 * SECOND), now=back)
    assert await watch(store, back + SECOND, 8) == 0
    assert await watch(store, back + 10 * SECOND, 2) == 1
    assert [state for _, state, _ in await backend.rows(STATES)] == ["waiting", "late"]


async def test_time_without_open_limits_is_no_outage(store: Engine, backend: Backend) -> None:
    await register(store, new("old"))
    await take_in(store, failed("a"))
    await register(store, new(batch_id="next", notify_within_ms=SECOND), now=NOW + HOUR)
    assert await watch(store, NOW + HOUR + SECOND, 1) == 1
    assert (await payloads(backend))[-1]["data"]["away_seconds"] == 0


async def test_more_limits_than_one_transaction_takes_are_taken_by_the_next(store: Engine, backend: Backend) -> None:
    wanted = [new(f"r{n}", batch_id=f"b{n}", notify_within_ms=SECOND) for n in range(MAX_DUE + 5)]
    await register(store, *wanted)
    assert await store.expectations.check_limits(WAITS, NOW + 2 * SECOND) == MAX_DUE
    assert await store.expectations.check_limits(WAITS, NOW + 2 * SECOND) == 5


# Around it


async def test_events_of_no_batch_are_pulled_by_their_api_code(backend: Backend, store: Engine) -> None:
    await register(store, new(notify_within_ms=SECOND), new(api_code="other", notify_within_ms=SECOND))
    await watch(store, NOW + 2 * SECOND, 1)
    records = await backend.records()
    found = await records.outbox.events(0, list(EventType), "other", 10)
    assert [json.loads(bytes(each.data))["api_code"] for each in found] == ["other"]


async def test_late_event_goes_to_endpoints_of_its_api_code_alone(store: Engine, backend: Backend) -> None:
    late = [str(EventType.BATCH_LATE)]
    endpoints = Subscription("mine", late, [API_CODE]), Subscription("others", late, ["other"])
    await store.outbox.subscribe(endpoints, None, NOW)
    await register(store, new(notify_within_ms=SECOND))
    await watch(store, NOW + SECOND, 1)
    assert await backend.rows("SELECT endpoint FROM forward") == [("mine",)]
    replayed = [await store.outbox.replay_deliveries(each.name, 0, NOW + HOUR, NOW, True) for each in endpoints]
    assert replayed == [0, 0]
    await backend.rows("SELECT 1")
    await store.outbox.subscribe(
        (Subscription("mine", late, [API_CODE]), Subscription("new", late, ["other"])), None, NOW
    )
    assert await store.outbox.replay_deliveries("new", 0, NOW + HOUR, NOW, True) == 0


async def test_prune_deletes_the_expectations_of_its_batches_and_old_unmatched_ones(
    store: Engine, backend: Backend
) -> None:
    await register(store, new(), new("late", batch_id="never", notify_within_ms=SECOND), new("open", batch_id="no"))
    await take_in(store, finished("a"))
    (file,) = await claim(store)
    await store.record([found(file)], NOW)
    await watch(store, NOW + 2 * SECOND, 1)
    assert await store.prune(NOW, NOW, 100) == 0
    while await store.prune(NOW + HOUR, NOW, 100):
        pass
    assert await backend.rows(STATES) == [("open", "waiting", None)]
