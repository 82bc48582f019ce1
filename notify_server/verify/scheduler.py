"""The verifier: claims due files, sends their requests to the probers, judges the evidence, and has the outcome
recorded.

    store.claim -> Host.queue -> prober -> policy.judge -> (another request | policy.conclude) -> store.record

Hosts take turns, one file each. What is claimed, in flight and not yet recorded is bounded whatever the backlog, and
all of it is in memory only: after a crash, or when a prober dies, the files are pending as before and no attempt is
spent.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heappop, heappush

import structlog

from notify_server.config import HostSettings, VerifyConfig
from notify_server.errors import StoreUnavailableError
from notify_server.model import (
    AttemptRow,
    BatchVerdict,
    CircuitState,
    DueFile,
    Evidence,
    FileResult,
    FileState,
    HostView,
    Reason,
    Request,
    http_reason,
)
from notify_server.processes.prober_client import STOP_SECONDS, ProberLink
from notify_server.store.base import FileQueue
from notify_server.supervise import start_task
from notify_server.verify import policy
from notify_server.verify.connectivity import Connectivity, ask_name_server, is_name
from notify_server.verify.guard import Guard
from notify_server.verify.hosts import BUSY_SECONDS, Host, hostname_of

log = structlog.get_logger("notify_server.verify")

# Results in one transaction: large enough to share its cost, and where callbacks wait for it small enough to keep them
# waiting for a ms or two only.
RECORD_ROWS = 256
RECORD_ROWS_BY_TURNS = 128
# How long results wait for company while more are on their way.
RECORD_LINGER = 0.02
# Results that wait for a store which cannot commit: no file is started when there are more.
MAX_UNRECORDED = 4096
# Files claimed ahead, for each request that may be in flight. Hosts share them evenly; few hosts do not take them all,
# and less where callbacks wait meanwhile.
AHEAD_PER_SLOT = 32
AHEAD_SHARES = 8
AHEAD_SHARES_BY_TURNS = 64
# A host stays with the prober that has its connections as long as no other has so many requests less to do.
LOAD_APART = 8
# Of all slots, what hosts on trial may have together: dead hosts, however many, leave the rest to the living.
TRIAL_SHARE = 4
# Hosts looked up at a time, and known at a time.
LOOK_HOSTS = 1000
LOOK_SECONDS = 1.0
MAX_HOSTS = 10_000
# Moments at which files are due are remembered in steps of this, as far ahead as that.
DUE_STEP_MS = 50
DUE_SOON_MS = 60_000
HOSTS_A_CLAIM = 64
# While we are cut off, attempts begin so far apart.
TRIAL_SECONDS = 0.25
# Timers of the event loop have a resolution of 1 ms, and must not fire before their time.
TIMER_SLACK = 0.002
# A file that was in flight when this many probers died may be what kills them: it is charged an attempt.
DEATHS_BORNE = 5


class Flight:
    """An attempt under way on one file."""

    __slots__ = ("ask", "cut_off", "deadline", "doubted", "file", "host", "link", "on_trial", "requests", "sent_at")

    def __init__(self, file: DueFile, host: Host, ask: policy.NextRequest, now: float) -> None:
        self.file = file
        self.host = host
        self.ask = ask
        self.deadline = now + host.settings.timeout
        self.on_trial = host.on_trial
        # Whether it began while we were cut off: what it fails at is nobody's fault.
        self.cut_off = False
        self.link: ProberLink | None = None
        self.sent_at = 0
        self.requests: list[AttemptRow] = []
        # An answer on a reused connection that did not count.
        self.doubted: Evidence | None = None


Doubted = tuple[Flight, policy.Conclusion, Evidence]


class Pool:
    """Runs from `start` to `stop`. `now` gives Unix ms, `chance` a number in [0, 1)."""

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
        self._store = store
        self._guard = guard
        self._config = config
        self._links = links
        self._now = now
        self._chance = chance
        self._on_verdicts = on_verdicts
        self._on_recorded = on_recorded
        self._limit_of = limit_of
        # How long a host may refuse everything for being asked too often, until its files are charged for it.
        self._busy_seconds = busy_seconds
        # What one prober may have in flight: the living do not take over what the dead had.
        self._a_prober = -(-config.concurrency // max(1, len(links)))
        self._trial_slots = max(1, config.concurrency // TRIAL_SHARE)

        self._hosts: dict[str, Host] = {}
        # Hosts that may start a file now, in the order of their turns; and hosts that may have more to claim.
        self._turns: deque[Host] = deque()
        self._hungry: dict[str, Host] = {}
        self._trial_waiting: deque[Host] = deque()
        self._trial_flights = 0
        self._flights: dict[int, Flight] = {}
        self._last_id = 0
        self._results: deque[FileResult] = deque()
        self._recording = 0
        self._deaths: dict[int, int] = {}
        self._network: Connectivity[Doubted] = Connectivity()
        self._names: Connectivity[Doubted] = Connectivity()
        self._asking_names = False
        # Hosts whose turn it was while we were cut off, and when the next of them may be tried.
        self._parked: deque[Host] = deque()
        self._parked_timer: asyncio.TimerHandle | None = None
        self._trial_at = 0.0

        self._look_after = ""
        self._look_at = 0.0
        # When files will be due, as far as it is known and soon: the look is the truth, this wakes it in time.
        self._due: list[int] = []
        self._due_known: set[int] = set()
        self._work = asyncio.Event()
        self._recordable = asyncio.Event()
        self._drained = asyncio.Event()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    # Lifetime

    async def start(self) -> None:
        """Start the probers and the work."""
        await asyncio.gather(*(link.start(self._on_ready, self._on_evidence, self._on_death) for link in self._links))
        self._tasks = [
            start_task(self._claim_loop(), "verify: claim"),
            start_task(self._record_loop(), "verify: record"),
        ]

    def finish(self) -> None:
        """Start nothing more."""
        self._stopping = True
        self._check_drained()

    async def stop(self, grace: float) -> None:
        """Start nothing more, let what is in flight finish within `grace` seconds, record it, and stop the probers.

        What does not finish stays pending, and no attempt is spent on it.
        """
        self.finish()
        claim, record = self._tasks
        claim.cancel()
        try:
            async with asyncio.timeout(grace):
                await self._drained.wait()
        except TimeoutError:
            log.info("probes cut off, their files stay pending", files=len(self._flights) + len(self._results))
        record.cancel()
        await asyncio.gather(*(link.stop(min(STOP_SECONDS, grace / 2)) for link in self._links))
        for reach in (self._network, self._names):
            reach.take()
        await asyncio.gather(claim, record, return_exceptions=True)

    @property
    def alive(self) -> bool:
        """Whether every prober is up, and so is what feeds them."""
        return all(link.alive for link in self._links) and not any(task.done() for task in self._tasks)

    @property
    def in_flight(self) -> int:
        """Files whose attempt is under way."""
        return len(self._flights)

    def circuits(self) -> dict[str, float]:
        """How many of the hosts that are remembered are in each state."""
        now = time.monotonic()
        states = Counter(host.circuit(now) for host in self._hosts.values())
        return {state.value: states[state] for state in CircuitState}

    def hosts(self) -> list[HostView]:
        """The hosts that are remembered."""
        now = time.monotonic()
        return [
            HostView(
                host.name,
                host.circuit(now),
                round(max(0.0, host.open_until - now), 3) if host.on_trial else 0.0,
                host.in_flight,
                len(host.queue),
                host.limit,
                None if host.rate is None else round(host.rate, 1),
                round(max(0.0, host.rest_until - now), 3),
            )
            for host in self._hosts.values()
        ]

    def add_hosts(self, hosts: Iterable[str]) -> None:
        """These hosts have new files."""
        for name in hosts:
            self._feed(name)
        self._work.set()

    def poll_soon(self) -> None:
        """Some host may have new files."""
        self._look_at = 0.0
        self._work.set()

    # Claiming

    def _feed(self, name: str) -> None:
        host = self._hosts.get(name)
        if host is None:
            if len(self._hosts) >= MAX_HOSTS:
                return  # A later look finds it.
            host = self._hosts[name] = Host(name, self._config.for_host(hostname_of(name)), self._busy_seconds)
            host.limit = self._limit_of(name, host.settings)
        self._hungry[name] = host

    async def _claim_loop(self) -> None:
        while True:
            try:
                if time.monotonic() >= self._look_at:
                    await self._look()
                while self._hungry and await self._claim():
                    pass
            except StoreUnavailableError as error:
                log.warning("cannot claim files, trying again", error=str(error))
                self._look_at = time.monotonic() + LOOK_SECONDS
                self._work.clear()
            await self._wait_for_work()

    async def _wait_for_work(self) -> None:
        timeout = self._look_at - time.monotonic()
        if self._due:
            timeout = min(timeout, (self._due[0] - self._now()) / 1000)
        try:
            async with asyncio.timeout(max(0.0, timeout)):
                await self._work.wait()
        except TimeoutError:
            self._look_at = 0.0
        self._work.clear()

    async def _look(self) -> None:
        """Learn which hosts have due files, a page of hosts at a time, and when the next file will be due.

        This is the truth about what is due; `add_hosts` and what is recorded only make it known sooner.
        """
        page = await self._store.due_hosts(self._look_after, LOOK_HOSTS)
        now = self._now()
        while self._due and self._due[0] <= now:
            self._due_known.discard(heappop(self._due))
        self._look_after = page[-1].host if len(page) == LOOK_HOSTS else ""
        self._look_at = time.monotonic() + LOOK_SECONDS
        for entry in page:
            if entry.next_attempt_at <= now:
                self._feed(entry.host)
            else:
                self._due_by(entry.next_attempt_at)
        self._share_out()
        moment = time.monotonic()
        for name in [name for name, host in self._hosts.items() if host.idle(moment) and name not in self._hungry]:
            del self._hosts[name]

    def _share_out(self) -> None:
        """Keep to what is this daemon's of each host: others may have come, or gone."""
        for host in self._hosts.values():
            limit = self._limit_of(host.name, host.settings)
            if limit == host.limit:
                continue
            more, host.limit = limit > host.limit, limit
            if more:
                self._hungry[host.name] = host
                self._ready(host)
            elif not limit and host.queue:
                self._store.release(list(host.queue))
                host.queue.clear()
        self._pump()

    def _due_by(self, moment: int) -> None:
        moment += -moment % DUE_STEP_MS
        if moment not in self._due_known and moment - self._now() < DUE_SOON_MS:
            self._due_known.add(moment)
            heappush(self._due, moment)
            if moment == self._due[0]:
                self._work.set()

    async def _claim(self) -> bool:
        """Claim for some of the hungry hosts; whether there was anything to do."""
        now = time.monotonic()
        shares = AHEAD_SHARES_BY_TURNS if self._store.prefers_small_batches else AHEAD_SHARES
        most = max(2, self._config.concurrency * AHEAD_PER_SLOT // max(shares, len(self._hosts)))
        wanted: list[tuple[str, int]] = []
        for name in list(self._hungry)[:HOSTS_A_CLAIM]:
            host = self._hungry.pop(name)
            shared = host.limit < host.settings.per_host_concurrency
            # What others may ask for too is not all taken: they would have nothing to do.
            share = min(most, host.limit * AHEAD_PER_SLOT) if shared else most
            if not host.rests(now) and (n := share - len(host.queue)) > 0:
                wanted.append((name, n))
        if not wanted or self._stopping:
            return bool(self._hungry) and not self._stopping
        try:
            claimed = await self._store.claim(wanted, self._now())
        except StoreUnavailableError:
            self._hungry.update((name, self._hosts[name]) for name, _ in wanted if name in self._hosts)
            raise
        got: dict[str, int] = {}
        for file in claimed:
            got[file.host] = got.get(file.host, 0) + 1
            self._hosts[file.host].queue.append(file)
        for name, n in wanted:
            host = self._hosts[name]
            host.exhausted = got.get(name, 0) < n
            host.low = n // 2
            self._ready(host)
        self._pump()
        return True

    # Starting

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
            self._pump()
        else:
            # The host was resting; what was queued went back to the store.
            self._hungry[host.name] = host
            self._work.set()

    def _pump(self) -> None:
        """Start files, a host a turn, as long as there are slots."""
        for _ in range(min(len(self._trial_waiting), self._trial_slots - self._trial_flights)):
            waiting = self._trial_waiting.popleft()
            waiting.in_turn = False
            self._ready(waiting)
        if self._stopping or not self._turns:
            return
        now, at = time.monotonic(), self._now()
        links = [link for link in self._links if link.alive and link.busy < self._a_prober]
        outgoing: dict[ProberLink, list[Request]] = {link: [] for link in links}
        while self._turns and links and len(self._flights) < self._config.concurrency and self._has_room():
            host = self._turns.popleft()
            host.in_turn = False
            if host.on_trial and self._trial_flights >= self._trial_slots:
                host.in_turn = True
                self._trial_waiting.append(host)
                continue
            moment = host.ready_at()
            if not host.queue or moment is None or moment > now:
                self._ready(host)
                continue
            if self._is_cut_off(host.name):
                if now < self._trial_at:
                    self._park(host)
                    continue
                self._trial_at = now + TRIAL_SECONDS
            self._start(host, host.queue.popleft(), now, at, links, outgoing)
            self._ready(host)
            if len(host.queue) <= host.low and not host.exhausted and host.name not in self._hungry:
                self._hungry[host.name] = host
                self._work.set()
        for link, requests in outgoing.items():
            if requests:
                link.send(requests)

    def _has_room(self) -> bool:
        return len(self._results) + self._recording < MAX_UNRECORDED

    def _start(
        self,
        host: Host,
        file: DueFile,
        now: float,
        at: int,
        links: list[ProberLink],
        outgoing: dict[ProberLink, list[Request]],
    ) -> None:
        target = self._guard.examine(file.target_url)
        host.start(now)
        flight = Flight(file, host, policy.first(target, host.settings), now)
        flight.cut_off = self._is_cut_off(host.name)
        self._trial_flights += flight.on_trial
        if target.refusal is not None:
            # Refused by settings that came after the file was admitted.
            self._end(flight, policy.Conclusion(FileState.BLOCKED, target.refusal), None, at)
            return
        link = links[0] if len(links) == 1 else self._link_for(host, links, outgoing)
        outgoing[link].append(self._request(flight, link, now, at))

    def _link_for(
        self, host: Host, links: Sequence[ProberLink], outgoing: Mapping[ProberLink, Sequence[Request]]
    ) -> ProberLink:
        """The prober that has the host's connections, unless another has much less to do."""

        def load(link: ProberLink) -> int:
            return link.busy + len(outgoing[link])

        idlest, last = min(links, key=load), self._links[host.prober]
        if last in outgoing and load(last) <= load(idlest) + LOAD_APART:
            return last
        host.prober = self._links.index(idlest)
        return idlest

    def _request(self, flight: Flight, link: ProberLink, now: float, at: int) -> Request:
        self._last_id += 1
        self._flights[self._last_id] = flight
        flight.link = link
        flight.sent_at = at
        ask, settings = flight.ask, flight.host.settings
        return Request(
            self._last_id,
            ask.method,
            ask.target.url,
            round((flight.deadline - now) * 1000),
            round(settings.connect_timeout * 1000),
            # A host that is not trusted with it gets no connection that was used before, nor keeps this one.
            ask.fresh or not flight.host.reuse,
            flight.host.reuse,
            ask.ranged,
        )

    # Finishing

    def _on_ready(self, link: ProberLink) -> None:
        self._pump()

    def _on_evidence(self, link: ProberLink, evidence: list[Evidence]) -> None:
        again: list[Request] = []
        # What arrives together has arrived at the same time.
        now, at = time.monotonic(), self._now()
        for item in evidence:
            flight = self._flights.pop(item.id, None)
            if flight is None:
                continue
            last = flight.file.attempts >= len(self._config.retry_schedule)
            settings = flight.host.settings
            outcome = policy.judge(flight.ask, item, settings, self._guard.follow, last=last)
            if isinstance(outcome, policy.NextRequest) and now >= flight.deadline:
                if outcome.method != flight.ask.method:
                    # HEAD has taken all of the time, and the GET that decides has a time of its own.
                    flight.deadline = now + settings.timeout
                else:
                    # No time is left to ask again: this was the attempt, on whichever connection it came.
                    outcome = policy.Conclusion(FileState.PENDING, Reason.TIMEOUT)
            self._note(flight, item, outcome)
            if isinstance(outcome, policy.Conclusion):
                if not (self._slow_down(flight, outcome, item, at) or self._doubt(flight, outcome, item)):
                    self._end(flight, outcome, item, at)
                continue
            flight.ask = outcome
            again.append(self._request(flight, link, now, at))
        if again:
            link.send(again)
        self._settle_doubts()
        self._pump()

    def _note(self, flight: Flight, item: Evidence, outcome: policy.NextRequest | policy.Conclusion) -> None:
        """Keep the request as an attempt row, and what it says of the host."""
        host, ask = flight.host, flight.ask
        if item.status is not None:
            host.answered()
        if item.status is not None or item.connect_ms is not None or item.refused:
            self._answered(self._network, ask.target.host)
        if item.dns_ms is not None and is_name(ask.target.hostname):
            self._answered(self._names, ask.target.host)
        if isinstance(outcome, policy.NextRequest) and outcome.fresh and not ask.fresh:
            flight.doubted = item
            return
        doubted, flight.doubted = flight.doubted, None
        if doubted is not None and policy.was_anothers(doubted, item):
            if host.reuse:
                log.warning("host sends answers that nobody asked for, its connections are used once", host=host.name)
            host.reuse = False
        if item.failure is not None:
            reason: str | None = item.failure
        elif item.status in policy.REDIRECTS or outcome is policy.AVAILABLE:
            reason = None
        else:
            reason = http_reason(item.status or 0)
        flight.requests.append(
            AttemptRow(
                flight.sent_at,
                ask.method,
                ask.target.url if ask.hops else None,
                item.status,
                reason,
                item.dns_ms,
                item.connect_ms,
                item.tls_ms,
                item.first_byte_ms,
                item.total_ms,
                item.remote_addr,
            )
        )

    def _end(self, flight: Flight, conclusion: policy.Conclusion, item: Evidence | None, now: int) -> None:
        """The attempt is over: what becomes of the file, and who is next."""
        file, config = flight.file, self._config
        attempts = file.attempts + 1
        asked = policy.retry_after_ms(item.retry_after, now) if item is not None and item.retry_after else None
        fate = policy.conclude(conclusion, attempts, config.retry_schedule, config.jitter, self._chance(), asked)
        next_attempt_at = None if fate.wait_ms is None else now + fate.wait_ms
        self._results.append(
            FileResult(
                file,
                fate.state,
                conclusion.reason,
                attempts,
                next_attempt_at,
                item.status if item is not None else None,
                item.content_length if item is not None else None,
                item.content_type if item is not None else None,
                item.etag if item is not None else None,
                item.last_modified if item is not None else None,
                conclusion.led_to or (flight.ask.target.url if flight.ask.hops else None),
                item.remote_addr if item is not None else None,
                sum(request.total_ms for request in flight.requests) if item is not None else None,
                None if fate.state is FileState.PENDING else now,
                tuple(flight.requests),
            )
        )
        self._recordable.set()
        self._deaths.pop(file.id, None)
        if item is not None and item.status is None and conclusion.reason in policy.CONNECTION_FAILURES:
            self._host_failed(flight.host, item.total_ms / 1000)
        self._free(flight)

    def _host_failed(self, host: Host, seconds: float) -> None:
        was_open = host.on_trial
        if not host.failed(time.monotonic(), seconds):
            return
        if not was_open:
            log.warning("host does not answer, its files wait", host=host.name)
        self._rest(host, host.open_until)

    def _slow_down(self, flight: Flight, conclusion: policy.Conclusion, item: Evidence, at: int) -> bool:
        """Return whether the attempt does not count, because the host has asked for fewer requests."""
        now = time.monotonic()
        # What redirects led to is a host of its own, and so is what it can bear.
        name = flight.ask.target.host
        host = flight.host if name == flight.host.name else self._hosts.get(name, flight.host)
        if not conclusion.busy:
            if item.status is not None:
                host.served(now)
            return False
        asked_ms = policy.retry_after_ms(item.retry_after, at)
        was_paced = host.rate is not None
        if not host.too_busy(now, None if asked_ms is None else asked_ms / 1000):
            return False
        if not was_paced:
            log.warning("host asks for fewer requests, it is paced", host=host.name, rate=round(host.rate or 0.0, 1))
        self._rest(host, host.rest_until)
        self._give_back([flight])
        return True

    def _rest(self, host: Host, until: float) -> None:
        """Ask the host for nothing until then."""
        # Others may have what is queued here: it is due, and nothing has been spent on it.
        if host.queue:
            self._store.release(list(host.queue))
            host.queue.clear()
        host.exhausted = True
        if host.timer is not None:
            host.timer.cancel()
        host.timer = asyncio.get_running_loop().call_later(
            max(0.0, until - time.monotonic()) + TIMER_SLACK, self._on_time, host
        )

    def _free(self, flight: Flight) -> None:
        """The slot is free again."""
        host = flight.host
        host.end()
        if flight.on_trial:
            self._trial_flights -= 1
        self._ready(host)
        self._check_drained()

    def _doubt(self, flight: Flight, conclusion: policy.Conclusion, item: Evidence) -> bool:
        """Whether the attempt's end waits for what is heard of others: it has failed to reach anybody."""
        if conclusion.state is not FileState.PENDING or item.status is not None or item.reused or item.refused:
            return False
        if item.failure is Reason.DNS_ERROR:
            reach = self._names
        elif item.failure in (Reason.TIMEOUT, Reason.CONNECT_ERROR) and item.connect_ms is None:
            reach = self._network
        else:
            return False
        host = flight.ask.target.host
        if not flight.cut_off:
            reach.doubt(host, (flight, conclusion, item))
            if reach is self._network:
                self._failed(reach, host)
            return True
        self._give_back([flight])
        if reach is self._names:
            self._ask_name_server(host)
        return True

    def _answered(self, reach: Connectivity[Doubted], host: str) -> None:
        if reach.answered(host):
            log.warning("connected again", to=self._called(reach))
            while self._parked:
                self._unpark()
        for doubted in reach.take():
            self._end(*doubted, self._now())

    def _failed(self, reach: Connectivity[Doubted], host: str) -> None:
        if reach.failed(host):
            log.warning("nobody answers, files wait and nothing is spent on them", to=self._called(reach))
        if reach.lost and reach.doubted:
            self._give_back([flight for flight, _, _ in reach.take()])

    def _called(self, reach: Connectivity[Doubted]) -> str:
        return "network" if reach is self._network else "name servers"

    def _settle_doubts(self) -> None:
        """Let failures count that nothing more can be heard of."""
        for reach in (self._network, self._names):
            if not (doubted := reach.doubted):
                continue
            if reach is self._names and (unheard := reach.unheard):
                self._ask_name_server(min(unheard))
                continue
            others = (flight.ask.target for flight in self._flights.values())
            if not any(
                other.host not in doubted and (reach is self._network or is_name(other.hostname)) for other in others
            ):
                for attempt in reach.take():
                    self._end(*attempt, self._now())

    def _ask_name_server(self, host: str) -> None:
        if self._asking_names:
            return
        self._asking_names = True

        def told(answers: bool) -> None:
            self._asking_names = False
            if answers:
                self._answered(self._names, host)
            else:
                self._failed(self._names, host)
            self._settle_doubts()
            self._pump()

        ask_name_server(hostname_of(host), asyncio.get_running_loop(), told)

    def _is_cut_off(self, host: str) -> bool:
        return self._network.lost or (self._names.lost and is_name(hostname_of(host)))

    def _park(self, host: Host) -> None:
        host.in_turn = True
        self._parked.append(host)
        if self._parked_timer is None:
            delay = max(0.0, self._trial_at - time.monotonic()) + TIMER_SLACK
            self._parked_timer = asyncio.get_running_loop().call_later(delay, self._on_trial_time)

    def _on_trial_time(self) -> None:
        self._parked_timer = None
        self._unpark()
        self._pump()
        if self._parked:
            self._park(self._parked.popleft())

    def _unpark(self) -> None:
        if self._parked:
            host = self._parked.popleft()
            host.in_turn = False
            self._ready(host)

    def _give_back(self, flights: Sequence[Flight]) -> None:
        """These files are pending and due as before, and nothing is spent."""
        self._store.release([flight.file for flight in flights])
        for flight in flights:
            self._free(flight)
        self.add_hosts({flight.file.host for flight in flights})

    def _on_death(self, link: ProberLink) -> None:
        """The prober is gone: its files are pending again, and nothing is spent, unless they seem to be what kills."""
        lost = [id for id, flight in self._flights.items() if flight.link is link]
        released: list[DueFile] = []
        for id in lost:
            flight = self._flights.pop(id)
            file = flight.file
            self._deaths[file.id] = self._deaths.get(file.id, 0) + 1
            if self._deaths[file.id] >= DEATHS_BORNE:
                self._end(flight, policy.Conclusion(FileState.PENDING, Reason.PROTOCOL_ERROR), None, self._now())
                continue
            released.append(file)
            self._free(flight)
        if released:
            self._store.release(released)
            self.add_hosts({file.host for file in released})
        self._settle_doubts()

    # Recording

    async def _record_loop(self) -> None:
        delay = RECORD_LINGER
        while True:
            await self._recordable.wait()
            rows = RECORD_ROWS_BY_TURNS if self._store.prefers_small_batches else RECORD_ROWS
            if len(self._results) < rows and self._flights:
                await asyncio.sleep(RECORD_LINGER)
            batch = [self._results.popleft() for _ in range(min(rows, len(self._results)))]
            if not self._results:
                self._recordable.clear()
            if not batch:
                continue
            self._recording = len(batch)
            try:
                verdicts = await self._store.record(batch, self._now())
            except StoreUnavailableError as error:
                log.warning("cannot record results, trying again", files=len(batch), error=str(error))
                self._results.extendleft(reversed(batch))
                self._recordable.set()
                delay = min(delay * 2, LOOK_SECONDS)
                await asyncio.sleep(delay)
                continue
            finally:
                self._recording = 0
            delay = RECORD_LINGER
            self._on_recorded(batch)
            for result in batch:
                if result.next_attempt_at is not None:
                    self._due_by(result.next_attempt_at)
            if verdicts:
                self._on_verdicts(verdicts)
            self._check_drained()
            self._pump()

    def _check_drained(self) -> None:
        if self._stopping and not (self._flights or self._results or self._recording):
            self._drained.set()
