"""Caches answers that cost a walk over the record."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")

# An answer is cached for at least 1 s and for 200 times the duration of its query, but never longer than 10 s.
MIN_AGE_SECONDS = 1.0
MAX_AGE_SECONDS = 10.0
AGE_FACTOR = 200.0


class TimedCache:
    """Answers by name, each cached for a time that grows with the cost of its query."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, Any]] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changes = 0

    async def get(self, name: str, query: Callable[[], Awaitable[T]]) -> T:
        """Return the answer of this name; run the query when none is cached. Concurrent callers share one query."""
        async with self._locks[name]:
            until, answer = self._answers.get(name, (0.0, None))
            if time.monotonic() >= until:
                began, changes = time.monotonic(), self._changes
                answer = await query()
                ended = time.monotonic()
                # A query that began before a change may miss it.
                if changes == self._changes:
                    self._answers[name] = began + max_age(ended - began), answer
            return cast("T", answer)

    def clear(self) -> None:
        """Drop all answers, because the record has been changed by hand."""
        self._changes += 1
        self._answers.clear()


def max_age(cost: float) -> float:
    """Return how long the answer of a query that took `cost` seconds may be used, from the start of the query."""
    return cost + min(max(MIN_AGE_SECONDS, AGE_FACTOR * cost), MAX_AGE_SECONDS)
