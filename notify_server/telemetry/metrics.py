"""Logs and metrics: set up once by the composition root, never from the import of a module."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO, cast

import structlog
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CollectorRegistry, Gauge, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from notify_server.config import LogConfig
from notify_server.model import FileResult, FileState, Verdict

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# How a callback that was accepted is counted: the code of the platform's convention.
ACCEPTED = "000"
SETTLED_VERDICTS = (Verdict.COMPLETE, Verdict.INCOMPLETE)
SETTLED_STATES = (FileState.AVAILABLE, FileState.UNAVAILABLE, FileState.BLOCKED)


class BestEffortStream:
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
    stream = cast("TextIO", BestEffortStream(sys.stderr))
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


def tracing_wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment names a collector for traces, in the variables that OpenTelemetry has for it."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    return bool(environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"))


class Series:
    """The observations of one histogram under one label. Counting costs the hot path one bisection."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds


class Durations:
    """Histograms of seconds, one for each value of a label; without a label there is one, under "".

    They are made into Prometheus's when they are scraped.
    """

    def __init__(self, name: str, text: str, label: str, values: Sequence[str]) -> None:
        self._name, self._text, self._labels = name, text, [label] if label else []
        self.series = {value: Series() for value in values}

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For prometheus_client."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
        for value, series in self.series.items():
            buckets = list(zip(bounds, accumulate(series.counts), strict=True))
            family.add_metric([value] if value else [], buckets, series.sum)
        yield family


class Counts:
    """Counters under one label, counted on the event loop alone and therefore without a lock; without a label there is
    one, under "".
    """

    def __init__(self, name: str, text: str, label: str, values: Sequence[str]) -> None:
        self._family = name, text, None, [label] if label else []
        self.by = dict.fromkeys(values, 0)

    def add(self, value: str, number: int = 1) -> None:
        """Count `number` more."""
        self.by[value] = self.by.get(value, 0) + number

    def add_plain(self, number: int = 1) -> None:
        """Count `number` more of what has no label."""
        self.add("", number)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """For prometheus_client."""
        family = CounterMetricFamily(*self._family)
        for value, number in self.by.items():
            family.add_metric([value] if value else [], number)
        yield family


class _Read:
    """Metrics of one kind under one label that are read when they are scraped; without a label there is at most one,
    under "".
    """

    def __init__(
        self,
        kind: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        text: str,
        label: str,
        read: Callable[[], Mapping[str, float]],
    ) -> None:
        self._kind = kind
        self._family = name, text, None, [label] if label else []
        self._read = read

    def describe(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """For prometheus_client, which otherwise reads them to learn their names."""
        yield self._kind(*self._family)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """For prometheus_client."""
        family = self._kind(*self._family)
        for value, number in self._read().items():
            family.add_metric([value] if value else [], number)
        yield family


class Metrics:
    """What Prometheus is told, in a registry of its own: an application has one, and a test as many as it likes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.callbacks = self._counts(
            "notify_server_callbacks", "Callbacks answered, by the code of the answer; 000 is an ack.", "code", ACCEPTED
        )
        self.connections_refused = self._counts(
            "notify_server_connections_refused", "Connections refused because there were max_connections already.", ""
        )
        self.ack_seconds = self._durations(
            "notify_server_ack_seconds", "From a callback's headers to its durable acknowledgement."
        )
        self.commit_seconds = self._durations(
            "notify_server_commit_seconds", "Transactions that callbacks waited for, from their beginning to the disk."
        )
        self.unknown_fields = self._counts(
            "notify_server_unknown_fields", "Fields in notifications that the contract does not know.", ""
        )
        self.verdicts = self._counts(
            "notify_server_verdicts", "Verdicts reached; a batch that is checked again reaches another.",
            "verdict", *SETTLED_VERDICTS,
        )  # fmt: skip
        self.files = self._counts(
            "notify_server_files_settled", "Files that were asked for and have settled.", "state", *SETTLED_STATES
        )
        self.probes = self._counts(
            "notify_server_probes", 'Requests made to hosts, by the reason they failed for, or "ok".', "reason", "ok"
        )
        self.probe_seconds = self._durations(
            "notify_server_probe_seconds", "Requests to hosts, in all and phase by phase where a phase took place.",
            "phase", "dns", "connect", "tls", "first_byte", "total",
        )  # fmt: skip
        self._surveyed: tuple[float | None, int] | None = None
        self.pruned_rows = self._counts("notify_server_pruned_rows", "Rows that retention has deleted.", "")
        self._prune: tuple[float, float] | None = None
        self.gauge(
            "notify_server_prune_last_run_timestamp_seconds",
            "When retention was last gone through to its end, in Unix time; missing until then.",
            lambda: self._prune[0] if self._prune else None,
        )
        self.gauge(
            "notify_server_prune_last_run_duration_seconds",
            "How long retention took when it was last gone through to its end.",
            lambda: self._prune[1] if self._prune else None,
        )

    def pruned(self, at: float, seconds: float) -> None:
        """Retention has been gone through: when that was, in Unix seconds, and what it took."""
        self._prune = at, seconds

    def surveyed(self, oldest_pending_at: float | None, rejections: int) -> None:
        """What only a walk over the record tells: when its oldest batch without a verdict came, in Unix seconds, and
        how many refused bodies it has."""
        self._surveyed = oldest_pending_at, rejections

    def watch_survey(self, now: Callable[[], float]) -> None:
        """Tell of what was `surveyed` last; `now` gives Unix seconds."""

        def oldest_pending() -> float | None:
            if self._surveyed is None:
                return None
            oldest_at, _ = self._surveyed
            return max(0.0, now() - oldest_at) if oldest_at is not None else 0.0

        self.gauge(
            "notify_server_oldest_pending_seconds",
            "How long the oldest batch without a verdict has been waiting for it; 0 when there is none.",
            oldest_pending,
        )
        self.gauge(
            "notify_server_rejections", "Refused bodies that are kept.", lambda: self._surveyed and self._surveyed[1]
        )

    def watch_files(self, database: Path) -> None:
        """Tell how large the database at this path is, and how much room is left for it."""

        def sizes() -> Mapping[str, float]:
            parts = {"database": database, "wal": database.with_name(database.name + "-wal")}
            return {part: path.stat().st_size for part, path in parts.items() if path.exists()}

        def free() -> float | None:
            try:
                volume = os.statvfs(database.parent)
            except OSError:
                return None
            return volume.f_bavail * volume.f_frsize

        self.gauges("notify_server_store_bytes", "Size of the store's files: the database, and its WAL.", "file", sizes)
        self.gauge("notify_server_store_free_bytes", "Space that is left where the store's files are.", free)

    def build_info(self, **versions: str) -> None:
        """The versions of what this daemon is made of, as labels."""
        gauge = Gauge("notify_server_build_info", "1, and the versions in use.", list(versions), registry=self.registry)
        gauge.labels(**versions).set(1)

    def _counts(self, name: str, text: str, label: str, *values: str) -> Counts:
        counts = Counts(name, text, label, values or ("",))
        self.registry.register(counts)
        return counts

    def _durations(self, name: str, text: str, label: str = "", *values: str) -> Durations:
        durations = Durations(name, text, label, values or ("",))
        self.registry.register(durations)
        return durations

    def gauge(self, name: str, text: str, read: Callable[[], float | None]) -> None:
        """A gauge that is read when it is scraped; None is no value."""

        def reading() -> Mapping[str, float]:
            value = read()
            return {} if value is None else {"": value}

        self.gauges(name, text, "", reading)

    def gauges(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        """Gauges, one for each value of a label, that are read when they are scraped."""
        self.registry.register(_Read(GaugeMetricFamily, name, text, label, read))

    def counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A counter that is counted elsewhere and read when it is scraped."""
        self.registry.register(_Read(CounterMetricFamily, name, text, "", lambda: {"": read()}))

    def recorded(self, results: Sequence[FileResult]) -> None:
        """Count results that have been recorded, and the requests they took."""
        dns, connect, tls, first_byte, total = self.probe_seconds.series.values()
        for result in results:
            if result.state is not FileState.PENDING:
                self.files.add(result.state)
            for request in result.requests:
                self.probes.add(request.reason or "ok")
                total.observe(request.total_ms / 1000)
                for series, duration_ms in (
                    (dns, request.dns_ms),
                    (connect, request.connect_ms),
                    (tls, request.tls_ms),
                    (first_byte, request.first_byte_ms),
                ):
                    if duration_ms is not None:
                        series.observe(duration_ms / 1000)

    def render(self) -> tuple[bytes, str]:
        """The exposition, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
