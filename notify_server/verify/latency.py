"""Bounds the requests under way at a host by its latency. Has no clock.

An overloaded host answers more slowly instead of refusing. When an answer takes much longer than the fastest one, the
number of requests under way is reduced. Otherwise each answer raises it by 1/size, up to the host's limit.
"""

from __future__ import annotations

# Answers are slow from this time on, and from this multiple of the fastest one on.
SLOW_SECONDS = 1.0
SLOW_FACTOR = 4.0
SHRINK = 0.7


class LatencyWindow:
    """`size` is how many requests may be under way, None for any number. Times are monotonic seconds."""

    __slots__ = ("_fastest", "_shrunk_at", "size")

    def __init__(self) -> None:
        self.size: float | None = None
        self._fastest = float("inf")
        self._shrunk_at = float("-inf")

    def answered(self, now: float, seconds: float, in_flight: int, limit: int) -> None:
        """Adapt to an answer that took so many seconds, with so many requests under way of at most `limit`."""
        if seconds < self._fastest:
            self._fastest = seconds
        if seconds >= SLOW_SECONDS and seconds >= SLOW_FACTOR * self._fastest:
            self._shrink(now, seconds, in_flight)
        elif self.size is not None:
            self.size += 1 / self.size
            if self.size >= limit:
                self.size = None

    def _shrink(self, now: float, seconds: float, in_flight: int) -> None:
        if self.size is not None and self.size <= 1:
            # Slow even with one request under way: it is not their number.
            self._fastest = seconds
        elif now - seconds >= self._shrunk_at:
            # Answers to requests from before the last time say nothing of the present size.
            self.size = max(1.0, SHRINK * min(self.size or in_flight, in_flight))
            self._shrunk_at = now
