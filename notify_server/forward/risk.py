"""Finds the batches at risk (old, without a verdict, and with a file whose latest attempt failed), and those of which
addresses or objects end soon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import structlog

from notify_server.config import AlertConfig, VerifyConfig
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
            # A transaction takes so many; a storage that is down puts all batches at risk at once.
            while await outbox.find_at_risk(now() - round(at_risk_after * 1000), waits, now()):
                on_found()
        except StoreUnavailableError as error:
            log.debug("cannot look for batches at risk, trying again", error=str(error))


async def watch_expiring(
    outbox: Outbox, expiring_before: float, now: Callable[[], int], on_found: Callable[[], object]
) -> None:
    """Look every second for batches with files that end within `expiring_before` seconds."""
    while True:
        await asyncio.sleep(SECONDS)
        try:
            at = now()
            while await outbox.find_expiring(at + round(expiring_before * 1000), at):
                on_found()
        except StoreUnavailableError as error:
            log.debug("cannot look for batches that end soon, trying again", error=str(error))


def watches(
    outbox: Outbox,
    verify: VerifyConfig,
    alert: AlertConfig,
    now: Callable[[], int],
    is_cut_off: Callable[[], bool],
    on_found: Callable[[], object],
) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
    """Return the tasks that look for batches to warn about, with their names."""
    yield "watch for batches at risk", watch_at_risk(outbox, verify, alert.at_risk_after, now, is_cut_off, on_found)
    if alert.expiring_before:
        yield "watch for files that end soon", watch_expiring(outbox, alert.expiring_before, now, on_found)
