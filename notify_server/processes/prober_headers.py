"""Reads the header lines of a response into the fields that evidence keeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

# Longer values are cut, because people read them.
VALUE_LIMIT = 255
# One more than `Guard.follow` takes, so that the beginning of a longer address is not followed.
LOCATION_LIMIT = 8193

_KEPT = frozenset(
    {b"content-length", b"content-type", b"etag", b"last-modified", b"retry-after", b"location", b"content-range"}
)
# C0, DEL and C1: nothing that a terminal, a log or a spreadsheet acts on.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_CONTENT_RANGE = re.compile(rb"bytes\s+(?:\d+-\d+|\*)/(\d{1,18})\s*$", re.IGNORECASE)


_NON_ASCII = re.compile(rb"[\x80-\xff]")


def sanitise(value: bytes, limit: int = VALUE_LIMIT) -> str:
    """Return a header value as text that is safe to keep: UTF-8 or replaced, no control characters, cut at `limit`."""
    text = value.decode("utf-8", "replace").strip()[:limit]
    return text if text.isascii() and text.isprintable() else _CONTROL.sub("\ufffd", text)


def location_text(value: bytes) -> str:
    """Return a Location as text that keeps its bytes: those beyond ASCII, in whatever encoding, become %XX, as browsers
    and curl send them.
    """
    return sanitise(_NON_ASCII.sub(lambda found: b"%%%02X" % found[0][0], value), LOCATION_LIMIT)


class Answer(NamedTuple):
    """Holds the fields of a final response that are kept."""

    content_length: int | None
    content_type: str | None
    etag: str | None
    last_modified: str | None
    retry_after: str | None
    location: str | None


NO_ANSWER = Answer(None, None, None, None, None, None)
STATUS_LINE = b"HTTP/"


def read_headers(lines: Sequence[bytes]) -> Answer:
    """Return the kept fields of the header lines that libcurl passed on. Interim (1xx) responses are skipped.

    A Content-Length that is repeated with another value or is not a number is ignored (RFC 9110 8.6). If the answer is
    a part (206), or there is no such part (416), only Content-Range has the length of the whole object.
    """
    status_line = b""
    fields: dict[bytes, bytes] = {}
    contradicted = False
    # Lines that begin with a blank are to be ignored (RFC 9112 2.2); libcurl has joined continued fields.
    for line in lines:
        head, colon, value = line.partition(b":")
        name = _name(head)
        if name is None:
            continue
        if name is STATUS_LINE:
            status_line, fields, contradicted = line, {}, False
        elif not colon:
            continue
        elif name not in fields:
            fields[name] = value
        elif name == b"content-length":
            contradicted |= fields[name].strip() != value.strip()
    content_range, location = fields.get(b"content-range"), fields.get(b"location")
    if content_range is not None or status_of(status_line) in (b"206", b"416"):
        whole = _CONTENT_RANGE.match((content_range or b"").strip())
        length = int(whole[1]) if whole else None
    else:
        length = None if contradicted else _length(fields.get(b"content-length", b""))
    return Answer(
        length,
        _text(fields.get(b"content-type")),
        _text(fields.get(b"etag")),
        _text(fields.get(b"last-modified")),
        _text(fields.get(b"retry-after")),
        None if location is None else location_text(location),
    )


@lru_cache(maxsize=512)
def _name(head: bytes) -> bytes | None:
    """Return the name before a header line's colon, in lower case, if it is a field that is kept; or STATUS_LINE.

    Cached, because a host sends the same names in each response.
    """
    if head.startswith(STATUS_LINE):
        return STATUS_LINE
    name = head.rstrip(b" \t").lower()
    return name if name in _KEPT else None


def _text(value: bytes | None) -> str | None:
    return None if value is None else sanitise(value)


def status_of(line: bytes) -> bytes:
    return (*line.split(None, 2), b"", b"")[1]


def _length(value: bytes) -> int | None:
    digits = value.strip()
    return int(digits) if digits.isdigit() and len(digits) <= 18 else None
