"""The record as text for other programs: CSV that is safe to open in a spreadsheet, and NDJSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from datetime import datetime

import msgspec

from notify_server.store.reading.types import FileItem

COLUMNS = FileItem.__struct_fields__
# A cell that begins with one of these is a formula to a spreadsheet (OWASP, CSV injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\0", "＝", "＋", "－", "＠")


def _cell(value: object) -> object:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, str):
        text = value.replace("\0", "")
        return f"'{text}" if value.startswith(_FORMULA) else text
    return value


def csv_header() -> bytes:
    """The line with the names of the columns."""
    return (",".join(COLUMNS) + "\r\n").encode()


def csv_lines(files: Iterable[FileItem]) -> bytes:
    """A line for each file (RFC 4180). What a spreadsheet would take for a formula has an apostrophe before it."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([_cell(getattr(file, column)) for column in COLUMNS] for file in files)
    return text.getvalue().encode("utf-8", "backslashreplace")


def ndjson_lines(files: Iterable[FileItem]) -> bytes:
    """A JSON object for each file, one a line."""
    return b"".join(msgspec.json.encode(file) + b"\n" for file in files)
