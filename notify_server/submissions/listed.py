"""Reads lists of submissions as people have them: CSV with or without a header, or NDJSON."""

from __future__ import annotations

import codecs
import csv
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import msgspec

from notify_server.errors import NotifyServerError

LINE_BYTES = 8 * 1024**2
DELIMITERS = ",;\t|"
# Names of columns; other columns are left out.
COLUMNS: Mapping[str, Sequence[str]] = {
    "reference": ("reference", "ref"),
    "api_code": ("api_code", "apicode"),
    "batch_id": ("batch_id", "batchid", "batch"),
    "files": ("files", "file_count", "count"),
    "notify_within": ("notify_within",),
    "verdict_within": ("verdict_within",),
}
# Without a header: what the columns are, by their number.
POSITIONS = ("batch_id", "api_code", "files", "reference")


class ListError(NotifyServerError):
    """The list cannot be read; the text says where, and what to do."""


class Submitted(NamedTuple):
    """A submission of the list. `fields` are as they stand there, without empty ones."""

    line: int
    fields: dict[str, Any]


def read_submissions(file: BinaryIO, name: str, on_bytes: Callable[[int], object]) -> Iterator[Submitted]:
    """Yield the submissions one by one; `on_bytes` gets the number of bytes of each line. Raises ListError; those
    before it are valid.
    """
    lines = _lines(file, name, on_bytes)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    lines = itertools.chain([first], lines)
    if first[1].lstrip().startswith("{"):
        yield from _objects(lines, name)
    else:
        yield from _rows(lines, name, max(DELIMITERS, key=first[1].count))


def _lines(file: BinaryIO, name: str, on_bytes: Callable[[int], object]) -> Iterator[tuple[int, str]]:
    number = 0
    while raw := file.readline(LINE_BYTES + 1):
        number += 1
        on_bytes(len(raw))
        if len(raw) > LINE_BYTES:
            raise ListError(f"{name}, line {number}: is longer than {LINE_BYTES:,} bytes")
        if number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ListError(f"{name}: is UTF-16: save it as UTF-8, or `iconv -f UTF-16 -t UTF-8`")
            # Excel begins CSV with a byte order mark.
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, raw.decode()
        except UnicodeDecodeError:
            try:
                raw.decode("gb18030")
            except UnicodeDecodeError:
                raise ListError(f"{name}, line {number}: is not UTF-8: save it as UTF-8") from None
            raise ListError(
                f"{name}, line {number}: is GBK, not UTF-8: save it as CSV UTF-8, or `iconv -f GB18030 -t UTF-8`"
            ) from None


def _objects(lines: Iterator[tuple[int, str]], name: str) -> Iterator[Submitted]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            found = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ListError(f"{name}, line {number}: is not JSON ({error})") from error
        if not isinstance(found, dict):
            raise ListError(f'{name}, line {number}: must be an object, like {{"reference": "…", "batch_id": "…"}}')
        yield Submitted(number, {key: found[key] for key in COLUMNS if found.get(key) not in (None, "")})


def _rows(lines: Iterator[tuple[int, str]], name: str, delimiter: str) -> Iterator[Submitted]:
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number
        for number, line in lines:  # noqa: B007 (read by the errors, and by what is yielded)
            yield line

    rows = csv.reader(texts(), delimiter=delimiter)
    columns: list[str | None] | None = None
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if columns is None:
                columns = _header(cells)
                if columns is not None:
                    continue
                columns = _positions(cells)
            fields: dict[str, Any] = {
                column: cell for column, cell in zip(columns, cells, strict=False) if column is not None and cell
            }
            if "files" in fields:
                try:
                    fields["files"] = int(fields["files"])
                except ValueError:
                    raise ListError(
                        f"{name}, line {number}: files: must be a whole number, not {fields['files'][:40]!r}"
                    ) from None
            yield Submitted(number, fields)
    except csv.Error as error:
        raise ListError(f"{name}, line {number}: {error}") from error


def _header(cells: Sequence[str]) -> list[str | None] | None:
    """Return the columns that a first row names; None when it names none."""
    names = {alias: column for column, aliases in COLUMNS.items() for alias in aliases}
    columns = [names.get(cell.lower()) for cell in cells]
    return columns if any(columns) else None


def _positions(cells: Sequence[str]) -> list[str | None]:
    """Return the columns of a list without a header. The second may be the number of files already."""
    if len(cells) > 1 and cells[1].isdecimal():
        return ["batch_id", "files", "reference"]
    return list(POSITIONS)
