"""Logs and metrics: set up once by the composition root, never from the import of a module."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, TextIO, cast

import structlog
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from notify_server.config import LogConfig

ACK_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class _Patient:
    """A stream whose reader may go away: that must not stop what wanted to say something."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def set_up_logging(config: LogConfig) -> None:
    """Log to standard error, one line an event, in colour on a terminal or as JSON.

    Values from outside are escaped (JSON strings, or repr on the console), so that no event can forge another line.
    """
    stream = cast("TextIO", _Patient(sys.stderr))
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
            _inert,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    # What libraries log, asyncio's "exception was never retrieved" above all, goes the same way.
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
            foreign_pre_chain=shared,
        )
    )
    handler.addFilter(_is_news)
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


# Valid JSON, but obeyed by terminals, taken for line ends, or not encodable.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _to_json(event: Any, **_: object) -> str:
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(event, ensure_ascii=False, default=str))


def _inert(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape the text that is not printable."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[name] = value.encode("unicode_escape").decode()
    return event


def _is_news(record: logging.LogRecord) -> bool:
    """Not that a request was malformed: aiohttp tells with a traceback, and quotes headers that may hold a token."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def report_end(task: asyncio.Task[None]) -> None:
    """A task's done callback, for tasks that should run as long as the daemon does: none of them dies in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        structlog.get_logger("notify_server").critical(
            "a part of the daemon has stopped, restart it", part=task.get_name(), exc_info=error
        )


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
