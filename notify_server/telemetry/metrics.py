"""The server's metrics for Prometheus."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Info, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from notify_server.model import FileResult, FileState, Verdict
from notify_server.telemetry.series import Counts, Durations, Read

# The label of an accepted callback: the code of the platform's convention.
ACCEPTED = "000"
SETTLED_VERDICTS = (Verdict.COMPLETE, Verdict.INCOMPLETE)
SETTLED_STATES = (FileState.AVAILABLE, FileState.UNAVAILABLE, FileState.BLOCKED)


def tracing_wanted(environ: Mapping[str, str]) -> bool:
    """Return whether the environment names a collector for traces, in OpenTelemetry's variables."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    return bool(environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"))


class Metrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
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
        self.reported_failed = self._counts(
            "notify_server_files_reported_failed", "Files that notifications report as FAILED, at each delivery.", ""
        )
        self.verdicts = self._counts(
            "notify_server_verdicts", "Verdicts reached; a batch that is checked again reaches another.",
            "verdict", *SETTLED_VERDICTS,
        )  # fmt: skip
        self.files = self._counts(
            "notify_server_files_settled", "Files that were requested and have settled.", "state", *SETTLED_STATES
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
            "When pruning last finished, in Unix time; missing until then.",
            lambda: self._prune[0] if self._prune else None,
        )
        self.gauge(
            "notify_server_prune_last_run_duration_seconds",
            "How long the pruning that last finished took.",
            lambda: self._prune[1] if self._prune else None,
        )

    def pruned(self, at: float, seconds: float) -> None:
        """Note a finished pruning: its time, in Unix seconds, and its duration."""
        self._prune = at, seconds

    def surveyed(self, oldest_pending_at: float | None, rejections: int) -> None:
        """Note the figures that need a walk over the record: when its oldest batch without a verdict was received, in
        Unix seconds, and the number of refused bodies.
        """
        self._surveyed = oldest_pending_at, rejections

    def watch_survey(self, now: Callable[[], float]) -> None:
        """Export the figures of the last survey; `now` gives Unix seconds."""

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
        """Export the size of the database at this path, and the free space of its disk."""

        def sizes() -> Mapping[str, float]:
            parts = {"database": database, "wal": database.with_name(database.name + "-wal")}
            found = {}
            for part, path in parts.items():
                # The WAL may be deleted at any time.
                with contextlib.suppress(FileNotFoundError):
                    found[part] = path.stat().st_size
            return found

        def free() -> float | None:
            try:
                volume = os.statvfs(database.parent)
            except OSError:
                return None
            return volume.f_bavail * volume.f_frsize

        self.gauges("notify_server_store_bytes", "Size of the store's files: the database, and its WAL.", "file", sizes)
        self.gauge("notify_server_store_free_bytes", "Space that is left where the store's files are.", free)

    def build_info(self, **versions: str) -> None:
        """Export the versions of the components, as labels."""
        Info("notify_server_build", "The versions in use.", registry=self.registry).info(versions)

    def _counts(self, name: str, text: str, label: str, *values: str) -> Counts:
        counts = Counts(name, text, label, values or ("",))
        self.registry.register(counts)
        return counts

    def _durations(self, name: str, text: str, label: str = "", *values: str) -> Durations:
        durations = Durations(name, text, label, values or ("",))
        self.registry.register(durations)
        return durations

    def gauge(self, name: str, text: str, read: Callable[[], float | None]) -> None:
        """Add a gauge that is read when it is scraped; None is no value."""

        def reading() -> Mapping[str, float]:
            value = read()
            return {} if value is None else {"": value}

        self.gauges(name, text, "", reading)

    def gauges(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        """Add gauges, one for each value of a label, that are read when they are scraped."""
        self.registry.register(Read(GaugeMetricFamily, name, text, label, read))

    def counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a counter that is kept elsewhere and read when it is scraped."""
        self.registry.register(Read(CounterMetricFamily, name, text, "", lambda: {"": read()}))

    def recorded(self, results: Sequence[FileResult]) -> None:
        """Count recorded results and their requests."""
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
        """Return the exposition, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
