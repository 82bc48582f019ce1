"""The verifier: claims due files, has the probers request them, judges the evidence, and records the results.

    store.claim -> Scheduler -> Attempts -> prober -> policy.judge -> (next request | policy.conclude) -> Recorder

This file joins the parts, starts and stops them, and reports their figures. After a crash, or when a prober dies, files
in flight are pending as before and no attempt is spent.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import structlog

from notify_server.config import HostSettings, VerifyConfig
from notify_server.model import BatchVerdict, CircuitState, FileResult, HostView
from notify_server.processes.prober_client import STOP_SECONDS, ProberLink
from notify_server.store.base import FileQueue
from notify_server.supervise import start_task
from notify_server.verify.guard import Guard
from notify_server.verify.hosts import BUSY_SECONDS
from notify_server.verify.scheduler import Scheduler

log = structlog.get_logger("notify_server.verify")


class Verifier:
    """Runs from `start` to `stop`. `now` gives Unix ms, `chance` a number in [0, 1).

    `limit_of` gives this daemon's share of a host; `on_recorded` gets the results that were committed.
    """

    def __init__(
        self,
        store: FileQueue,
        guard: Guard,
        config: VerifyConfig,
        links: Sequence[ProberLink],
        *,
        now: Callable[[], int],
        chance: Callable[[], float],
        on_verdicts: Callable[[Sequence[BatchVerdict]], None],
        on_recorded: Callable[[Sequence[FileResult]], None] = lambda results: None,
        limit_of: Callable[[str, HostSettings], int] = lambda host, settings: settings.per_host_concurrency,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        self._links = links
        self._scheduler = Scheduler(
            store,
            guard,
            config,
            links,
            now=now,
            chance=chance,
            on_verdicts=on_verdicts,
            on_recorded=on_recorded,
            limit_of=limit_of,
            busy_seconds=busy_seconds,
        )
        self.add_hosts: Callable[[Iterable[str]], None] = self._scheduler.add_hosts
        self.poll_soon = self._scheduler.poll_soon
        self.finish = self._scheduler.finish
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def cut_off(self) -> bool:
        """True while no host, or no name server, answers."""
        return self._scheduler.attempts.outages.ongoing

    async def start(self) -> None:
        """Start the probers and the work."""
        scheduler = self._scheduler
        await asyncio.gather(
            *(
                link.start(lambda link: scheduler.pump(), scheduler.attempts.on_evidence, scheduler.on_death)
                for link in self._links
            )
        )
        self._tasks = [
            start_task(scheduler.run(), "verify: claim"),
            start_task(scheduler.recorder.run(), "verify: record"),
        ]

    async def stop(self, grace: float) -> None:
        """Start nothing more, let the attempts in flight finish within `grace` seconds, record them, and stop the
        probers.

        The others stay pending, and no attempt is spent on them.
        """
        scheduler = self._scheduler
        scheduler.finish()
        claim, record = self._tasks
        claim.cancel()
        try:
            async with asyncio.timeout(grace):
                await scheduler.drain()
        except TimeoutError:
            files = len(scheduler.attempts) + scheduler.recorder.unrecorded
            log.info("attempts cut off, their files stay pending", files=files)
        record.cancel()
        await asyncio.gather(*(link.stop(min(STOP_SECONDS, grace / 2)) for link in self._links))
        scheduler.attempts.outages.drop()
        await asyncio.gather(claim, record, return_exceptions=True)

    @property
    def alive(self) -> bool:
        """True while every prober is up, and so are the tasks that claim and record."""
        return all(link.alive for link in self._links) and not any(task.done() for task in self._tasks)

    @property
    def in_flight(self) -> int:
        """The number of files in flight."""
        return len(self._scheduler.attempts)

    @property
    def is_short(self) -> bool:
        """True while this machine has too few ports or descriptors."""
        return self._scheduler.attempts.capacity.is_short

    def circuits(self) -> dict[str, float]:
        """Return how many of the remembered hosts are in each state."""
        now = time.monotonic()
        states = Counter(host.circuit(now) for host in self._scheduler.hosts.values())
        return {state.value: states[state] for state in CircuitState}

    def paced_hosts(self) -> int:
        """Return how many of the remembered hosts are paced."""
        return sum(host.is_paced for host in self._scheduler.hosts.values())

    def hosts(self) -> list[HostView]:
        """Return the remembered hosts."""
        now = time.monotonic()
        return [host.view(now) for host in self._scheduler.hosts.values()]
