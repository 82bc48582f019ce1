"""Group commit: callers that arrive together share one transaction.

A Batcher collects callers. The component that takes a group from it decides when a transaction is made: the SQLite
writer between two jobs (sqlite/writer.py), its client once per turn of the event loop (sqlite/client.py), and a
GroupCommit (PostgreSQL) as soon as the last transaction has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from notify_server.errors import NotifyServerError, StoreUnavailableError

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Group = Sequence[tuple[Item, asyncio.Future[Answer]]]

MAX_ITEMS = 256
MAX_BYTES = 8 * 1024 * 1024


class Batcher(Generic[Item, Answer]):
    """Collects callers, hands them out in groups of bounded size, and answers them.

    `size` gives the bytes of an item: a group has at most MAX_ITEMS items and about MAX_BYTES bytes, and at least one
    item. `on_written` is called for each item that was written, in order, even if its caller has gone away.
    """

    def __init__(
        self,
        size: Callable[[Item], int] = lambda item: 0,
        on_written: Callable[[Item, Answer], object] = lambda item, answer: None,
    ) -> None:
        self._size = size
        self._on_written = on_written
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._closing = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: Item) -> asyncio.Future[Answer]:
        """Return the future of the item's answer. Fails with StoreUnavailableError once the batcher is closed."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if self._closing:
            future.set_exception(StoreUnavailableError("the store is closing"))
        else:
            self._waiting.append((item, future))
        return future

    def close(self) -> None:
        """Refuse callers from now on; those that wait are still to be taken and answered."""
        self._closing = True

    def take(self) -> Group[Item, Answer]:
        """Remove the longest waiting callers, as many as fit into one group."""
        waiting = self._waiting
        group: list[tuple[Item, asyncio.Future[Answer]]] = []
        size = 0
        while waiting and len(group) < MAX_ITEMS:
            size += self._size(waiting[0][0])
            if group and size > MAX_BYTES:
                break
            group.append(waiting.popleft())
        return group

    def answer(self, group: Group[Item, Answer], answers: Sequence[Answer | NotifyServerError]) -> None:
        """Answer a group that was written, in its order. An exception among the answers is raised to its own caller."""
        for (item, future), each in zip(group, answers, strict=True):
            if isinstance(each, NotifyServerError):
                if not future.done():
                    future.set_exception(each)
                continue
            self._on_written(item, each)
            if not future.done():
                future.set_result(each)

    def fail(self, group: Group[Item, Answer], error: Exception) -> None:
        """Raise the error to every caller of a group that was not written."""
        for _, future in group:
            if not future.done():
                future.set_exception(_copy(error))


class ByteGate:
    """Bounds the bytes under way. An item that would exceed the limit waits, in order.

    An item that is larger than the limit starts when nothing else is under way.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._under_way = 0
        self._waiting: deque[tuple[int, Callable[[], object]]] = deque()

    def enter(self, size: int, start: Callable[[], object]) -> None:
        """Call `start` once there is room for so many bytes, at once if there is. `leave` gives them back."""
        self._waiting.append((size, start))
        self._let_in()

    def leave(self, size: int) -> None:
        """Give back bytes, and let in those that wait for them."""
        self._under_way -= size
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and (not self._under_way or self._under_way + self._waiting[0][0] <= self._limit):
            size, start = self._waiting.popleft()
            self._under_way += size
            start()


class GroupCommit(Generic[Item, Answer]):
    """A Batcher that commits by itself: one transaction after the other as long as callers wait.

    `write` commits a group and answers each item in order; `on_commit` receives the seconds that each commit took.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Item]], Awaitable[Sequence[Answer | NotifyServerError]]],
        size: Callable[[Item], int],
        on_written: Callable[[Item, Answer], object] = lambda item, answer: None,
        on_commit: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self._write = write
        self._on_commit = on_commit
        self._batcher: Batcher[Item, Answer] = Batcher(size, on_written)
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """True while a caller waits."""
        return self._task is not None

    def __call__(self, item: Item) -> asyncio.Future[Answer]:
        future = self._batcher.add(item)
        if self._task is None and self._batcher:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="group commit")
        return future

    async def close(self) -> None:
        """Refuse callers from now on, and commit those that wait."""
        self._batcher.close()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        try:
            while self._batcher:
                await self._commit(self._batcher.take())
        finally:
            self._task = None

    async def _commit(self, group: Group[Item, Answer]) -> None:
        began = time.perf_counter()
        try:
            answers = await self._write([item for item, _ in group])
        except Exception as error:
            self._batcher.fail(group, error)
            return
        self._on_commit(time.perf_counter() - began)
        self._batcher.answer(group, answers)


def _copy(error: Exception) -> Exception:
    # Each caller gets its own exception: a shared one would collect the tracebacks of all of them.
    if not isinstance(error, StoreUnavailableError):
        return error
    own = StoreUnavailableError(str(error))
    own.__cause__ = error.__cause__
    return own
