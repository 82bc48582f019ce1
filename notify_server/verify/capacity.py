"""Limits the attempts in flight while this machine is short of ports or descriptors. Has no clock."""

from __future__ import annotations

# A lasting shortage lowers the capacity once in this time; without another in this time it has passed.
LOWER_SECONDS = 1.0
CALM_SECONDS = 5.0
# The capacity grows by this factor per second, once the shortage has passed.
GROWTH = 1.25


class Capacity:
    """`limit` is the maximum of attempts in flight, at most `slots`. Times are monotonic seconds."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._short_at = 0.0
        self._grown_at = 0.0
        self.limit = slots
        self.is_short = False

    def lower(self, now: float, in_flight: int) -> bool:
        """Halve the limit because of a shortage. Return whether a new shortage begins with it."""
        begins = not self.is_short
        if begins or now - self._short_at >= LOWER_SECONDS:
            self.limit = max(1, min(self.limit, in_flight) // 2)
            self._short_at = now
        self.is_short = True
        self._grown_at = now + CALM_SECONDS
        return begins

    def recover(self, now: float) -> bool:
        """Raise the limit if no shortage occurred lately. Return whether the shortage has just ended."""
        if not self.is_short or now - self._grown_at < 1.0:
            return False
        self._grown_at = now
        self.limit = min(self._slots, int(self.limit * GROWTH) + 1)
        self.is_short = self.limit < self._slots
        return not self.is_short
