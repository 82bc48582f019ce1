"""The clock of the record and the schedule."""

from __future__ import annotations

import time
from collections.abc import Callable

# The clock runs at most 1/SLEW faster or slower than elapsed time, which is less than the jitter of a retry's wait.
SLEW = 10
# A wall clock this wrong was never set. It is followed at once.
NEVER_SET_NS = 86_400 * 10**9


def unix_ms() -> int:
    """Return the wall clock's time, in milliseconds."""
    return time.time_ns() // 1_000_000


def boot_ns() -> int:
    """Return a time, in nanoseconds, that is never set and that does not stop while the machine sleeps."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class SteadyClock:
    """Gives Unix milliseconds that never go back and never leap: a tenth too fast, or too slow, until the wall clock
    agrees.

    When the wall clock is set forward by an hour, files that wait for an hour do not all become due at once; when it is
    set back, they do not wait for two; and nothing ends before it began.
    """

    def __init__(self, wall: Callable[[], int], elapsed_ns: Callable[[], int] = boot_ns) -> None:
        self._wall = wall
        self._elapsed_ns = elapsed_ns
        self._at = elapsed_ns()
        self._now = wall() * 1_000_000

    def __call__(self) -> int:
        """Return the time, in milliseconds."""
        at = self._elapsed_ns()
        passed, self._at = at - self._at, at
        behind = self._wall() * 1_000_000 - (self._now + passed)
        if abs(behind) < NEVER_SET_NS:
            behind = max(-passed // SLEW, min(behind, passed // SLEW))
        self._now += passed + behind
        return self._now // 1_000_000
