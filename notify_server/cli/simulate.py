"""`notify-server simulate`: runs the simulator, and shows progress and results."""

from __future__ import annotations

import asyncio
import shlex
import signal
import ssl
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from yarl import URL

from notify_server.cli.common import EXIT_FAILED, output, read_config, trust_only, until_signal
from notify_server.cli.own_daemon import Daemon, own_daemon, while_alive
from notify_server.config import Config
from notify_server.errors import NotifyServerError
from notify_server.simulator.compare import MAX_DIFFERENCES, Comparison, Tally
from notify_server.simulator.plan import Plan
from notify_server.simulator.platform import Platform, SimulationError
from notify_server.simulator.receiver import Behaviour, ForwardTally, Receivers
from notify_server.simulator.record import RecordViews
from notify_server.simulator.run import Report, Simulation

LOOPBACK_HINT = (
    "The daemon refuses this machine's own addresses. Set in its configuration: "
    '[verify] allowed_networks = ["127.0.0.0/8"] and allowed_ports = []'
)
# The first queries that a person would run.
QUERIES = (
    "SELECT batch_id, verdict, files, available FROM batch_summary LIMIT 5",
    "SELECT oss_object_name, state, reason, attempts FROM file_result WHERE state <> 'available' LIMIT 5",
)
TICK_SECONDS = 0.1


@dataclass(frozen=True)
class Options:
    """The daemon to play against, and the limits. Durations are seconds, `rate` is posts per second.

    Raises ValueError, one line, when they contradict each other.
    """

    config: Path | None
    url: str | None
    store: Path | None
    own_daemon: bool
    keep: Path | None
    rate: float
    slow_seconds: float
    timeout: float
    settle: float
    receivers: Sequence[Behaviour] = tuple(Behaviour)

    def __post_init__(self) -> None:
        given = {"--config": self.config, "--url": self.url, "--store": self.store}
        if self.own_daemon and (too_much := [name for name, value in given.items() if value is not None]):
            raise ValueError(f"--own-daemon brings its own configuration: leave out {', '.join(too_much)}")
        if self.keep is not None and not self.own_daemon:
            raise ValueError("--keep is the directory of --own-daemon: give both")
        if self.url is not None:
            try:
                url = URL(self.url)
            except ValueError:
                url = URL()
            if url.scheme not in ("http", "https") or not url.host:
                raise ValueError(f"--url must be an absolute http or https address, not {self.url!r}")


def run(plan: Plan, options: Options) -> None:
    """Play the plan and show the result.

    Exits 1 when anything differs, or with one line when it cannot be played; 128 plus the signal's number when stopped.
    """
    console = output()
    stopped_by: list[int] = []
    config = None if options.own_daemon else read_config(options.config)
    try:
        daemon = None if config is None else configured(config, options)
        code = uvloop.run(until_signal(play(plan, options, daemon, console), stopped_by))
    except NotifyServerError as error:
        print(f"notify_server: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except asyncio.CancelledError:
        print("stopped", file=sys.stderr)
        code = 128 + (stopped_by or [signal.SIGINT])[0]
    raise SystemExit(code)


async def play(plan: Plan, options: Options, daemon: Daemon | None, console: Console) -> int:
    """Play against the daemon, or against one of its own if None. Returns the exit code. Raises NotifyServerError."""
    console.print(f"seed {plan.seed}")
    if daemon is not None:
        return show(await _watched(plan, options, daemon), console)
    directory = options.keep or Path(tempfile.mkdtemp(prefix="notify-server-"))
    async with (
        Receivers(options.receivers, slow_seconds=options.slow_seconds) as receivers,
        own_daemon(directory, options.slow_seconds, receivers.tables()) as (daemon, process),
    ):
        report = await while_alive(process, _watched(plan, options, daemon, receivers), directory)
        code = show(report, console)
        # The daemon closes the database last, and so leaves a single file.
        async with await RecordViews.open(daemon.record) as views:
            await _show_queries(views, daemon.record, console)
    return code


def configured(config: Config, options: Options) -> Daemon:
    """Return the daemon of a configuration; options override it."""
    server, token = config.server, config.auth.callback_token
    url = options.url
    tls: ssl.SSLContext | bool = True
    if url is None:
        if server.port == 0:
            raise SimulationError("[server] port is 0, which is any free one: name the daemon's address with --url")
        url = server.local_url + server.callback_path
        if server.ssl_certificate:
            tls = trust_only(server.ssl_certificate)
    return Daemon(url, options.store or config.store.path, token.get_secret_value() if token else None, tls)


async def _watched(plan: Plan, options: Options, daemon: Daemon, receivers: Receivers | None = None) -> Report:
    """Run the simulation, with its progress on standard error if that is a terminal."""
    platform = Platform(plan)
    simulation = Simulation(
        platform,
        url=daemon.url,
        record=daemon.record,
        token=daemon.token,
        tls=daemon.tls,
        rate=options.rate,
        slow_seconds=options.slow_seconds,
        timeout=options.timeout,
        settle=options.settle,
        receivers=receivers,
    )
    progress = Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    posts, files = len(platform.deliveries), sum(1 for _ in platform.files)
    with progress:
        posted, acked = progress.add_task("posted", total=posts), progress.add_task("acked", total=posts)
        verified = progress.add_task("verified", total=files)
        running = asyncio.ensure_future(simulation.run())
        try:
            while not (await asyncio.wait([running], timeout=TICK_SECONDS))[0]:
                progress.update(posted, completed=platform.posted)
                progress.update(acked, completed=platform.acked)
                progress.update(verified, completed=simulation.verified)
            return await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


# --- Showing it ---


def show(report: Report, console: Console) -> int:
    """Print the result of the run; return the exit code."""
    comparison = report.comparison
    console.print(_kinds_table(comparison))
    console.print(_figures(report))
    if report.forwarded:
        console.print(_forwarded_table(report.forwarded))
    if comparison.differences:
        console.print(_differences_table(comparison))
    if comparison.refused_loopback:
        console.print(Text(LOOPBACK_HINT, "yellow"), soft_wrap=True)
    if report.timed_out:
        console.print(Text("Not every verdict was there in time: a longer --timeout may help.", "yellow"))
    forwarded_fault = any(tally.fault for tally in report.forwarded)
    if forwarded_fault:
        console.print(Text("Events were not forwarded as planted.", "bold red"))
    if comparison.different:
        files, batches = _planted(comparison)
        different = (
            f"{comparison.different_files:,} of {files} and {comparison.batches.different:,} of {batches} differ."
        )
        console.print(Text(different, "bold red"))
        return EXIT_FAILED
    if forwarded_fault:
        return EXIT_FAILED
    console.print(Text("Everything is as planted.", "bold green"))
    return 0


def _planted(comparison: Comparison) -> tuple[str, str]:
    files = sum(tally.planted for tally in comparison.files.values())
    return f"{files:,} files", f"{comparison.batches.planted:,} batches"


def _kinds_table(comparison: Comparison) -> Table:
    retried = comparison.batches.retried > 0 or any(tally.retried for tally in comparison.files.values())
    table = Table(title=" in ".join(_planted(comparison)), title_justify="left")
    table.add_column("planted")
    for heading in ("files", "as expected", *(["still being retried"] if retried else []), "different"):
        table.add_column(heading, justify="right")

    def add(name: str, tally: Tally) -> None:
        different = Text(f"{tally.different:,}", "bold red" if tally.different else "dim")
        between = [f"{tally.retried:,}"] if retried else []
        table.add_row(name, f"{tally.planted:,}", Text(f"{tally.as_expected:,}", "green"), *between, different)

    for kind, tally in comparison.files.items():
        if tally.planted:
            add(kind, tally)
    table.add_section()
    add("batches' verdicts", comparison.batches)
    return table


def _figures(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    again = f", {report.repeated:,} posted again" if report.repeated else ""
    redelivered = report.posted - report.comparison.batches.planted
    for name, figure in (
        ("acked", f"{report.acked:,} of {report.posted:,} posts, {redelivered:,} of them redeliveries{again}"),
        (
            "ack latency",
            f"p50 {report.ack_p50_ms:.1f} ms, p99 {report.ack_p99_ms:.1f} ms, max {report.ack_max_ms:.1f} ms",
        ),
        (
            "verified",
            f"{report.verified:,} files, {report.verified_per_second:,.0f} a second; "
            f"{report.busiest:,} in the busiest second",
        ),
        ("duration", f"{report.seconds:.1f} s"),
    ):
        table.add_row(Text(name, "bold"), figure)
    return table


def _forwarded_table(forwarded: Sequence[ForwardTally]) -> Table:
    table = Table(title="Forwarded verdicts", title_justify="left")
    table.add_column("receiver")
    for heading in ("batches", "as expected", "requests"):
        table.add_column(heading, justify="right")
    table.add_column("result")
    for tally in forwarded:
        good = "stopped after its 410" if tally.behaviour is Behaviour.GONE else "as planted"
        result = Text(tally.fault, "bold red") if tally.fault else Text(good, "green")
        has = Text(f"{tally.as_expected:,}", "green" if tally.as_expected == tally.expected else "red")
        table.add_row(tally.behaviour, f"{tally.expected:,}", has, f"{tally.requests:,}", result)
    return table


def _differences_table(comparison: Comparison) -> Table:
    shown = len(comparison.differences)
    title = f"The first {shown} differences" if shown == MAX_DIFFERENCES else "Differences"
    table = Table(title=title, title_justify="left")
    table.add_column("key", overflow="fold", ratio=1)
    for heading in ("planted", "expected", "state", "reason"):
        table.add_column(heading, overflow="fold")
    for difference in comparison.differences:
        # As plain text: the daemon's answers may look like markup.
        table.add_row(*(Text(value) for value in msgspec.structs.astuple(difference)))
    return table


async def _show_queries(views: RecordViews, record: Path, console: Console) -> None:
    console.print(Text(f"\nThe record is {record}, the log {record.with_name('daemon.log')}. Ask it:"), soft_wrap=True)
    for query in QUERIES:
        console.print(Text(f'\nsqlite3 {shlex.quote(str(record))} "{query}"', "bold cyan"), soft_wrap=True)
        columns, rows = await views.first_rows(query, 5)
        table = Table()
        # On a narrow terminal the id or key in the first column is cut, so that a row stays one line.
        rest = sum(max(len(str(cell)) for cell in cells) for cells in list(zip(columns, *rows, strict=True))[1:])
        for index, column in enumerate(columns):
            number = all(isinstance(row[index], int) for row in rows)
            most = max(20, console.width - rest - 3 * len(columns) - 1) if index == 0 else None
            table.add_column(column, justify="right" if number else "left", no_wrap=True, max_width=most)
        for row in rows:
            table.add_row(*(Text("" if value is None else str(value)) for value in row))
        console.print(table)
