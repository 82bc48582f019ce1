"""Decides which files are requested now, and starts them as slots become free.

A file whose time has come is not requested now for one of these reasons, all of them decided here:

- it is not claimed yet, because its host's queue has its share (claims.py);
- its host is at its limit, between two requests of an interval or a pace, or resting (`Host.ready_at`);
- its host is on trial and the slots for that are taken (`_hold_back`);
- this machine is cut off, and the next trial is not due (`_hold_back`);
- every slot is taken, every prober busy or dead, or too many results are unrecorded (`pump`).

Hosts take turns, one file each.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from notify_server.config import HostSettings, VerifyConfig
from notify_server.model import BatchVerdict, FileResult, Request
from notify_server.processes.prober_client import ProberLink
from notify_server.store.base import FileQueue
from notify_server.verify.attempts import Attempts, Flight
from notify_server.verify.claims import Claims
from notify_server.verify.guard import Guard
from notify_server.verify.hosts import BUSY_SECONDS, Host, hostname_of
from notify_server.verify.recorder import Recorder

# Keep a host on its prober (warm connections) unless another has 8 fewer requests.
LOAD_APART = 8
# The part of all slots that hosts on trial may have together: dead hosts, however many, leave the rest to others.
TRIAL_SHARE = 4
# The time between two attempts while this machine is cut off.
TRIAL_SECONDS = 0.25
# Timers of the event loop have a resolution of 1 ms, and must not fire before their time.
TIMER_SLACK = 0.002


class Scheduler:
    """Owns the slots and the turns. `now` gives Unix ms, `chance` a number in [0, 1)."""

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
        on_recorded: Callable[[Sequence[FileResult]], None],
        limit_of: Callable[[str, HostSettings], int],
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        self._store = store
        self._config = config
        self._links = links
        self._now = now
        # What one prober may have in flight: the living do not take over what the dead had.
        self._slots_a_prober = -(-config.concurrency // max(1, len(links)))
        self._trial_slots = max(1, config.concurrency // TRIAL_SHARE)

        # Hosts that may start a file now, in the order of their turns.
        self._turns: deque[Host] = deque()
        self._trial_waiting: deque[Host] = deque()
        self._trial_flights = 0
        # Hosts whose turn came during an outage, and when the next of them may be tried.
        self._parked: deque[Host] = deque()
        self._parked_timer: asyncio.TimerHandle | None = None
        self._trial_at = 0.0

        self._drained = asyncio.Event()
        self._stopping = False

        self._claims = Claims(
            store,
            config,
            now=now,
            limit_of=limit_of,
            on_queued=self._ready,
            on_done=self.pump,
            busy_seconds=busy_seconds,
        )
        self.hosts = self._claims.hosts
        self.add_hosts, self.poll_soon, self.run = self._claims.add_hosts, self._claims.poll_soon, self._claims.run
        self.recorder = Recorder(
            store,
            now=now,
            on_recorded=on_recorded,
            on_verdicts=on_verdicts,
            on_written=self._on_written,
            more_expected=lambda: len(self.attempts) > 0,
        )
        self.attempts = Attempts(guard, config, self.hosts, self.recorder, self, now=now, chance=chance)
        self._is_cut_off = self.attempts.outages.is_cut_off

    # Lifetime

    def finish(self) -> None:
        """Start nothing more."""
        self._stopping = True
        self._claims.finish()
        self._check_drained()

    async def drain(self) -> None:
        """Return when nothing is in flight or unrecorded after `finish`."""
        await self._drained.wait()

    def _check_drained(self) -> None:
        if self._stopping and not (len(self.attempts) or self.recorder.unrecorded):
            self._drained.set()

    def _on_written(self, results: Sequence[FileResult]) -> None:
        for result in results:
            if result.next_attempt_at is not None:
                self._claims.due_at(result.next_attempt_at)
        self._check_drained()
        self.pump()

    # Turns

    def _ready(self, host: Host) -> None:
        """Give the host a turn as soon as it may have one."""
        if host.in_turn or not host.queue:
            return
        moment = host.ready_at()
        if moment is None:
            return
        delay = moment - time.monotonic()
        if delay <= 0:
            host.in_turn = True
            self._turns.append(host)
        elif host.timer is None:
            host.timer = asyncio.get_running_loop().call_later(delay, self._on_time, host)

    def _on_time(self, host: Host) -> None:
        host.timer = None
        if host.queue:
            self._ready(host)
            self.pump()
        else:
            # The host was resting, so its queue went back to the store.
            self._claims.want(host)

    def pump(self) -> None:
        """Start files, one per host and turn, as long as there are slots."""
        for _ in range(min(len(self._trial_waiting), self._trial_slots - self._trial_flights)):
            waiting = self._trial_waiting.popleft()
            waiting.in_turn = False
            self._ready(waiting)
        if self._stopping or not self._turns:
            return
        now, at = time.monotonic(), self._now()
        links = [link for link in self._links if link.alive and link.busy < self._slots_a_prober]
        outgoing: dict[ProberLink, list[Request]] = {link: [] for link in links}
        slots, recorder = self._config.concurrency, self.recorder
        while self._turns and links and len(self.attempts) < slots and recorder.has_room:
            host = self._turns.popleft()
            host.in_turn = False
            moment = host.ready_at()
            if not host.queue or moment is None or moment > now:
                self._ready(host)
                continue
            if self._hold_back(host, now):
                continue
            self._start(host, now, at, links, outgoing)
            self._ready(host)
            self._claims.may_want(host)
        for link, requests in outgoing.items():
            if requests:
                link.send(requests)

    def _hold_back(self, host: Host, now: float) -> bool:
        """Return whether the host has to wait for a slot of a kind that is scarce; it keeps its place among those."""
        if host.on_trial and self._trial_flights >= self._trial_slots:
            host.in_turn = True
            self._trial_waiting.append(host)
            return True
        if self._is_cut_off(hostname_of(host.name)):
            if now < self._trial_at:
                self._park(host)
                return True
            self._trial_at = now + TRIAL_SECONDS
        return False

    def _start(
        self, host: Host, now: float, at: int, links: list[ProberLink], outgoing: dict[ProberLink, list[Request]]
    ) -> None:
        file = host.queue.popleft()
        host.start(now)
        flight = self.attempts.begin(file, host, now, cut_off=self._is_cut_off(hostname_of(host.name)))
        self._trial_flights += flight.on_trial
        if (refusal := flight.ask.target.refusal) is not None:
            self.attempts.refuse(flight, refusal, at)
            return
        link = links[0] if len(links) == 1 else self._link_for(host, links, outgoing)
        outgoing[link].append(self.attempts.request(flight, link, now, at))

    def _link_for(
        self, host: Host, links: Sequence[ProberLink], outgoing: Mapping[ProberLink, Sequence[Request]]
    ) -> ProberLink:
        """Return the prober that has the host's connections, unless another has much less to do."""

        def load(link: ProberLink) -> int:
            return link.busy + len(outgoing[link])

        idlest, last = min(links, key=load), self._links[host.prober]
        if last in outgoing and load(last) <= load(idlest) + LOAD_APART:
            return last
        host.prober = self._links.index(idlest)
        return idlest

    # The end of an attempt (attempts.Slots)

    def free(self, flight: Flight) -> None:
        """Free the slot of a flight that has ended."""
        host = flight.host
        host.end()
        if flight.on_trial:
            self._trial_flights -= 1
        self._ready(host)
        self._check_drained()

    def give_back(self, flights: Sequence[Flight]) -> None:
        """Free the slots, and return the files to the store: due as before, no attempt spent."""
        self._store.release([flight.file for flight in flights])
        for flight in flights:
            self.free(flight)
        self.add_hosts({flight.file.host for flight in flights})

    def on_death(self, link: ProberLink) -> None:
        """Give back the files that were in flight at a prober that has died."""
        if flights := self.attempts.on_death(link):
            self.give_back(flights)
        self.attempts.outages.settle()

    def rest(self, host: Host, until: float) -> None:
        """Send nothing to the host until then."""
        if host.queue:
            self._claims.release_queue(host)
        host.exhausted = True
        if host.timer is not None:
            host.timer.cancel()
        host.timer = asyncio.get_running_loop().call_later(
            max(0.0, until - time.monotonic()) + TIMER_SLACK, self._on_time, host
        )

    # Outages

    def _park(self, host: Host) -> None:
        host.in_turn = True
        self._parked.append(host)
        if self._parked_timer is None:
            delay = max(0.0, self._trial_at - time.monotonic()) + TIMER_SLACK
            self._parked_timer = asyncio.get_running_loop().call_later(delay, self._on_trial_time)

    def _on_trial_time(self) -> None:
        self._parked_timer = None
        self._unpark_one()
        self.pump()
        if self._parked:
            self._park(self._parked.popleft())

    def _unpark_one(self) -> None:
        if self._parked:
            host = self._parked.popleft()
            host.in_turn = False
            self._ready(host)

    def unpark(self) -> None:
        """Give the hosts that waited for the end of an outage their turns."""
        while self._parked:
            self._unpark_one()
