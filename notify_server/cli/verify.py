"""`notify-server verify`: ask for a list of addresses once, as the daemon would, without daemon and store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent import futures
from heapq import nsmallest
from itertools import chain
from pathlib import Path
from typing import TypeVar

import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from notify_server.cli.addresses import AddressFile, Entry, InputError
from notify_server.cli.common import EXIT_FAILED, EXIT_USAGE, output, printable, read_config, until_signal
from notify_server.clock import unix_ms
from notify_server.config import Config, LogConfig
from notify_server.errors import NotifyServerError
from notify_server.model import BatchVerdict, DueFile, FileResult, FileState, HostDue
from notify_server.processes.prober_client import ProberLink, prober_config
from notify_server.telemetry.logging import set_up_logging
from notify_server.verify.guard import Guard
from notify_server.verify.own_networks import own_networks
from notify_server.verify.policy import CONNECTION_FAILURES
from notify_server.verify.verifier import Verifier

T = TypeVar("T")

# Addresses read and not yet shown: whatever the list, no more are in memory.
WINDOW = 20_000
# A host is given up when for so long, and so many times, it could not be reached and never answered.
GIVE_UP_SECONDS = 5.0
GIVE_UP_FAILURES = 20
# Hosts whose failures are remembered.
MAX_HOSTS = 10_000
# A person waits: a host that refuses everything for this long is reported as it is.
BUSY_PATIENCE = 30.0
# Rows of the table on a terminal.
MAX_ROWS = 1_000


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """What became of an address, in the order of the fields of `--json`.

    `state` is pending when it was not asked for, because its host had been given up for `reason`.
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


class InMemoryQueue:
    """The pool's queue of files (store.base.FileQueue) in memory, fed from a list and emptied by `outcomes`."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._waiting: dict[str, deque[DueFile]] = {}
        self._settled: list[Outcome] = []
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        # Whether all of the list has entered.
        self.complete = False
        # How often a host could not be reached, and since when (monotonic seconds); and those given up, with the
        # reason.
        self._failing: dict[str, tuple[int, float]] = {}
        self._given_up: dict[str, str] = {}
        # All that came in; of them, those that have not been handed out by `outcomes` yet.
        self.entered = 0
        self._inside = 0
        self.add_hosts: Callable[[Iterable[str]], None] = lambda hosts: None

    # The list's side

    async def enter(self, entries: Sequence[Entry]) -> None:
        """Take these, as soon as there is room."""
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
        """Nothing more will enter."""
        self.complete = True
        self._news.set()

    async def outcomes(self) -> AsyncIterator[list[Outcome]]:
        """What has become of them, as it becomes known, until all that entered is settled."""
        while self._inside or not self.complete:
            await self._news.wait()
            yield self.take()

    def take(self) -> list[Outcome]:
        """What has settled since this was last called."""
        self._news.clear()
        settled, self._settled = self._settled, []
        self._inside -= len(settled)
        self._room.set()
        return settled

    def _settle(self, outcome: Outcome) -> None:
        self._settled.append(outcome)
        self._news.set()

    # The pool's side

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
                # Postponed: the host that a redirect led to rests.
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
        """Give up a host that cannot be reached: the pool would ask it again and again, ever more seldom, for hours."""
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


def _remember(hosts: dict[str, T], host: str, what: T) -> None:
    hosts[host] = what
    if len(hosts) > MAX_HOSTS:
        del hosts[next(iter(hosts))]


class Reading(threading.Thread):
    """Reads the list into the listing. A thread that nobody waits for: it may hang in a read that never returns."""

    def __init__(self, urls: Sequence[str], file: AddressFile | None, listing: InMemoryQueue) -> None:
        super().__init__(daemon=True)
        self._urls = urls
        self._file = file
        self._listing = listing
        self._loop = asyncio.get_running_loop()
        self._batch: list[Entry] = []
        # What has stopped it before the end of the list.
        self.error: InputError | None = None

    def run(self) -> None:
        entries = (
            Entry(url.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")) for url in self._urls
        )
        # The loop may end before the list does.
        with contextlib.suppress(futures.CancelledError, RuntimeError):
            try:
                for entry in chain(entries, self._file.entries(self._hand_over) if self._file is not None else ()):
                    self._batch.append(entry)
                self._hand_over()
            except InputError as error:
                self._hand_over()
                self.error = error
            self._loop.call_soon_threadsafe(self._listing.close)

    def _hand_over(self) -> None:
        if not self._batch:
            return
        batch, self._batch = self._batch, []
        entering = self._listing.enter(batch)
        try:
            asyncio.run_coroutine_threadsafe(entering, self._loop).result()
        finally:
            entering.close()


class Report:
    """What has been found so far, as it is told."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._table = not as_json and sys.stdout.isatty()
        self._started = time.monotonic()
        self._unavailable: list[Outcome] = []
        self.states: Counter[FileState] = Counter()
        self.reasons: Counter[str] = Counter()

    @property
    def settled(self) -> int:
        return self.states.total()

    @property
    def not_available(self) -> int:
        return self.settled - self.states[FileState.AVAILABLE]

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Count them, and show them where they are shown one by one."""
        lines: list[str] = []
        for outcome in outcomes:
            self.states[outcome.state] += 1
            if outcome.reason is not None and outcome.state is not FileState.AVAILABLE:
                self.reasons[outcome.reason] += 1
            if self._as_json:
                lines.append(json.dumps(msgspec.structs.asdict(outcome)))
            elif outcome.state is FileState.AVAILABLE:
                continue
            elif not self._table:
                lines.append(f"{outcome.state}\t{outcome.reason or '-'}\t{printable(outcome.url)}")
            elif len(self._unavailable) < MAX_ROWS:
                self._unavailable.append(outcome)
        if lines:
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()

    def end(self, entered: int, *, stopped: bool) -> None:
        """Show the table and the summary; the latter on standard error where standard output is for a program."""
        if self._unavailable:
            console = output()
            console.print(self._rows())
            if more := self.not_available - len(self._unavailable):
                console.print(Text(f"… and {more:,} more: --json tells all of them"))
        print(self._summary(entered, stopped), file=sys.stdout if self._table else sys.stderr)

    def _rows(self) -> Table:
        table = Table(title="Not available", title_justify="left")
        for heading in ("state", "reason"):
            table.add_column(heading, no_wrap=True)
        table.add_column("address", overflow="fold")
        for outcome in self._unavailable:
            url = printable(outcome.url)
            if outcome.final_url:
                url += f"\n-> {printable(outcome.final_url)}"
            table.add_row(outcome.state, outcome.reason or "", Text(url))
        return table

    def _summary(self, entered: int, stopped: bool) -> str:
        seconds = time.monotonic() - self._started
        states = ", ".join(f"{self.states[state]:,} {state}" for state in FileState if self.states[state])
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons.most_common())
        return (
            ("stopped: " if stopped else "")
            + f"{self.settled:,} address{'' if self.settled == 1 else 'es'}"
            + (f": {states}" if states else "")
            + (f" ({reasons})" if reasons else "")
            + (f"; {entered - self.settled:,} unsettled" if stopped else "")
            + f"; {seconds:.1f} s"
        )


def run(urls: Sequence[str], list_file: str | None, config_path: Path | None, *, as_json: bool) -> None:
    """Ask for each address once, and show what is not available.

    Exits 0 when all are, 1 when some are not, 2 with one line when a list cannot be read; 128 and the signal's number
    when stopped, with what is known by then.
    """
    config = read_config(config_path)
    # The daemon's warnings of hosts that rest would say what the result says.
    set_up_logging(LogConfig(level="error"))
    stopped_by: list[int] = []
    try:
        file = AddressFile(list_file) if list_file is not None else None
        code = uvloop.run(until_signal(_verify(config, urls, file, as_json), stopped_by))
    except InputError as error:
        print(f"notify_server: {error}", file=sys.stderr)
        code = EXIT_USAGE
    except NotifyServerError as error:
        print(f"notify_server: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except asyncio.CancelledError:
        code = 128 + (stopped_by or [signal.SIGINT])[0]
    raise SystemExit(code)


async def _verify(config: Config, urls: Sequence[str], file: AddressFile | None, as_json: bool) -> int:
    # One attempt: what it shows is what there is to tell.
    verify = config.verify.model_copy(update={"retry_schedule": ()})
    guard = Guard(
        verify.allowed_hosts, verify.allowed_networks, verify.allowed_ports, verify.refused_networks, own_networks()
    )
    listing = InMemoryQueue(guard)
    links = [ProberLink(prober_config(config.verify)) for _ in range(verify.processes)]
    pool = Verifier(
        listing,
        guard,
        verify,
        links,
        now=unix_ms,
        chance=random.random,
        on_verdicts=lambda verdicts: None,
        busy_seconds=BUSY_PATIENCE,
    )
    listing.add_hosts = pool.add_hosts
    reading = Reading(urls, file, listing)
    report = Report(as_json=as_json)
    stopped = True
    await pool.start()
    if not pool.alive:
        await pool.stop(0)
        raise NotifyServerError("the prober does not start: `notify-server doctor` may tell why")
    try:
        reading.start()
        with _progress() as progress:
            task = progress.add_task("", total=None)
            async for outcomes in listing.outcomes():
                report.add(outcomes)
                progress.update(
                    task,
                    completed=report.settled,
                    total=_expected(listing, file),
                    description=f"{report.not_available:,} not available",
                )
        stopped = False
    finally:
        await pool.stop(0)
        report.add(listing.take())
        report.end(listing.entered, stopped=stopped)
    if reading.error is not None:
        raise reading.error
    return EXIT_FAILED if report.not_available else 0


def _progress() -> Progress:
    return Progress(
        BarColumn(),
        TextColumn("{task.completed:,} asked, {task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _expected(listing: InMemoryQueue, file: AddressFile | None) -> int | None:
    """How many addresses there are, as far as can be told from how much of the list has been read."""
    if listing.complete or not file or not file.size or not file.bytes_read:
        return listing.entered if listing.complete else None
    return max(listing.entered, round(listing.entered * file.size / file.bytes_read))
