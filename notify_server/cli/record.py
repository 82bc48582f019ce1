"""The commands that look at the record, and those that act on it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import msgspec
import structlog
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from notify_server.cli.common import EXIT_FAILED, EXIT_USAGE, UsageError, output, printable, read_config, until_signal
from notify_server.cli.source import Acting, Remote, Source, SourceError, acting, reading
from notify_server.config import Config
from notify_server.config.values import duration
from notify_server.errors import NotifyServerError
from notify_server.model import CircuitState, FileState, Verdict
from notify_server.operations import NOT_AVAILABLE, ActionRefusedError, Prune, Recheck
from notify_server.store.export import csv_header, csv_lines, ndjson_lines
from notify_server.store.reading.types import BatchDetail, BatchFilter, BatchItem, FileFilter, FileItem, Page, Totals

if TYPE_CHECKING:
    from notify_server.telemetry.history import Sample
    from notify_server.web.api.types import Host, Status

T = TypeVar("T")
Item = TypeVar("Item")

PAGE = 500
MAX_HOSTS_SHOWN = 15
STATE_STYLES = {
    FileState.PENDING: "yellow",
    FileState.AVAILABLE: "green",
    FileState.UNAVAILABLE: "red",
    FileState.BLOCKED: "magenta",
    FileState.UPLOAD_FAILED: "red",
}
VERDICT_STYLES = {Verdict.PENDING: "yellow", Verdict.COMPLETE: "green", Verdict.INCOMPLETE: "red"}


def run(config_path: Path | None, url: str | None, work: Callable[[Config, Source], Awaitable[int]]) -> None:
    """Do the work with the record that is named, say on standard error which that is, and exit with what it returns."""
    config = read_config(config_path)
    # What a daemon would log is no news here, but what goes wrong is.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger("warning"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )

    async def do() -> int:
        async with reading(config, url) as source:
            print(f"reading {source.name}", file=sys.stderr)
            return await work(config, source)

    stopped_by: list[int] = []
    try:
        code = asyncio.run(until_signal(do(), stopped_by))
    except asyncio.CancelledError:
        code = 128 + stopped_by[0] if stopped_by else EXIT_FAILED
    except BrokenPipeError:
        # Whoever read the output has had enough; nothing is left to flush either.
        sys.stdout = None
        code = EXIT_FAILED
    except UsageError as error:
        print(error, file=sys.stderr)
        code = EXIT_USAGE
    except (NotifyServerError, OSError) as error:
        print(f"notify_server: {error}", file=sys.stderr)
        code = EXIT_FAILED
    raise SystemExit(code)


def _print_json(item: object) -> None:
    print(msgspec.json.encode(item).decode(), flush=True)


def moment(text: str) -> datetime:
    """A time given to a command: RFC 3339, a date, or how long ago, like "2h". Raises UsageError."""
    try:
        with contextlib.suppress(ValueError):
            parsed = datetime.fromisoformat(text)
            # Without an offset it is this machine's time, as everything that people write is.
            return parsed if parsed.tzinfo is not None else parsed.astimezone()
        if text[-1:].isdigit():
            raise ValueError("a time has a unit")
        return datetime.now(UTC) - timedelta(seconds=duration(text))
    except (ValueError, OverflowError):
        raise UsageError(
            f'"{printable(text)}" is not a time: write 2026-11-23T08:00:00Z, 2026-11-23, or 2h for so long ago'
        ) from None


def _ms(text: str | None) -> int | None:
    return None if text is None else round(moment(text).timestamp() * 1000)


def _local(at: datetime | None) -> str:
    return "" if at is None else at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


async def _pages(fetch: Callable[[str | None], Awaitable[Page[Item]]]) -> AsyncIterator[list[Item]]:
    cursor: str | None = None
    while True:
        page = await fetch(cursor)
        yield page.items
        if (cursor := page.next) is None:
            return


async def _first(fetch: Callable[[str | None], Awaitable[Page[Item]]], limit: int) -> tuple[list[Item], bool]:
    """The first items, and whether there are more."""
    items: list[Item] = []
    async for page in _pages(fetch):
        items += page
        if len(items) > limit:
            return items[:limit], True
    return items, False


# --- batches and show ---


async def batches(
    source: Source,
    verdict: Verdict | None,
    api_code: str | None,
    since: str | None,
    until: str | None,
    limit: int,
    *,
    as_json: bool,
) -> int:
    """List batches, the latest first."""
    wanted = BatchFilter(verdict, api_code, None, _ms(since), _ms(until))
    found, more = await _first(lambda cursor: source.records.batches(wanted, cursor, min(limit + 1, PAGE)), limit)
    if as_json:
        for batch in found:
            _print_json(batch)
        return 0
    table = Table(caption=f"the latest {limit:,}: --limit shows more" if more else None, caption_justify="left")
    table.add_column("batch_id", overflow="fold")
    table.add_column("api_code", overflow="fold")
    for heading in ("verdict", "files", "available", "pending", "missing", "received"):
        table.add_column(heading, justify="left" if heading in ("verdict", "received") else "right", no_wrap=True)
    for batch in found:
        missing = batch.unavailable + batch.blocked + batch.upload_failed
        table.add_row(
            Text(printable(batch.batch_id)),
            Text(printable(batch.api_code)),
            Text(batch.verdict, VERDICT_STYLES[batch.verdict]),
            f"{batch.files:,}",
            f"{batch.available:,}",
            f"{batch.pending:,}" if batch.pending else "",
            Text(f"{missing:,}", "red") if missing else "",
            _local(batch.first_received_at),
        )
    output().print(table)
    return 0


async def find_batch(source: Source, batch_id: str, api_code: str | None) -> BatchItem:
    """The batch of this batch_id. Raises SourceError when there is none, UsageError when there are several."""
    page = await source.records.batches(BatchFilter(batch_id=batch_id, api_code=api_code), None, 10)
    if not page.items:
        raise SourceError(f'there is no batch "{printable(batch_id)}": `notify-server batches` lists them')
    if len(page.items) > 1:
        codes = ", ".join(printable(batch.api_code) for batch in page.items)
        raise UsageError(f"there are several with this batch_id: name one of {codes} with --api-code")
    return page.items[0]


async def show(
    source: Source,
    batch_id: str,
    api_code: str | None,
    state: FileState | None,
    limit: int,
    *,
    every: bool,
    as_json: bool,
) -> int:
    """A batch, and its files: those that are not available, unless others are asked for. 1 when it is incomplete."""
    item = await find_batch(source, batch_id, api_code)
    batch = await source.records.batch(item.id)
    if batch is None:
        raise SourceError("the batch has just been deleted")
    states = (
        [state] if state is not None else [None] if every else [s for s in FileState if s is not FileState.AVAILABLE]
    )
    files: list[FileItem] = []
    more = False
    for chosen in states:
        found, left = await _first(
            lambda cursor, chosen=chosen: source.records.files(FileFilter(batch=item.id, state=chosen), cursor, PAGE),  # type: ignore[misc]
            limit - len(files),
        )
        files += found
        more = more or left
    code = EXIT_FAILED if batch.verdict is Verdict.INCOMPLETE else 0
    if as_json:
        _print_json({"batch": batch, "files": files})
        return code
    console = output()
    console.print(_batch_head(batch))
    if files:
        console.print(_files_table(files, f"the first {limit:,}: --limit shows more" if more else None))
    elif not every and state is None:
        console.print(Text("Every file is available.", "green"))
    return code


def _batch_head(batch: BatchDetail) -> Table:
    table = Table.grid(padding=(0, 2))
    counts = {
        state: getattr(batch, state.value) for state in FileState if getattr(batch, state.value) or not batch.files
    }
    summary = Text(", ").join(Text(f"{count:,} {state}", STATE_STYLES[state]) for state, count in counts.items())
    for name, value in (
        ("batch", Text(printable(batch.batch_id))),
        ("api_code", Text(printable(batch.api_code))),
        ("verdict", Text(batch.verdict, VERDICT_STYLES[batch.verdict])),
        (f"{batch.files:,} files", summary),
        ("received", Text(f"{_local(batch.first_received_at)}, deliveries: {batch.deliveries:,}")),
        ("settled", Text(_local(batch.completed_at))),
        ("request_id", Text(batch.last_delivery.request_id if batch.last_delivery is not None else "")),
    ):
        table.add_row(Text(name, "bold"), value)
    return table


def _files_table(files: Sequence[FileItem], caption: str | None) -> Table:
    table = Table(caption=caption, caption_justify="left")
    for heading in ("id", "state", "reason", "tries"):
        table.add_column(heading, justify="right" if heading in ("id", "tries") else "left", no_wrap=True)
    table.add_column("oss_object_name", overflow="fold", ratio=2)
    table.add_column("target_url", overflow="fold", ratio=3)
    table.add_column("next try", no_wrap=True)
    for file in files:
        table.add_row(
            str(file.id),
            Text(file.state, STATE_STYLES[file.state]),
            Text(printable(file.reason or "")),
            str(file.attempts),
            Text(printable(file.oss_object_name)),
            Text(printable(file.target_url or "")),
            _local(file.next_attempt_at),
        )
    return table


async def rejections(source: Source, limit: int, *, as_json: bool) -> int:
    """List refused bodies, the latest first."""
    found, more = await _first(lambda cursor: source.records.rejections(cursor, min(limit + 1, PAGE)), limit)
    if as_json:
        for rejection in found:
            _print_json(rejection)
        return 0
    table = Table(caption=f"the latest {limit:,}: --limit shows more" if more else None, caption_justify="left")
    for heading in ("id", "received", "from", "code", "bytes"):
        table.add_column(heading, justify="right" if heading in ("id", "bytes") else "left", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for rejection in found:
        table.add_row(
            str(rejection.id),
            _local(rejection.received_at),
            rejection.remote_addr,
            rejection.code,
            f"{rejection.size:,}",
            Text(printable(rejection.detail)),
        )
    output().print(table)
    return 0


# --- export ---


async def export(
    source: Source,
    batch_id: str | None,
    api_code: str | None,
    state: FileState | None,
    reason: str | None,
    host: str | None,
    form: Literal["csv", "ndjson"],
    target: Path | None,
) -> int:
    """Write files as CSV or NDJSON, a page at a time."""
    batch = None if batch_id is None else (await find_batch(source, batch_id, api_code)).id
    wanted = FileFilter(batch, state, reason, host)
    lines = csv_lines if form == "csv" else ndjson_lines
    with contextlib.ExitStack() as stack:
        try:
            file = sys.stdout.buffer if target is None else stack.enter_context(target.open("wb"))
        except OSError as error:
            raise UsageError(f"{target}: cannot be written ({error.strerror})") from error
        if isinstance(source.records, Remote):
            async with contextlib.aclosing(source.records.export(wanted, form)) as pieces:
                async for piece in pieces:
                    file.write(piece)
            file.flush()
            return 0
        if form == "csv":
            file.write(csv_header())
        async for files in _pages(lambda cursor: source.records.files(wanted, cursor, PAGE)):
            file.write(lines(files))
        file.flush()
    return 0


# --- actions ---


async def _confirm(question: str, *, yes: bool) -> bool:
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError("nobody is there to confirm it: add --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    # Reading would keep Ctrl-C waiting; a terminal has whole lines to be read.
    loop, typed = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin, typed.set)
    try:
        await typed.wait()
    finally:
        loop.remove_reader(sys.stdin)
    return sys.stdin.readline().strip().lower() in ("y", "yes", "是")


@contextlib.asynccontextmanager
async def _by(config: Config, source: Source) -> AsyncIterator[Acting]:
    async with acting(config, source) as actor:
        itself = "the database" if source.itself is not None else "the file"
        by = f"the daemon at {source.daemon.url}" if source.daemon is not None else f"this command, on {itself} itself"
        print(f"acting through {by}", file=sys.stderr)
        yield actor


async def _refusable(work: Awaitable[T]) -> T:
    try:
        return await work
    except ActionRefusedError as error:
        raise SourceError(str(error)) from error


class RecheckSelection(NamedTuple):
    """What to ask for anew, as it was named."""

    file: int | None
    batch_id: str | None
    api_code: str | None
    reason: str | None
    host: str | None
    states: Sequence[FileState] | None
    dry_run: bool


async def recheck(config: Config, source: Source, chosen: RecheckSelection, *, yes: bool, as_json: bool) -> int:
    """Ask for files anew, after saying how many."""
    if chosen.file is None and chosen.batch_id is None and chosen.reason is None:
        raise UsageError("name files with --file, --batch or --reason")
    batch = None if chosen.batch_id is None else (await find_batch(source, chosen.batch_id, chosen.api_code)).id
    states = list(chosen.states or NOT_AVAILABLE)
    wanted = Recheck(chosen.file, batch, chosen.reason, chosen.host, states, chosen.dry_run)
    async with _by(config, source) as actor:
        counted = await _refusable(actor.recheck(msgspec.structs.replace(wanted, dry_run=True)))
        if counted is None:
            raise SourceError("there is no such file or batch")
        if wanted.dry_run or not counted.files:
            _print_json(counted) if as_json else print(f"{counted.files:,} files would be asked for anew")
            return 0
        if not await _confirm(f"Ask for {counted.files:,} files anew?", yes=yes):
            return EXIT_FAILED
        files = 0
        while True:
            done = await _refusable(actor.recheck(wanted))
            files += done.files if done is not None else 0
            if done is None or not done.more:
                break
        if as_json:
            _print_json({"files": files})
        else:
            later = "" if source.served else ", as soon as a daemon runs"
            print(f"{files:,} files are asked for anew{later}")
    return 0


async def replay(config: Config, source: Source, ids: Sequence[int], *, as_json: bool) -> int:
    """Take refused bodies after all; 1 when any is refused again, or not there."""
    code = 0
    async with _by(config, source) as actor:
        for id in ids:
            try:
                taken = await actor.replay(id)
                problem = "" if taken is not None else "is not there, it may have been replayed"
            except (ActionRefusedError, SourceError) as error:
                taken, problem = None, str(error)
            if taken is None:
                code = EXIT_FAILED
            if as_json:
                _print_json(
                    {"rejection": id, "delivery": taken.delivery if taken else None, "problem": problem or None}
                )
            elif taken is not None:
                print(f"rejection {id}: taken as delivery {taken.delivery}, request_id {taken.request_id}")
            else:
                print(f"rejection {id}: {problem}", file=sys.stderr)
    return code


async def prune(
    config: Config, source: Source, completed: str | None, refused: str | None, *, yes: bool, as_json: bool
) -> int:
    """Delete what is old, after saying what that is."""
    wanted = Prune(None if completed is None else moment(completed), None if refused is None else moment(refused))
    now = datetime.now(UTC)
    if wanted.completed_before is None and wanted.rejections_before is None and source.daemon is not source.records:
        wanted = Prune(
            now - timedelta(seconds=config.retention.completed), now - timedelta(seconds=config.retention.rejections)
        )
    what = [
        f"{name} before {_local(before)}"
        for name, before in (
            ("batches completed", wanted.completed_before), ("rejections received", wanted.rejections_before)
        )
        if before is not None
    ] or ["what the daemon's [retention] says"]  # fmt: skip
    if not await _confirm(f"Delete {' and '.join(what)}?", yes=yes):
        return EXIT_FAILED
    rows = 0
    async with _by(config, source) as actor:
        while True:
            done = await actor.prune(wanted)
            rows += done.rows
            if not done.more:
                break
    _print_json({"rows": rows}) if as_json else print(f"{rows:,} rows deleted")
    return 0


# --- status ---


async def status(source: Source, *, once: bool, as_json: bool) -> int:
    """The record in numbers, and what a running daemon is at; on a terminal again every second until it is stopped."""
    if as_json:
        look = await _look(source)
        if look.problem:
            print(look.problem, file=sys.stderr)
        _print_json({"totals": look.totals, "status": look.status, "hosts": look.hosts})
        return 0
    console = output()
    if once or not console.is_terminal:
        console.print(_screen(source, await _look(source)))
        return 0
    with Live(console=console, screen=True, auto_refresh=False) as screen:
        while True:
            began = time.monotonic()
            screen.update(_screen(source, await _look(source)), refresh=True)
            await asyncio.sleep(max(0.1, 1.0 - (time.monotonic() - began)))


class Look(NamedTuple):
    """The record in numbers, and what the daemon is at, unless none runs or there is a problem with it."""

    totals: Totals
    status: Status | None = None
    hosts: list[Host] | None = None
    problem: str = ""


async def _look(source: Source) -> Look:
    totals = await source.records.totals()
    if source.daemon is None:
        return Look(totals)
    try:
        return Look(totals, await source.daemon.status(), (await source.daemon.hosts()).items)
    except SourceError as error:
        return Look(totals, problem=str(error))


def _screen(source: Source, look: Look) -> RenderableType:
    totals = look.totals
    parts: list[RenderableType] = [Text(source.name, "bold")]
    if look.status is not None:
        parts += [_now(look.status.last), _hosts_table(look.hosts or ())]
        nodes = look.status.nodes
        if nodes.callbacks != 1 or nodes.probes != 1:
            here = " and ".join(look.status.roles)
            parts.append(Text(f"servers: {nodes.callbacks} take callbacks, {nodes.probes} probe; this one: {here}"))
    counts = Table(title="the record", title_justify="left")
    counts.add_column("")
    for heading in ("all", "pending", "complete", "incomplete"):
        counts.add_column(heading, justify="right")
    numbers = (totals.batches, totals.batches_pending, totals.batches_complete, totals.batches_incomplete)
    counts.add_row("batches", *(f"{number:,}" for number in numbers))
    files = Table()
    for heading in ("files", *FileState):
        files.add_column(heading, justify="right")
    files.add_row(f"{totals.files:,}", *(f"{getattr(totals, state.value):,}" for state in FileState))
    parts += [counts, files]
    if look.problem:
        parts.append(Text(f"what the daemon is at cannot be told: {printable(look.problem)}", "yellow"))
    if totals.oldest_pending_at is not None:
        parts.append(Text(f"the oldest batch without a verdict was received {_local(totals.oldest_pending_at)}"))
    if totals.rejections:
        parts.append(Text(f"{totals.rejections:,} refused bodies are kept: `notify-server rejections`"))
    return Group(*parts)


def _now(sample: Sample | None) -> Table:
    table = Table(title="the last second", title_justify="left")
    for heading in ("acks", "ack p99 ms", "refused", "requests", "failed", "probe p99 ms", "backlog", "in flight"):
        table.add_column(heading, justify="right")
    if sample is not None:
        values = (
            sample.accepted, sample.ack_p99_ms, sample.refused, sample.requests, sample.failed_requests,
            sample.probe_p99_ms, sample.backlog, sample.in_flight,
        )  # fmt: skip
        table.add_row(*(_number(value) for value in values))
    return table


def _hosts_table(hosts: Sequence[Host]) -> Table:
    more = len(hosts) - MAX_HOSTS_SHOWN
    table = Table(
        title="hosts", title_justify="left", caption=f"and {more:,} more" if more > 0 else None, caption_justify="left"
    )
    table.add_column("host", overflow="fold")
    for heading in ("pending", "in flight", "circuit", "tried", "failed", "mean ms"):
        table.add_column(heading, justify="left" if heading == "circuit" else "right", no_wrap=True)
    for host in hosts[:MAX_HOSTS_SHOWN]:
        closed = host.circuit is CircuitState.CLOSED
        table.add_row(
            Text(printable(host.host)),
            f"{host.pending:,}",
            f"{host.in_flight}" + (f" of {host.limit}" if host.limit is not None else ""),
            Text(
                host.circuit.replace("_", " ") + (f" for {host.open_for:.0f} s" if host.open_for else ""),
                "" if closed else "red",
            ),
            f"{host.last_minute.attempts:,}",
            f"{host.last_minute.failed:,}",
            _number(host.last_minute.mean_ms),
        )
    return table
