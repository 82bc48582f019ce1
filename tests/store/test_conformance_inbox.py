"""Accepting and refusing notifications, and the inbox that waits for expansion."""

from __future__ import annotations

import asyncio

import pytest

from notify_server.errors import NonceReusedError, StoreUnavailableError
from notify_server.model import Verdict
from notify_server.store.base import Engine
from tests.store.backends import Backend
from tests.store.builders import API_CODE, NOW, chunk, deliver, delivery, failed, finished, rejection, take_in

BODY = '{"batch_id":"批次-1",\r\n\t"api_code" : "a", "file_list":[]} \U0001f3e0 e\u0301 \u00e9 \\u0041 \ufeff'.encode()


async def nothing_in_inbox(store: Engine) -> bool:
    return await store.inbox(10) == []


# accept


async def test_an_accepted_delivery_is_in_the_notification_table_as_it_was_given(
    store: Engine, backend: Backend
) -> None:
    id = await store.accept(
        delivery("b-1", api_code="code", body=BODY, files=3, received_at=NOW + 5, remote_addr="2001:db8::1",
                 signature="9f86d081", request_id="r-1")
    )  # fmt: skip
    assert await backend.rows(
        "SELECT id, batch_id, api_code, body, received_at, remote_addr, signature, request_id, files, expanded_at"
        " FROM notification"
    ) == [(id, "b-1", "code", BODY.decode(), NOW + 5, "2001:db8::1", "9f86d081", "r-1", 3, None)]


async def test_an_accepted_delivery_is_in_the_inbox_with_its_body_byte_for_byte(
    store: Engine, backend: Backend
) -> None:
    id = await store.accept(delivery(body=BODY, files=3, remote_addr="192.0.2.7", request_id="r-1"))
    for _ in range(2):
        (item,) = await store.inbox(10)
        assert item.body == BODY
        assert (item.id, item.received_at, item.remote_addr, item.request_id, item.files) == (
            id, NOW, "192.0.2.7", "r-1", 3
        )  # fmt: skip
        store = await backend.reopen()


async def test_a_body_of_several_megabytes_survives_reopening_byte_for_byte(store: Engine, backend: Backend) -> None:
    bodies = [(f"{n}é" * 1_000_000).encode() for n in range(4)]
    for body in bodies:
        await store.accept(delivery(body=body))
    assert [item.body for item in await store.inbox(10)] == bodies
    assert [item.body for item in await (await backend.reopen()).inbox(10)] == bodies


async def test_concurrent_deliveries_get_distinct_ids_each_with_its_own_body(store: Engine) -> None:
    deliveries = [delivery(body=f"body {n}".encode()) for n in range(600)]
    ids = await asyncio.gather(*map(store.accept, deliveries))
    assert len(set(ids)) == 600
    bodies = {item.id: item.body for item in await store.inbox(1000)}
    assert [bodies[id] for id in ids] == [delivery.body for delivery in deliveries]


async def test_ids_are_never_given_twice_even_when_everything_older_is_pruned(store: Engine, backend: Backend) -> None:
    await take_in(store, failed())
    first = max(id for (id,) in await backend.rows("SELECT id FROM notification"))
    while await store.prune(NOW + 1, NOW + 1, 100):
        pass
    assert await store.accept(delivery()) > first


async def test_a_notification_accepted_after_everything_older_was_pruned_is_expanded(store: Engine) -> None:
    for name in ("a", "b"):
        await take_in(store, failed(name))
    while await store.prune(NOW + 1, NOW + 1, 100):
        pass
    id = await store.accept(delivery())
    assert [item.id for item in await store.inbox(10)] == [id]


async def test_deliveries_accepted_just_before_closing_survive_and_later_ones_are_refused(
    store: Engine, backend: Backend
) -> None:
    deliveries = [delivery(request_id=f"r-{n}") for n in range(400)]
    early = [asyncio.ensure_future(store.accept(delivery)) for delivery in deliveries[:200]]
    await asyncio.sleep(0)
    closing = asyncio.create_task(backend.close())
    await asyncio.sleep(0)
    late = [asyncio.ensure_future(store.accept(delivery)) for delivery in deliveries[200:]]
    answers = await asyncio.gather(*early, *late, return_exceptions=True)
    await closing

    assert all(isinstance(answer, int | StoreUnavailableError) for answer in answers)
    acked = {d.request_id for d, answer in zip(deliveries, answers, strict=True) if isinstance(answer, int)}
    reopened = await backend.open()
    assert {item.request_id for item in await reopened.inbox(1000)} == acked


async def test_every_verb_of_a_closed_store_raises_store_unavailable(store: Engine, backend: Backend) -> None:
    item = await deliver(store)
    await backend.close()
    for call in (
        store.accept(delivery()),
        store.reject(rejection()),
        store.expand([chunk(item, finished())], NOW),
        store.discard(item, "unreadable", NOW),
        store.due_hosts("", 10),
        store.claim([("h", 1)], NOW),
        store.record([], NOW),
        store.recheck([1], NOW),
        store.ping(NOW),
        store.prune(NOW, NOW, 10),
    ):
        with pytest.raises(StoreUnavailableError):
            await call
    store.release([])


async def test_a_delivery_whose_caller_has_gone_is_still_expanded_and_counted_in_the_backlog(store: Engine) -> None:
    assert await nothing_in_inbox(store)
    call = asyncio.ensure_future(store.accept(delivery(files=7)))
    await asyncio.sleep(0)
    call.cancel()
    await store.ping(NOW)
    async with asyncio.timeout(5):
        await store.wait_inbox()
    assert [item.files for item in await store.inbox(10)] == [7]
    assert store.backlog == 7


# Nonces


async def consumed(store: Engine, nonce: str = "nonce", *, at: int = NOW) -> bool:
    """Try to use the nonce, and tell whether it had been consumed before."""
    try:
        await store.accept(delivery(nonce=(nonce, at + 60_000), received_at=at))
    except NonceReusedError:
        return True
    return False


async def test_of_fifty_concurrent_deliveries_with_one_nonce_exactly_one_is_stored(store: Engine) -> None:
    deliveries = [delivery(nonce=("nonce", NOW + 60_000)) for _ in range(50)]
    answers = await asyncio.gather(*map(store.accept, deliveries), return_exceptions=True)
    (id,) = [answer for answer in answers if isinstance(answer, int)]
    assert sum(isinstance(answer, NonceReusedError) for answer in answers) == 49
    assert [item.id for item in await store.inbox(100)] == [id]
    assert store.backlog == 1


async def test_one_delivery_handed_in_many_times_at_once_is_stored_once(store: Engine) -> None:
    same = delivery(nonce=("nonce", NOW + 60_000))
    answers = await asyncio.gather(*(store.accept(same) for _ in range(50)), return_exceptions=True)
    assert sum(isinstance(answer, int) for answer in answers) == 1
    assert sum(isinstance(answer, NonceReusedError) for answer in answers) == 49


async def test_a_consumed_nonce_is_still_consumed_after_reopening(store: Engine, backend: Backend) -> None:
    assert not await consumed(store)
    assert await consumed(await backend.reopen())


async def test_a_nonce_is_consumed_until_it_expires_and_free_afterwards(store: Engine) -> None:
    assert not await consumed(store, at=NOW)
    assert await consumed(store, at=NOW + 59_999)
    assert not await consumed(store, at=NOW + 60_001)
    assert await consumed(store, at=NOW + 60_002)


async def test_the_passing_of_one_nonce_frees_no_other(store: Engine) -> None:
    assert not await consumed(store, "early", at=NOW)
    assert not await consumed(store, "late", at=NOW + 30_000)
    assert not await consumed(store, "third", at=NOW + 60_001)
    assert await consumed(store, "late", at=NOW + 60_001)


async def test_a_reused_nonce_affects_its_own_delivery_alone(store: Engine) -> None:
    assert not await consumed(store, "used")
    deliveries = [
        delivery(body=b"0"),
        delivery(body=b"1", nonce=("used", NOW + 60_000)),
        delivery(body=b"2", nonce=("new", NOW + 60_000)),
        delivery(body=b"3"),
    ]
    answers = await asyncio.gather(*map(store.accept, deliveries), return_exceptions=True)
    assert [type(answer) for answer in answers] == [int, NonceReusedError, int, int]
    bodies = {item.id: item.body for item in await store.inbox(10)}
    assert [bodies[id] for id in answers if isinstance(id, int)] == [b"0", b"2", b"3"]


async def test_a_delivery_refused_for_its_nonce_leaves_no_row_and_no_backlog(store: Engine, backend: Backend) -> None:
    assert not await consumed(store)
    assert await consumed(store)
    assert await backend.rows("SELECT count(*) FROM notification") == [(1,)]
    assert store.backlog == 1


# reject


async def test_a_rejection_is_kept_as_it_was_given_even_when_its_body_is_no_text(
    store: Engine, backend: Backend
) -> None:
    await store.reject(rejection(received_at=NOW + 1, remote_addr="::1", code="401001", detail="签名", body=b"\xff\0{"))
    assert await backend.rows("SELECT received_at, remote_addr, code, detail, body FROM rejection") == [
        (NOW + 1, "::1", "401001", "签名", b"\xff\0{")
    ]


async def kept(backend: Backend) -> list[str]:
    return [detail for (detail,) in await backend.rows("SELECT detail FROM rejection ORDER BY id")]


async def test_rejections_beyond_the_number_kept_push_out_the_oldest(
    store: Engine, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.bound(monkeypatch, rejections=5, rejection_bytes=1_000_000)
    for n in range(8):
        await store.reject(rejection(detail=str(n)))
        assert await kept(backend) == [str(m) for m in range(max(0, n - 4), n + 1)]
    store = await backend.reopen()
    await asyncio.gather(*(store.reject(rejection(detail=str(n))) for n in range(8, 22)))
    assert await kept(backend) == ["17", "18", "19", "20", "21"]


async def test_rejections_beyond_the_bytes_kept_push_out_the_oldest(
    store: Engine, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.bound(monkeypatch, rejections=1000, rejection_bytes=100)
    for n, size in enumerate((40, 40, 20)):
        await store.reject(rejection(detail=str(n), body=b"x" * size))
    assert await kept(backend) == ["0", "1", "2"]
    store = await backend.reopen()
    await store.reject(rejection(detail="3", body=b"x"))
    assert await kept(backend) == ["1", "2", "3"]
    await store.reject(rejection(detail="4", body=b"x" * 100))
    assert await kept(backend) == ["4"]


async def test_a_rejection_larger_than_all_that_is_kept_does_not_stop_the_store(
    store: Engine, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.bound(monkeypatch, rejections=1000, rejection_bytes=100)
    async with asyncio.timeout(5):
        await store.reject(rejection(detail="huge", body=b"x" * 101))
        await store.reject(rejection(detail="small"))
    assert await kept(backend) == ["small"]


# The inbox


async def test_the_inbox_gives_the_oldest_first_up_to_the_limit(store: Engine) -> None:
    ids = [await store.accept(delivery(received_at=NOW - n)) for n in range(5)]
    assert [item.id for item in await store.inbox(3)] == ids[:3]
    assert [item.id for item in await store.inbox(5)] == ids
    assert [item.id for item in await store.inbox(9)] == ids


async def test_an_item_stays_in_the_inbox_until_its_last_files_are_expanded(store: Engine, backend: Backend) -> None:
    first = await deliver(store, 2, batch_id="1")
    second = await deliver(store, 1, batch_id="2")
    await store.expand([chunk(first, finished("a"), batch_id="1", last=False)], NOW)
    assert await store.inbox(10) == [first, second]
    store = await backend.reopen()
    assert await store.inbox(10) == [first, second]
    await store.expand([chunk(first, finished("b"), batch_id="1")], NOW + 7)
    assert await store.inbox(10) == [second]
    assert await (await backend.reopen()).inbox(10) == [second]
    assert await backend.rows("SELECT expanded_at FROM notification ORDER BY id") == [(NOW + 7,), (None,)]


async def test_waiting_for_the_inbox_ends_with_the_next_delivery(store: Engine) -> None:
    assert await nothing_in_inbox(store)
    waiting = asyncio.create_task(store.wait_inbox())
    await store.ping(NOW)
    assert not waiting.done()
    await store.accept(delivery())
    async with asyncio.timeout(5):
        await waiting


async def test_waiting_ends_at_once_while_the_inbox_holds_what_has_been_read_but_not_expanded(store: Engine) -> None:
    await deliver(store)
    async with asyncio.timeout(5):
        await store.wait_inbox()
        assert len(await store.inbox(10)) == 1
        await store.wait_inbox()


async def test_waiting_ends_at_once_after_reopening_with_something_in_the_inbox(
    store: Engine, backend: Backend
) -> None:
    await store.accept(delivery())
    store = await backend.reopen()
    async with asyncio.timeout(5):
        await store.wait_inbox()


async def test_waiting_ends_at_once_while_more_is_left_than_the_limit(store: Engine) -> None:
    ids = [await store.accept(delivery()) for _ in range(3)]
    async with asyncio.timeout(5):
        for id in ids:
            await store.wait_inbox()
            (item,) = await store.inbox(1)
            assert item.id == id
            await store.expand([chunk(item, failed())], NOW)


# discard


async def test_a_discarded_item_is_out_of_the_inbox_and_kept_among_the_rejections(
    store: Engine, backend: Backend
) -> None:
    item = await deliver(store, 4, body=BODY, received_at=NOW + 3, remote_addr="192.0.2.7")
    following = await deliver(store)
    assert store.backlog == 5
    assert await store.discard(item, "file_list: missing", NOW + 9) == []
    assert store.backlog == 1
    assert await store.inbox(10) == [following]
    assert await backend.rows("SELECT received_at, remote_addr, detail, body FROM rejection") == [
        (NOW + 3, "192.0.2.7", "file_list: missing", BODY)
    ]
    store = await backend.reopen()
    assert await store.inbox(10) == [following]
    assert store.backlog == 1
    await store.expand([chunk(following, failed())], NOW)
    assert await store.inbox(10) == []


async def test_a_half_expanded_item_that_is_discarded_does_not_keep_its_batch_from_a_verdict(
    store: Engine, backend: Backend
) -> None:
    item = await deliver(store, 2)
    await store.expand([chunk(item, failed("a"), last=False)], NOW)
    (verdict,) = await store.discard(item, "unreadable", NOW + 5)
    assert (verdict.batch_id, verdict.verdict, verdict.completed_at) == ("batch", Verdict.INCOMPLETE, NOW + 5)
    assert store.backlog == 0
    assert await backend.rows("SELECT verdict, files FROM batch_summary") == [("incomplete", 1)]


# ping


async def test_ping_commits_and_leaves_no_trace_in_the_record(store: Engine, backend: Backend) -> None:
    await store.ping(NOW)
    await store.ping(NOW - 1)
    tables = ("notification", "batch", "file", "attempt", "rejection")
    assert [await backend.rows(f"SELECT count(*) FROM {table}") for table in tables] == [[(0,)]] * 5


# The backlog


async def test_the_backlog_counts_files_in_the_inbox_and_pending_ones_and_no_others(
    store: Engine, backend: Backend
) -> None:
    assert store.backlog == 0
    await take_in(store, finished("a"), finished("b"), failed("c"))
    assert store.backlog == 2
    await store.accept(delivery(files=10))
    assert store.backlog == 12
    assert (await backend.reopen()).backlog == 12


async def test_the_backlog_is_not_worn_down_by_expansions_that_are_cut_off_and_begun_again(
    store: Engine, backend: Backend
) -> None:
    item = await deliver(store, 4)
    for _ in range(5):
        await store.expand([chunk(item, finished("a"), finished("b"), last=False)], NOW)
    await store.expand([chunk(item, finished("c"), finished("d"))], NOW)
    assert store.backlog == 4
    assert (await backend.reopen()).backlog == 4


async def test_the_backlog_counts_a_key_that_is_listed_twice_once_it_is_expanded_as_one_file(store: Engine) -> None:
    item = await deliver(store, 2)
    assert store.backlog == 2
    await store.expand([chunk(item, finished("a"), finished("a", url="https://other.example/a"))], NOW)
    assert store.backlog == 1


async def test_the_api_code_is_part_of_what_names_a_batch(store: Engine, backend: Backend) -> None:
    for api_code in (API_CODE, "another.code"):
        item = await deliver(store, api_code=api_code)
        await store.expand([type(chunk(item))(item, "batch", api_code, [finished()], True)], NOW)
    assert await backend.rows("SELECT batch_id, files FROM batch_summary") == [("batch", 1)] * 2
