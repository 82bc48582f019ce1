"""Formats files as CSV that is safe to open in a spreadsheet, and as NDJSON."""

from __future__ import annotations

import csv
import io
import re
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


def csv_header(*, bom: bool = False) -> bytes:
    """Return the header line. With `bom` a byte order mark precedes it: Excel takes a file without one for the local
    encoding, which on a Chinese Windows is GBK.
    """
    return (b"\xef\xbb\xbf" if bom else b"") + (",".join(COLUMNS) + "\r\n").encode()


def file_name(parts: Iterable[str | None], extension: str) -> str:
    """Return the name of an export after what it holds: `b-20261123-unavailable.csv`; `files.csv` when it is all."""
    named = [re.sub(r"[^\w.-]+", "_", part)[:80].strip("._") for part in parts if part]
    return ("-".join(part for part in named if part)[:200] or "files") + f".{extension}"


def csv_lines(files: Iterable[FileItem]) -> bytes:
    """Return a line for each file (RFC 4180). An apostrophe precedes texts that look like formulas."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([safe_cell(getattr(file, column)) for column in COLUMNS] for file in files)
    return text.getvalue().encode("utf-8", "backslashreplace")


def ndjson_lines(files: Iterable[FileItem]) -> bytes:
    """Return a JSON object for each file, one per line."""
    return b"".join(msgspec.json.encode(file) + b"\n" for file in files)
