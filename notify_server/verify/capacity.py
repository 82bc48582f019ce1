"""How many attempts may be in flight: fewer while this machine is short of ports or descriptors. Has no clock."""

from __future__ import annotations

# A shortage that lasts lowers the capacity once in this time; and it has passed when this time is over.
LOWER_SECONDS = 1.0
CALM_SECONDS = 5.0
# The capacity grows by this factor a second, once the shortage has passed.
GROWTH = 1.25


class Capacity:
    """`limit` is the number of attempts that may be in flight, at most `slots`. Times are monotonic seconds."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._short_at = 0.0
        self._grown_at = 0.0
        self.limit = slots
        self.is_short = False

    def lower(self, now: float, in_flight: int) -> bool:
        """Halve the limit because of a shortage. Return whether it is the first of its kind."""
        begins = not self.is_short
        if begins or now - self._short_at >= LOWER_SECONDS:
            self.limit = max(1, min(self.limit, in_flight) // 2)
            self._short_at = now
        self.is_short = True
        self._grown_at = now + CALM_SECONDS
        return begins

    def recover(self, now: float) -> bool:
        """Raise the limit as time has passed without a shortage. Return whether the shortage is over with it."""
        if not self.is_short or now - self._grown_at < 1.0:
            return False
        self._grown_at = now
        self.limit = min(self._slots, int(self.limit * GROWTH) + 1)
        self.is_short = self.limit < self._slots
        return not self.is_short
