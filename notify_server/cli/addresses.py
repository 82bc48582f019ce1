"""Reads lists of addresses as a stream: text, CSV, JSON, or a notification's body."""

from __future__ import annotations

import csv
import errno
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from notify_server.contract.envelope import open_envelope
from notify_server.contract.wire import parse_notification
from notify_server.errors import ContractError, NotifyServerError
from notify_server.model import ReportedStatus

# Names of a column, or a field of an object, with addresses; the first match counts.
NAMES = ("target_url", "url", "address")
BLOCK_BYTES = 1 << 16
# A notification may be one line, and is never longer than the daemon's default limit.
LINE_BYTES = 8 * 1024**2

_is_address = re.compile(r"\s*https?://", re.IGNORECASE).match


class InputError(NotifyServerError):
    """The list cannot be read or understood; the text says where."""


class Entry(NamedTuple):
    """An address to check. With `failed`, the platform reported the file as FAILED: it is not checked, and may be
    empty.
    """

    url: str
    failed: bool = False


class AddressFile:
    """A list in a file, or on standard input when its name is `-`. Raises InputError when it cannot be opened.

    The content decides the format: JSON begins with a brace; CSV has the suffix `.csv`, or a first line with a column
    of addresses or of their name; anything else is text. `bytes_read` of `size` bytes have been read; `size` is None if
    unknown.
    """

    def __init__(self, name: str) -> None:
        self.name = "standard input" if name == "-" else name
        self._is_csv = name.lower().endswith(".csv")
        self.bytes_read = 0
        self._number = 0
        try:
            # An unbuffered descriptor: a thread blocked in Python's buffered read would keep the process from ending.
            self._descriptor = 0 if name == "-" else os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self._descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from None
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None

    def _unreadable(self, error: OSError | ValueError) -> InputError:
        return InputError(f"{self.name}: cannot be read ({getattr(error, 'strerror', None) or error})")

    def entries(self, before_reading: Callable[[], None]) -> Iterator[Entry]:
        """Yield the entries one by one; `before_reading` is called before each read, which may block.

        Raises InputError. Entries yielded before the error are valid.
        """
        lines = self._lines(before_reading)
        first = next((line for line in lines if not _is_blank(line)), None)
        if first is None:
            return
        lines = itertools.chain([first], lines)
        try:
            if first.lstrip().startswith(("{", "[")):
                yield from self._json(lines)
            elif self._is_csv or _looks_like_csv(first):
                yield from _csv(lines, max(",;\t", key=first.count))
            else:
                yield from (Entry(line.strip()) for line in lines if not _is_blank(line))
        except (ContractError, csv.Error, msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise InputError(f"{self.name}, line {self._number}: {error}") from None

    def _lines(self, before_reading: Callable[[], None]) -> Iterator[str]:
        rest, ended = b"", False
        while not ended:
            before_reading()
            try:
                block = os.read(self._descriptor, BLOCK_BYTES)
            except OSError as error:
                raise self._unreadable(error) from None
            if not self.bytes_read:
                # Excel's CSV begins with a byte order mark.
                rest = block.removeprefix(b"\xef\xbb\xbf")
            else:
                rest += block
            self.bytes_read += len(block)
            ended = not block
            *whole, rest = rest.split(b"\n") if not ended else ([rest, b""] if rest else [b""])
            if len(rest) > LINE_BYTES:
                raise InputError(
                    f"{self.name}, line {self._number + len(whole) + 1}: is longer than {LINE_BYTES:,} bytes"
                )
            for line in whole:
                self._number += 1
                # Invalid UTF-8 stays recognisable, and is refused as an address.
                yield line.decode("utf-8", "surrogateescape")

    def _json(self, lines: Iterator[str]) -> Iterator[Entry]:
        for line in lines:
            if _is_blank(line):
                continue
            body = _bytes(line)
            try:
                found = msgspec.json.decode(body)
            except msgspec.DecodeError:
                # One object on many lines.
                body = _whole(body, lines)
                found = msgspec.json.decode(body)
            if not isinstance(found, dict):
                raise ValueError('must be an object a line, like {"target_url": "…"}')  # noqa: TRY004
            if url := next((url for name in NAMES if isinstance(url := found.get(name), str)), None):
                yield Entry(url)
            else:
                yield from _notified(body)


def _is_blank(line: str) -> bool:
    text = line.strip()
    return not text or text.startswith("#")


def _bytes(line: str) -> bytes:
    return line.encode("utf-8", "surrogateescape")


def _whole(first: bytes, lines: Iterator[str]) -> bytes:
    body = bytearray(first)
    for line in lines:
        body += b"\n" + _bytes(line)
        if len(body) > LINE_BYTES:
            raise ValueError(f"the object is longer than {LINE_BYTES:,} bytes: write one object a line")
    return bytes(body)


def _notified(body: bytes) -> Iterator[Entry]:
    envelope = open_envelope(body)
    notification = parse_notification(body if envelope is None else envelope.notification, max_files=2**31)
    for entry in notification.file_list:
        yield Entry(entry.target_url or "", entry.status is ReportedStatus.FAILED)


def _looks_like_csv(line: str) -> bool:
    cells = [cell.strip("\"' \r").lower() for cell in re.split("[,;\t]", line)]
    return bool(set(NAMES) & set(cells)) or (not _is_address(cells[0]) and any(map(_is_address, cells)))


def _csv(lines: Iterator[str], delimiter: str) -> Iterator[Entry]:
    """Yield the addresses of the rows; rows without one are skipped."""
    rows: Iterator[list[str]] = (row for row in csv.reader(lines, delimiter=delimiter) if row)
    first = next(rows, [])
    column = _named_column(first)
    if column is None:
        column = _address_column(first)
        if column is None:
            # The header has other names.
            first = next(rows, [])
            column = _address_column(first)
            if column is None:
                raise ValueError(f"no column has an address: call it {NAMES[0]}")
        rows = itertools.chain([first], rows)
    for row in rows:
        if len(row) > column and (url := row[column].strip()):
            yield Entry(url)


def _named_column(header: Sequence[str]) -> int | None:
    names = [cell.strip().lower() for cell in header]
    return next((names.index(name) for name in NAMES if name in names), None)


def _address_column(row: Sequence[str]) -> int | None:
    return next((index for index, cell in enumerate(row) if _is_address(cell)), None)
