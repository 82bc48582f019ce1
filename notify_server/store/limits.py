"""Bounds on what a record keeps, the same on both engines."""

from __future__ import annotations

from notify_server.store.base import MAX_ID

# The latest refused bodies are kept: at most this many, and this many bytes of them.
MAX_REJECTIONS = 10_000
MAX_REJECTION_BYTES = 256 * 1024 * 1024
# The latest requests of each file are kept.
MAX_ATTEMPT_ROWS = 50
# By how much the wait for the next delivery of an event may exceed the longest wait of a file: the schedule's longest
# wait is a day, and so is the longest wait that Retry-After may request.
DELIVERY_WAIT_MS = 2 * 86_400_000


def clamp(number: int) -> int:
    """Return the nearest number that both engines can hold."""
    return min(max(number, -MAX_ID), MAX_ID)
