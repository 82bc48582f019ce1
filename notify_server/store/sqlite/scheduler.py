"""Decides whether the SQLite writer runs a background job next or keeps itself free for acks.

Acks come first. When many callers have just got their acks, their next requests are about to arrive, and a job that
has begun would make them wait. So jobs wait a moment for such a crowd, but have a share of the time whatever the crowd
does: callers must not make verification fall behind.
"""

from __future__ import annotations

import math

# This many acks within CROWD_SECONDS are a crowd: more will follow, so jobs wait for them for up to CROWD_SECONDS.
CROWD = 8
CROWD_SECONDS = 0.01
# The share of all time that jobs have while a crowd keeps coming, and of the time spent waiting for it.
JOB_SHARE = 0.1
IDLE_SHARE = 0.6
# Callbacks are expected to continue for this long after the last one.
RECENT_SECONDS = 1.0


class JobScheduler:
    """Keeps the time budget of background jobs. Times are seconds of a monotonic clock and passed in."""

    def __init__(self) -> None:
        # Seconds that jobs may still take; negative is a debt to the crowd.
        self._budget = 0.0
        self._budget_at = 0.0
        self._crowd_until = 0.0
        self._acks = 0
        self._counted_from = 0.0
        self._last_ack_at = -math.inf

    def acked(self, callers: int, now: float) -> None:
        """Count callers that have just been answered."""
        self._last_ack_at = now
        if now - self._counted_from > CROWD_SECONDS:
            self._counted_from, self._acks = now, 0
        self._acks += callers
        if self._acks >= CROWD:
            self._crowd_until = now + CROWD_SECONDS

    def acked_recently(self, now: float) -> bool:
        """Return True if a caller was answered within RECENT_SECONDS."""
        return now - self._last_ack_at < RECENT_SECONDS

    def may_run_job(self, now: float) -> bool:
        """Return True if a job may run: no crowd is expected, or jobs have budget left."""
        passed, self._budget_at = now - self._budget_at, now
        self._budget = min(self._budget + JOB_SHARE * passed, JOB_SHARE * CROWD_SECONDS)
        return self._budget > 0 or now >= self._crowd_until

    def wait_until(self, now: float) -> float:
        """Return how long to wait for the crowd before a job runs after all: until the crowd is not expected any more,
        or waiting has paid the debt.
        """
        return min(self._crowd_until, now - self._budget / IDLE_SHARE)

    def waited(self, seconds: float) -> None:
        """Add to the budget what jobs get of time spent on waiting; JOB_SHARE of it is added by `may_run_job`."""
        self._budget += (IDLE_SHARE - JOB_SHARE) * seconds

    def ran_job(self, seconds: float) -> None:
        """Charge a job to the budget."""
        self._budget -= seconds
