"""A host, as an object: what waits for it, what is in flight to it, how fast it may be asked, and whether it answers
at all.

The circuit of a host opens after `circuit_failures` consecutive connection-level failures. While it is open nothing is
sent, and nothing is spent: the files stay pending. Afterwards it is half open, and the host on trial: as many files as
its limit allows are tried, within what all hosts on trial may have together. One answer closes the circuit; otherwise
it opens again. It stays open for ten times as long as its failures take, so that a host which keeps silent costs a
tenth of what it did, and one which refuses at once is asked again soon; but never for longer than `circuit_rest`.
"""

from __future__ import annotations

from asyncio import TimerHandle
from collections import deque

from notify_server.config import HostSettings
from notify_server.model import CircuitState, DueFile

REST_FACTOR = 10.0
REST_SHORTEST = 0.1


def hostname_of(host: str) -> str:
    """The host name in a `Target.host`: without its port, and without an IPv6 address's brackets."""
    if host.startswith("["):
        return host[1 : host.index("]")]
    return host.partition(":")[0] if host.count(":") == 1 else host


class Host:
    """Times are monotonic seconds. The pool keeps one for every host it has files of, and drops it when it is idle."""

    __slots__ = (
        "_failures", "_next_start", "exhausted", "in_flight", "in_turn", "limit", "low", "name", "open_until", "prober",
        "queue", "reuse", "settings", "timer",
    )  # fmt: skip

    def __init__(self, name: str, settings: HostSettings) -> None:
        self.name = name
        self.settings = settings
        # How many files may be under way here; less than the settings say when other daemons ask the host too.
        self.limit = settings.per_host_concurrency
        self.queue: deque[DueFile] = deque()
        self.in_flight = 0
        # False once an answer on a reused connection proved to be another request's.
        self.reuse = True
        # The store had no more due files when it was last asked; and how short the queue is when it is worth asking
        # again.
        self.exhausted = False
        self.low = 0
        # The pool's: whether the host stands in line, and what will put it there; and the place of the prober that has
        # its connections.
        self.in_turn = False
        self.prober = 0
        self.timer: TimerHandle | None = None
        self.open_until = 0.0
        self._failures = 0
        self._next_start = 0.0

    @property
    def on_trial(self) -> bool:
        """Whether the circuit is not closed: what is sent now finds out whether the host is back."""
        return self._failures >= self.settings.circuit_failures

    def rests(self, now: float) -> bool:
        """Whether the circuit is open."""
        return self.on_trial and now < self.open_until

    def circuit(self, now: float) -> CircuitState:
        """The state of the circuit."""
        if not self.on_trial:
            return CircuitState.CLOSED
        return CircuitState.OPEN if now < self.open_until else CircuitState.HALF_OPEN

    def ready_at(self) -> float | None:
        """When the next file may start, which may be in the past; None when the host is at its limit."""
        if self.in_flight >= self.limit:
            return None
        return max(self._next_start, self.open_until) if self.on_trial else self._next_start

    def start(self, now: float) -> None:
        """An attempt begins."""
        self.in_flight += 1
        if self.settings.per_host_interval:
            self._next_start = now + self.settings.per_host_interval

    def end(self) -> None:
        """An attempt is over, whatever came of it."""
        self.in_flight -= 1

    def answered(self) -> None:
        """The host has answered something: it is there."""
        self._failures = 0

    def failed(self, now: float, seconds: float) -> bool:
        """The host could not be reached, after so many seconds. Returns whether the circuit is open now."""
        self._failures += 1
        if self.on_trial:
            rest = min(max(REST_FACTOR * seconds, REST_SHORTEST), self.settings.circuit_rest)
            self.open_until = max(self.open_until, now + rest)
        return self.on_trial

    def idle(self, now: float) -> bool:
        """Whether nothing is known of the host that would be missed."""
        remembered = max(self._next_start, self.open_until + self.settings.circuit_rest if self._failures else 0.0)
        return not (self.queue or self.in_flight or self.timer or now < remembered)
