"""Bounds the memory that unanswered callbacks take, all senders together."""

from __future__ import annotations

# Bytes received of requests that are not answered yet.
MAX_UNANSWERED_BYTES = 256 * 1024**2


class Budget:
    """Counts bytes against a limit."""

    def __init__(self, limit: int = MAX_UNANSWERED_BYTES) -> None:
        self._limit = limit
        self.used = 0

    def take(self, size: int) -> bool:
        """Count so many bytes more; return False, and count nothing, when they exceed the limit."""
        if self.used + size > self._limit:
            return False
        self.used += size
        return True

    def give_back(self, size: int) -> None:
        """Stop counting so many bytes."""
        self.used -= size
