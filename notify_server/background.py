"""The long tasks of the daemon beside callbacks and probing: pruning, the survey of the record, the time series."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import structlog

from notify_server.config import VerifyConfig
from notify_server.contract.trace_context import trace_fields
from notify_server.errors import StoreUnavailableError
from notify_server.model import BatchVerdict
from notify_server.reloading import Live
from notify_server.store.base import Store
from notify_server.store.reading.types import Records
from notify_server.supervise import start_task
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
# A host may ask for a rest of an hour.
LONGEST_REST = 3600.0
CLOCK_MARGIN = 60.0
LATE_FILES = 1000
WAITS_SECONDS = 600.0
# A session that was ended on one server is accepted on others for at most this long.
LOG_OUT_SECONDS = 5.0


def start_housekeeping(
    store: Store,
    records: Records,
    live: Live,
    metrics: Metrics,
    now: Callable[[], int],
    add_hosts: Callable[[frozenset[str]], object],
) -> list[asyncio.Task[None]]:
    """Start the tasks that keep the record in order. `add_hosts` gets hosts whose files are due."""
    return [
        start_task(prune_record(live, store, metrics, now), "prune the record"),
        start_task(survey_record(records, metrics), "survey the record"),
        start_task(limit_waits(store, live.config.verify, now, add_hosts), "limit waits"),
    ]


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


async def limit_waits(
    store: Store, verify: VerifyConfig, now: Callable[[], int], add_hosts: Callable[[frozenset[str]], object]
) -> None:
    """Make files due whose next attempt is later than the schedule allows. The clock of this machine (before a restart)
    or of another server was wrong when that time was written.
    """
    longest = max([LONGEST_REST, *verify.retry_schedule]) * (1 + verify.jitter) + CLOCK_MARGIN
    while True:
        try:
            while (late := await store.make_due(now() + round(longest * 1000), now(), LATE_FILES)).files:
                log.warning("files waited for longer than the schedule says, they are due now", files=late.files)
                add_hosts(late.hosts)
        except StoreUnavailableError as error:
            log.warning("cannot look for files that wait for too long, trying again later", error=str(error))
        await asyncio.sleep(WAITS_SECONDS)


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


async def follow_log_outs(end_sessions: Callable[[Sequence[str]], object], records: Records) -> None:
    """Take over the sessions that were ended on other servers."""
    while True:
        await asyncio.sleep(LOG_OUT_SECONDS)
        try:
            end_sessions(await records.ended_sessions())
        except StoreUnavailableError as error:
            log.debug("cannot read which sessions were ended, trying again later", error=str(error))


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
