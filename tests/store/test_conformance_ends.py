"""batch.expiring: files whose address or object ends soon. Both stores are held to the same."""

from __future__ import annotations

import json
from typing import Any

from notify_server.events.payload import EventType
from notify_server.store.base import Engine
from notify_server.store.outbox import Subscription
from tests.store.backends import Backend
from tests.store.builders import NOW, blocked, chunk, claim, deliver, failed, finished, found, missing, take_in
from tests.store.test_conformance_outbox import EVENTS, due, result, subscribe

DAY = 86_400_000
HOUR = 3_600_000
# 2025-10-11, two days after NOW.
OBJECT_ENDS = 1_760_140_800_000
DELETED = '["deleted_on:2025-10-11"]'


async def look(store: Engine, *, now: int = NOW, before: int = DAY) -> int:
    return await store.outbox.find_expiring(now + before, now)


async def payload(backend: Backend) -> dict[str, Any]:
    ((text,),) = await backend.rows("SELECT payload FROM event WHERE type = 'batch.expiring'")
    loaded: dict[str, Any] = json.loads(text)["data"]
    return loaded


async def test_address_that_ends_soon_is_an_event_once(store: Engine, backend: Backend) -> None:
    await take_in(
        store, finished("late", expires_at=NOW + 2 * DAY), finished("b", expires_at=NOW + DAY),
        finished("a", expires_at=NOW + HOUR), finished("never"),
    )  # fmt: skip
    assert await look(store) == 1
    assert await look(store) == 0
    assert await backend.rows(EVENTS) == [("batch.expiring", 1)]
    told = await payload(backend)
    assert [(each["oss_object_name"], each["what"]) for each in told["ending"]] == [("a", "address"), ("b", "address")]
    assert (told["ending_total"], told["ends_at"]) == (2, "2025-10-09T09:53:20.123Z")
    assert told["ending"][0]["ends_at"] == told["ends_at"]
    assert (told["verdict"], told["files"], told["pending"]) == ("pending", 4, 4)
    assert await backend.rows("SELECT expiring_at FROM batch") == [(NOW,)]


async def test_batch_is_looked_at_again_when_its_next_address_ends(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a", expires_at=NOW + 3 * DAY))
    assert await look(store) == 0
    assert await look(store, now=NOW + 2 * DAY - 1) == 0
    assert await look(store, now=NOW + 2 * DAY) == 1
    assert await backend.rows(EVENTS) == [("batch.expiring", 1)]


async def test_address_that_has_ended_is_left_to_the_verdict(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a", expires_at=NOW - 1), finished("b", expires_at=NOW + 3 * DAY))
    assert await look(store) == 1
    assert await look(store) == 0
    assert await backend.rows(EVENTS) == []
    assert await look(store, now=NOW + 2 * DAY + 1) == 1
    assert await backend.rows(EVENTS) == [("batch.expiring", 1)]


async def test_only_pending_and_available_files_count(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a", expires_at=NOW + HOUR), failed("b"), blocked("c"))
    (file,) = await claim(store)
    await store.record([missing(file)], NOW)
    assert await look(store) == 1
    assert await backend.rows(EVENTS) == [("batch.incomplete", 1)]
    assert await look(store) == 0


async def test_address_of_an_available_file_counts(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a", expires_at=NOW + HOUR))
    (file,) = await claim(store)
    await store.record([found(file)], NOW)
    assert await look(store) == 1
    assert await backend.rows(EVENTS) == [("batch.complete", 1), ("batch.expiring", 2)]
    assert (await payload(backend))["verdict"] == "complete"


async def test_object_with_a_deletion_date_counts(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a"), finished("b", expires_at=OBJECT_ENDS + HOUR))
    await store.record([found(file, flags=DELETED) for file in await claim(store)], NOW)
    assert await look(store, now=OBJECT_ENDS - DAY - 1) == 0
    assert await look(store, now=OBJECT_ENDS - DAY) == 1
    told = await payload(backend)
    assert {(each["oss_object_name"], each["what"]) for each in told["ending"]} == {("a", "object"), ("b", "object")}
    assert told["ends_at"] == "2025-10-11T00:00:00.000Z"
    assert [type for type, _ in await backend.rows(EVENTS)] == ["batch.complete", "batch.expiring"]


async def test_fresh_address_postpones_the_warning(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a", expires_at=NOW + 2 * DAY))
    await take_in(store, finished("a", url="https://files.example.com/a?fresh", expires_at=NOW + 9 * DAY))
    assert await look(store, now=NOW + DAY) == 1
    assert await backend.rows(EVENTS) == []
    assert await look(store, now=NOW + 8 * DAY) == 1
    assert await backend.rows(EVENTS) == [("batch.expiring", 1)]


async def test_redelivery_with_addresses_is_looked_at(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a"))
    assert await look(store) == 0
    await take_in(store, finished("a"), finished("b", expires_at=NOW + HOUR))
    assert await look(store) == 1
    assert await backend.rows(EVENTS) == [("batch.expiring", 1)]


async def test_batch_that_is_still_expanded_waits(store: Engine, backend: Backend) -> None:
    item = await deliver(store, 2)
    await store.expand([chunk(item, finished("a", expires_at=NOW + HOUR), last=False)], NOW)
    assert await look(store) == 0
    await store.expand([chunk(item, finished("b", expires_at=NOW + HOUR))], NOW)
    assert await look(store) == 1
    assert await backend.rows(EVENTS) == [("batch.expiring", 1)]


async def test_warning_is_no_problem_that_must_end(store: Engine, backend: Backend) -> None:
    problems = Subscription("a", [EventType.BATCH_EXPIRING, EventType.BATCH_INCOMPLETE], recoveries=True)
    await subscribe(store, problems)
    await take_in(store, finished("a", expires_at=NOW + HOUR))
    assert await look(store) == 1
    (delivery,) = await due(store)
    await store.outbox.record_deliveries([result(delivery)], NOW)
    assert await store.outbox.open_problems("a") == []
    (file,) = await claim(store)
    await store.record([found(file)], NOW)
    assert await due(store) == []
    await store.recheck([file.id], NOW)
    (file,) = await claim(store)
    await store.record([missing(file)], NOW)
    (delivery,) = await due(store)
    assert delivery.type == "batch.incomplete"
    await store.outbox.record_deliveries([result(delivery)], NOW)
    assert len(await store.outbox.open_problems("a")) == 1


async def test_many_files_are_listed_as_far_as_a_payload_has_room(store: Engine, backend: Backend) -> None:
    files = [finished(f"{number:04}" + "k" * 1000, url="https://files.example.com/k", expires_at=NOW + HOUR)
             for number in range(120)]  # fmt: skip
    await take_in(store, *files)
    assert await look(store) == 1
    told = await payload(backend)
    assert told["ending_total"] == told["missing_total"] == 120
    assert 0 < len(told["ending"]) < 50
    assert 0 < len(told["missing"]) < 50
