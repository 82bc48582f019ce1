"""Logs and metrics: set up once by the composition root, never from the import of a module."""

from __future__ import annotations

import logging
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from notify_server.config import LogConfig

ACK_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


def set_up_logging(config: LogConfig) -> None:
    """Log to standard error, one line an event, in colour on a terminal or as JSON.

    Values from outside are escaped (JSON strings, or repr on the console), so that no event can forge another line.
    """
    level = logging.getLevelNamesMapping()[config.level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if config.format == "json":
        renderer: list[structlog.typing.Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ]
    else:
        renderer = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            )
        ]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # What libraries log, asyncio's "exception was never retrieved" above all, goes the same way.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processor=renderer[-1], foreign_pre_chain=shared)
    )  # fmt: skip
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def _to_json(event: Any, **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()


class Durations:
    """A histogram of seconds that costs the hot path one bisection; it is made into Prometheus's when it is scraped."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text
        self._counts = [0] * (len(ACK_BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect_left(ACK_BUCKETS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For prometheus_client."""
        bounds = [*(str(bound) for bound in ACK_BUCKETS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class Metrics:
    """What Prometheus is told, in a registry of its own: an application has one, and a test as many as it likes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.refused = Counter(
            "notify_server_callbacks_refused", "Callbacks refused, by the code of the answer.", ["code"],
            registry=self.registry,
        )  # fmt: skip
        self.ack_seconds = Durations(
            "notify_server_ack_seconds",
            "From a callback's headers to its durable acknowledgement; its count is the acks.",
        )
        self.registry.register(self.ack_seconds)
        self.unknown_fields = Counter(
            "notify_server_unknown_fields",
            "Fields in notifications that the contract does not know.",
            registry=self.registry,
        )
        self.verdicts = Counter("notify_server_verdicts", "Verdicts reached.", ["verdict"], registry=self.registry)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def render(self) -> tuple[bytes, str]:
        """The exposition, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
