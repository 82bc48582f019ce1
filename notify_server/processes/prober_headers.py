"""Reads the header lines of a response into the fields that evidence keeps."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec

# Longer values are cut, because people read them.
VALUE_LIMIT = 255
# One more than `Guard.follow` takes, so that the beginning of a longer address is not followed.
LOCATION_LIMIT = 8193

# Fields that are kept as they are, the most important first: what is too much at the end is left out.
_FURTHER = {
    name: name.decode()
    for name in (
        b"x-oss-ec", b"x-oss-storage-class", b"x-amz-storage-class", b"x-oss-restore", b"x-amz-restore",
        b"x-oss-expiration", b"x-amz-expiration", b"x-oss-object-type", b"x-oss-hash-crc64ecma",
        b"x-cos-hash-crc64ecma", b"content-md5", b"content-disposition", b"content-encoding", b"server", b"date",
        b"via", b"x-cache",
    )
}  # fmt: skip
# Their values are the same in many answers.
_REPEATED = frozenset({b"server", b"date", b"x-oss-storage-class", b"x-oss-object-type", b"x-amz-storage-class"})
# The JSON of these is at most this many bytes.
FURTHER_LIMIT = 2000
_REQUEST_IDS = (
    b"x-oss-request-id", b"x-amz-request-id", b"x-cos-request-id", b"x-tos-request-id", b"x-obs-request-id", b"x-reqid"
)  # fmt: skip
_KEPT = frozenset(
    {b"content-length", b"content-type", b"etag", b"last-modified", b"retry-after", b"location", b"content-range"}
    | {b"x-oss-err", *_REQUEST_IDS, *_FURTHER}
)
_CODE = re.compile(rb"<Code>\s*([A-Za-z0-9._-]{1,64})\s*</Code>").search
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
    vendor_request_id: str | None = None
    vendor_code: str | None = None
    further: dict[str, str] | None = None


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
        _repeated(fields[b"content-type"]) if b"content-type" in fields else None,
        _text(fields.get(b"etag")),
        _text(fields.get(b"last-modified")),
        _text(fields.get(b"retry-after")),
        None if location is None else location_text(location),
        next((_text(fields[name]) for name in _REQUEST_IDS if name in fields), None),
        _code_of_header(fields.get(b"x-oss-err")),
        _further(fields),
    )


def error_code(body: bytes) -> str | None:
    """Return the `<Code>` of an error in the form of S3, which OSS, COS, OBS, TOS and MinIO share."""
    found = _CODE(body)
    return found[1].decode() if found else None


def has_xml(lines: Sequence[bytes]) -> bool:
    """Return True if the Content-Type names XML, the form in which storage vendors explain an error."""
    return any(b"xml" in line and line[:13].lower() == b"content-type:" for line in map(bytes.lower, lines))


def _code_of_header(value: bytes | None) -> str | None:
    """Return the code of an `x-oss-err` field: OSS sends the XML of an error in it where there is no body."""
    if value is None:
        return None
    try:
        return error_code(base64.b64decode(value.strip()))
    except binascii.Error:
        return None


def _further(fields: Mapping[bytes, bytes]) -> dict[str, str] | None:
    kept = {
        _FURTHER[name]: _repeated(value) if name in _REPEATED else sanitise(value)
        for name, value in fields.items()
        if name in _FURTHER
    }
    if sum(map(len, kept.values())) > FURTHER_LIMIT // 8 and len(msgspec.json.encode(kept)) > FURTHER_LIMIT:
        kept = {name: kept[name] for name in _FURTHER.values() if name in kept}
        while len(msgspec.json.encode(kept)) > FURTHER_LIMIT:
            kept.popitem()
    return kept or None


@lru_cache(maxsize=512)
def _name(head: bytes) -> bytes | None:
    """Return the name before a header line's colon, in lower case, if it is a field that is kept; or STATUS_LINE.

    Cached, because a host sends the same names in each response.
    """
    if head.startswith(STATUS_LINE):
        return STATUS_LINE
    name = head.rstrip(b" \t").lower()
    return name if name in _KEPT else None


@lru_cache(maxsize=512)
def _repeated(value: bytes) -> str:
    return sanitise(value)


def _text(value: bytes | None) -> str | None:
    return None if value is None else sanitise(value)


def status_of(line: bytes) -> bytes:
    return (*line.split(None, 2), b"", b"")[1]


def _length(value: bytes) -> int | None:
    digits = value.strip()
    return int(digits) if digits.isdigit() and len(digits) <= 18 else None
