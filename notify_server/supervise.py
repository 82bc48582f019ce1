"""Starts, names and watches the tasks that run as long as the process does, and divides the time of its stop.

A long task ends by being cancelled. One that ends in any other way is an error: it is logged at once, and `/readyz`
names it, so that neither a crash nor a stray `return` stops a part of the daemon unnoticed.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine
from weakref import WeakKeyDictionary, WeakSet

import structlog

log = structlog.get_logger("notify_server")

# Threshold of the youngest generation: a burst of callbacks allocates this many objects and creates no cycles.
YOUNG_OBJECTS = 20_000

# By event loop, since a task belongs to one: the names of the long tasks that have ended, with the reason.
_ended: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, str]] = WeakKeyDictionary()
_may_end: WeakSet[asyncio.Task[None]] = WeakSet()


def freeze_gc() -> None:
    """Exempt all objects that exist by now from garbage collection: they stay, and a pass over them takes 30 ms."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


def start_task(
    run: Coroutine[object, object, None], name: str, *, on_failure: Callable[[], object] = lambda: None
) -> asyncio.Task[None]:
    """Start a task that runs until it is cancelled. `on_failure` is called when it has ended in any other way, after
    that was logged.
    """

    def ended(task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is None and task in _may_end:
            return
        why = f"{type(error).__name__}: {error}" if error is not None else "it returned"
        _ended.setdefault(task.get_loop(), {})[name] = why
        log.critical("a part of the daemon has stopped, restart it", part=name, why=why, exc_info=error)
        on_failure()

    task = asyncio.get_running_loop().create_task(run, name=name)
    task.add_done_callback(ended)
    return task


def let_end(task: asyncio.Task[None]) -> None:
    """Accept from now on that the long task returns."""
    _may_end.add(task)


async def stop_tasks(*tasks: asyncio.Task[None]) -> None:
    """Cancel the tasks and wait for their ends, however they end."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def ended_tasks() -> dict[str, str]:
    """Return the long tasks of the running loop that have ended without being cancelled, by name, with the reason."""
    return dict(_ended.get(asyncio.get_running_loop(), {}))


class Grace:
    """Divides the time that a stop may take. It runs from `begin`, or from the first call of `left`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends_at: float | None = None

    def begin(self) -> None:
        """Start the time, unless it has started already."""
        if self._ends_at is None:
            self._ends_at = time.monotonic() + self._seconds

    def left(self) -> float:
        """Return the seconds that remain, at least 0."""
        self.begin()
        assert self._ends_at is not None
        return max(0.0, self._ends_at - time.monotonic())


def log_task_failure(task: asyncio.Task[None]) -> None:
    """Log the exception of a short task, as its done callback."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a task has failed, please report this", task=task.get_name(), exc_info=error)
