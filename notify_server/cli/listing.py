"""The commands that list batches, files and rejections, and export them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from rich.table import Table
from rich.text import Text

from notify_server.cli.common import EXIT_FAILED, Column, UsageError, new_table, output, print_fitted, printable
from notify_server.cli.source import Remote, Source, SourceError
from notify_server.config.values import duration
from notify_server.model import FileState, Verdict
from notify_server.store.export import csv_header, csv_lines, ndjson_lines
from notify_server.store.reading.types import BatchDetail, BatchFilter, BatchItem, FileFilter, FileItem, Page

T = TypeVar("T")
Item = TypeVar("Item")
PAGE = 500
# Batches that are looked at to find the one that is named.
MAX_NAMED = 10
STATE_STYLES = {
    FileState.PENDING: "yellow",
    FileState.AVAILABLE: "green",
    FileState.UNAVAILABLE: "red",
    FileState.BLOCKED: "magenta",
    FileState.UPLOAD_FAILED: "red",
}
VERDICT_STYLES = {Verdict.PENDING: "yellow", Verdict.COMPLETE: "green", Verdict.INCOMPLETE: "red"}


def print_json(item: object) -> None:
    print(msgspec.json.encode(item).decode(), flush=True)


def moment(text: str) -> datetime:
    """Parse a time given to a command: RFC 3339, a date, or an age such as "2h". Raises UsageError."""
    try:
        with contextlib.suppress(ValueError):
            parsed = datetime.fromisoformat(text)
            # Without an offset it is local time, as people write it.
            return parsed if parsed.tzinfo is not None else parsed.astimezone()
        if text[-1:].isdigit():
            raise ValueError("a time has a unit")
        return datetime.now(UTC) - timedelta(seconds=duration(text))
    except (ValueError, OverflowError):
        raise UsageError(
            f'"{printable(text)}" is not a time: write 2026-11-23T08:00:00Z, 2026-11-23, or 2h for two hours ago'
        ) from None


def milliseconds(text: str | None) -> int | None:
    return None if text is None else round(moment(text).timestamp() * 1000)


def local(at: datetime | None) -> str:
    return "" if at is None else at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


async def _pages(fetch: Callable[[str | None], Awaitable[Page[Item]]]) -> AsyncIterator[list[Item]]:
    cursor: str | None = None
    while True:
        page = await fetch(cursor)
        yield page.items
        if (cursor := page.next) is None:
            return


async def _first(fetch: Callable[[str | None], Awaitable[Page[Item]]], limit: int) -> tuple[list[Item], bool]:
    """Return the first items, and whether there are more."""
    items: list[Item] = []
    async for page in _pages(fetch):
        items += page
        if len(items) > limit:
            return items[:limit], True
    return items, False


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
    wanted = BatchFilter(verdict, api_code, None, milliseconds(since), milliseconds(until))
    found, more = await _first(lambda cursor: source.records.batches(wanted, cursor, min(limit + 1, PAGE)), limit)
    if as_json:
        for batch in found:
            print_json(batch)
        return 0
    columns = (
        Column("batch_id"),
        Column("verdict"),
        Column("missing", 7, right=True),
        Column("id", 6, right=True),
        Column(f"received ({datetime.now().astimezone():%Z})", 5),
        Column("files", 4, right=True),
        Column("available", 3, right=True),
        Column("pending", 2, right=True),
        Column("api_code", 1),
    )
    rows = [
        (
            Text(printable(batch.batch_id)),
            Text(batch.verdict, VERDICT_STYLES[batch.verdict]),
            Text(f"{missing:,}" if missing else "", "red"),
            Text(str(batch.id)),
            Text(f"{batch.first_received_at.astimezone():%Y-%m-%d %H:%M}"),
            Text(f"{batch.files:,}"),
            Text(f"{batch.available:,}"),
            Text(f"{batch.pending:,}" if batch.pending else ""),
            Text(printable(batch.api_code)),
        )
        for batch in found
        for missing in [batch.unavailable + batch.blocked + batch.upload_failed]
    ]
    print_fitted(columns, rows, f"the latest {limit:,}: --limit shows more" if more else None)
    return 0


async def find_batch(source: Source, named: str, api_code: str | None) -> BatchItem:
    """Return the batch of this batch_id; else of this row id; else of the batch_id that begins so. Raises SourceError
    when there is none, UsageError when there are several.
    """
    page = await source.records.batches(BatchFilter(batch_id=named, api_code=api_code), None, MAX_NAMED)
    found: list[BatchItem] = page.items
    if not found and named.isascii() and named.isdecimal() and (batch := await source.records.batch(int(named))):
        found = [batch]
    if not found:
        beginning = (await source.records.search(named, MAX_NAMED)).batches
        found = [batch for batch in beginning if batch.batch_id.startswith(named)]
    found = [batch for batch in found if api_code in (None, batch.api_code)]
    if not found:
        raise SourceError(f'there is no batch "{printable(named)}": `notify-server batches` lists them')
    if len(found) > 1 and len({batch.batch_id for batch in found}) == 1:
        codes = ", ".join(printable(batch.api_code) for batch in found)
        raise UsageError(f"there are several with this batch_id: name one of {codes} with --api-code")
    if len(found) > 1:
        ids = ", ".join(printable(batch.batch_id) for batch in found[:3]) + (", …" if len(found) > 3 else "")
        raise UsageError(f'several batch_ids begin with "{printable(named)}": {ids}: name one of them')
    return found[0]


async def find_file(source: Source, named: str, batch: int | None) -> int:
    """Return the row id of the file: `named` is that id, or its key, or with a batch the beginning of its key. Raises
    SourceError when there is none, UsageError when there are several.
    """
    if named.isascii() and named.isdecimal() and await source.records.file(int(named)) is not None:
        return int(named)
    if batch is None:
        found = [
            file for file in (await source.records.search(named, MAX_NAMED)).files if file.oss_object_name == named
        ]
    else:
        found = []
        async for files in _pages(lambda cursor: source.records.files(FileFilter(batch=batch), cursor, PAGE)):
            if whole := [file for file in files if file.oss_object_name == named]:
                return whole[0].id
            found += [file for file in files if file.oss_object_name.startswith(named)]
    if not found:
        raise SourceError(f'there is no file "{printable(named)}": `notify-server show BATCH` lists those of a batch')
    if len(found) > 1:
        ids = ", ".join(str(file.id) for file in found[:5]) + (", …" if len(found) > 5 else "")
        raise UsageError(f'several files are called "{printable(named)}": name one by its row id: {ids}')
    return found[0].id


async def show(
    source: Source,
    named: str,
    api_code: str | None,
    state: FileState | None,
    limit: int,
    *,
    every: bool,
    as_json: bool,
) -> int:
    """Show a batch and its files: by default those that are not available. Returns 1 when it is incomplete."""
    item = await find_batch(source, named, api_code)
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
        print_json({"batch": batch, "files": files})
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
        ("id", Text(str(batch.id))),
        ("verdict", Text(batch.verdict, VERDICT_STYLES[batch.verdict])),
        (f"{batch.files:,} files", summary),
        ("received", Text(f"{local(batch.first_received_at)}, deliveries: {batch.deliveries:,}")),
        ("settled", Text(local(batch.completed_at))),
        ("request_id", Text(batch.last_delivery.request_id if batch.last_delivery is not None else "")),
    ):
        table.add_row(Text(name, "bold"), value)
    return table


def _files_table(files: Sequence[FileItem], caption: str | None) -> Table:
    table = new_table(caption=caption, caption_justify="left")
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
            local(file.next_attempt_at),
        )
    return table


async def rejections(source: Source, limit: int, *, as_json: bool) -> int:
    """List refused bodies, the latest first."""
    found, more = await _first(lambda cursor: source.records.rejections(cursor, min(limit + 1, PAGE)), limit)
    if as_json:
        for rejection in found:
            print_json(rejection)
        return 0
    table = new_table(caption=f"the latest {limit:,}: --limit shows more" if more else None, caption_justify="left")
    for heading in ("id", "received", "from", "code", "bytes"):
        table.add_column(heading, justify="right" if heading in ("id", "bytes") else "left", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for rejection in found:
        table.add_row(
            str(rejection.id),
            local(rejection.received_at),
            rejection.remote_addr,
            rejection.code,
            f"{rejection.size:,}",
            Text(printable(rejection.detail)),
        )
    output().print(table)
    return 0


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
