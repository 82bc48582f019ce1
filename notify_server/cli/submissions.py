"""The commands about submissions: register them, and compare them with the record."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import msgspec
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from notify_server.cli.common import EXIT_FAILED, UsageError, new_table, output, printable
from notify_server.cli.listing import milliseconds, print_json
from notify_server.cli.source import Remote, Source, SourceError
from notify_server.store.export import safe_cell
from notify_server.store.reading.expectations import ExpectationFilter, ExpectationItem
from notify_server.store.reading.types import BatchFilter, Page, Records
from notify_server.submissions.listed import Submitted, read_submissions
from notify_server.submissions.reconciliation import PROBLEMS, Reconciled, Reconciliation, Result
from notify_server.submissions.service import ExpectationsRegistered

# Lines of one request, and rows of one read.
LINES = 1_000
PAGE = 500
STYLES = {Result.NEVER_NOTIFIED: "red", Result.SHORT: "red", Result.INCOMPLETE: "red", Result.PENDING: "yellow"}
Format = Literal["table", "csv", "json"]


async def expect(
    source: Source, name: str, api_code: str | None, notify_within: str | None, verdict_within: str | None
) -> int:
    """Register the submissions of a list."""
    daemon = source.daemon
    if daemon is None:
        raise SourceError("no server runs on this database: start it, or name it with --url")
    defaults = {"api_code": api_code, "notify_within": notify_within, "verdict_within": verdict_within}
    created = existing = 0
    with _opened(name) as file, _progress("registering", _size(file)) as advance:
        submissions = read_submissions(file, name, advance)
        while part := list(islice(submissions, LINES)):
            body = b"".join(msgspec.json.encode(_submission(each, name, defaults)) + b"\n" for each in part)
            try:
                registered = await daemon.post_lines(ExpectationsRegistered, "expectations", body)
            except SourceError as error:
                raise SourceError(f"{error} (of those from line {part[0].line} of {name} on)") from error
            created += registered.created
            existing += registered.existing
    print(f"{created:,} submissions are registered, {existing:,} were before")
    return 0


def _submission(submitted: Submitted, name: str, defaults: dict[str, str | None]) -> dict[str, Any]:
    fields = {key: value for key, value in defaults.items() if value is not None} | submitted.fields
    fields.setdefault("reference", fields.get("batch_id"))
    for field, remedy in (("reference", "add a column reference or batch_id"), ("api_code", "name it with --api-code")):
        if fields.get(field) is None:
            raise UsageError(f"{name}, line {submitted.line}: {field}: is missing: {remedy}")
    return fields


async def reconcile(source: Source, name: str, api_code: str | None, since: str | None, shape: Format) -> int:
    """Compare the submissions of a list with the record. Returns 1 when one was never notified, is short or
    incomplete.
    """
    with tempfile.TemporaryDirectory(prefix="notify-server-") as directory:
        reconciliation = Reconciliation(Path(directory) / "reconciliation.db")
        try:
            with _opened(name) as file, _progress("reading the list", _size(file)) as advance:
                submissions = read_submissions(file, name, advance)
                while part := list(islice(submissions, LINES)):
                    reconciliation.add_submissions(part, api_code)
            with _progress("reading the record", None) as advance:
                wanted = BatchFilter(api_code=api_code, received_from=milliseconds(since))
                cursor: str | None = None
                while True:
                    page = await source.records.batches(wanted, cursor, PAGE)
                    reconciliation.add_batches(page.items)
                    advance(len(page.items))
                    if (cursor := page.next) is None:
                        break
            if reconciliation.lacks_batch_ids:
                async for items in _expectations(source):
                    reconciliation.add_expectations(items)
            counts = _write(reconciliation.results(), shape)
        finally:
            reconciliation.close()
    return EXIT_FAILED if any(counts[problem] for problem in PROBLEMS) else 0


async def _expectations(source: Source) -> AsyncIterator[list[tuple[ExpectationItem, str | None]]]:
    """Yield the expectations with the batch_id that the platform gave their batch."""
    cursor: str | None = None
    while True:
        if isinstance(source.records, Remote):
            found = await source.records.ask(Page[ExpectationItem], "GET", "expectations", cursor=cursor, limit=PAGE)
            page = found if found is not None else Page[ExpectationItem]([])
        else:
            before = int(cursor) if cursor is not None else 2**63 - 1
            records = cast("Records", source.records)
            items = await records.expectations.expectations(ExpectationFilter(), before, PAGE)
            page = Page(items, str(items[-1].id) if len(items) == PAGE else None)
        rows: list[tuple[ExpectationItem, str | None]] = []
        for item in page.items:
            batch_id = item.batch_id
            if batch_id is None and item.batch is not None:
                batch = await source.records.batch(item.batch)
                batch_id = None if batch is None else batch.batch_id
            rows.append((item, batch_id))
        yield rows
        if (cursor := page.next) is None:
            return


def _write(results: Iterator[Reconciled], shape: Format) -> Counter[Result]:
    """Print the results; a table has those that are not complete."""
    counts: Counter[Result] = Counter()
    columns = Reconciled.__struct_fields__
    if shape == "csv":
        print(",".join(columns), end="\r\n")
    table = new_table()
    for column in columns:
        numbers = column in ("line", "files", "listed", "available")
        table.add_column(column, overflow="fold", justify="right" if numbers else "left")
    for each in results:
        counts[each.result] += 1
        if shape == "json":
            print_json(each)
        elif shape == "csv":
            line = io.StringIO()
            csv.writer(line).writerow([safe_cell(getattr(each, column)) for column in columns])
            print(line.getvalue(), end="")
        elif each.result is not Result.COMPLETE and table.row_count < PAGE:
            cells = ["" if (value := getattr(each, column)) is None else printable(str(value)) for column in columns]
            table.add_row(Text(cells[0], STYLES.get(each.result, "")), *map(Text, cells[1:]))
    if shape == "table":
        if table.row_count:
            output().print(table)
        shown = counts.total() - counts[Result.COMPLETE]
        if shown > PAGE:
            print(f"the first {PAGE:,} of {shown:,}: --csv has all")
        print(", ".join(f"{counts[result]:,} {result.replace('_', ' ')}" for result in Result))
    return counts


@contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        with Path(name).open("rb") as file:
            yield file
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror})") from error


def _size(file: BinaryIO) -> int | None:
    with contextlib.suppress(OSError):
        return Path(file.name).stat().st_size if file.seekable() and isinstance(file.name, str) else None
    return None


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Any]:
    """Show a bar on standard error while a person watches; yield the function that moves it on."""
    from rich.console import Console

    console = Console(stderr=True)
    with Progress(
        TextColumn(what), BarColumn(), TextColumn("{task.completed:,.0f}"),
        console=console, transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task(what, total=total)
        yield lambda number: progress.advance(task, number)
