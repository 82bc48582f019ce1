"""The batcher: which callers share a transaction, and who gets which answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from notify_server.errors import NonceReusedError, NotifyServerError, StoreUnavailableError
from notify_server.store.batching import MAX_BYTES, MAX_ITEMS, Batcher, GroupCommit


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([], []),
        ([1], [1]),
        ([1] * MAX_ITEMS, [MAX_ITEMS]),
        ([1] * (MAX_ITEMS + 1), [MAX_ITEMS, 1]),
        ([MAX_BYTES, 1], [1, 1]),
        ([MAX_BYTES - 1, 1, 1], [2, 1]),
        ([MAX_BYTES * 3, MAX_BYTES * 3], [1, 1]),
    ],
)
async def test_a_group_is_bounded_in_items_and_bytes_and_has_at_least_one(sizes: list[int], groups: list[int]) -> None:
    batcher: Batcher[int, int] = Batcher(lambda size: size)
    for size in sizes:
        batcher.add(size)
    taken = []
    while batcher:
        taken.append([item for item, _ in batcher.take()])
    assert [len(group) for group in taken] == groups
    assert [size for group in taken for size in group] == sizes
    assert batcher.take() == []


async def test_each_caller_gets_its_own_answer_or_error() -> None:
    written: list[tuple[str, int]] = []
    batcher: Batcher[str, int] = Batcher(on_written=lambda item, answer: written.append((item, answer)))
    futures = [batcher.add(item) for item in "abcd"]
    futures[1].cancel()
    futures[3].cancel()
    batcher.answer(batcher.take(), [1, 2, NonceReusedError("used"), NonceReusedError("used")])
    assert futures[0].result() == 1
    with pytest.raises(NonceReusedError):
        futures[2].result()
    # Written, even if its caller has gone away.
    assert written == [("a", 1), ("b", 2)]


async def test_callers_of_a_failed_group_get_an_exception_each() -> None:
    batcher: Batcher[str, int] = Batcher()
    futures = [batcher.add(item) for item in "abc"]
    futures[0].cancel()
    cause = OSError("disk")
    error = StoreUnavailableError("full")
    error.__cause__ = cause
    batcher.fail(batcher.take(), error)
    errors = [future.exception() for future in futures[1:]]
    assert [str(each) for each in errors] == ["full", "full"]
    assert errors[0] is not errors[1]
    assert {each.__cause__ for each in errors if each is not None} == {cause}
    other = ValueError("a mistake")
    future = batcher.add("d")
    batcher.fail(batcher.take(), other)
    assert future.exception() is other


async def test_a_closed_batcher_refuses_callers_and_keeps_those_that_wait() -> None:
    batcher: Batcher[str, int] = Batcher()
    waiting = batcher.add("a")
    batcher.close()
    with pytest.raises(StoreUnavailableError, match="closing"):
        await batcher.add("b")
    batcher.answer(batcher.take(), [1])
    assert await waiting == 1


async def test_group_commit_puts_callers_that_arrive_during_a_commit_into_the_next() -> None:
    groups: list[list[int]] = []
    gate = asyncio.Event()
    times: list[float] = []

    async def write(items: Sequence[int]) -> Sequence[int | NotifyServerError]:
        groups.append(list(items))
        await gate.wait()
        return [item * 10 for item in items]

    commit = GroupCommit(write, lambda item: 1, on_commit=times.append)
    assert not commit.busy
    first = commit(1)
    await asyncio.sleep(0)
    later = [commit(2), commit(3)]
    assert commit.busy
    gate.set()
    assert await asyncio.gather(first, *later) == [10, 20, 30]
    assert groups == [[1], [2, 3]]
    assert len(times) == 2
    await commit.close()
    assert not commit.busy
    with pytest.raises(StoreUnavailableError):
        await commit(4)


async def test_group_commit_goes_on_after_a_failed_transaction() -> None:
    fails = True

    async def write(items: Sequence[int]) -> Sequence[int | NotifyServerError]:
        if fails:
            raise StoreUnavailableError("away")
        return list(items)

    commit = GroupCommit(write, lambda item: 1)
    with pytest.raises(StoreUnavailableError, match="away"):
        await commit(1)
    fails = False
    assert await commit(2) == 2
