"""Watches the limits of submissions, every second in which this server is ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from notify_server.config import VerifyConfig
from notify_server.errors import StoreUnavailableError
from notify_server.forward.risk import longest_waits
from notify_server.store.expectations import MAX_DUE, Expectations

log = structlog.get_logger("notify_server.submissions")

SECONDS = 1.0


async def watch_limits(
    store: Expectations,
    verify: VerifyConfig,
    now: Callable[[], int],
    is_ready: Callable[[], bool],
    on_news: Callable[[], object],
) -> None:
    """Check the limits until cancelled. While the server is not ready, or cannot commit, their clock stands still."""
    waits = longest_waits(verify.retry_schedule, verify.jitter, verify.timeout)
    while True:
        try:
            while is_ready() and (taken := await store.check_limits(waits, now())):
                log.info("limits of submissions have passed", expectations=taken)
                on_news()
                if taken < MAX_DUE:
                    break
        except StoreUnavailableError as error:
            log.debug("cannot check the limits of submissions, trying again", error=str(error))
        await asyncio.sleep(SECONDS)
