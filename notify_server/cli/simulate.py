"""`notify-server simulate`: runs the simulator, and shows progress and results."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from yarl import URL

from notify_server.cli.common import EXIT_FAILED, output, read_config, trust_only, until_signal
from notify_server.config import ENV_PREFIX, Config
from notify_server.errors import NotifyServerError
from notify_server.simulator.compare import MAX_DIFFERENCES, Comparison, Tally
from notify_server.simulator.plan import Plan
from notify_server.simulator.platform import Platform, SimulationError
from notify_server.simulator.record import RecordViews
from notify_server.simulator.run import Report, Simulation

T = TypeVar("T")

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
START_SECONDS = 30.0
GRACE_SECONDS = 5.0


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


@dataclass(frozen=True)
class Daemon:
    """A daemon to play against. `tls` is aiohttp's `ssl`."""

    url: str
    record: Path
    token: str | None = None
    tls: ssl.SSLContext | bool = True


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
        return show(await _watched(plan, options, daemon), plan, console)
    directory = options.keep or Path(tempfile.mkdtemp(prefix="notify-server-"))
    async with own_daemon(directory, options.slow_seconds) as (daemon, process):
        report = await _while_alive(process, _watched(plan, options, daemon), directory)
        code = show(report, plan, console)
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


async def _watched(plan: Plan, options: Options, daemon: Daemon) -> Report:
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
    posts, files = len(platform.deliveries), plan.batches * plan.files
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


# --- A daemon of its own ---


@contextlib.asynccontextmanager
async def own_daemon(directory: Path, slow_seconds: float) -> AsyncIterator[tuple[Daemon, asyncio.subprocess.Process]]:
    """Run a daemon on a free port, with its configuration, record and log in `directory`; SIGTERM stops it at the end.

    Raises SimulationError when it does not start or does not stop properly.
    """
    config, record, log_path = _prepare(directory, slow_seconds)
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "notify_server", "--config", str(config)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)},
        )
    try:
        yield Daemon(await _ready(process, log_path), record), process
    except BaseException:
        await _stop(process)
        raise
    if (code := await _stop(process)) != 0:
        raise SimulationError(f"the daemon ended with exit code {code}: see {log_path}")


def _prepare(directory: Path, slow_seconds: float) -> tuple[Path, Path, Path]:
    """Prepare the directory; return the paths of configuration, record and log, the latter empty."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory = directory.resolve()
        config, record, log = (directory / name for name in ("config.toml", "notify.db", "daemon.log"))
        config.write_text(_own_config(record, slow_seconds), encoding="utf-8")
        log.write_bytes(b"")
    except OSError as error:
        raise SimulationError(f"{directory}: cannot be used ({error.strerror}): name another with --keep") from error
    return config, record, log


def _own_config(record: Path, slow_seconds: float) -> str:
    # JSON's strings are valid TOML, except for characters that no terminal lets one type.
    return f"""\
[server]
port = 0
shutdown_grace = "{GRACE_SECONDS}s"
[store]
url = {json.dumps(f"sqlite:///{record}", ensure_ascii=False)}
[verify]
allowed_networks = ["127.0.0.0/8"]
allowed_ports = []
retry_schedule = ["500ms", "1s", "1s"]
timeout = "{slow_seconds + 10:.3f}s"
[log]
format = "json"
"""


async def _ready(process: asyncio.subprocess.Process, log: Path) -> str:
    """Wait until the daemon's log says where it listens; return that address."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + START_SECONDS
    while clock() < deadline:
        exited = process.returncode is not None
        lines = _whole_lines(log)
        for line in lines:
            if '"ready for notifications"' in line:
                return str(msgspec.json.decode(line)["url"])
        if exited:
            raise SimulationError(f"the daemon does not start: {lines[-1] if lines else 'the log is empty'}")
        await asyncio.sleep(0.02)
    raise SimulationError(f"the daemon is not ready after {START_SECONDS:g} seconds: see {log}")


def _whole_lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


async def _while_alive(process: asyncio.subprocess.Process, work: Coroutine[Any, Any, T], directory: Path) -> T:
    """Run the coroutine; raise SimulationError as soon as the daemon ends."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise SimulationError(f"the daemon has ended during the run: see {directory / 'daemon.log'}")
        return await working
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _stop(process: asyncio.subprocess.Process) -> int:
    """Send SIGTERM, and SIGKILL if it does not end in time; return the exit code."""
    try:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        async with asyncio.timeout(2 * GRACE_SECONDS):
            return await process.wait()
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        code = await process.wait()
        if isinstance(error, TimeoutError):
            return code
        raise


# --- Showing it ---


def show(report: Report, plan: Plan, console: Console) -> int:
    """Print the result of the run; return the exit code."""
    comparison = report.comparison
    console.print(_kinds_table(comparison, plan))
    console.print(_figures(report, plan))
    if comparison.differences:
        console.print(_differences_table(comparison))
    if comparison.refused_loopback:
        console.print(Text(LOOPBACK_HINT, "yellow"), soft_wrap=True)
    if report.timed_out:
        console.print(Text("Not every verdict was there in time: a longer --timeout may help.", "yellow"))
    if comparison.different:
        files, batches = f"{plan.batches * plan.files:,} files", f"{plan.batches:,} batches"
        different = (
            f"{comparison.different_files:,} of {files} and {comparison.batches.different:,} of {batches} differ."
        )
        console.print(Text(different, "bold red"))
        return EXIT_FAILED
    console.print(Text("Everything is as planted.", "bold green"))
    return 0


def _kinds_table(comparison: Comparison, plan: Plan) -> Table:
    retried = comparison.batches.retried > 0 or any(tally.retried for tally in comparison.files.values())
    table = Table(title=f"{plan.batches * plan.files:,} files in {plan.batches:,} batches", title_justify="left")
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


def _figures(report: Report, plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    again = f", {report.repeated:,} posted again" if report.repeated else ""
    redelivered = report.posted - plan.batches
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
