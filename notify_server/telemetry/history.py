"""What has been going on, second by second and minute by minute, in memory: how much came in, what was asked, how long
it took; and how each host has been doing of late. It begins with the process; the record itself is in the store.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from msgspec import Struct

from notify_server.model import FileResult, FileState, Verdict
from notify_server.telemetry.metrics import ACCEPTED, BUCKETS, Metrics

HISTORY_SECONDS = 600
HISTORY_MINUTES = 24 * 60
# A host's rates are of the last minute, forgotten in steps of ten seconds.
STEP_SECONDS = 10.0
MAX_STEPS = 6
# Hosts whose rates are remembered, those asked last.
MAX_HOSTS_KEPT = 1000


class Sample(Struct, frozen=True):
    """What happened in `seconds` until `at`. Latencies are estimates from histograms, null when nothing happened."""

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


class HostRate(Struct, frozen=True):
    """A host in the last minute: attempts that ended, those that did not find the file, and the mean time they took."""

    attempts: int
    failed: int
    mean_ms: float


def quantile_ms(counts: Sequence[int], share: float) -> float | None:
    """The quantile of a histogram with the bounds BUCKETS, in ms, as if a bucket were evenly filled; beyond the last
    bound, that bound. None when it is empty."""
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
    """The counters at one moment."""

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

    def sample(self, monotonic: float) -> Sample:
        """What has happened since the last time; `monotonic` is seconds."""
        reading = self._read(monotonic)
        sample = self._between(self._last, reading)
        self._last = reading
        self.seconds.append(sample)
        if not self._minute.at:
            self._minute = reading
        elif reading.at - self._minute.at >= 60.0:
            self.minutes.append(self._between(self._minute, reading))
            self._minute = reading
        return sample

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


class HostRates:
    """What each host has answered in the last minute. Times are monotonic seconds."""

    def __init__(self) -> None:
        # For each step: when it ends, attempts, failures, and ms in all.
        self._hosts: dict[str, deque[list[float]]] = {}

    def recorded(self, results: Sequence[FileResult], now: float) -> None:
        """Count these outcomes."""
        end = (now // STEP_SECONDS + 1) * STEP_SECONDS
        for result in results:
            host = result.file.host
            # Asked last stands last.
            steps = self._hosts.pop(host) if host in self._hosts else deque(maxlen=MAX_STEPS)
            self._hosts[host] = steps
            if not steps or steps[-1][0] != end:
                steps.append([end, 0, 0, 0.0])
                if len(self._hosts) > MAX_HOSTS_KEPT:
                    del self._hosts[next(iter(self._hosts))]
            step = steps[-1]
            step[1] += 1
            step[2] += result.state is not FileState.AVAILABLE
            step[3] += result.elapsed_ms or 0.0

    def rates(self, now: float) -> dict[str, HostRate]:
        """By host; hosts that have not been asked in the last minute are left out."""
        # As many steps as are kept of a host that is asked all the time: none of what they tell is older than a minute.
        oldest = (now // STEP_SECONDS + 1 - MAX_STEPS) * STEP_SECONDS
        rates: dict[str, HostRate] = {}
        for host, steps in self._hosts.items():
            recent = [step for step in steps if step[0] > oldest]
            if recent:
                attempts = int(sum(step[1] for step in recent))
                total_ms = sum(step[3] for step in recent)
                rates[host] = HostRate(attempts, int(sum(step[2] for step in recent)), round(total_ms / attempts, 1))
        return rates
