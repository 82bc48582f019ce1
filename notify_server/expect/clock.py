"""The clock that limits go by: it stands still while no server was ready to take notifications. Pure."""

from __future__ import annotations

import msgspec

# A server that is ready says so every second. A longer silence is an outage, in which the clock stands still.
MAX_SILENCE_MS = 3_000
# The clocks of several servers differ by less than this. A time further back comes from a clock that was set.
MAX_SKEW_MS = 60_000


class ReadyClock(msgspec.Struct, frozen=True, array_like=True):
    """`ready_at` is the last moment at which a server was ready, `away_ms` the sum of all outages before it."""

    ready_at: int
    away_ms: int

    def at(self, now: int) -> int:
        """Return the time on the clock at `now` (Unix ms). During an outage it is that of the moment before."""
        return (self.ready_at if self._stands_still(now) else now) - self.away_ms

    def ready(self, now: int) -> ReadyClock:
        """Return the clock after a server was ready at `now`: an outage that ends here counts as away."""
        if self._stands_still(now):
            return ReadyClock(now, self.away_ms + now - self.ready_at)
        return ReadyClock(max(now, self.ready_at), self.away_ms)

    def started(self, now: int) -> ReadyClock:
        """Return the clock after a time without open limits, in which `ready_at` is not kept up to date."""
        return ReadyClock(now, self.away_ms)

    def _stands_still(self, now: int) -> bool:
        return not -MAX_SKEW_MS <= now - self.ready_at <= MAX_SILENCE_MS
