"""A rejection that is taken after all: it becomes a delivery in one transaction, once."""

from __future__ import annotations

import asyncio

import pytest

from notify_server.errors import NonceReusedError, RejectionGoneError
from notify_server.store.base import Engine
from tests.store.backends import Backend
from tests.store.builders import NOW, chunk, deliver, delivery, failed, rejection


async def kept(backend: Backend) -> list[tuple[int, str]]:
    return [(id, detail) for id, detail in await backend.rows("SELECT id, detail FROM rejection ORDER BY id")]


async def refuse(store: Engine, backend: Backend, *details: str) -> list[int]:
    """Have these rejections in an empty store; their ids."""
    for detail in details:
        await store.reject(rejection(detail=detail, body=detail.encode()))
    return [id for id, _ in await kept(backend)]


async def test_a_replay_is_in_the_inbox_and_its_rejection_is_gone(store: Engine, backend: Backend) -> None:
    first, second, third = await refuse(store, backend, "first", "second", "third")
    id = await store.accept(delivery(body=b"second", files=3, traceparent="00-ab-cd-01", replays=second))
    assert await kept(backend) == [(first, "first"), (third, "third")]
    (item,) = await store.inbox(10)
    assert (item.id, item.body, item.traceparent) == (id, b"second", "00-ab-cd-01")
    assert store.backlog == 3
    store = await backend.reopen()
    assert await store.inbox(10) == [item]
    assert await kept(backend) == [(first, "first"), (third, "third")]


@pytest.mark.parametrize("id", [0, -1, 2, 2**63 - 1, 2**63, 2**64, 10**30])
async def test_a_rejection_that_is_not_there_is_gone_and_nothing_is_written(
    store: Engine, backend: Backend, id: int
) -> None:
    (first,) = await refuse(store, backend, "first")
    with pytest.raises(RejectionGoneError, match=f"^rejection {id} is not there"):
        await store.accept(delivery(replays=id))
    assert await backend.rows("SELECT count(*) FROM notification") == [(0,)]
    assert await kept(backend) == [(first, "first")]
    assert store.backlog == 0


async def test_of_many_replays_of_one_rejection_at_once_exactly_one_is_stored(store: Engine, backend: Backend) -> None:
    (first,) = await refuse(store, backend, "first")
    calls = (store.accept(delivery(replays=first)) for _ in range(20))
    answers = await asyncio.gather(*calls, return_exceptions=True)
    (id,) = [answer for answer in answers if isinstance(answer, int)]
    assert sum(isinstance(answer, RejectionGoneError) for answer in answers) == 19
    assert [item.id for item in await store.inbox(100)] == [id]
    assert await kept(backend) == []
    assert store.backlog == 1


async def test_replays_share_a_transaction_with_deliveries_in_the_order_in_which_they_came(
    store: Engine, backend: Backend
) -> None:
    first, second = await refuse(store, backend, "first", "second")
    deliveries = [
        delivery(body=b"0"),
        delivery(body=b"1", replays=second),
        delivery(body=b"2", replays=2**64),
        delivery(body=b"3", nonce=("nonce", NOW + 60_000)),
        delivery(body=b"4", nonce=("nonce", NOW + 60_000)),
        delivery(body=b"5", replays=second),
        delivery(body=b"6", replays=first),
        delivery(body=b"7"),
    ]
    answers = await asyncio.gather(*map(store.accept, deliveries), return_exceptions=True)
    gone, reused = RejectionGoneError, NonceReusedError
    assert [type(answer) for answer in answers] == [int, int, gone, int, reused, gone, int, int]
    inbox = [(item.id, item.body) for item in await store.inbox(100)]
    assert inbox == [
        (answer, delivery.body)
        for answer, delivery in zip(answers, deliveries, strict=True)
        if isinstance(answer, int)
    ]  # fmt: skip
    assert inbox == sorted(inbox)
    assert await kept(backend) == []


async def test_a_replay_that_is_refused_for_its_nonce_leaves_its_rejection(store: Engine, backend: Backend) -> None:
    (first,) = await refuse(store, backend, "first")
    await store.accept(delivery(nonce=("nonce", NOW + 60_000)))
    with pytest.raises(NonceReusedError):
        await store.accept(delivery(nonce=("nonce", NOW + 60_000), replays=first))
    assert await kept(backend) == [(first, "first")]


async def test_the_id_of_a_rejection_that_was_replayed_is_never_given_to_another(
    store: Engine, backend: Backend
) -> None:
    (first,) = await refuse(store, backend, "first")
    await store.accept(delivery(replays=first))
    for _ in range(2):
        await store.reject(rejection(detail="another"))
        with pytest.raises(RejectionGoneError):
            await store.accept(delivery(replays=first))
        store = await backend.reopen()
    assert [detail for _, detail in await kept(backend)] == ["another"] * 2


@pytest.mark.parametrize("places", [(-1, 1), (1, 1)], ids=["the newest too", "not the newest"])
async def test_rejections_are_still_bounded_after_replays(
    store: Engine, backend: Backend, monkeypatch: pytest.MonkeyPatch, places: tuple[int, int]
) -> None:
    backend.bound(monkeypatch, rejections=5, rejection_bytes=100)
    sizes: dict[str, int] = {}

    async def refuse_one(detail: str, size: int) -> None:
        await store.reject(rejection(detail=detail, body=b"x" * size))
        sizes[detail] = size
        while len(sizes) > 5 or sum(sizes.values()) > 100:
            del sizes[next(iter(sizes))]
        assert [each for _, each in await kept(backend)] == list(sizes)

    for n in range(5):
        await refuse_one(str(n), 20)
    for place in places:
        id, detail = (await kept(backend))[place]
        await store.accept(delivery(replays=id))
        del sizes[detail]
    for n, size in enumerate((40, 1, 0, 0, 100)):
        await refuse_one(f"later {n}", size)


async def test_an_item_that_is_discarded_again_after_its_replay_is_kept_as_a_new_rejection(
    store: Engine, backend: Backend
) -> None:
    (first,) = await refuse(store, backend, "first")
    item = await deliver(store, 1, body=b"first", request_id="r-2", replays=first)
    await store.discard(item, "unreadable", NOW)
    assert await backend.rows("SELECT detail, body, request_id FROM rejection") == [("unreadable", b"first", "r-2")]
    assert (await kept(backend))[0][0] > first
    following = await deliver(store)
    await store.expand([chunk(following, failed())], NOW)
    assert store.backlog == 0
