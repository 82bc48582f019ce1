"""Parses the heads of callbacks with aiohttp's own parser, so that both readers understand a request alike.

The only file that uses internals of aiohttp. pyproject.toml bounds its version, and `sound_parser` checks at start that
the internals behave as expected; where they do not, aiohttp reads every request.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import structlog
from yarl import URL

from notify_server.callbacks.access import Headers

log = structlog.get_logger("notify_server")

# aiohttp's limit of a line. Longer heads are left to aiohttp.
MAX_HEAD = 8190
# A longer number than this is no length, and int() refuses thousands of digits.
MAX_LENGTH_DIGITS = 18
_SAMPLE = b"POST /p?q=1 HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 7\r\nConnection: close\r\n\r\n"


class Head(NamedTuple):
    """The head of a request that is read here; `length` is the size of its body in bytes."""

    method: str
    headers: Headers
    url: URL
    length: int
    should_close: bool


class HeadParser:
    """Parses complete heads, one at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        from aiohttp.base_protocol import BaseProtocol
        from aiohttp.http import HttpProcessingError, HttpRequestParser, HttpVersion11

        self._loop = loop
        self._parser = HttpRequestParser
        self._version = HttpVersion11
        self._malformed = HttpProcessingError
        # The parser needs a protocol whose reading it could pause. It is given heads alone.
        self._protocol = BaseProtocol(loop)

    def parse(self, data: bytes) -> Head | None:
        """Return a complete head, None when it is malformed or of a kind that is left to aiohttp."""
        parser = self._parser(self._protocol, self._loop, MAX_HEAD, auto_decompress=False)
        try:
            messages, _, _ = parser.feed_data(data)
        except (self._malformed, ValueError):
            # ValueError: aiohttp's parser in Python, given a Content-Length of thousands of digits.
            return None
        if not messages:
            return None
        message: Any = messages[0][0]
        headers = message.headers
        if message.version != self._version or message.chunked or message.upgrade or message.compression:
            return None
        length = headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return None
        if "Expect" in headers or "Transfer-Encoding" in headers or "Content-Encoding" in headers:
            return None
        return Head(message.method, headers, message.url, length_of(length), message.should_close)


def length_of(digits: str) -> int:
    """Return a Content-Length in bytes; one of too many digits counts as very large."""
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) <= MAX_LENGTH_DIGITS else 10**MAX_LENGTH_DIGITS


def sound_parser(loop: asyncio.AbstractEventLoop) -> HeadParser | None:
    """Return a parser that has passed a self-check; log a warning and return None when it does not pass."""
    try:
        parser = HeadParser(loop)
        head = parser.parse(_SAMPLE)
        found = head and (
            head.method, head.headers.getall("X-A"), head.url.raw_path_qs, head.length, head.should_close
        )  # fmt: skip
        if found != ("POST", ["1", "2"], "/p?q=1", 7, True):
            raise ValueError(f"a sample head is read as {found}")
        if parser.parse(_SAMPLE.replace(b"Host", b"Ho st")) is not None:
            raise ValueError("a malformed head is accepted")
    except Exception as error:
        log.warning(
            "aiohttp's internals have changed, so it reads the callbacks itself, at a third of the speed: "
            "install the versions that pyproject.toml allows",
            error=f"{type(error).__name__}: {error}",
        )
        return None
    return parser
