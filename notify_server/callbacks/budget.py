"""Bounds the memory that unanswered callbacks take, all senders together."""

from __future__ import annotations

# Bytes of unanswered requests. Bodies that arrive in parts may use the first; what arrives at once, as most callbacks
# do, may use the reserve too, so that large and unfinished bodies keep no small one out. The whole server stays within
# 350 MiB with both.
MAX_UNANSWERED_BYTES = 80 * 1024**2
RESERVE_BYTES = 16 * 1024**2


class Budget:
    """Counts bytes against a limit and a reserve."""

    def __init__(self, limit: int = MAX_UNANSWERED_BYTES, reserve: int = RESERVE_BYTES) -> None:
        self._limit = limit
        self._reserve = reserve
        self.used = 0

    def take(self, size: int, *, whole: bool) -> bool:
        """Count so many bytes more, which are a `whole` body or a part; return False, and count nothing, when they
        exceed the limit.
        """
        if self.used + size > self._limit + (self._reserve if whole else 0):
            return False
        self.used += size
        return True

    def give_back(self, size: int) -> None:
        """Stop counting so many bytes."""
        self.used -= size
