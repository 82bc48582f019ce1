"""The long tasks of the daemon beside callbacks and probing: pruning, the survey of the record, the time series."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import structlog

from notify_server.contract.trace_context import trace_fields
from notify_server.errors import StoreUnavailableError
from notify_server.model import BatchVerdict
from notify_server.reloading import Live
from notify_server.store.base import Store
from notify_server.store.reading.types import Records
from notify_server.telemetry.history import Timeline
from notify_server.telemetry.metrics import Metrics
from notify_server.web.stream import Stream, verdict_message

log = structlog.get_logger("notify_server")

PRUNE_SECONDS = 600.0
PRUNE_ROWS = 500
# After each transaction of pruning, rest for this many times its duration, so that pruning takes at most a quarter of
# the store's time.
PRUNE_PAUSES = 3.0
# The survey counts over the whole record: at most this often, and for at most this share of the time.
SURVEY_SECONDS = 5.0
SURVEY_SHARE = 0.05


async def prune_record(live: Live, store: Store, metrics: Metrics, now: Callable[[], int]) -> None:
    """Delete data older than `[retention]`, in small transactions."""
    while True:
        completed_ms = round(live.retention.completed * 1000)
        rejections_ms = round(live.retention.rejections * 1000)
        began = time.monotonic()
        try:
            started = began
            while deleted := await store.prune(now() - completed_ms, now() - rejections_ms, PRUNE_ROWS):
                metrics.pruned_rows.add_plain(deleted)
                log.debug("pruned", rows=deleted)
                await asyncio.sleep((time.monotonic() - started) * PRUNE_PAUSES)
                started = time.monotonic()
            metrics.pruned(now() / 1000, time.monotonic() - began)
        except StoreUnavailableError as error:
            log.warning("cannot prune, trying again later", error=str(error))
        await asyncio.sleep(PRUNE_SECONDS)


async def survey_record(records: Records, metrics: Metrics) -> None:
    """Refresh the metrics that need a walk over the record, so that a scrape never waits for one."""
    while True:
        began = time.monotonic()
        try:
            totals = await records.totals()
        except StoreUnavailableError as error:
            log.debug("cannot survey the record, trying again later", error=str(error))
        else:
            oldest = totals.oldest_pending_at
            metrics.surveyed(oldest.timestamp() if oldest is not None else None, totals.rejections)
        await asyncio.sleep(max(SURVEY_SECONDS, (time.monotonic() - began) / SURVEY_SHARE))


async def sample_time_series(timeline: Timeline, stream: Stream) -> None:
    """Take a sample every second and publish it to the listeners."""
    while True:
        now = time.monotonic()
        stream.publish("sample", timeline.sample(now))
        # Round, because a timer may fire a little early.
        await asyncio.sleep(math.floor(now + 1.5) - now)


def publish_verdicts(verdicts: Sequence[BatchVerdict], metrics: Metrics, stream: Stream) -> None:
    """Count, stream and log new verdicts."""
    for verdict in verdicts:
        metrics.verdicts.add(verdict.verdict)
        stream.publish("verdict", verdict_message(verdict), verdict.event)
        log.info(
            "verdict",
            batch_id=verdict.batch_id,
            api_code=verdict.api_code,
            verdict=verdict.verdict,
            files=verdict.files,
            available=verdict.available,
            request_id=verdict.request_id,
            **trace_fields(verdict.traceparent),
            seconds=(verdict.completed_at - verdict.first_received_at) / 1000,
        )
