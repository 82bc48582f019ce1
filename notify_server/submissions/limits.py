"""Watches the limits of submissions and the silence of api_codes, every second in which this server is ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from notify_server.config import Config, VerifyConfig
from notify_server.errors import StoreUnavailableError
from notify_server.expect.quiet import QuietLimit
from notify_server.forward.risk import longest_waits
from notify_server.store.expectations import MAX_DUE, Expectations
from notify_server.store.reading.expectations import ExpectationRecords
from notify_server.submissions.metrics import SubmissionMetrics
from notify_server.supervise import start_task
from notify_server.telemetry.metrics import Metrics

log = structlog.get_logger("notify_server.submissions")

SECONDS = 1.0


def start_watching(
    config: Config,
    store: Expectations,
    records: ExpectationRecords,
    metrics: Metrics,
    now: Callable[[], int],
    is_ready: Callable[[], bool],
    on_news: Callable[[], object],
) -> list[asyncio.Task[None]]:
    """Start the survey and, on a server that takes notifications, the watches. While it is not ready, or cannot commit,
    their clocks stand still.
    """
    counts = SubmissionMetrics(metrics, config.alert.quiet_limits)
    tasks = [start_task(counts.survey(records), "survey submissions")]
    if not config.server.takes_callbacks:
        return tasks
    limits = watch_limits(store, config.verify, now, is_ready, on_news)
    tasks.append(start_task(limits, "watch the limits of submissions"))
    if config.alert.quiet:
        quiet = watch_quiet(store, config.alert.quiet_limits, now, is_ready, on_news)
        tasks.append(start_task(quiet, "watch the silence of api_codes"))
    return tasks


async def watch_limits(
    store: Expectations,
    verify: VerifyConfig,
    now: Callable[[], int],
    is_ready: Callable[[], bool],
    on_news: Callable[[], object],
) -> None:
    """Check the limits of submissions until cancelled."""
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


async def watch_quiet(
    store: Expectations,
    limits: Sequence[QuietLimit],
    now: Callable[[], int],
    is_ready: Callable[[], bool],
    on_news: Callable[[], object],
) -> None:
    """Check the silence of api_codes until cancelled."""
    while True:
        try:
            if is_ready() and (written := await store.check_quiet(limits, now())):
                log.info("api_codes are silent for longer than [alert] quiet", api_codes=written)
                on_news()
        except StoreUnavailableError as error:
            log.debug("cannot check the silence of api_codes, trying again", error=str(error))
        await asyncio.sleep(SECONDS)
