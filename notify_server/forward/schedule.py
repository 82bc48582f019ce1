"""Decides when a delivery that failed is tried again. Pure: time and chance are passed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Seconds before the first, second, … attempt (Standard Webhooks, "Reliability").
SCHEDULE = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
JITTER = 0.2
MAX_RETRY_AFTER_MS = 86_400_000


class Outcome(NamedTuple):
    """The decision after an attempt: the delivery's state (a value of DeliveryState), when to try again (Unix ms) while
    it is pending, and whether the endpoint is to be stopped until a person starts it.
    """

    state: str
    next_attempt_at: int | None = None
    stop: bool = False


def after_attempt(
    *,
    delivered: bool,
    status: int | None,
    attempts: int,
    now: int,
    chance: float,
    retry_after_ms: int | None = None,
    schedule: Sequence[float] = SCHEDULE,
) -> Outcome:
    """Decide what follows attempt number `attempts` (from 1). `chance` in [0, 1) spreads the wait by ± JITTER.

    Retry-After counts on 429 and 503 alone, if it is longer than the scheduled wait, up to a day. 410 stops the
    endpoint; the delivery stays pending for the day on which it is started again.
    """
    if delivered:
        return Outcome("delivered")
    if status == 410:
        return Outcome("pending", now, stop=True)
    if attempts >= len(schedule):
        return Outcome("failed")
    wait = schedule[attempts] * 1000 * (1 + JITTER * (2 * chance - 1))
    if retry_after_ms is not None and status in (429, 503):
        wait = max(wait, min(retry_after_ms, MAX_RETRY_AFTER_MS))
    return Outcome("pending", now + round(wait))
