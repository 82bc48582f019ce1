"""When a batch gets its verdict, and when it loses it again; and files that change while an attempt is under way."""

from __future__ import annotations

import asyncio

import pytest

from notify_server.model import BatchVerdict, FileState, Verdict
from notify_server.store.base import Engine, NewFile
from tests.store.backends import EVIDENCE, FILES, NO_EVIDENCE, Backend, summary
from tests.store.builders import (
    API_CODE,
    HOST,
    NOW,
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

# Verdicts


async def test_a_delivery_without_files_is_complete_at_once(store: Engine, backend: Backend) -> None:
    item = await deliver(store, 0, received_at=NOW, request_id="r")
    (verdict,) = await store.expand([chunk(item)], NOW + 5)
    (id,) = [id for (id,) in await backend.rows("SELECT id FROM batch")]
    assert verdict == BatchVerdict(
        id, "batch", API_CODE, Verdict.COMPLETE, 0, 0, NOW, NOW + 5, "r", event=1, revision=1
    )
    assert await backend.rows("SELECT verdict, completed_at FROM batch") == [("complete", NOW + 5)]
    assert await take_in(store) == []


async def test_a_delivery_whose_files_all_failed_or_are_blocked_is_incomplete_at_once(
    store: Engine, backend: Backend
) -> None:
    (verdict,) = await take_in(store, failed("a"), blocked("b"), received_at=NOW, now=NOW + 5, request_id="r")
    (id,) = [id for (id,) in await backend.rows("SELECT id FROM batch")]
    assert verdict == BatchVerdict(
        id, "batch", API_CODE, Verdict.INCOMPLETE, 2, 0, NOW, NOW + 5, "r", event=1, revision=1
    )
    assert await backend.rows("SELECT verdict, completed_at FROM batch") == [("incomplete", NOW + 5)]


async def test_a_verdict_names_the_latest_delivery_of_its_batch(store: Engine) -> None:
    traceparent = f"00-{'4b' * 16}-{'0f' * 8}-01"
    await take_in(store, finished("a"), request_id="first")
    (verdict,) = await settle(store)
    assert (verdict.request_id, verdict.traceparent) == ("first", None)
    await take_in(store, finished("a"), finished("b"), request_id="second", traceparent=traceparent)
    (verdict,) = await settle(store)
    assert (verdict.request_id, verdict.traceparent) == ("second", traceparent)


async def test_a_verdict_names_no_delivery_that_is_not_kept_any_more(store: Engine, backend: Backend) -> None:
    await take_in(store, finished(), request_id="gone")
    await store.prune(NOW + 1, NOW + 1, 100)
    assert await backend.rows("SELECT count(*) FROM notification") == [(0,)]
    (verdict,) = await settle(store)
    assert (verdict.request_id, verdict.traceparent) == (None, None)


async def test_a_batch_has_no_verdict_while_one_of_its_files_is_pending(store: Engine) -> None:
    assert await take_in(store, failed("a"), finished("b")) == []


async def test_a_batch_has_no_verdict_before_the_last_files_of_its_delivery_are_in(
    store: Engine, backend: Backend
) -> None:
    item = await deliver(store, 3)
    assert await store.expand([chunk(item, failed("a"), last=False)], NOW) == []
    assert await store.expand([chunk(item, finished("b"), last=False)], NOW) == []
    assert await settle(store) == []
    assert await backend.rows("SELECT verdict, completed_at FROM batch") == [("pending", None)]
    (verdict,) = await store.expand([chunk(item)], NOW + 9)
    assert (verdict.files, verdict.available, verdict.completed_at) == (2, 1, NOW + 9)


async def test_a_redelivery_that_is_half_expanded_takes_no_verdict_away_unless_it_brings_something_new(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, failed("a"))
    item = await deliver(store, 2)
    assert await store.expand([chunk(item, failed("a"), last=False)], NOW + 1) == []
    assert await backend.rows("SELECT verdict, completed_at FROM batch") == [("incomplete", NOW)]
    (verdict,) = await store.expand([chunk(item, failed("b"))], NOW + 2)
    assert (verdict.files, verdict.completed_at) == (2, NOW + 2)


@pytest.mark.parametrize("newcomer", [finished("b"), finished("a", url="https://h/other", host=HOST)])
async def test_a_batch_that_had_its_verdict_is_pending_again_when_it_has_a_file_to_wait_for(
    store: Engine, backend: Backend, newcomer: NewFile
) -> None:
    await take_in(store, finished("a"))
    (first,) = await settle(store)
    assert first.verdict is Verdict.COMPLETE
    assert await take_in(store, newcomer, now=NOW + 10) == []
    assert await backend.rows("SELECT verdict, completed_at FROM batch") == [("pending", None)]
    (second,) = await store.record([missing(await claim_one(store, now=NOW + 10))], NOW + 20)
    assert (second.verdict, second.completed_at) == (Verdict.INCOMPLETE, NOW + 20)


async def test_a_complete_batch_is_incomplete_once_a_file_that_failed_is_added(store: Engine) -> None:
    await take_in(store, finished("a"))
    await settle(store)
    (verdict,) = await take_in(store, failed("b"), received_at=NOW + 2, now=NOW + 10)
    assert (verdict.verdict, verdict.files, verdict.available) == (Verdict.INCOMPLETE, 2, 1)


async def test_a_verdict_that_is_returned_is_the_one_that_is_committed(store: Engine, backend: Backend) -> None:
    items = [await deliver(store, batch_id=name) for name in ("x", "y", "x", "y")]
    verdicts = await store.expand(
        [
            chunk(items[0], failed("a"), batch_id="x"),
            chunk(items[1], failed("a"), batch_id="y"),
            chunk(items[2], finished("b"), batch_id="x"),
            chunk(items[3], failed("b"), batch_id="y"),
        ],
        NOW,
    )
    assert [(verdict.batch_id, verdict.files) for verdict in verdicts] == [("y", 2)]
    assert await backend.rows("SELECT batch_id, verdict FROM batch ORDER BY batch_id") == [
        ("x", "pending"),
        ("y", "incomplete"),
    ]


async def test_each_batch_of_a_transaction_gets_its_own_verdict(store: Engine) -> None:
    names = [f"batch {n}" for n in range(40)]
    items = [await deliver(store, batch_id=name) for name in names]
    verdicts = await store.expand(
        [
            chunk(item, *([failed()] if n % 2 else []), batch_id=name)
            for n, (item, name) in enumerate(zip(items, names, strict=True))
        ],
        NOW,
    )
    assert {verdict.batch_id: verdict.verdict for verdict in verdicts} == {
        name: Verdict.INCOMPLETE if n % 2 else Verdict.COMPLETE for n, name in enumerate(names)
    }


# Expansion and attempts at the same time


@pytest.mark.parametrize("host", [HOST, "new.example"])
@pytest.mark.parametrize("state", [FileState.AVAILABLE, FileState.UNAVAILABLE])
async def test_the_result_of_a_file_that_started_over_since_its_claim_is_dropped(
    store: Engine, backend: Backend, host: str, state: FileState
) -> None:
    await take_in(store, finished())
    stale = await claim_one(store)
    await take_in(store, finished(url="https://new.example/key", host=host), now=NOW + 10)
    before = await backend.rows(FILES)
    assert await store.record([found(stale, state=state)], NOW + 20) == []
    assert await backend.rows(FILES) == before
    assert await backend.rows("SELECT count(*) FROM attempt") == [(0,)]
    assert store.backlog == 1
    file = await claim_one(store, host, now=NOW + 20)
    (verdict,) = await store.record([found(file)], NOW + 30)
    assert verdict.verdict is Verdict.COMPLETE


async def test_a_file_that_started_over_on_another_host_is_claimed_only_after_its_old_attempt_has_ended(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, finished())
    stale = await claim_one(store)
    await take_in(store, finished(url="https://new.example/key", host="new.example"), now=NOW + 10)
    assert await claim(store, "new.example", now=NOW + 10) == []
    await store.record([found(stale, http_status=202)], NOW + 20)
    file = await claim_one(store, "new.example", now=NOW + 20)
    await store.record([found(file, http_status=201)], NOW + 30)
    assert await backend.rows("SELECT state, http_status, attempts FROM file") == [("available", 201, 1)]


async def test_old_and_new_attempts_at_a_file_never_speak_for_one_another(store: Engine, backend: Backend) -> None:
    await take_in(store, finished())
    stale = await claim_one(store)
    await take_in(store, finished(url="https://new.example/key", host="new.example"), now=NOW + 10)
    early = await claim(store, "new.example", now=NOW + 10)
    await store.record([found(file, http_status=201) for file in early], NOW + 20)
    await store.record([found(stale, http_status=202)], NOW + 20)
    late = await claim(store, "new.example", now=NOW + 20)
    await store.record([found(file, http_status=201) for file in late], NOW + 30)
    assert await backend.rows("SELECT state, http_status, attempts FROM file") == [("available", 201, 1)]
    assert await summary(backend) == [("batch", "complete", 1, 0, 1, 0, 0, 0)]
    assert store.backlog == 0


async def test_a_file_that_was_blocked_while_it_was_claimed_stays_blocked(store: Engine, backend: Backend) -> None:
    await take_in(store, finished())
    stale = await claim_one(store)
    (verdict,) = await take_in(store, blocked(), now=NOW + 10)
    assert verdict.verdict is Verdict.INCOMPLETE
    assert await store.record([found(stale)], NOW + 20) == []
    assert await summary(backend) == [("batch", "incomplete", 1, 0, 0, 0, 1, 0)]
    assert store.backlog == 0


async def test_the_claim_of_a_file_that_started_over_can_be_released(store: Engine) -> None:
    await take_in(store, finished())
    stale = await claim_one(store)
    await take_in(store, finished(url="https://new.example/key", host="new.example"), now=NOW + 10)
    store.release([stale])
    file = await claim_one(store, "new.example", now=NOW + 10)
    (verdict,) = await store.record([found(file)], NOW + 20)
    assert verdict.available == 1


async def test_the_identical_delivery_does_not_void_a_claim(store: Engine) -> None:
    await take_in(store, finished())
    file = await claim_one(store)
    await take_in(store, finished(), failed())
    (verdict,) = await store.record([found(file)], NOW)
    assert verdict.verdict is Verdict.COMPLETE


@pytest.mark.parametrize("first", ["expand", "record"])
async def test_expanding_and_recording_one_file_at_once_restarts_it_with_correct_counters(
    store: Engine, backend: Backend, first: str
) -> None:
    for n in range(20):
        name = f"batch {n}"
        await take_in(store, finished(), batch_id=name, now=NOW + n)
        file = await claim_one(store, now=NOW + n)
        item = await deliver(store, batch_id=name)
        changed = chunk(item, finished(url="https://new.example/key", host="new.example"), batch_id=name)
        calls = [store.expand([changed], NOW + n), store.record([found(file)], NOW + n)]
        await asyncio.gather(*(calls if first == "expand" else reversed(calls)))
        assert await backend.rows(
            f"SELECT target_url, state, attempts, next_attempt_at, {EVIDENCE} FROM file"
            f" WHERE batch = (SELECT id FROM batch WHERE batch_id = '{name}')"
        ) == [("https://new.example/key", "pending", 0, NOW + n, *NO_EVIDENCE, None)]
        assert store.backlog == n + 1
    assert {row[1:] for row in await summary(backend)} == {("pending", 1, 1, 0, 0, 0, 0)}
    assert len(await claim(store, "new.example", now=NOW + 100)) == 20
