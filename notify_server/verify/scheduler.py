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

import structlog

from notify_server.config import HostSettings, VerifyConfig
from notify_server.model import BatchVerdict, FileResult, Request
from notify_server.processes.prober_client import ProberLink
from notify_server.store.base import FileQueue
from notify_server.verify.attempts import Attempts, Flight
from notify_server.verify.claims import Claims
from notify_server.verify.guard import Guard
from notify_server.verify.hosts import BUSY_SECONDS, Address, Host, hostname_of
from notify_server.verify.recorder import Recorder

log = structlog.get_logger("notify_server.verify")

# Keep a host on its prober (warm connections) unless another has 8 fewer requests.
LOAD_APART = 8
# The shares of all slots for hosts on trial, and for hosts that have not answered lately: dead and silent hosts,
# however many, leave the rest to others.
TRIAL_SHARE = 4
STRANGER_SHARE = 2
# Attempts that may wait at the hosts of redirects, for each slot; and how long each may wait there.
HOPS_PER_SLOT = 4
HOP_SECONDS = 2.0
# The time between two attempts while this machine is cut off.
TRIAL_SECONDS = 0.25
# Timers of the event loop have a resolution of 1 ms, and must not fire before their time.
TIMER_SLACK = 0.002


class Share:
    """The slots that hosts of a kind share, and the hosts of this kind that wait for one."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._waiting: deque[Host] = deque()
        self._oldest_next = True
        self.flights = 0

    @property
    def is_full(self) -> bool:
        """True while every slot is taken."""
        return self.flights >= self._slots

    def wait(self, host: Host) -> None:
        """Let the host wait for a slot."""
        host.in_turn = True
        self._waiting.append(host)

    def take_waiting(self) -> list[Host]:
        """Remove and return as many hosts as there are free slots, the oldest and the newest alternately, so that a new
        host waits for two free slots at most, however many silent hosts were there before.
        """
        taken: list[Host] = []
        for _ in range(min(len(self._waiting), self._slots - self.flights)):
            taken.append(self._waiting.popleft() if self._oldest_next else self._waiting.pop())
            self._oldest_next = not self._oldest_next
        return taken


def link_for(host: Host, links: Sequence[ProberLink], outgoing: Mapping[ProberLink, Sequence[Request]]) -> ProberLink:
    """Return the prober that has the host's connections, unless another has much less to do.

    Those in `outgoing` have a free slot; `links` are all of them.
    """

    def load(link: ProberLink) -> int:
        return link.busy + len(outgoing[link])

    idlest, last = min(outgoing, key=load), links[host.prober]
    if last in outgoing and load(last) <= load(idlest) + LOAD_APART:
        return last
    host.prober = links.index(idlest)
    return idlest


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
        # The maximum in flight at one prober. When a prober has died, the others do not take over its share.
        self._slots_a_prober = -(-config.concurrency // max(1, len(links)))

        # Hosts that may start a file now, in the order of their turns.
        self._turns: deque[Host] = deque()
        self._trials = Share(max(1, config.concurrency // TRIAL_SHARE))
        self._strangers = Share(max(1, config.concurrency // STRANGER_SHARE))
        # Attempts that wait at the host of a redirect.
        self._hops = 0
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
        self.attempts = Attempts(guard, config, self.recorder, self, now=now, chance=chance)
        self._is_cut_off = self.attempts.outages.is_cut_off

    # Lifetime

    def finish(self) -> None:
        """Start nothing more."""
        self._stopping = True
        self._claims.finish()
        for host in self.hosts.values():
            self._store.release([flight.file for flight in host.hops])
            host.hops.clear()
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
        if host.in_turn or not (host.queue or host.hops):
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
        if host.queue or host.hops:
            self._ready(host)
            self.pump()
        else:
            # The host was paused, so its queue went back to the store.
            self._claims.want(host)

    def pump(self) -> None:
        """Start files, one per host and turn, as long as there are slots."""
        for share in (self._trials, self._strangers):
            for waiting in share.take_waiting():
                waiting.in_turn = False
                self._ready(waiting)
        if self._stopping or not self._turns:
            return
        now, at, attempts = time.monotonic(), self._now(), self.attempts
        links = [link for link in self._links if link.alive and link.busy < self._slots_a_prober]
        outgoing: dict[ProberLink, list[Request]] = {link: [] for link in links}
        if attempts.capacity.recover(now):
            log.info("this machine has ports and descriptors again")
        while self._turns and links and len(attempts) < attempts.capacity.limit and self.recorder.has_room:
            host = self._turns.popleft()
            host.in_turn = False
            # `_ready` gives turns by the clock: by a `now` of the past, such a host would take turn after turn.
            if (moment := host.ready_at()) is not None and moment > now:
                now = time.monotonic()
            if not (host.queue or host.hops) or moment is None or moment > now:
                self._ready(host)
                self._wake(host.address)
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
        """Return whether the host must wait for a slot of a scarce kind; it keeps its place in that queue."""
        address = host.address
        if address is not None:
            if address.in_flight >= host.settings.per_host_concurrency:
                host.in_turn = True
                address.waiting.append(host)
                return True
            if address.not_before > now:
                host.delay_start(address.not_before)
                self._ready(host)
                return True
        share = self._trials if host.on_trial and self._trials.is_full else None
        if share is None and self._strangers.is_full and host.is_stranger(now):
            share = self._strangers
        if share is not None:
            share.wait(host)
            self._wake(address)
            return True
        if self._is_cut_off(hostname_of(host.name)):
            if now < self._trial_at:
                self._park(host)
                self._wake(address)
                return True
            self._trial_at = now + TRIAL_SECONDS
        return False

    def _start(
        self, host: Host, now: float, at: int, links: list[ProberLink], outgoing: dict[ProberLink, list[Request]]
    ) -> None:
        outages_before = self.attempts.outages.before(hostname_of(host.name))
        host.start(now)
        if host.hops:
            flight: Flight = host.hops.popleft()
            self._hops -= 1
            flight.deadline += now - flight.waits_since
            flight.outages_before = outages_before
        else:
            flight = self.attempts.begin(host.queue.popleft(), host, now, outages_before)
        if host.on_trial:
            flight.on_trial = True
            self._trials.flights += 1
        if host.is_stranger(now):
            flight.is_stranger = True
            self._strangers.flights += 1
        if (address := host.address) is not None:
            flight.address = address
            address.in_flight += 1
            if host.settings.per_host_interval:
                address.not_before = now + host.settings.per_host_interval
        if (refusal := flight.ask.target.refusal) is not None:
            self.attempts.refuse(flight, refusal, at)
            return
        link = links[0] if len(links) == 1 else link_for(host, self._links, outgoing)
        outgoing[link].append(self.attempts.request(flight, link, now, at))

    # The end of an attempt (attempts.Slots)

    def free(self, flight: Flight) -> None:
        """Free the slot of a flight that has ended."""
        host = flight.host
        host.end()
        if flight.on_trial:
            flight.on_trial = False
            self._trials.flights -= 1
        if flight.is_stranger:
            flight.is_stranger = False
            self._strangers.flights -= 1
        if (address := flight.address) is not None:
            flight.address = None
            address.in_flight -= 1
            self._wake(address)
        self._ready(host)
        self._check_drained()

    def _wake(self, address: Address | None) -> None:
        """Give a turn to the next host that waits for a slot at the address, skipping those without work."""
        while address is not None and address.waiting:
            host = address.waiting.popleft()
            host.in_turn = False
            self._ready(host)
            if host.in_turn:
                return

    def move(self, flight: Flight) -> None:
        """Exchange the slot for one at the host of the flight's next request, as soon as one is free.

        Without a place to wait the file is postponed: if claimed again at once, it would only be redirected here again.
        """
        self.free(flight)
        if self._stopping:
            self._store.release([flight.file])
            return
        now = time.monotonic()
        host = self._claims.host(flight.ask.target.host)
        rest = 0.0 if host is None else max(0.0, host.rest_ends() - now)
        if host is None or rest > HOP_SECONDS or self._hops >= HOPS_PER_SLOT * self._config.concurrency:
            self.attempts.postpone(flight, max(rest, HOP_SECONDS))
            return
        flight.host, flight.waits_since = host, now
        host.hops.append(flight)
        self._hops += 1
        self._ready(host)

    def give_back(self, flights: Sequence[Flight]) -> None:
        """Free the slots, and return the files to the store: still due, no attempt spent."""
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
        """Send nothing to the host before then."""
        if host.queue:
            self._claims.release_queue(host)
        while host.hops:
            self._hops -= 1
            self.attempts.postpone(host.hops.popleft(), until - time.monotonic())
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
        """Give turns to the hosts that waited for the end of an outage."""
        while self._parked:
            self._unpark_one()
