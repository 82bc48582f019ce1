"""`notify-server copy`: copies a record from SQLite to PostgreSQL or back, and verifies the copy."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from notify_server.cli.common import EXIT_FAILED, EXIT_USAGE, UsageError, new_table, output, read_config, until_signal
from notify_server.config import LogConfig
from notify_server.config.values import store_url
from notify_server.errors import NotifyServerError, StoreUnavailableError
from notify_server.store.copying.copy import Checked, Progress, Side, Step, copy
from notify_server.store.copying.sqlite import SqliteSide
from notify_server.telemetry.logging import set_up_logging

# Interval of the lines about a long table, if there is no terminal.
LINE_SECONDS = 5.0
DOING = {"copy": "copying", "verify": "verifying"}
CHECKSUM_SHOWN = 12


class Report(msgspec.Struct, frozen=True):
    """The output of `--json`."""

    source: str = msgspec.field(name="from")
    target: str = msgspec.field(name="to")
    verified: bool
    seconds: float
    tables: list[Checked]


def run(config_path: Path | None, source: str | None, target: str | None, *, restart: bool, as_json: bool) -> None:
    """Copy and verify. Exits 0 when the copy is identical, 1 when it differs or cannot be made, 2 for wrong addresses,
    and 128 plus the signal's number when stopped.
    """
    config = read_config(config_path)
    set_up_logging(LogConfig(level="warning"))
    stopped_by: list[int] = []
    later = "the same command continues from here" if not restart else "without --restart it continues from here"
    try:
        if source is None and target is None:
            raise UsageError("name --from, --to or both: the other one is [store] url")
        urls = _address("--from", source, config.store.url), _address("--to", target, config.store.url)
        report = asyncio.run(until_signal(_copy(*urls, restart=restart), stopped_by))
    except asyncio.CancelledError:
        print(f"stopped: {later}", file=sys.stderr)
        raise SystemExit(128 + stopped_by[0] if stopped_by else EXIT_FAILED) from None
    except UsageError as error:
        print(error, file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None
    except (NotifyServerError, OSError) as error:
        more = f": {later}" if isinstance(error, StoreUnavailableError) else ""
        print(f"notify_server: {error}{more}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        _show(report)
    raise SystemExit(0 if report.verified else EXIT_FAILED)


def _address(option: str, given: str | None, configured: str) -> str:
    try:
        return configured if given is None else store_url(given)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None


async def _copy(source_url: str, target_url: str, *, restart: bool) -> Report:
    if _is_file(source_url) == _is_file(target_url):
        raise UsageError(
            "--from and --to: one is a file of SQLite, the other a database on PostgreSQL; a file is copied with "
            '`sqlite3 FILE ".backup COPY"`, a database with pg_dump'
        )
    began = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        source = await _open(source_url, to_read=True)
        stack.push_async_callback(source.close)
        target = await _open(target_url, to_read=False)
        stack.push_async_callback(target.close)
        with _shown(f"{source.place} -> {target.place}") as progress:
            tables = await copy(source, target, restart=restart, progress=progress)
        verified = all(table.same for table in tables)
        return Report(source.place, target.place, verified, round(time.monotonic() - began, 3), tables)


def _is_file(url: str) -> bool:
    return url.startswith("sqlite:///")


async def _open(url: str, *, to_read: bool) -> Side:
    if _is_file(url):
        path = Path(url.removeprefix("sqlite:///"))
        return await (SqliteSide.source(path) if to_read else SqliteSide.target(path))
    # Loaded only when used, because its driver takes time to load.
    from notify_server.store.copying.postgres import PostgresSide

    return await (PostgresSide.source(url) if to_read else PostgresSide.target(url))


@contextlib.contextmanager
def _shown(what: str) -> Iterator[Progress]:
    """Show the progress from its first step on: bars on a terminal, else lines."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        columns = TextColumn("{task.description:<23}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Bars(*columns, console=console) as bars:
            yield _Bars(what, bars)
    else:
        yield _Lines(what)


class _Bars:
    def __init__(self, what: str, bars: Bars) -> None:
        self._what = what
        self._bars = bars
        self._tasks: dict[tuple[Step, str], TaskID] = {}

    def __call__(self, step: Step, table: str, done: int, total: int) -> None:
        if not self._tasks:
            self._bars.console.print(Text(self._what), soft_wrap=True)
        if (step, table) not in self._tasks:
            self._tasks[step, table] = self._bars.add_task(f"{DOING[step]} {table}", total=total)
        self._bars.update(self._tasks[step, table], completed=done, total=total)


class _Lines:
    """Prints a line when a table begins, when it ends, and every few seconds between."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._last = "", "", -1
        self._at = 0.0

    def __call__(self, step: Step, table: str, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._at:
            print(self._what, file=sys.stderr)
        is_new = (step, table) != self._last[:2] or done >= total or now - self._at >= LINE_SECONDS
        if is_new and (step, table, done) != self._last:
            self._last, self._at = (step, table, done), now
            print(f"{DOING[step]} {table}: {done:,} of {total:,}", file=sys.stderr, flush=True)


def _show(report: Report) -> None:
    table = new_table()
    table.add_column("table")
    for heading in ("rows", "in the copy"):
        table.add_column(heading, justify="right")
    for heading in ("checksum", "of the copy", ""):
        table.add_column(heading)
    for each in report.tables:
        table.add_row(
            each.table,
            f"{each.rows:,}",
            f"{each.copy_rows:,}",
            each.checksum[:CHECKSUM_SHOWN],
            each.copy_checksum[:CHECKSUM_SHOWN],
            Text("same", "green") if each.same else Text("DIFFERENT", "bold red"),
        )
    console = output()
    console.print(table)
    for each in report.tables:
        if each.replaced:
            columns = ", ".join(f"{number:,} in {column}" for column, number in each.replaced.items())
            text = f"{each.table}: values with NUL, which PostgreSQL cannot hold, have U+FFFD in its place: {columns}"
            console.print(Text(text, "yellow"), soft_wrap=True)
    console.print(_verdict(report), soft_wrap=True)


def _verdict(report: Report) -> Text:
    rows = sum(table.copy_rows for table in report.tables)
    if report.verified:
        done = f"Verified: {rows:,} rows in {report.seconds:,.1f} s."
        return Text(f"{done} Set [store] url to the copy and start the server; {report.source} is unchanged.", "green")
    different = ", ".join(table.table for table in report.tables if not table.same)
    return Text(
        f"The copy differs in {different}, and no server will start on it: --restart starts over. {report.source} "
        "is unchanged.",
        "bold red",
    )
