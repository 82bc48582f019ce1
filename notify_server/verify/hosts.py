"""Models a host: its queue, its files in flight, its pace, and its circuit.

**Circuit.** It opens after `circuit_failures` consecutive connection-level failures. While it is open nothing is sent
and no attempt is spent: the files stay pending. Afterwards it is half open, and the host on trial: as many files as its
limit allows are tried, within the slots that all hosts on trial share. One answer closes the circuit; otherwise it
opens again, for twice as long. It stays open for ten times the duration of the failure, so that a silent host uses a
tenth of the slots, but for at least a second and at most `circuit_rest`.

**Pacing.** A 429, or a 503 with Retry-After, slows the host down: it is paused for as long as it asked, and
afterwards paced to a little less than it has just served. The rate grows by 5 % per second while nothing is refused,
and ends above MAX_RATE. A host whose answers become slow has fewer requests under way (latency.py).
"""

from __future__ import annotations

from asyncio import TimerHandle
from collections import deque
from typing import Any

from notify_server.config import HostSettings
from notify_server.model import CircuitState, DueFile, HostView
from notify_server.verify.latency import LatencyWindow

REST_FACTOR = 10.0
MIN_REST = 1.0
# A host that asks for fewer requests without a time is paused for this long, doubled each time it serves nothing in
# between; never for longer than an hour, whatever it asks for.
BUSY_REST = 1.0
MAX_BUSY_REST_UNNAMED = 60.0
MAX_BUSY_REST = 3600.0
# A host that has refused all requests for a day is charged for it like for any other failure.
BUSY_SECONDS = 86_400.0
# Refusals within this time count as one: the requests were in flight together.
SAME_REFUSAL = 1.0
SLOW_DOWN = 0.85
SPEED_UP_A_SECOND = 0.05
MIN_RATE = 0.5
# Above this rate, pacing makes no difference.
MAX_RATE = 5000.0
# Paced requests may be this early, since timers have a resolution of a millisecond.
BURST_SECONDS = 0.005


# A host that has not answered for this long, or never, is a stranger.
LATELY = 300.0


def hostname_of(host: str) -> str:
    """Return the host name in a `Target.host`: without its port, and without an IPv6 address's brackets."""
    if host.startswith("["):
        return host[1 : host.index("]")]
    return host.partition(":")[0] if host.count(":") == 1 else host


def port_of(host: str) -> str:
    """Return the port in a `Target.host`, empty when it is the scheme's default."""
    return host.removeprefix("[").removeprefix(hostname_of(host)).removeprefix("]").removeprefix(":")


class Address:
    """A dialled address and port. The names at it share its limit and interval."""

    __slots__ = ("__weakref__", "in_flight", "not_before", "waiting")

    def __init__(self) -> None:
        self.in_flight = 0
        # When the next request may start, in monotonic seconds; and hosts whose turn came while it was at its limit.
        self.not_before = 0.0
        self.waiting: deque[Host] = deque()


class Host:
    """A host and its queue. Times are monotonic seconds. `Claims` keeps one for every host with files, and drops it
    when idle.
    """

    __slots__ = (
        "_busy_seconds", "_busy_since", "_failures", "_grown_at", "_last_rate", "_next_start", "_opened", "_refusals",
        "_served", "_slowed_at", "_window_start", "address", "answered_at", "dialled", "exhausted", "hops", "in_flight",
        "in_turn", "latency", "limit", "low", "name", "open_until", "prober", "queue", "rate", "rest_until", "reuse",
        "settings", "timer",
    )  # fmt: skip

    def __init__(self, name: str, settings: HostSettings, busy_seconds: float = BUSY_SECONDS) -> None:
        self.name = name
        self._busy_seconds = busy_seconds
        self.settings = settings
        # The maximum of files in flight here; less than the settings allow if other daemons request from the host too.
        self.limit = settings.per_host_concurrency
        self.latency = LatencyWindow()
        self.queue: deque[DueFile] = deque()
        self.in_flight = 0
        # False once an answer on a reused connection proved to be another request's.
        self.reuse = True
        # Set if the store had no more due files at the last claim; and the queue length below which to claim again.
        self.exhausted = False
        self.low = 0
        # State of the scheduler: whether the host has a turn, and the timer that will give it one; and the index of the
        # prober that has its connections.
        self.in_turn = False
        self.prober = 0
        self.timer: TimerHandle | None = None
        self.answered_at = float("-inf")
        # Attempts on files of other hosts that were redirected here and wait for a slot (attempts.Flight).
        self.hops: deque[Any] = deque()
        # The address dialled last, as text and as the limit shared with its other names.
        self.dialled = ""
        self.address: Address | None = None
        self.open_until = 0.0
        # Requests per second, None when the host is not paced; and the end of the pause that it asked for.
        self.rate: float | None = None
        self.rest_until = 0.0
        self._failures = 0
        self._opened = 0
        self._next_start = 0.0
        # Requests served in the current second, and the rate of the last whole one.
        self._window_start = 0.0
        self._served = 0
        self._last_rate = 0.0
        self._slowed_at = -SAME_REFUSAL
        self._grown_at = 0.0
        self._refusals = 0
        self._busy_since: float | None = None

    @property
    def on_trial(self) -> bool:
        """True while the circuit is not closed: requests now find out whether the host is back."""
        return self._failures >= self.settings.circuit_failures

    @property
    def is_paced(self) -> bool:
        """True while the host has a rate, or fewer requests under way than its limit because it answers slowly."""
        return self.rate is not None or self.latency.size is not None

    def rests(self, now: float) -> bool:
        """Return whether nothing may be sent now: the circuit is open, or the host has asked for a pause."""
        return now < self.rest_until or (self.on_trial and now < self.open_until)

    def rest_ends(self) -> float:
        """Return when the host's pause ends, which may be in the past."""
        return max(self.rest_until, self.open_until) if self.on_trial else self.rest_until

    def circuit(self, now: float) -> CircuitState:
        """The state of the circuit."""
        if not self.on_trial:
            return CircuitState.CLOSED
        return CircuitState.OPEN if now < self.open_until else CircuitState.HALF_OPEN

    def ready_at(self) -> float | None:
        """Return when the next file may start, which may be in the past; None when the host is at its limit."""
        if self.in_flight >= self.limit or (self.latency.size is not None and self.in_flight >= int(self.latency.size)):
            return None
        moment = max(self._next_start, self.rest_until)
        return max(moment, self.open_until) if self.on_trial else moment

    def start(self, now: float) -> None:
        """Count an attempt that begins."""
        self.in_flight += 1
        interval = self.settings.per_host_interval
        if self.rate is not None:
            self._next_start = max(self._next_start, now - BURST_SECONDS) + max(interval, 1 / self.rate)
        elif interval:
            self._next_start = now + interval

    def end(self) -> None:
        """Count an attempt that has ended."""
        self.in_flight -= 1

    def answered(self, now: float) -> None:
        """Close the circuit: the host has answered."""
        self._failures = 0
        self._opened = 0
        self.answered_at = now

    def is_stranger(self, now: float) -> bool:
        """Return whether the host has not answered lately, so that it shares its slots with others of the kind."""
        return now - self.answered_at > LATELY

    def pause(self, until: float) -> None:
        """Pause the host until `until`, because this machine is short of ports or descriptors."""
        self.rest_until = max(self.rest_until, until)

    def delay_start(self, until: float) -> None:
        """Start nothing before then."""
        self._next_start = max(self._next_start, until)

    def served(self, now: float) -> None:
        """Count a request that the host did not refuse as too many, and raise its rate."""
        self._busy_since = None
        self._refusals = 0
        if now - self._window_start >= 1:
            self._last_rate = self._served / (now - self._window_start)
            self._window_start, self._served = now, 0
        self._served += 1
        if self.rate is not None:
            grown = self.rate * (1 + SPEED_UP_A_SECOND * min(1.0, max(0.0, now - self._grown_at)))
            self._grown_at = max(now, self._grown_at)
            self.rate = grown if grown < MAX_RATE else None

    def took(self, now: float, seconds: float) -> None:
        """Adapt the number of requests under way to the time that an answer took."""
        self.latency.answered(now, seconds, self.in_flight, self.limit)

    def too_busy(self, now: float, asked_seconds: float | None) -> bool:
        """Note that the host has asked for fewer requests, and perhaps for a pause of so many seconds.

        Return False when it has refused everything for a day, so that the file is charged.
        """
        if self._busy_since is None:
            self._busy_since = now
        elif now - self._busy_since > self._busy_seconds:
            return False
        if now - self._slowed_at >= SAME_REFUSAL:
            self._refusals += 1
            elapsed = max(1.0, now - self._window_start)
            seen = max(self._served / elapsed, self._last_rate if elapsed < 2 else 0.0, MIN_RATE)
            before = self.rate if self.rate is not None else seen
            self.rate = max(MIN_RATE, SLOW_DOWN * min(before, max(seen, before / 2)))
        self._slowed_at = self._grown_at = now
        if asked_seconds is None:
            asked_seconds = min(BUSY_REST * 2.0 ** min(self._refusals - 1, 10), MAX_BUSY_REST_UNNAMED)
        self.rest_until = max(self.rest_until, now + min(max(asked_seconds, 0.0), MAX_BUSY_REST, self._busy_seconds))
        return True

    def failed(self, now: float, seconds: float) -> bool:
        """Count a connection-level failure that took so many seconds. Return whether the circuit is open now."""
        self._failures += 1
        if self.on_trial:
            # Requests that were in flight together open it once.
            self._opened += now >= self.open_until
            rest = max(REST_FACTOR * seconds, MIN_REST) * 2.0 ** min(self._opened - 1, 16)
            self.open_until = max(self.open_until, now + min(rest, self.settings.circuit_rest))
        return self.on_trial

    def view(self, now: float) -> HostView:
        """Return the figures that pages and metrics show."""
        return HostView(
            self.name,
            self.circuit(now),
            round(max(0.0, self.open_until - now), 3) if self.on_trial else 0.0,
            self.in_flight,
            len(self.queue) + len(self.hops),
            self.limit if self.latency.size is None else min(self.limit, int(self.latency.size)),
            None if self.rate is None else round(self.rate, 1),
            round(max(0.0, self.rest_until - now), 3),
        )

    def idle(self, now: float) -> bool:
        """Return whether the entry can be evicted without losing state."""
        remembered = max(
            self._next_start,
            self.open_until + self.settings.circuit_rest if self._failures else 0.0,
            self.rest_until + MAX_BUSY_REST_UNNAMED if self.rate is not None else 0.0,
        )
        return not (self.queue or self.hops or self.in_flight or self.timer or now < remembered)
