"""Keeps a time series of the server's work in memory: seconds for ten minutes, minutes for a day."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from msgspec import Struct

from notify_server.model import FileState, Verdict
from notify_server.telemetry.metrics import ACCEPTED, Metrics
from notify_server.telemetry.series import BUCKETS

HISTORY_SECONDS = 600
HISTORY_MINUTES = 24 * 60


class Sample(Struct, frozen=True):
    """Counts of `seconds` until `at`. Latencies are estimates from histograms, null when nothing happened."""

    at: datetime
    seconds: float
    accepted: int
    refused: int
    requests: int
    failed_requests: int
    available: int
    unavailable: int
    complete: int
    incomplete: int
    backlog: int
    in_flight: int
    ack_p50_ms: float | None = None
    ack_p99_ms: float | None = None
    probe_p50_ms: float | None = None
    probe_p99_ms: float | None = None


def quantile_ms(counts: Sequence[int], share: float) -> float | None:
    """Return a quantile of a histogram with the bounds BUCKETS, in ms, as if each bucket were evenly filled; beyond the
    last bound, that bound. None when it is empty.
    """
    rank = share * sum(counts)
    if not rank:
        return None
    below = 0
    low = 0.0
    for count, high in zip(counts, BUCKETS, strict=False):
        if below + count >= rank:
            return 1000 * (low + (high - low) * (rank - below) / count)
        below += count
        low = high
    return 1000 * BUCKETS[-1]


class _Reading(Struct, frozen=True):
    """The counters at one time."""

    at: float
    callbacks: Mapping[str, int]
    probes: Mapping[str, int]
    files: Mapping[str, int]
    verdicts: Mapping[str, int]
    acks: Sequence[int]
    probe_times: Sequence[int]


class Timeline:
    """Call `sample` once a second. `now` gives Unix ms; `backlog` and `in_flight` are read at each sample."""

    def __init__(
        self, metrics: Metrics, *, now: Callable[[], int], backlog: Callable[[], int], in_flight: Callable[[], int]
    ) -> None:
        self._metrics = metrics
        self._now = now
        self._backlog = backlog
        self._in_flight = in_flight
        self.seconds: deque[Sample] = deque(maxlen=HISTORY_SECONDS)
        self.minutes: deque[Sample] = deque(maxlen=HISTORY_MINUTES)
        self._last = self._minute = self._read(0.0)
        self._readings: deque[_Reading] = deque(maxlen=HISTORY_SECONDS + 1)

    def sample(self, monotonic: float) -> Sample:
        """Take a sample of the time since the last one; `monotonic` is seconds."""
        reading = self._read(monotonic)
        sample = self._between(self._last, reading)
        self._last = reading
        self._readings.append(reading)
        self.seconds.append(sample)
        if not self._minute.at:
            self._minute = reading
        elif reading.at - self._minute.at >= 60.0:
            self.minutes.append(self._between(self._minute, reading))
            self._minute = reading
        return sample

    def window(self, seconds: float) -> Sample | None:
        """Return one sample of the last `seconds`, at most ten minutes; None before the first sample. Its quantiles are
        those of the whole window."""
        if not self._readings:
            return None
        latest = self._readings[-1]
        # The readings are a second apart, give or take a late timer.
        first = next(reading for reading in self._readings if reading.at >= latest.at - seconds - 0.5)
        return self._between(first, latest)

    def _read(self, monotonic: float) -> _Reading:
        metrics = self._metrics
        return _Reading(
            monotonic,
            dict(metrics.callbacks.by),
            dict(metrics.probes.by),
            dict(metrics.files.by),
            dict(metrics.verdicts.by),
            list(metrics.ack_seconds.series[""].counts),
            list(metrics.probe_seconds.series["total"].counts),
        )

    def _between(self, before: _Reading, after: _Reading) -> Sample:
        def grown(was: Mapping[str, int], has: Mapping[str, int], *names: str) -> int:
            return sum(has.get(name, 0) - was.get(name, 0) for name in names)

        accepted = grown(before.callbacks, after.callbacks, ACCEPTED)
        requests = grown(before.probes, after.probes, *after.probes)
        acks = [now - then for then, now in zip(before.acks, after.acks, strict=True)]
        probes = [now - then for then, now in zip(before.probe_times, after.probe_times, strict=True)]
        return Sample(
            datetime.fromtimestamp(self._now() / 1000, UTC),
            round(after.at - before.at, 3) if before.at else 0.0,
            accepted,
            grown(before.callbacks, after.callbacks, *after.callbacks) - accepted,
            requests,
            requests - grown(before.probes, after.probes, "ok"),
            grown(before.files, after.files, FileState.AVAILABLE),
            grown(before.files, after.files, FileState.UNAVAILABLE, FileState.BLOCKED),
            grown(before.verdicts, after.verdicts, Verdict.COMPLETE),
            grown(before.verdicts, after.verdicts, Verdict.INCOMPLETE),
            self._backlog(),
            self._in_flight(),
            quantile_ms(acks, 0.5),
            quantile_ms(acks, 0.99),
            quantile_ms(probes, 0.5),
            quantile_ms(probes, 0.99),
        )
