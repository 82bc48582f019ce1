"""Formats files as CSV that is safe to open in a spreadsheet, and as NDJSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from datetime import datetime

import msgspec

from notify_server.store.reading.types import FileItem

COLUMNS = FileItem.__struct_fields__
# A spreadsheet runs cells that begin with one of these as formulas (OWASP, CSV injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\0", "＝", "＋", "－", "＠")


def safe_cell(value: object) -> object:
    """Return a cell that no spreadsheet takes for a formula."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return msgspec.json.encode(value).decode()
    if isinstance(value, str):
        text = value.replace("\0", "")
        return f"'{text}" if value.startswith(_FORMULA) else text
    return value


def csv_header() -> bytes:
    """Return the header line."""
    return (",".join(COLUMNS) + "\r\n").encode()


def csv_lines(files: Iterable[FileItem]) -> bytes:
    """Return a line for each file (RFC 4180). An apostrophe precedes texts that look like formulas."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([safe_cell(getattr(file, column)) for column in COLUMNS] for file in files)
    return text.getvalue().encode("utf-8", "backslashreplace")


def ndjson_lines(files: Iterable[FileItem]) -> bytes:
    """Return a JSON object for each file, one per line."""
    return b"".join(msgspec.json.encode(file) + b"\n" for file in files)
