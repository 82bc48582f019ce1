"""What runs as long as the daemon does."""

from __future__ import annotations

import asyncio
import gc

import structlog

# Objects made and not yet freed at which cycles are looked for: a burst of callbacks makes so many, and no cycles.
YOUNG_OBJECTS = 20_000


def freeze_gc() -> None:
    """Have the garbage collector pass over all that is there by now, which stays: going through it takes 30 ms, in
    which nothing is answered."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


def log_task_failure(task: asyncio.Task[None]) -> None:
    """A task's done callback, for tasks that should run as long as the daemon does: none of them dies in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        structlog.get_logger("notify_server").critical(
            "a part of the daemon has stopped, restart it", part=task.get_name(), exc_info=error
        )
