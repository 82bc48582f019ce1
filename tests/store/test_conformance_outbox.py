"""The outbox: events with the change that they are about, and their deliveries. Both stores are held to the same."""

from __future__ import annotations

import json
from typing import Any

from notify_server.events.payload import EventType, utc
from notify_server.store.base import Engine
from notify_server.store.outbox import DeliveryResult, DeliveryState, Outgoing, Subscription
from tests.store.backends import Backend
from tests.store.builders import (
    API_CODE,
    NOW,
    again,
    blocked,
    chunk,
    claim,
    claim_one,
    deliver,
    failed,
    finished,
    found,
    missing,
    settle,
    take_in,
)

ALL = Subscription("a", list(EventType))
EVENTS = "SELECT type, revision FROM event ORDER BY id"
FORWARDS = "SELECT endpoint, state, attempts FROM forward ORDER BY id"
MINUTE = 60_000


async def subscribe(store: Engine, *subscriptions: Subscription) -> None:
    await store.outbox.subscribe(subscriptions or (ALL,), "https://n.example.com", NOW)


async def due(store: Engine, endpoint: str = "a", *, now: int = NOW + MINUTE, n: int = 100) -> list[Outgoing]:
    return (await store.outbox.claim_deliveries([(endpoint, n)], now)).deliveries


def result(delivery: Outgoing, state: DeliveryState = DeliveryState.DELIVERED, **changes: Any) -> DeliveryResult:
    fields: dict[str, Any] = {
        "attempts": delivery.attempts + 1,
        "next_attempt_at": NOW + 5 * MINUTE if state is DeliveryState.PENDING else None,
        "status": 200 if state is DeliveryState.DELIVERED else 500,
        "error": None if state is DeliveryState.DELIVERED else "answered HTTP 500",
        "response": "ok",
        "started_at": NOW + MINUTE,
        "elapsed_ms": 1.5,
    }
    return DeliveryResult(delivery.id, delivery.endpoint, state, **fields | changes)


async def retry(store: Engine, delivery: Outgoing, **changes: Any) -> None:
    await store.outbox.record_deliveries([result(delivery, DeliveryState.PENDING, **changes)], NOW + MINUTE)


def data(delivery: Outgoing) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(delivery.payload)["data"]
    return loaded


# Events


async def test_verdict_has_an_event_in_its_transaction(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a"), finished("b"))
    assert await backend.rows(EVENTS) == []
    first, second = await claim(store)
    await store.record([found(first)], NOW)
    assert await backend.rows(EVENTS) == []
    (verdict,) = await store.record([found(second)], NOW)
    assert await backend.rows("SELECT id, type, revision, occurred_at FROM event") == [
        (verdict.event, "batch.complete", 1, NOW)
    ]
    assert verdict.revision == 1


async def test_payload_names_the_missing_files(store: Engine) -> None:
    await subscribe(store)
    await take_in(store, finished("a"), finished("b"), failed("c"), blocked("d"))
    first, second = await claim(store)
    await store.record([found(first), missing(second)], NOW)
    (delivery,) = await due(store)
    payload = json.loads(delivery.payload)
    data_ = payload["data"]
    assert (payload["type"], payload["timestamp"]) == ("batch.incomplete", "2025-10-09T08:53:20.123Z")
    assert (data_["batch_id"], data_["api_code"], data_["verdict"], data_["revision"]) == (
        "batch",
        API_CODE,
        "incomplete",
        1,
    )
    counts = [data_[name] for name in ("files", "available", "unavailable", "blocked", "upload_failed", "pending")]
    assert counts == [4, 1, 1, 1, 1, 0]
    assert [(f["oss_object_name"], f["state"], f["reason"]) for f in data_["missing"]] == [
        (second.target_url.rpartition("/")[2], "unavailable", "http_410"),
        ("c", "upload_failed", None),
        ("d", "blocked", "private_address"),
    ]
    assert data_["missing"][0]["last_attempt_at"] is not None
    assert data_["missing_total"] == 3
    assert (data_["previous"], data_["reference"], data_["expected_files"]) == (None, None, None)
    assert data_["url"].startswith("https://n.example.com/ui/batches/")


async def test_batch_that_is_settled_at_expansion_has_its_event(store: Engine, backend: Backend) -> None:
    (verdict,) = await take_in(store, failed("a"))
    assert verdict.revision == 1
    assert await backend.rows(EVENTS) == [("batch.incomplete", 1)]


async def test_same_verdict_again_has_no_event(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a"))
    (file,) = await claim(store)
    await store.record([found(file)], NOW)
    await store.recheck([file.id], NOW)
    (verdict,) = await settle(store)
    assert (verdict.event, verdict.revision) == (None, None)
    assert await backend.rows(EVENTS) == [("batch.complete", 1)]


async def test_changed_verdict_has_the_next_revision_and_the_previous_verdict(store: Engine, backend: Backend) -> None:
    await subscribe(store)
    await take_in(store, finished("a"))
    (file,) = await claim(store)
    await store.record([missing(file)], NOW)
    await store.recheck([file.id], NOW)
    (verdict,) = await settle(store)
    assert verdict.revision == 2
    assert await backend.rows(EVENTS) == [("batch.incomplete", 1), ("batch.complete", 2)]
    (delivery,) = await due(store)
    assert (data(delivery)["previous"], data(delivery)["revision"]) == ("incomplete", 2)


async def test_redelivery_that_changes_the_verdict_has_an_event(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a"))
    await settle(store)
    await take_in(store, failed("b"))
    assert await backend.rows(EVENTS) == [("batch.complete", 1), ("batch.incomplete", 2)]


async def test_discarded_rest_brings_the_event(store: Engine, backend: Backend) -> None:
    item = await deliver(store, 2)
    await store.expand([chunk(item, failed("a"), last=False)], NOW)
    assert await backend.rows(EVENTS) == []
    await store.discard(item, "cannot be read", NOW)
    assert await backend.rows(EVENTS) == [("batch.incomplete", 1)]


async def test_without_endpoints_there_are_events_and_no_deliveries(store: Engine, backend: Backend) -> None:
    await take_in(store, failed("a"))
    assert await backend.rows("SELECT count(*) FROM event") == [(1,)]
    assert await backend.rows(FORWARDS) == []


async def test_payload_never_holds_an_address(store: Engine) -> None:
    await subscribe(store)
    await take_in(store, finished("a", url="https://files.example.com/a?Signature=hush-hush"))
    (file,) = await claim(store)
    await store.record([missing(file)], NOW)
    (delivery,) = await due(store)
    assert b"hush" not in delivery.payload


# Subscriptions


async def test_events_go_to_those_who_subscribe(store: Engine, backend: Backend) -> None:
    await subscribe(
        store,
        Subscription("all", list(EventType)),
        Subscription("complete", ["batch.complete"]),
        Subscription("other", list(EventType), ["another.code"]),
        Subscription("mine", list(EventType), [API_CODE]),
    )
    await take_in(store, failed("a"))
    assert [row[0] for row in await backend.rows(FORWARDS)] == ["all", "mine"]


async def test_new_endpoint_starts_with_the_next_event(store: Engine, backend: Backend) -> None:
    await take_in(store, failed("a"), batch_id="before")
    await subscribe(store)
    await take_in(store, failed("a"), batch_id="after")
    (delivery,) = await due(store)
    assert delivery.subject == "after"


async def test_removed_endpoint_has_its_pending_deliveries_cancelled(store: Engine, backend: Backend) -> None:
    await subscribe(store, ALL, Subscription("b", list(EventType)))
    await take_in(store, failed("a"), batch_id="1")
    (delivery,) = await due(store, "a")
    await store.outbox.record_deliveries([result(delivery)], NOW)
    await take_in(store, failed("a"), batch_id="2")
    await subscribe(store, Subscription("b", list(EventType)))
    await backend.remove_endpoints()
    assert await backend.rows("SELECT endpoint, state FROM forward ORDER BY endpoint, id") == [
        ("a", "delivered"), ("a", "cancelled"), ("b", "pending"), ("b", "pending"),
    ]  # fmt: skip
    assert [state.name for state in await store.outbox.endpoint_states()] == ["b"]
    assert await due(store, "a") == []


async def test_recoveries_are_delivered_to_who_had_the_problem(store: Engine, backend: Backend) -> None:
    await subscribe(store, Subscription("bot", ["batch.incomplete"], delay_ms=30_000, recoveries=True))
    await take_in(store, finished("a"), batch_id="good")
    await settle(store)
    assert await backend.rows(FORWARDS) == []
    await take_in(store, finished("a"), batch_id="bad")
    (file,) = await claim(store)
    await store.record([missing(file)], NOW)
    assert await due(store, "bot", now=NOW + 29_999) == []
    (problem,) = await due(store, "bot", now=NOW + 30_000)
    await store.outbox.record_deliveries([result(problem)], NOW)
    assert len(await store.outbox.open_problems("bot")) == 1
    await store.recheck([file.id], NOW)
    await settle(store)
    assert await store.outbox.open_problems("bot") == []
    (recovery,) = await due(store, "bot")
    assert (recovery.type, recovery.subject) == ("batch.complete", "bad")


# Claiming and recording


async def test_claimed_delivery_is_not_claimed_twice(store: Engine) -> None:
    await subscribe(store)
    await take_in(store, failed("a"))
    (delivery,) = await due(store)
    assert await due(store) == []
    store.outbox.release_deliveries([delivery.id])
    (released,) = await due(store)
    assert released == delivery


async def test_claim_of_a_dead_daemon_is_free(store: Engine, backend: Backend) -> None:
    await subscribe(store)
    await take_in(store, failed("a"))
    (delivery,) = await due(store)
    store = await backend.reopen()
    (again_,) = await due(store)
    assert again_.key == delivery.key


async def test_at_most_so_many_are_claimed_the_oldest_first(store: Engine) -> None:
    await subscribe(store)
    for number in range(5):
        await take_in(store, failed("a"), batch_id=f"b{number}", now=NOW + number)
    assert [each.subject for each in await due(store, n=2)] == ["b0", "b1"]
    assert [each.subject for each in await due(store, n=9)] == ["b2", "b3", "b4"]


async def test_endpoints_do_not_share_a_queue(store: Engine) -> None:
    await subscribe(store, ALL, Subscription("b", list(EventType)))
    await take_in(store, failed("a"))
    claimed = await store.outbox.claim_deliveries([("a", 5), ("b", 5)], NOW)
    assert [each.endpoint for each in claimed.deliveries] == ["a", "b"]


async def test_outcome_is_kept_with_its_attempts(store: Engine, backend: Backend) -> None:
    await subscribe(store)
    await take_in(store, failed("a"))
    (delivery,) = await due(store)
    await retry(store, delivery, response="busy\x00")
    claimed = await store.outbox.claim_deliveries([("a", 5)], NOW + MINUTE)
    assert claimed.deliveries == []
    assert claimed.next_at == {"a": NOW + 5 * MINUTE}
    (later,) = await due(store, now=NOW + 5 * MINUTE)
    assert later.attempts == 1
    await store.outbox.record_deliveries([result(later)], NOW + 6 * MINUTE)
    assert await backend.rows(
        "SELECT state, attempts, next_attempt_at, last_status, last_error, last_response, delivered_at FROM forward"
    ) == [("delivered", 2, None, 200, None, "ok", NOW + 6 * MINUTE)]
    assert await backend.rows("SELECT status, error, total_ms FROM forward_attempt ORDER BY id") == [
        (500, "answered HTTP 500", 1.5), (200, None, 1.5),
    ]  # fmt: skip


async def test_result_that_was_not_sent_keeps_no_attempt(store: Engine, backend: Backend) -> None:
    await subscribe(store)
    await take_in(store, failed("a"))
    (delivery,) = await due(store)
    await store.outbox.record_deliveries([result(delivery, DeliveryState.SUPERSEDED, sent=False)], NOW)
    assert await backend.rows("SELECT count(*) FROM forward_attempt") == [(0,)]


# Order and supersession


async def reopen_and(store: Engine, file_id: int, outcome: Any) -> None:
    await store.recheck([file_id], NOW)
    (file,) = await claim(store)
    await store.record([outcome(file)], NOW)


async def test_newer_verdict_supersedes_the_undelivered_one(store: Engine, backend: Backend) -> None:
    await subscribe(store)
    await take_in(store, finished("a"))
    (file,) = await claim(store)
    await store.record([missing(file)], NOW)
    await reopen_and(store, file.id, found)
    await reopen_and(store, file.id, missing)
    assert await backend.rows(FORWARDS) == [("a", "superseded", 0), ("a", "superseded", 0), ("a", "pending", 0)]
    (delivery,) = await due(store)
    assert delivery.revision == 3


async def test_one_delivery_of_a_batch_is_in_flight_and_the_newer_waits(store: Engine, backend: Backend) -> None:
    await subscribe(store)
    await take_in(store, finished("a"))
    (file,) = await claim(store)
    await store.record([missing(file)], NOW)
    (first,) = await due(store)
    await reopen_and(store, file.id, found)
    assert await due(store) == []
    await store.outbox.record_deliveries([result(first)], NOW)
    (second,) = await due(store)
    assert (first.revision, second.revision) == (1, 2)
    assert [row[1] for row in await backend.rows(FORWARDS)] == ["delivered", "pending"]


async def test_delivery_that_fails_beside_a_newer_one_is_superseded(store: Engine, backend: Backend) -> None:
    await subscribe(store)
    await take_in(store, finished("a"))
    (file,) = await claim(store)
    await store.record([missing(file)], NOW)
    (first,) = await due(store)
    await reopen_and(store, file.id, found)
    await retry(store, first)
    assert [row[1] for row in await backend.rows(FORWARDS)] == ["superseded", "pending"]
    (second,) = await due(store)
    assert second.revision == 2


async def test_type_that_is_not_subscribed_supersedes_nothing(store: Engine, backend: Backend) -> None:
    await subscribe(store, Subscription("a", ["batch.incomplete"]))
    await take_in(store, finished("a"))
    (file,) = await claim(store)
    await store.record([missing(file)], NOW)
    await reopen_and(store, file.id, found)
    assert [row[1] for row in await backend.rows(FORWARDS)] == ["pending"]


# At risk


async def at_risk(store: Engine, *, before: int = NOW, now: int = NOW + 10 * MINUTE) -> int:
    return await store.outbox.find_at_risk(before, [1000, 2000, 3000], now)


async def test_old_batch_with_a_failed_attempt_is_at_risk_once(store: Engine, backend: Backend) -> None:
    await subscribe(store)
    await take_in(store, finished("a"), finished("b"))
    first, second = await claim(store)
    await store.record([again(first, NOW + 20 * MINUTE, attempts=1), found(second)], NOW)
    assert await at_risk(store, before=NOW - 1) == 0
    assert await at_risk(store) == 1
    assert await at_risk(store) == 0
    assert await backend.rows(EVENTS) == [("batch.at_risk", 1)]
    (delivery,) = await due(store, now=NOW + 20 * MINUTE)
    data_ = data(delivery)
    assert (data_["verdict"], data_["cause"], data_["pending"], data_["completed_at"]) == ("pending", "age", 1, None)
    assert data_["missing"][0]["reason"] == "timeout"
    assert data_["next_attempt_at"] == "2025-10-09T09:13:20.123Z"
    assert data_["final_by"] == "2025-10-09T09:13:22.123Z"
    records = await backend.records()
    (gate,) = await records.outbox.gate("batch", None)
    assert (gate.provisional, gate.next_attempt_at, gate.final_by) == (
        True, utc(NOW + 20 * MINUTE), utc(NOW + 20 * MINUTE + 2000),
    )  # fmt: skip
    await store.record([found(await claim_one(store, now=NOW + 20 * MINUTE))], NOW + 20 * MINUTE)
    (gate,) = await records.outbox.gate("batch", None)
    assert (gate.provisional, gate.next_attempt_at, gate.final_by) == (False, None, None)


async def test_batch_whose_files_only_wait_is_not_at_risk(store: Engine) -> None:
    await take_in(store, finished("a"))
    assert await at_risk(store) == 0
    file = await claim_one(store)
    store.release([file])
    assert await at_risk(store) == 0


async def test_file_that_was_rechecked_does_not_count_until_it_fails_again(store: Engine) -> None:
    await take_in(store, finished("a"))
    file = await claim_one(store)
    await store.record([again(file, NOW + MINUTE)], NOW)
    await store.recheck([file.id], NOW)
    assert await at_risk(store) == 0
    file = await claim_one(store)
    await store.record([again(file, NOW + MINUTE)], NOW)
    assert await at_risk(store) == 1


async def test_settled_batch_is_not_at_risk(store: Engine) -> None:
    await take_in(store, finished("a"))
    file = await claim_one(store)
    await store.record([again(file, NOW)], NOW)
    await settle(store)
    assert await at_risk(store) == 0


async def test_verdict_after_at_risk_raises_an_event_although_unchanged(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a"))
    (file,) = await claim(store)
    await store.record([found(file)], NOW)
    await store.recheck([file.id], NOW)
    (file,) = await claim(store)
    await store.record([again(file, NOW)], NOW)
    assert await at_risk(store) == 1
    await settle(store)
    assert await backend.rows(EVENTS) == [("batch.complete", 1), ("batch.at_risk", 2), ("batch.complete", 3)]


async def test_verdict_supersedes_at_risk(store: Engine, backend: Backend) -> None:
    await subscribe(store)
    await take_in(store, finished("a"))
    (file,) = await claim(store)
    await store.record([again(file, NOW)], NOW)
    await at_risk(store)
    await settle(store)
    assert [row[1] for row in await backend.rows(FORWARDS)] == ["superseded", "pending"]


# Endpoints


async def fail(store: Engine, times: int, **changes: Any) -> list[str]:
    notices = []
    for _ in range(times):
        (delivery,) = await due(store, n=1)
        outcome = result(delivery, DeliveryState.PENDING, next_attempt_at=NOW, **changes)
        notices += [notice.what for notice in await store.outbox.record_deliveries([outcome], NOW + MINUTE)]
    return notices


async def test_four_failures_in_a_row_are_an_event_for_the_others(store: Engine, backend: Backend) -> None:
    await subscribe(store, ALL, Subscription("b", ["endpoint.failing", "endpoint.recovered"]))
    await take_in(store, failed("a"))
    assert await fail(store, 3) == []
    assert await fail(store, 1) == ["failing"]
    assert await fail(store, 3) == []
    (event,) = await due(store, "b")
    assert (event.type, event.batch, event.revision, event.subject) == ("endpoint.failing", None, 0, None)
    assert data(event) == {
        "endpoint": "a", "failures": 4, "last_status": 500, "last_error": "answered HTTP 500", "pending": 1,
        "stopped": False,
    }  # fmt: skip
    await store.outbox.record_deliveries([result(event)], NOW)
    (delivery,) = await due(store)
    (notice,) = await store.outbox.record_deliveries([result(delivery)], NOW)
    assert notice.what == "recovered"
    (recovered,) = await due(store, "b")
    assert recovered.type == "endpoint.recovered"
    assert await backend.rows("SELECT count(*) FROM forward WHERE endpoint = 'a'") == [(1,)]


async def test_gone_endpoint_is_stopped_and_keeps_its_deliveries(store: Engine, backend: Backend) -> None:
    await subscribe(store)
    await take_in(store, failed("a"))
    assert await fail(store, 1, stop=True, status=410, error="answered HTTP 410") == ["stopped"]
    assert await due(store) == []
    (state,) = await store.outbox.endpoint_states()
    assert (state.stopped_at, state.stopped_reason) == (NOW + MINUTE, "answered HTTP 410")
    assert [row[1] for row in await backend.rows(FORWARDS)] == ["pending"]
    await take_in(store, failed("a"), batch_id="2")
    assert await store.outbox.stop_endpoint("a", None, NOW)
    assert len(await due(store)) == 2


async def test_five_days_of_failures_stop_an_endpoint(store: Engine) -> None:
    await subscribe(store)
    await take_in(store, failed("a"))
    await fail(store, 1)
    (delivery,) = await due(store)
    late = NOW + MINUTE + 5 * 86_400_000
    (notice,) = await store.outbox.record_deliveries([result(delivery, DeliveryState.FAILED)], late)
    assert notice.what == "stopped"


async def test_endpoint_stays_stopped_when_it_is_configured_again(store: Engine) -> None:
    await subscribe(store)
    assert await store.outbox.stop_endpoint("a", "by hand", NOW)
    await subscribe(store)
    (state,) = await store.outbox.endpoint_states()
    assert state.stopped_reason == "by hand"
    assert not await store.outbox.stop_endpoint("none", None, NOW)


async def test_ping_goes_to_one_endpoint_at_once(store: Engine) -> None:
    await subscribe(store, Subscription("a", [], delay_ms=30_000), Subscription("b", list(EventType)))
    id = await store.outbox.ping_endpoint("a", NOW)
    (delivery,) = await due(store, "a", now=NOW)
    assert (delivery.id, delivery.type) == (id, "test.ping")
    assert await due(store, "b") == []
    assert await store.outbox.ping_endpoint("none", NOW) is None


# Replay


async def replay(store: Engine, since: int = NOW, until: int = NOW + 1, *, dry_run: bool = False) -> int:
    return await store.outbox.replay_deliveries("a", since, until, NOW, dry_run)


async def test_replay_delivers_again_and_a_dry_run_only_counts(store: Engine, backend: Backend) -> None:
    await subscribe(store)
    for number in range(3):
        await take_in(store, failed("a"), batch_id=str(number), now=NOW + number)
    first, second, third = await due(store)
    await store.outbox.record_deliveries([result(first), result(second, DeliveryState.FAILED)], NOW)
    assert await replay(store, until=NOW + 10, dry_run=True) == 2
    assert [row[1] for row in await backend.rows(FORWARDS)] == ["delivered", "failed", "pending"]
    assert await replay(store, since=NOW + 1, until=NOW + 10) == 1
    (again_,) = await due(store)
    assert (again_.key, again_.attempts) == (second.key, 0)
    assert third.subject == "2"


async def test_replay_brings_what_came_before_the_endpoint(store: Engine) -> None:
    await take_in(store, failed("a"))
    await subscribe(store)
    assert await replay(store) == 1
    assert len(await due(store)) == 1
    assert await store.outbox.replay_deliveries("none", 0, NOW + 1, NOW, False) == 0


async def test_replay_brings_neither_tests_nor_failures_of_the_endpoint_itself(store: Engine) -> None:
    await subscribe(store, ALL, Subscription("b", ["endpoint.failing", "endpoint.recovered"]))
    await take_in(store, failed("a"))
    await fail(store, 4)
    await store.outbox.ping_endpoint("b", NOW)
    later = NOW + 60 * MINUTE
    assert await store.outbox.replay_deliveries("a", 0, later, later, True) == 0
    (failing,) = [each for each in await due(store, "b") if each.type == "endpoint.failing"]
    await store.outbox.record_deliveries([result(failing)], NOW)
    assert await store.outbox.replay_deliveries("b", 0, later, later, True) == 1


async def test_replay_brings_the_newest_event_of_a_batch_only(store: Engine) -> None:
    await take_in(store, finished("a"))
    (file,) = await claim(store)
    await store.record([missing(file)], NOW)
    await reopen_and(store, file.id, found)
    await subscribe(store)
    assert await replay(store) == 1
    (delivery,) = await due(store)
    assert delivery.revision == 2


# Pruning


async def test_events_go_with_their_batch(store: Engine, backend: Backend) -> None:
    await subscribe(store)
    await take_in(store, failed("a"))
    (delivery,) = await due(store)
    await retry(store, delivery)
    await store.outbox.ping_endpoint("a", NOW)
    while await store.prune(NOW + 1, NOW, 100):
        pass
    for table, left in (("event", 1), ("forward", 1), ("forward_attempt", 0), ("batch", 0)):
        assert await backend.rows(f"SELECT count(*) FROM {table}") == [(left,)]
    while await store.prune(NOW + 1, NOW + 1, 100):
        pass
    assert await backend.rows("SELECT count(*) FROM event") == [(0,)]
    assert await backend.rows("SELECT count(*) FROM forward") == [(0,)]
