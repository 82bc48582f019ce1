"""The queue of addresses that `notify-server verify` hands to the verifier."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from heapq import nsmallest
from typing import TypeVar

import msgspec

from notify_server.cli.addresses import Entry
from notify_server.model import BatchVerdict, DueFile, FileResult, FileState, HostDue
from notify_server.verify.guard import Guard
from notify_server.verify.policy import CONNECTION_FAILURES

T = TypeVar("T")

# Addresses in memory at most, however long the list.
WINDOW = 20_000
# A host is given up after so many failures in a row to reach it, over at least this time.
GIVE_UP_SECONDS = 5.0
GIVE_UP_FAILURES = 20
# Hosts whose failures are remembered.
MAX_HOSTS = 10_000


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """The result for an address; the fields are those of `--json`, in their order.

    `state` is pending if it was not checked, because its host had been given up for `reason`.
    """

    url: str
    state: FileState
    reason: str | None = None
    http_status: int | None = None
    content_length: int | None = None
    content_type: str | None = None
    final_url: str | None = None
    remote_addr: str | None = None
    elapsed_ms: float | None = None


class AddressQueue:
    """Implements store.base.FileQueue in memory. A list fills it, `outcomes` empties it."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._waiting: dict[str, deque[DueFile]] = {}
        self._settled: list[Outcome] = []
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        # True once the whole list has entered.
        self.complete = False
        # The number of failures to reach a host, with the time of the first (monotonic seconds).
        self._failing: dict[str, tuple[int, float]] = {}
        # Hosts that were given up, with the reason.
        self._given_up: dict[str, str] = {}
        # Addresses that have entered; of these, the ones that `outcomes` has not returned yet.
        self.entered = 0
        self._inside = 0
        self.add_hosts: Callable[[Iterable[str]], None] = lambda hosts: None

    # The side of the list

    async def enter(self, entries: Sequence[Entry]) -> None:
        """Add addresses, as soon as there is room."""
        while self._inside >= WINDOW:
            self._room.clear()
            await self._room.wait()
        hosts: set[str] = set()
        for url, failed in entries:
            self.entered += 1
            self._inside += 1
            target = self._guard.examine(url)
            if failed:
                self._settle(Outcome(url, FileState.UPLOAD_FAILED))
            elif target.refusal is not None:
                self._settle(Outcome(url, FileState.BLOCKED, target.refusal))
            elif target.host in self._given_up:
                self._settle(Outcome(url, FileState.PENDING, self._given_up[target.host]))
            else:
                self._waiting.setdefault(target.host, deque()).append(DueFile(self.entered, 0, target.host, url, 0))
                hosts.add(target.host)
        self.add_hosts(hosts)

    def close(self) -> None:
        """Mark the end of the list."""
        self.complete = True
        self._changed.set()

    async def outcomes(self) -> AsyncIterator[list[Outcome]]:
        """Yield outcomes as they become known, until every address is settled."""
        while self._inside or not self.complete:
            await self._changed.wait()
            yield self.take()

    def take(self) -> list[Outcome]:
        """Return the outcomes since the last call."""
        self._changed.clear()
        settled, self._settled = self._settled, []
        self._inside -= len(settled)
        self._room.set()
        return settled

    def _settle(self, outcome: Outcome) -> None:
        self._settled.append(outcome)
        self._changed.set()

    # The side of the verifier

    @property
    def prefers_small_batches(self) -> bool:
        return False

    async def due_hosts(self, after: str, limit: int) -> list[HostDue]:
        return [HostDue(host, 0) for host in nsmallest(limit, (host for host in self._waiting if host > after))]

    async def claim(self, wanted: Sequence[tuple[str, int]], now: int) -> list[DueFile]:
        claimed: list[DueFile] = []
        for host, most in wanted:
            waiting = self._waiting.get(host, deque())
            claimed += [waiting.popleft() for _ in range(min(most, len(waiting)))]
            if not waiting:
                self._waiting.pop(host, None)
        return claimed

    def release(self, files: Sequence[DueFile]) -> None:
        for file in reversed(files):
            if reason := self._given_up.get(file.host):
                self._settle(Outcome(file.target_url, FileState.PENDING, reason))
            else:
                self._waiting.setdefault(file.host, deque()).appendleft(file)

    async def record(self, results: Sequence[FileResult], now: int) -> list[BatchVerdict]:
        for result in results:
            if result.next_attempt_at is not None and result.attempts == result.file.attempts:
                # Postponed: the host of a redirect is paused.
                delay = max(0, result.next_attempt_at - now) / 1000
                asyncio.get_running_loop().call_later(delay, self._put_back, result.file)
                continue
            elapsed = result.elapsed_ms
            self._settle(
                Outcome(
                    result.file.target_url,
                    result.state,
                    result.reason,
                    result.http_status,
                    result.content_length,
                    result.content_type,
                    result.final_url,
                    result.remote_addr,
                    None if elapsed is None else round(elapsed, 3),
                )
            )
            self._note(result)
        return []

    def _put_back(self, file: DueFile) -> None:
        self.release([file])
        self.add_hosts({file.host})

    def _note(self, result: FileResult) -> None:
        """Give up a host that cannot be reached; the verifier would retry it for hours."""
        host, now = result.file.host, time.monotonic()
        if result.http_status is not None or result.reason not in CONNECTION_FAILURES:
            self._failing.pop(host, None)
            self._given_up.pop(host, None)
            return
        failures, since = self._failing.get(host, (0, now - (result.elapsed_ms or 0.0) / 1000))
        _remember(self._failing, host, (failures + 1, since))
        if failures + 1 >= GIVE_UP_FAILURES and now - since >= GIVE_UP_SECONDS:
            _remember(self._given_up, host, result.reason)
            self.release(self._waiting.pop(host, deque()))


def _remember(hosts: dict[str, T], host: str, value: T) -> None:
    hosts[host] = value
    if len(hosts) > MAX_HOSTS:
        del hosts[next(iter(hosts))]
