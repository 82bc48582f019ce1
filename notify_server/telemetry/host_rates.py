"""Keeps the rates of each host over the last minute."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from msgspec import Struct

from notify_server.model import FileResult, FileState

# A host's rates cover the last minute, and are forgotten in steps of ten seconds.
STEP_SECONDS = 10.0
MAX_STEPS = 6
# The number of hosts whose rates are remembered; the most recently requested stay.
MAX_HOSTS_KEPT = 1000


class HostRate(Struct, frozen=True):
    """A host in the last minute: attempts that ended, those that did not find the file, and their mean duration."""

    attempts: int
    failed: int
    mean_ms: float


class HostRates:
    """Counts each host's answers in the last minute. Times are monotonic seconds."""

    def __init__(self, max_hosts: int = MAX_HOSTS_KEPT) -> None:
        self._max_hosts = max_hosts
        # For each step: its end, attempts, failures, and ms in all.
        self._hosts: dict[str, deque[list[float]]] = {}

    def recorded(self, results: Sequence[FileResult], now: float) -> None:
        """Count these outcomes."""
        end = (now // STEP_SECONDS + 1) * STEP_SECONDS
        for result in results:
            host = result.file.host
            # The most recently requested host is last.
            steps = self._hosts.pop(host) if host in self._hosts else deque(maxlen=MAX_STEPS)
            self._hosts[host] = steps
            if not steps or steps[-1][0] != end:
                steps.append([end, 0, 0, 0.0])
                if len(self._hosts) > self._max_hosts:
                    del self._hosts[next(iter(self._hosts))]
            step = steps[-1]
            step[1] += 1
            step[2] += result.state is not FileState.AVAILABLE
            step[3] += result.elapsed_ms or 0.0

    def rates(self, now: float) -> dict[str, HostRate]:
        """Return the rates by host; hosts without a request in the last minute are left out."""
        # All steps of a host that is requested continuously: none of them is older than a minute.
        oldest = (now // STEP_SECONDS + 1 - MAX_STEPS) * STEP_SECONDS
        rates: dict[str, HostRate] = {}
        for host, steps in self._hosts.items():
            recent = [step for step in steps if step[0] > oldest]
            if recent:
                attempts = int(sum(step[1] for step in recent))
                total_ms = sum(step[3] for step in recent)
                rates[host] = HostRate(attempts, int(sum(step[2] for step in recent)), round(total_ms / attempts, 1))
        return rates
