"""Finds the batches at risk: old, without a verdict, and with a file whose latest attempt failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from notify_server.config import VerifyConfig
from notify_server.errors import StoreUnavailableError
from notify_server.store.outbox import Outbox

log = structlog.get_logger("notify_server.forward")

SECONDS = 1.0


def longest_waits(schedule: Sequence[float], jitter: float, timeout: float) -> list[int]:
    """Return, for n attempts made, the longest time in ms from the start of the next one to the verdict."""
    waits = []
    for made in range(len(schedule) + 1):
        rest = schedule[made:]
        attempts = len(rest) + 1
        waits.append(round((sum(rest) * (1 + jitter) + attempts * timeout) * 1000))
    return waits


async def watch_at_risk(
    outbox: Outbox,
    verify: VerifyConfig,
    at_risk_after: float,
    now: Callable[[], int],
    is_cut_off: Callable[[], bool],
    on_found: Callable[[], object],
) -> None:
    """Look every second, except while no host answers at all: then the fault is this network's."""
    waits = longest_waits(verify.retry_schedule, verify.jitter, verify.timeout)
    while True:
        await asyncio.sleep(SECONDS)
        if is_cut_off():
            continue
        try:
            if await outbox.find_at_risk(now() - round(at_risk_after * 1000), waits, now()):
                on_found()
        except StoreUnavailableError as error:
            log.debug("cannot look for batches at risk, trying again", error=str(error))
