"""Callers that arrive together share one transaction, on the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from notify_server.errors import NotifyServerError, StoreUnavailableError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

GROUP_LIMIT = 256
GROUP_BYTES = 32 * 1024 * 1024
# Callers who came within this time are about to come again.
LATELY_SECONDS = 1.0


class GroupCommit(Generic[Item, Answer]):
    """`write` commits a group and answers for each item in its order; an answer that is an exception is raised to its
    own caller alone. `committed` is called for each that was written, in that order, whatever became of its caller;
    `on_commit` is told what each group took, in seconds. A group holds about GROUP_BYTES, by `size`, at most.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Item]], Awaitable[Sequence[Answer | NotifyServerError]]],
        size: Callable[[Item], int],
        committed: Callable[[Item, Answer], object] = lambda item, answer: None,
        on_commit: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self._write = write
        self._size = size
        self._committed = committed
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def busy(self) -> bool:
        """Whether somebody waits."""
        return self._task is not None

    def __call__(self, item: Item) -> asyncio.Future[Answer]:
        future: asyncio.Future[Answer] = self._loop.create_future()
        if self._closing:
            future.set_exception(StoreUnavailableError("the store is closing"))
            return future
        self._waiting.append((item, future))
        if self._task is None:
            self._task = self._loop.create_task(self._run(), name="group-commit")
        return future

    async def close(self) -> None:
        """Finish what was handed in; refuse what comes later."""
        self._closing = True
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._commit(self._take())
        finally:
            self._task = None

    def _take(self) -> list[tuple[Item, asyncio.Future[Answer]]]:
        group = [self._waiting.popleft()]
        size = self._size(group[0][0])
        while self._waiting and len(group) < GROUP_LIMIT:
            size += self._size(self._waiting[0][0])
            if size > GROUP_BYTES:
                break
            group.append(self._waiting.popleft())
        return group

    async def _commit(self, group: Sequence[tuple[Item, asyncio.Future[Answer]]]) -> None:
        began = self._loop.time()
        try:
            answers = await self._write([item for item, _ in group])
        except Exception as error:
            fail(group, error)
            return
        self._on_commit(self._loop.time() - began)
        answer(group, answers, self._committed)


def answer(
    group: Sequence[tuple[Item, asyncio.Future[Answer]]],
    answers: Sequence[Answer | NotifyServerError],
    committed: Callable[[Item, Answer], object] = lambda item, answer: None,
) -> None:
    """Give each of a group that was written its answer; an exception is raised to its own caller alone."""
    for (item, future), each in zip(group, answers, strict=True):
        if isinstance(each, NotifyServerError):
            if not future.done():
                future.set_exception(each)
            continue
        committed(item, each)
        if not future.done():
            future.set_result(each)


def fail(group: Sequence[tuple[Item, asyncio.Future[Answer]]], error: Exception) -> None:
    """Tell each of a group that was not written."""
    for _, future in group:
        if not future.done():
            future.set_exception(_own(error))


def _own(error: Exception) -> Exception:
    # Each caller gets an exception of its own: a shared one would gather the tracebacks of all of them.
    if not isinstance(error, StoreUnavailableError):
        return error
    own = StoreUnavailableError(str(error))
    own.__cause__ = error.__cause__
    return own
