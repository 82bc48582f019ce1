"""Counts the files that are accepted and not settled, on a database that other nodes change too."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

# The number of corrections that may be skipped in a row while this node changes the backlog.
MAX_SKIPPED_CORRECTIONS = 30
# At most this share of the time is spent on counting: its cost grows with the backlog.
COUNTING_SHARE = 0.02


class Backlog:
    """Keeps the count in memory, exact for the changes of this node, and corrects it for those of the others.

    A count that the database gives is only comparable while no change of this node is in flight: such a change may or
    may not be in it already.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.files = 0
        self._clock = clock
        self._begun = 0
        self._in_flight = 0
        self._skipped = 0
        self._correct_at = 0.0

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Mark the time in which the database and `files` are changed."""
        self._begun += 1
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    async def correct(self, count: Callable[[], Awaitable[int]]) -> None:
        """Set `files` to the result of `count`, unless that was done a moment ago, or this node was changing it."""
        if (began := self._clock()) < self._correct_at:
            return
        begun, before, quiet = self._begun, self.files, not self._in_flight
        counted = await count()
        self._correct_at = began + (self._clock() - began) / COUNTING_SHARE
        if quiet and begun == self._begun:
            self.files = counted
            self._skipped = 0
        elif self._skipped < MAX_SKIPPED_CORRECTIONS:
            self._skipped += 1
        else:
            # Exact to within the changes in flight.
            self.files = counted + self.files - before
            self._skipped = 0
