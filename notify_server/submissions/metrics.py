"""Counts open submissions and shows the latest notification of each api_code, for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog

from notify_server.errors import StoreUnavailableError
from notify_server.expect.quiet import QuietLimit
from notify_server.store.reading.expectations import ExpectationRecords, quiet_codes
from notify_server.telemetry.metrics import Metrics

log = structlog.get_logger("notify_server.submissions")

# The survey runs at most this often, and for at most this share of the time.
SURVEY_SECONDS = 2.0
SURVEY_SHARE = 0.01
# Values of the label api_code: those with the latest notifications.
MAX_LABELS = 200


class SubmissionMetrics:
    """Keeps the figures of the last survey; scrapes read them."""

    def __init__(self, metrics: Metrics, limits: Sequence[QuietLimit]) -> None:
        self._limits = limits
        self._open: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._quiet: int | None = None
        metrics.gauges(
            "notify_server_expectations",
            "Registered submissions that are open, by state; at most 100,000 of each are counted.",
            "state",
            lambda: self._open,
        )
        metrics.gauges(
            "notify_server_last_notification_timestamp_seconds",
            f"When the latest notification of an api_code was received, in Unix time; of the latest {MAX_LABELS}.",
            "api_code",
            lambda: self._latest,
        )
        metrics.gauge(
            "notify_server_quiet_api_codes",
            "Api_codes, or patterns without any notification, that are silent for longer than [alert] quiet.",
            lambda: self._quiet,
        )

    async def refresh(self, records: ExpectationRecords) -> None:
        """Read the figures."""
        counts, arrivals = await records.counts(), await records.arrivals()
        self._open = {str(each.state): each.number for each in counts}
        known = [(each.api_code, each.received_at) for each in arrivals if each.received_at is not None]
        self._latest = {api_code: at.timestamp() for api_code, at in known[:MAX_LABELS]}
        self._quiet = len(quiet_codes(arrivals, self._limits))

    async def survey(self, records: ExpectationRecords) -> None:
        """Refresh the figures until cancelled."""
        while True:
            began = time.monotonic()
            try:
                await self.refresh(records)
            except StoreUnavailableError as error:
                log.debug("cannot count submissions, trying again later", error=str(error))
            await asyncio.sleep(max(SURVEY_SECONDS, (time.monotonic() - began) / SURVEY_SHARE))
