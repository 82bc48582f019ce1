"""Tasks that run as long as the daemon does."""

from __future__ import annotations

import asyncio

import structlog


def report_end(task: asyncio.Task[None]) -> None:
    """A task's done callback, for tasks that should run as long as the daemon does: none of them dies in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        structlog.get_logger("notify_server").critical(
            "a part of the daemon has stopped, restart it", part=task.get_name(), exc_info=error
        )
