"""Claims due files: finds the hosts that have any, and keeps a queue of claimed files for each.

Claimed files are in memory only, and bounded whatever the backlog.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

import structlog

from notify_server.config import HostSettings, VerifyConfig
from notify_server.errors import StoreUnavailableError
from notify_server.store.base import FileQueue
from notify_server.verify.hosts import BUSY_SECONDS, Host, hostname_of

log = structlog.get_logger("notify_server.verify")

# Files claimed ahead for each slot, and the minimum number of hosts among which they are divided. While acks share the
# writer the minimum is higher, so that each claim is smaller.
AHEAD_PER_SLOT = 32
MIN_AHEAD_SHARES = 8
MIN_SMALL_AHEAD_SHARES = 64
# Hosts per page when looking for due hosts, and hosts remembered.
LOOK_HOSTS = 1000
LOOK_SECONDS = 1.0
MAX_HOSTS = 10_000
# Of these, hosts that have not answered lately; and hosts whose last answer is remembered after eviction.
MAX_STRANGERS = MAX_HOSTS // 2
MAX_ANSWERED = 10_000
HOSTS_A_CLAIM = 64
# Resolution and horizon of the remembered due times.
DUE_STEP_MS = 50
DUE_SOON_MS = 60_000


class DueTimes:
    """The times, in Unix ms, at which files become due within DUE_SOON_MS, in steps of DUE_STEP_MS."""

    def __init__(self) -> None:
        self._heap: list[int] = []
        self._known: set[int] = set()

    @property
    def first(self) -> int | None:
        """The earliest time, None if there is none."""
        return self._heap[0] if self._heap else None

    def add(self, moment: int, now: int) -> bool:
        """Remember a time. Return True if it is new and now the earliest."""
        moment += -moment % DUE_STEP_MS
        if moment in self._known or moment - now >= DUE_SOON_MS:
            return False
        self._known.add(moment)
        heappush(self._heap, moment)
        return moment == self._heap[0]

    def drop_until(self, now: int) -> None:
        """Forget the times up to `now`."""
        while self._heap and self._heap[0] <= now:
            self._known.discard(heappop(self._heap))


class Claims:
    """Owns the hosts and their queues of claimed files. `on_queued` is called for a host whose queue or limit has
    grown, and `on_done` once after several of them.
    """

    def __init__(
        self,
        store: FileQueue,
        config: VerifyConfig,
        *,
        now: Callable[[], int],
        limit_of: Callable[[str, HostSettings], int],
        on_queued: Callable[[Host], None],
        on_done: Callable[[], None],
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        self._store = store
        self._config = config
        self._now = now
        self._limit_of = limit_of
        self._on_queued = on_queued
        self._on_done = on_done
        # How long a host may refuse every request as too many before its files are charged for it.
        self._busy_seconds = busy_seconds
        self.hosts: dict[str, Host] = {}
        self._strangers = 0
        self._answered_at: dict[str, float] = {}
        # Hosts that may have more files to claim.
        self._hungry: dict[str, Host] = {}
        self._look_after = ""
        self._look_at = 0.0
        # Wakes the next look at the right time; only the store knows which files are due.
        self._due = DueTimes()
        self._work = asyncio.Event()
        self._stopping = False

    def finish(self) -> None:
        """Stop claiming."""
        self._stopping = True

    def add_hosts(self, hosts: Iterable[str]) -> None:
        """Claim soon for these hosts: they have new files."""
        for name in hosts:
            self._feed(name)
        self._work.set()

    def poll_soon(self) -> None:
        """Look soon for due files of any host."""
        self._look_at = 0.0
        self._work.set()

    async def run(self) -> None:
        """Claim files until cancelled."""
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

    def host(self, name: str) -> Host | None:
        """Return the host of this name, None if no more hosts can be remembered."""
        host = self.hosts.get(name)
        if host is None:
            answered_at = self._answered_at.get(name)
            if len(self.hosts) >= MAX_HOSTS or (answered_at is None and self._strangers >= MAX_STRANGERS):
                return None
            host = self.hosts[name] = Host(name, self._config.for_host(hostname_of(name)), self._busy_seconds)
            host.limit = self._limit_of(name, host.settings)
            if answered_at is None:
                self._strangers += 1
            else:
                host.answered_at = answered_at
        return host

    def _feed(self, name: str) -> None:
        host = self.host(name)
        if host is not None:  # Otherwise a later look finds it.
            self._hungry[name] = host

    def _evict(self) -> None:
        """Forget idle hosts, except the times of their answers."""
        now = time.monotonic()
        for name in [name for name, host in self.hosts.items() if host.idle(now) and name not in self._hungry]:
            host = self.hosts.pop(name)
            self._answered_at.pop(name, None)
            if not host.is_stranger(now):
                self._answered_at[name] = host.answered_at
        for name in list(self._answered_at)[: max(0, len(self._answered_at) - MAX_ANSWERED)]:
            del self._answered_at[name]
        self._strangers = sum(host.is_stranger(now) for host in self.hosts.values())

    async def _wait_for_work(self) -> None:
        timeout = self._look_at - time.monotonic()
        if self._due.first is not None:
            timeout = min(timeout, (self._due.first - self._now()) / 1000)
        try:
            async with asyncio.timeout(max(0.0, timeout)):
                await self._work.wait()
        except TimeoutError:
            self._look_at = 0.0
        self._work.clear()

    async def _look(self) -> None:
        """Read from the store which hosts have due files, a page of hosts at a time, and when the next file is due.

        The store alone decides which files are due; `add_hosts` and results only announce it sooner.
        """
        page = await self._store.due_hosts(self._look_after, LOOK_HOSTS)
        now = self._now()
        self._due.drop_until(now)
        self._look_after = page[-1].host if len(page) == LOOK_HOSTS else ""
        self._look_at = time.monotonic() + LOOK_SECONDS
        for entry in page:
            if entry.next_attempt_at <= now:
                self._feed(entry.host)
            else:
                self.due_at(entry.next_attempt_at)
        self._share_out()
        self._evict()

    def _share_out(self) -> None:
        """Apply this daemon's share of each host, which changes when daemons join or leave."""
        for host in self.hosts.values():
            limit = self._limit_of(host.name, host.settings)
            if limit == host.limit:
                continue
            more, host.limit = limit > host.limit, limit
            if more:
                self._hungry[host.name] = host
                self._on_queued(host)
            elif not limit and host.queue:
                self.release_queue(host)
        self._on_done()

    def due_at(self, moment: int) -> None:
        """Look for due files at this time, in Unix ms."""
        if self._due.add(moment, self._now()):
            self._work.set()

    def may_want(self, host: Host) -> None:
        """Claim more for a host whose queue has become short."""
        if len(host.queue) <= host.low and not host.exhausted and host.name not in self._hungry:
            self.want(host)

    def want(self, host: Host) -> None:
        """Claim soon for a host."""
        self._hungry[host.name] = host
        self._work.set()

    def release_queue(self, host: Host) -> None:
        """Return a host's queue to the store: its files are due, and other daemons may claim them."""
        self._store.release(list(host.queue))
        host.queue.clear()

    async def _claim(self) -> bool:
        """Claim for some of the hosts that need files. Return whether more may need some."""
        wanted = self._wanted()
        if not wanted or self._stopping:
            return bool(self._hungry) and not self._stopping
        try:
            claimed = await self._store.claim(wanted, self._now())
        except StoreUnavailableError:
            self._hungry.update((name, self.hosts[name]) for name, _ in wanted if name in self.hosts)
            raise
        got: dict[str, int] = {}
        for file in claimed:
            got[file.host] = got.get(file.host, 0) + 1
            self.hosts[file.host].queue.append(file)
        for name, n in wanted:
            host = self.hosts[name]
            host.exhausted = got.get(name, 0) < n
            host.low = n // 2
            self._on_queued(host)
        self._on_done()
        return True

    def _wanted(self) -> list[tuple[str, int]]:
        """Take some of the hosts that need files, and return how many files to claim for each."""
        now = time.monotonic()
        shares = MIN_SMALL_AHEAD_SHARES if self._store.prefers_small_batches else MIN_AHEAD_SHARES
        most = max(2, self._config.concurrency * AHEAD_PER_SLOT // max(shares, len(self.hosts)))
        wanted: list[tuple[str, int]] = []
        for name in list(self._hungry)[:HOSTS_A_CLAIM]:
            host = self._hungry.pop(name)
            # Other daemons share this host: leave them files to claim.
            is_shared = host.limit < host.settings.per_host_concurrency
            share = min(most, host.limit * AHEAD_PER_SLOT) if is_shared else most
            if not host.rests(now) and (n := share - len(host.queue)) > 0:
                wanted.append((name, n))
        return wanted
