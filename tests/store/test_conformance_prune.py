"""Pruning: which old rows are deleted, and which never are."""

from __future__ import annotations

from notify_server.store.base import Engine
from notify_server.store.reading.types import Prunable
from tests.store.backends import Backend, Row
from tests.store.builders import (
    NOW,
    again,
    chunk,
    claim,
    deliver,
    failed,
    finished,
    found,
    missing,
    rejection,
    request,
    take_in,
)

TABLES = ("notification", "batch", "file", "attempt", "rejection", "event")
LATER = NOW + 1_000_000


async def counts(backend: Backend) -> dict[str, int]:
    return {table: (await backend.rows(f"SELECT count(*) FROM {table}"))[0][0] for table in TABLES}


async def batches(backend: Backend) -> list[str]:
    return [batch_id for (batch_id,) in await backend.rows("SELECT batch_id FROM batch ORDER BY batch_id")]


async def prune_all(store: Engine, *, before: int, rejected_before: int = 0, limit: int = 100) -> list[int]:
    deleted = []
    while rows := await store.prune(before, rejected_before, limit):
        deleted.append(rows)
        assert len(deleted) < 1000
    return deleted


async def complete(store: Engine, batch_id: str, files: int, *, at: int, requests: int = 1) -> None:
    """A batch that was delivered and completed at this time."""
    await take_in(store, *(finished(str(n)) for n in range(files)), batch_id=batch_id, now=at, received_at=at)
    results = [found(file, requests=(request(),) * requests) for file in await claim(store, now=at)]
    await store.record(results, at)


async def test_what_would_be_pruned_is_counted_by_the_same_bounds(store: Engine, backend: Backend) -> None:
    await complete(store, "old", 3, at=NOW)
    await complete(store, "new", 2, at=NOW + 1)
    await store.reject(rejection(received_at=NOW))
    records = await backend.records()
    assert await records.prunable(NOW + 1, NOW) == Prunable(1, 3, 0)
    assert await records.prunable(NOW + 2, NOW + 1) == Prunable(2, 5, 1)


async def test_there_is_nothing_to_prune_in_an_empty_store(store: Engine) -> None:
    assert await store.prune(LATER, LATER, 10) == 0


async def test_a_batch_completed_before_is_deleted_with_its_files_attempts_and_deliveries(
    store: Engine, backend: Backend
) -> None:
    await complete(store, "old", 3, at=NOW, requests=2)
    await complete(store, "new", 2, at=NOW + 1)
    assert sum(await prune_all(store, before=NOW + 1)) == 1 + 1 + 3 + 6 + 1
    assert await batches(backend) == ["new"]
    assert await counts(backend) == {
        "notification": 1, "batch": 1, "file": 2, "attempt": 2, "rejection": 0, "event": 1,
    }  # fmt: skip
    assert await backend.rows("SELECT DISTINCT batch_id FROM file_result") == [("new",)]


async def test_a_batch_without_files_is_deleted_too(store: Engine, backend: Backend) -> None:
    await take_in(store, now=NOW)
    await prune_all(store, before=NOW)
    assert await batches(backend) == ["batch"]
    await prune_all(store, before=NOW + 1)
    assert await batches(backend) == []


async def test_a_batch_without_a_verdict_is_never_deleted_however_old(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a"), failed("b"), batch_id="waiting")
    await take_in(store, finished("a", host="b"), batch_id="trying")
    await store.record([again(file, NOW + 9) for file in await claim(store, "b")], NOW)
    await prune_all(store, before=LATER)
    assert await batches(backend) == ["trying", "waiting"]
    assert (await counts(backend))["file"] == 3


async def test_a_delivery_that_has_not_been_expanded_is_never_deleted_however_old(
    store: Engine, backend: Backend
) -> None:
    item = await deliver(store, received_at=NOW)
    await prune_all(store, before=LATER)
    assert await store.inbox(10) == [item]
    assert store.backlog == 1
    store = await backend.reopen()
    assert await store.inbox(10) == [item]
    assert store.backlog == 1


async def test_a_batch_is_not_deleted_while_one_of_its_deliveries_is_half_expanded(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, failed("a"), failed("b"))
    item = await deliver(store, 2, received_at=LATER)
    await store.expand([chunk(item, failed("a"), last=False)], LATER)
    await prune_all(store, before=LATER)
    await store.expand([chunk(item, failed("b"))], LATER)
    assert await backend.rows("SELECT files, upload_failed FROM batch_summary") == [(2, 2)]


async def test_deliveries_received_before_are_deleted_and_later_ones_kept(store: Engine, backend: Backend) -> None:
    for n in range(6):
        await take_in(store, finished(), received_at=NOW + n)
    await prune_all(store, before=NOW + 4, limit=2)
    assert await backend.rows("SELECT received_at FROM notification ORDER BY id") == [(NOW + 4,), (NOW + 5,)]


async def test_rejections_received_before_are_deleted_by_a_time_of_their_own(store: Engine, backend: Backend) -> None:
    for n in range(6):
        await store.reject(rejection(received_at=NOW + n))
    await take_in(store, failed(), now=NOW, received_at=NOW)
    assert await prune_all(store, before=0, rejected_before=NOW + 4, limit=3) == [3, 1]
    assert await backend.rows("SELECT received_at FROM rejection ORDER BY id") == [(NOW + 4,), (NOW + 5,)]
    assert await batches(backend) == ["batch"]


async def test_the_oldest_batches_go_first(store: Engine, backend: Backend) -> None:
    for at in (3, 1, 2):
        await complete(store, f"completed {at}", 1, at=NOW + at)
    seen = [await batches(backend)]
    while await store.prune(LATER, 0, 1):
        if seen[-1] != (left := await batches(backend)):
            seen.append(left)
    assert seen == [
        ["completed 1", "completed 2", "completed 3"],
        ["completed 2", "completed 3"],
        ["completed 3"],
        [],
    ]


async def test_each_call_deletes_about_the_given_number_of_rows_and_repeated_calls_finish(
    store: Engine, backend: Backend
) -> None:
    for n in range(10):
        await complete(store, f"small {n}", 5, at=NOW)
    await complete(store, "large", 200, at=NOW, requests=8)
    for n in range(40):
        await store.reject(rejection(received_at=NOW + n))
    there = sum((await counts(backend)).values())
    deleted = await prune_all(store, before=LATER, rejected_before=LATER, limit=50)
    assert sum(deleted) == there
    assert await counts(backend) == dict.fromkeys(TABLES, 0)
    # Each kind of row has the limit to itself, and a file goes with the attempts on it.
    assert max(deleted) <= 3 * 50 + 8
    assert await store.prune(LATER, LATER, 50) == 0


async def grouped(backend: Backend) -> list[Row]:
    return await backend.rows(
        "SELECT batch.id, count(file.id), "
        + ", ".join(
            f"count(CASE WHEN state = '{state}' THEN 1 END)"
            for state in ("pending", "available", "unavailable", "blocked", "upload_failed")
        )
        + " FROM batch LEFT JOIN file ON file.batch = batch.id GROUP BY batch.id ORDER BY batch.id"
    )


async def test_counters_stay_true_while_a_batch_is_deleted_in_parts(store: Engine, backend: Backend) -> None:
    await take_in(store, *(failed(f"f{n}") for n in range(10)), *(finished(f"k{n}") for n in range(20)))
    files = await claim(store)
    await store.record([found(file) if n % 3 else missing(file) for n, file in enumerate(files)], NOW)
    seen = 0
    while await store.prune(LATER, 0, 7):
        counters = await backend.rows(
            "SELECT id, files, pending, available, unavailable, blocked, upload_failed FROM batch ORDER BY id"
        )
        assert counters == await grouped(backend)
        seen += len(counters)
    assert seen > 2
    assert await counts(backend) == dict.fromkeys(TABLES, 0)


async def test_a_batch_redelivered_while_it_is_deleted_in_parts_gets_its_deleted_files_back(
    store: Engine, backend: Backend
) -> None:
    files = [failed(str(n)) for n in range(30)]
    await take_in(store, *files)
    await store.prune(LATER, 0, 10)
    (verdict,) = await take_in(store, *files, now=LATER, received_at=LATER)
    assert verdict.files == 30
    await prune_all(store, before=LATER)
    assert await backend.rows("SELECT files, upload_failed FROM batch_summary") == [(30, 30)]


async def test_pruning_changes_neither_the_backlog_nor_what_can_be_claimed(store: Engine, backend: Backend) -> None:
    await complete(store, "old", 5, at=NOW)
    await take_in(store, finished("a"), finished("b"), batch_id="new")
    (held,) = await claim(store, n=1)
    await prune_all(store, before=LATER)
    assert store.backlog == 2
    (other,) = await claim(store)
    assert other.id != held.id
    assert (await backend.reopen()).backlog == 2


async def test_rejections_are_still_bounded_after_pruning(store: Engine, backend: Backend) -> None:
    for n in range(5):
        await store.reject(rejection(received_at=NOW + n))
    await prune_all(store, before=0, rejected_before=NOW + 3)
    await store.reject(rejection(received_at=NOW + 5))
    assert (await counts(backend))["rejection"] == 3
