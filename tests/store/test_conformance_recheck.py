"""Files that are rechecked on request."""

from __future__ import annotations

import asyncio

import pytest
from msgspec import structs

from notify_server.model import FileState, HostDue, Reason, Restart, Verdict
from notify_server.store.base import Engine
from tests.store.backends import FILES, NO_EVIDENCE, Backend, Row, states, summary
from tests.store.builders import (
    HOST,
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

NOTHING = Restart(0, frozenset())
LATER = NOW + 1000


async def ids(backend: Backend) -> dict[str, int]:
    return dict(await backend.rows("SELECT oss_object_name, id FROM file"))


async def tables(backend: Backend) -> list[list[Row]]:
    return [await backend.rows(f"SELECT * FROM {table} ORDER BY id") for table in ("batch", "file", "attempt")]


@pytest.mark.parametrize(
    "outcome",
    [
        found,
        missing,
        lambda file: found(file, state=FileState.BLOCKED, reason="private_address"),
        lambda file: again(file, NOW + 60_000),
    ],
    ids=["available", "unavailable", "blocked", "waiting"],
)
async def test_a_file_in_any_state_is_pending_at_once_with_nothing_known_and_no_attempt_spent(
    store: Engine, backend: Backend, outcome: object
) -> None:
    assert callable(outcome)
    await take_in(store, finished())
    file = await claim_one(store)
    await store.record([outcome(file)], NOW)
    assert await store.recheck([file.id], LATER) == Restart(1, frozenset({HOST}))
    assert await backend.rows(FILES) == [
        ("key", f"https://{HOST}/key", HOST, "FINISHED", "pending", None, 0, LATER, *NO_EVIDENCE, None)
    ]
    assert await backend.rows("SELECT count(*) FROM attempt") == [(1,)]
    assert await store.due_hosts("", 9) == [HostDue(HOST, LATER)]
    assert await claim_one(store, now=LATER) == file


async def test_a_file_that_the_guard_had_refused_is_requested_at_its_own_host(store: Engine, backend: Backend) -> None:
    await take_in(store, blocked())
    restart = await store.recheck([(await ids(backend))["key"]], LATER)
    assert restart == Restart(1, frozenset({"127.0.0.1"}))
    assert [file.target_url for file in await claim(store, "127.0.0.1", now=LATER)] == ["https://127.0.0.1/key"]


async def test_a_file_that_cannot_be_requested_stays_as_it_is(store: Engine, backend: Backend) -> None:
    refused = structs.replace(blocked("c", url="https://["), host="", reason=Reason.INVALID_URL)
    await take_in(store, failed("a"), failed("b", url="https://files.example.com/b"), refused)
    before = await tables(backend)
    wanted = [*(await ids(backend)).values(), 0, -1, 10**6, 2**63, 2**64, 10**30, -(2**63) - 1]
    assert await store.recheck(wanted, LATER) == NOTHING
    assert await store.recheck([], LATER) == NOTHING
    assert await tables(backend) == before
    assert store.backlog == 0


async def test_counters_the_verdict_and_the_backlog_follow_and_a_verdict_comes_again(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, *map(finished, "abc"), blocked("d"), failed("e"), now=NOW)
    first, second, third = await claim(store)
    await store.record([found(first), missing(second), found(third)], NOW)
    assert await summary(backend) == [("batch", "incomplete", 5, 0, 2, 1, 1, 1)]

    id = await ids(backend)
    assert await store.recheck([id["a"], id["b"], id["d"]], LATER) == Restart(3, frozenset({HOST, "127.0.0.1"}))
    assert await summary(backend) == [("batch", "pending", 5, 3, 1, 0, 0, 1)]
    assert await backend.rows("SELECT completed_at FROM batch") == [(None,)]
    assert store.backlog == 3
    assert (await backend.reopen()).backlog == 3

    store = await backend.reopen()
    assert await settle(store, now=LATER) == []
    (verdict,) = await store.record([found(await claim_one(store, "127.0.0.1", now=LATER))], LATER + 7)
    assert (verdict.verdict, verdict.available, verdict.completed_at) == (Verdict.INCOMPLETE, 4, LATER + 7)
    assert await summary(backend) == [("batch", "incomplete", 5, 0, 4, 0, 0, 1)]
    assert store.backlog == 0


async def test_each_batch_gets_back_its_own_files_however_many_there_are(store: Engine, backend: Backend) -> None:
    for n in range(300):
        await take_in(store, *(finished(f"{m}") for m in range(1 + n % 3)), batch_id=f"{n:03}")
    await settle(store)
    every = [id for (id,) in await backend.rows("SELECT id FROM file")]
    assert await store.recheck([*every, *every], LATER) == Restart(600, frozenset({HOST}))
    assert await summary(backend) == [
        (f"{n:03}", "pending", 1 + n % 3, 1 + n % 3, 0, 0, 0, 0) for n in range(300)
    ]  # fmt: skip
    assert len(await settle(store, now=LATER)) == 300


async def test_the_result_of_a_file_in_flight_is_dropped_and_it_is_requested_again(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, finished("a"), finished("b"))
    first, second = await claim(store)
    assert await store.recheck([first.id], LATER) == Restart(1, frozenset({HOST}))
    # Nobody else gets it before its old attempt has ended.
    assert await claim(store, now=LATER) == []
    assert await store.record([missing(first), found(second)], LATER) == []
    assert [state for *_, state in await states(backend)] == ["pending", "available"]
    assert await backend.rows("SELECT count(*) FROM attempt WHERE file = 1") == [(0,)]
    assert store.backlog == 1
    assert await claim_one(store, now=LATER) == first
    (verdict,) = await store.record([found(first)], LATER)
    assert (verdict.verdict, verdict.available) == (Verdict.COMPLETE, 2)
    assert store.backlog == 0


async def test_a_file_in_flight_that_is_rechecked_can_be_released(store: Engine) -> None:
    await take_in(store, finished())
    file = await claim_one(store)
    await store.recheck([file.id], LATER)
    store.release([file])
    assert await claim_one(store, now=LATER) == file
    (verdict,) = await store.record([found(file)], LATER)
    assert verdict.verdict is Verdict.COMPLETE


async def test_rechecking_and_recording_a_file_at_once_leaves_counters_that_are_true(
    store: Engine, backend: Backend
) -> None:
    for n in range(20):
        await take_in(store, finished(), batch_id=str(n))
        file = await claim_one(store)
        calls = [store.record([found(file)], NOW), store.recheck([file.id], NOW)]
        await asyncio.gather(*(calls if n % 2 else reversed(calls)))
        assert await backend.rows(f"SELECT pending, available, verdict FROM batch WHERE id = {file.batch}") == [
            (1, 0, "pending")
        ]
        assert store.backlog == 1
        assert await claim_one(store) == file
        assert len(await store.record([found(file)], NOW)) == 1


async def test_rechecking_twice_counts_twice_and_changes_once(store: Engine, backend: Backend) -> None:
    await take_in(store, finished())
    await settle(store)
    for _ in range(2):
        assert await store.recheck([1], LATER) == Restart(1, frozenset({HOST}))
        assert await summary(backend) == [("batch", "pending", 1, 1, 0, 0, 0, 0)]
        assert store.backlog == 1
    assert len(await settle(store, now=LATER)) == 1


async def test_a_batch_that_is_being_expanded_has_no_verdict_before_both_are_done(
    store: Engine, backend: Backend
) -> None:
    item = await deliver(store, 2)
    await store.expand([chunk(item, finished("a"), last=False)], NOW)
    assert await settle(store) == []
    await store.recheck([1], LATER)
    assert await settle(store, now=LATER) == []
    await store.recheck([1], LATER)
    assert await store.expand([chunk(item, failed("b"))], LATER) == []
    assert await summary(backend) == [("batch", "pending", 2, 1, 0, 0, 0, 1)]
    (verdict,) = await settle(store, now=LATER)
    assert (verdict.verdict, verdict.files) == (Verdict.INCOMPLETE, 2)
    assert store.backlog == 0


async def test_a_batch_under_recheck_is_not_pruned(store: Engine, backend: Backend) -> None:
    await take_in(store, finished())
    await settle(store)
    await store.recheck([1], LATER)
    while await store.prune(LATER, LATER, 100):
        pass
    assert await summary(backend) == [("batch", "pending", 1, 1, 0, 0, 0, 0)]


DAY_MS = 86_400_000


async def test_files_that_wait_for_longer_than_the_limit_become_due_and_spend_nothing(
    store: Engine, backend: Backend
) -> None:
    """Row 132: their next attempt was written while the clock was 400 days ahead."""
    await take_in(store, finished("late"), finished("soon"), finished("settled"))
    late, soon, settled = await claim(store)
    results = [
        again(late, NOW + 400 * DAY_MS), again(soon, NOW + DAY_MS), found(settled)
    ]  # fmt: skip
    await store.record(results, NOW)
    assert await store.make_due(NOW + 400 * DAY_MS, NOW, 10) == Restart(0, frozenset())
    assert await store.make_due(NOW + DAY_MS, NOW, 10) == Restart(1, frozenset({HOST}))
    assert await store.make_due(NOW + DAY_MS, NOW, 10) == Restart(0, frozenset())
    rows = await backend.rows("SELECT oss_object_name, state, attempts, next_attempt_at FROM file ORDER BY 1")
    assert rows == [
        ("late", "pending", 1, NOW), ("settled", "available", 1, None), ("soon", "pending", 1, NOW + DAY_MS)
    ]  # fmt: skip
    assert [file.id for file in await claim(store)] == [late.id]


async def test_files_of_many_hosts_become_due_a_limited_number_at_a_time(store: Engine) -> None:
    for host in ("a.example", "b.example", "c.example"):
        await take_in(store, *(finished(f"{n}", host=host) for n in range(3)), batch_id=host)
        files = await claim(store, host)
        await store.record([again(file, NOW + 400 * DAY_MS) for file in files], NOW)
    made = [await store.make_due(NOW + DAY_MS, NOW, 4) for _ in range(4)]
    assert [each.files for each in made] == [4, 4, 1, 0]
    assert frozenset().union(*(each.hosts for each in made)) == {"a.example", "b.example", "c.example"}
