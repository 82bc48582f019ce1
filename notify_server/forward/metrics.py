"""Counts attempts at deliveries, and deliveries that wait, for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from notify_server.errors import StoreUnavailableError
from notify_server.forward.outcome import Attempt
from notify_server.store.outbox import Outgoing

# The times at which series began would double their number.
disable_created_metrics()  # type: ignore[no-untyped-call]

log = structlog.get_logger("notify_server.forward")

SURVEY_SECONDS = 5.0
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 300.0, 3600.0, 86_400.0)


class Waiting(Protocol):
    """The deliveries of an endpoint that wait, and its health."""

    @property
    def name(self) -> str: ...
    @property
    def pending(self) -> int: ...
    @property
    def oldest_at(self) -> int | None: ...
    @property
    def failures(self) -> int: ...
    @property
    def stopped_at(self) -> int | None: ...


class ForwardMetrics:
    """Counts attempts as they are made, and deliveries that wait every SURVEY_SECONDS."""

    def __init__(self, registry: CollectorRegistry, endpoints: Iterable[str], now: Callable[[], int]) -> None:
        self._now = now
        self._attempts = Counter(
            "notify_server_forward_attempts",
            "Attempts to deliver an event to an endpoint, by outcome: delivered, failed or throttled.",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self._seconds = Histogram(
            "notify_server_forward_delivery_seconds",
            "From an event to its delivery, of the events that were delivered.",
            ["endpoint"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._pending = Gauge("notify_server_forward_pending", "Deliveries that wait.", ["endpoint"], registry=registry)
        self._oldest = Gauge(
            "notify_server_forward_oldest_pending_seconds",
            "How long the event of the oldest delivery that waits has been known; 0 when none waits.",
            ["endpoint"],
            registry=registry,
        )
        self._failures = Gauge(
            "notify_server_forward_failures", "Attempts that failed in a row.", ["endpoint"], registry=registry
        )
        self._stopped = Gauge(
            "notify_server_forward_stopped",
            "1 while the endpoint is stopped until a person starts it.",
            ["endpoint"],
            registry=registry,
        )
        for endpoint in endpoints:
            for outcome in ("delivered", "failed", "throttled"):
                self._attempts.labels(endpoint, outcome)
            self._seconds.labels(endpoint)
            self._pending.labels(endpoint)
            self._oldest.labels(endpoint)
            self._failures.labels(endpoint)
            self._stopped.labels(endpoint)

    def on_attempt(self, endpoint: str, delivery: Outgoing, attempt: Attempt) -> None:
        """Count an attempt."""
        outcome = "delivered" if attempt.delivered else "throttled" if attempt.throttled else "failed"
        self._attempts.labels(endpoint, outcome).inc()
        if attempt.delivered:
            self._seconds.labels(endpoint).observe(max(0, self._now() - delivery.occurred_at) / 1000)

    def surveyed(self, waiting: Iterable[Waiting]) -> None:
        """Note what waits."""
        for each in waiting:
            self._pending.labels(each.name).set(each.pending)
            age = 0 if each.oldest_at is None else max(0, self._now() - each.oldest_at)
            self._oldest.labels(each.name).set(age / 1000)
            self._failures.labels(each.name).set(each.failures)
            self._stopped.labels(each.name).set(each.stopped_at is not None)

    async def survey(self, read: Callable[[], Awaitable[Iterable[Waiting]]]) -> None:
        """Refresh the gauges until cancelled; `read` is a coroutine function that returns what waits."""
        while True:
            try:
                self.surveyed(await read())
            except StoreUnavailableError as error:
                log.debug("cannot count waiting deliveries, trying again later", error=str(error))
            await asyncio.sleep(SURVEY_SECONDS)
