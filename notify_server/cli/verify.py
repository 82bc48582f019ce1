"""`notify-server verify`: checks a list of addresses once, as the daemon would, without a daemon or a store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent import futures
from itertools import chain
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from notify_server.cli.address_queue import AddressQueue, Outcome
from notify_server.cli.addresses import AddressFile, Entry, InputError
from notify_server.cli.common import EXIT_FAILED, EXIT_USAGE, new_table, output, printable, read_config, until_signal
from notify_server.clock import unix_ms
from notify_server.config import Config, LogConfig
from notify_server.errors import NotifyServerError
from notify_server.model import FileState
from notify_server.processes.prober_client import ProberLink, prober_config
from notify_server.telemetry.logging import set_up_logging
from notify_server.verify.guard import Guard
from notify_server.verify.own_networks import own_networks
from notify_server.verify.verifier import Verifier

# A host that refuses everything for this long is reported in that state: a person is waiting.
BUSY_PATIENCE = 30.0
# Rows of the table on a terminal.
MAX_ROWS = 1_000


class Reading(threading.Thread):
    """Reads the list into the queue, on a daemon thread: a read may never return, and must not keep the process."""

    def __init__(self, urls: Sequence[str], file: AddressFile | None, queue: AddressQueue) -> None:
        super().__init__(daemon=True)
        self._urls = urls
        self._file = file
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._batch: list[Entry] = []
        # Why it stopped before the end of the list.
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
            self._loop.call_soon_threadsafe(self._queue.close)

    def _hand_over(self) -> None:
        if not self._batch:
            return
        batch, self._batch = self._batch, []
        entering = self._queue.enter(batch)
        try:
            asyncio.run_coroutine_threadsafe(entering, self._loop).result()
        finally:
            entering.close()


class Report:
    """Counts the outcomes, and shows them on standard output."""

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
        """Count outcomes; show them at once unless they are collected for the table."""
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
        """Show the table and the summary; the summary on standard error if standard output is read by a program."""
        if self._unavailable:
            console = output()
            console.print(self._rows())
            if more := self.not_available - len(self._unavailable):
                console.print(Text(f"… and {more:,} more: --json shows all of them"))
        print(self._summary(entered, stopped), file=sys.stdout if self._table else sys.stderr)

    def _rows(self) -> Table:
        table = new_table(title="Not available", title_justify="left")
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
            + f"{self.settled:,} URL{'' if self.settled == 1 else 's'}"
            + (f": {states}" if states else "")
            + (f" ({reasons})" if reasons else "")
            + (f"; {entered - self.settled:,} unsettled" if stopped else "")
            + f"; {seconds:.1f} s"
        )


def run(urls: Sequence[str], list_file: str | None, config_path: Path | None, *, as_json: bool) -> None:
    """Check each address once, and show those that are not available.

    Exits 0 when all are available, 1 when some are not, 2 with one line when the list cannot be read, and 128 plus the
    signal's number when stopped, after showing the results so far.
    """
    config = read_config(config_path)
    # The results say what the daemon's warnings about hosts would.
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
    # One attempt: its result is what the command shows.
    verify = config.verify.model_copy(update={"retry_schedule": ()})
    guard = Guard(
        verify.allowed_hosts, verify.allowed_networks, verify.allowed_ports, verify.refused_networks, own_networks()
    )
    queue = AddressQueue(guard)
    links = [ProberLink(prober_config(config.verify)) for _ in range(verify.processes)]
    verifier = Verifier(
        queue,
        guard,
        verify,
        links,
        now=unix_ms,
        chance=random.random,
        on_verdicts=lambda verdicts: None,
        busy_seconds=BUSY_PATIENCE,
    )
    queue.add_hosts = verifier.add_hosts
    reading = Reading(urls, file, queue)
    report = Report(as_json=as_json)
    stopped = True
    await verifier.start()
    if not verifier.alive:
        await verifier.stop(0)
        raise NotifyServerError("the prober does not start: `notify-server doctor` may show why")
    try:
        reading.start()
        with _progress() as progress:
            task = progress.add_task("", total=None)
            async for outcomes in queue.outcomes():
                report.add(outcomes)
                progress.update(
                    task,
                    completed=report.settled,
                    total=_expected(queue, file),
                    description=f"{report.not_available:,} not available",
                )
        stopped = False
    finally:
        await verifier.stop(0)
        report.add(queue.take())
        report.end(queue.entered, stopped=stopped)
    if reading.error is not None:
        raise reading.error
    return EXIT_FAILED if report.not_available else 0


def _progress() -> Progress:
    return Progress(
        BarColumn(),
        TextColumn("{task.completed:,} checked, {task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _expected(queue: AddressQueue, file: AddressFile | None) -> int | None:
    """Return the number of addresses, estimated from the share of the list that has been read; None if unknown."""
    if queue.complete or not file or not file.size or not file.bytes_read:
        return queue.entered if queue.complete else None
    return max(queue.entered, round(queue.entered * file.size / file.bytes_read))
