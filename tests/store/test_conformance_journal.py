"""Every engine keeps actions, acknowledgements and the samples of the charts alike."""

from __future__ import annotations

from notify_server.model import FileState
from notify_server.store.base import MAX_ID, Engine
from notify_server.store.journal import KEPT_MS, MINUTE, TEN_MINUTES, Group, KeptSample, NewAcknowledgement, NewAction
from notify_server.store.reading.types import BatchFilter, FileFilter
from tests.store.backends import Backend
from tests.store.builders import API_CODE, HOST, NOW, claim, failed, finished, missing, rejection, take_in

HOUR = 3_600_000
BY = "page 192.0.2.7"


async def acknowledge(store: Engine, **subjects: object) -> int:
    return await store.journal.acknowledge(NewAcknowledgement(NOW + 10, BY, "known", **subjects))  # type: ignore[arg-type]


async def incomplete(store: Engine, *names: str, batch_id: str = "b1", now: int = NOW) -> None:
    await take_in(store, *(finished(name) for name in names), batch_id=batch_id)
    await store.record([missing(file) for file in await claim(store)], now)


async def test_actions_are_read_newest_first_page_by_page(store: Engine, backend: Backend) -> None:
    for n in range(3):
        await store.journal.add_action(NewAction(NOW + n, BY, "recheck", f'{{"batch_id":"b\\u0000{n}"}}', n or None))
    records = await backend.records()
    newest = await records.journal.actions(MAX_ID, 2)
    assert [(each.who, each.what, each.files) for each in newest] == [(BY, "recheck", 2), (BY, "recheck", 1)]
    assert str(newest[0].filter["batch_id"]).startswith("b")
    assert newest[0].at.timestamp() * 1000 == NOW + 2
    (oldest,) = await records.journal.actions(newest[-1].id, 2)
    assert oldest.files is None


async def test_acknowledged_batch_needs_no_attention_until_its_next_verdict(store: Engine, backend: Backend) -> None:
    await incomplete(store, "a")
    await take_in(store, finished("b"), batch_id="waits")
    records = await backend.records()
    unseen = BatchFilter(acknowledged=False)
    (batch,) = (await records.batches(unseen, None, 10)).items
    assert (await records.attention()).batches == 1
    (waits,) = (await records.batches(BatchFilter(batch_id="waits"), None, 1)).items
    assert await acknowledge(store, batches=[batch.id, waits.id, MAX_ID]) == 1
    assert await acknowledge(store, batches=[batch.id]) == 0
    assert (await records.batches(unseen, None, 10)).items == []
    assert (await records.attention()).batches == 0
    detail = await records.batch(batch.id)
    assert detail is not None
    assert detail.acknowledged is not None
    assert (detail.acknowledged.who, detail.acknowledged.note) == (BY, "known")

    (file,) = (await records.files(FileFilter(batch=batch.id), None, 5)).items
    await store.recheck([file.id], NOW + HOUR)
    claimed = [each for each in await claim(store, now=NOW + HOUR) if each.id == file.id]
    await store.record([missing(each) for each in claimed], NOW + HOUR)
    assert [each.id for each in (await records.batches(unseen, None, 10)).items] == [batch.id]


async def test_acknowledged_rejection_is_not_counted_as_new(store: Engine, backend: Backend) -> None:
    for n in range(3):
        await store.reject(rejection(received_at=NOW + n))
    records = await backend.records()
    ids = [each.id for each in (await records.rejections(None, 10)).items]
    assert (await records.attention()).rejections == 3
    assert await acknowledge(store, rejections=[ids[0], ids[1], MAX_ID]) == 2
    assert await acknowledge(store, rejections=ids[:1]) == 0
    assert (await records.attention()).rejections == 1
    seen = await records.journal.rejections(ids)
    assert sorted(seen) == sorted(ids[:2])
    assert seen[ids[0]].note == "known"


async def test_acknowledged_group_counts_only_later_files_as_new(store: Engine, backend: Backend) -> None:
    await incomplete(store, "a", "b")
    await take_in(store, failed("f1"), failed("f2"), batch_id="failed")
    records = await backend.records()
    groups = await records.failures(10)
    assert [(group.reason, group.state, group.files, group.new) for group in groups] == [
        (None, FileState.UPLOAD_FAILED, 2, 2),
        ("http_410", FileState.UNAVAILABLE, 2, 2),
    ]
    reported = groups[0].host
    wanted = [
        Group("http_410", HOST, "unavailable"),
        Group("", reported, "upload_failed"),
        Group("timeout", HOST, "pending"),
    ]
    assert await acknowledge(store, groups=wanted) == 4
    assert [group.new for group in await records.failures(10)] == [0, 0]
    assert {group.acknowledged.note for group in await records.failures(10) if group.acknowledged} == {"known"}
    await incomplete(store, "c", batch_id="b2")
    await take_in(store, failed("f3"), batch_id="failed2")
    assert [(group.files, group.new) for group in await records.failures(10)] == [(3, 1), (3, 1)]
    assert await acknowledge(store, groups=wanted) == 2
    assert await backend.rows("SELECT count(*) FROM acknowledgement") == [(2,)]


async def test_samples_are_kept_for_a_day_and_a_week_and_once_each(store: Engine, backend: Backend) -> None:
    await store.journal.keep_samples([KeptSample(MINUTE, NOW, "one", "{}"), KeptSample(TEN_MINUTES, NOW, "one", "{}")])
    await store.journal.keep_samples([KeptSample(MINUTE, NOW, "one", '{"accepted":2}')])
    await store.journal.keep_samples([KeptSample(MINUTE, NOW, "two", '{"accepted":3}')])
    records = await backend.records()
    assert sorted(await records.journal.history(MINUTE, 0)) == [(NOW, '{"accepted":2}'), (NOW, '{"accepted":3}')]
    assert await records.journal.history(MINUTE, NOW + 1) == []
    later = NOW + KEPT_MS[MINUTE] + 1
    await store.journal.keep_samples(
        [KeptSample(MINUTE, later, "one", "{}"), KeptSample(TEN_MINUTES, later, "one", "{}")]
    )
    assert await backend.rows("SELECT step, at FROM history ORDER BY step, at") == [
        (MINUTE, later), (TEN_MINUTES, NOW), (TEN_MINUTES, later),
    ]  # fmt: skip


async def test_prune_deletes_old_actions_and_acknowledgements(store: Engine, backend: Backend) -> None:
    await store.reject(rejection(received_at=NOW))
    (kept,) = (await (await backend.records()).rejections(None, 1)).items
    await acknowledge(store, rejections=[kept.id])
    await store.journal.add_action(NewAction(NOW, BY, "prune", "{}", 1))
    await store.journal.add_action(NewAction(NOW + HOUR, BY, "prune", "{}", 1))
    while await store.prune(NOW + HOUR, NOW, 100):
        pass
    assert await backend.rows("SELECT at FROM action") == [(NOW + HOUR,)]
    assert await backend.rows("SELECT count(*) FROM acknowledgement") == [(1,)]
    while await store.prune(NOW + HOUR, NOW + HOUR, 100):
        pass
    assert await backend.rows("SELECT count(*) FROM acknowledgement") == [(0,)]


async def test_incomplete_batches_of_an_api_code_are_found_among_acknowledged_ones(
    store: Engine, backend: Backend
) -> None:
    for n in range(4):
        await incomplete(store, "a", batch_id=f"b{n}", now=NOW + n)
    records = await backend.records()
    batches = (await records.batches(BatchFilter(), None, 10)).items
    await acknowledge(store, batches=[each.id for each in batches[::2]])
    found = await records.batches(BatchFilter(acknowledged=False, api_code=API_CODE), None, 1)
    rest = await records.batches(BatchFilter(acknowledged=False, api_code=API_CODE), found.next, 10)
    assert {each.id for each in [*found.items, *rest.items]} == {each.id for each in batches[1::2]}
