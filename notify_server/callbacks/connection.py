"""The callers' connections. Callbacks are read and answered here; everything else is aiohttp's.

What is read here is what senders send: a whole head at once, with the length of the body in it. aiohttp's own parser
reads the head, so that both understand a request alike. At the first request of another kind (another path or method,
chunked, a head in pieces or malformed) the connection is handed to aiohttp for good, with that
request from its first byte. An ack costs a third of what it costs there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import cast

from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpProcessingError, HttpRequestParser, HttpVersion11, RawRequestMessage

from notify_server.callbacks.errors import RefusedError
from notify_server.callbacks.handler import Callback, content_length
from notify_server.callbacks.response import Answer
from notify_server.config import ServerConfig

# A longer head is aiohttp's; so long may one line of it be there.
MAX_HEAD = 8190
HEAD_END = b"\r\n\r\n"
# How long what is still coming of a refused body is read after the answer, so that the sender gets to read that.
LINGER_SECONDS = 1.0


def body_length(message: RawRequestMessage) -> int | None:
    """The length of the body in bytes, None for a request that is not read here."""
    headers = message.headers
    if message.version != HttpVersion11 or message.chunked or message.upgrade or message.compression:
        return None
    if "Expect" in headers or "Transfer-Encoding" in headers or "Content-Encoding" in headers:
        return None
    length = headers.get("Content-Length", "")
    return content_length(headers) if length.isascii() and length.isdigit() else None


class CallbackConnection:
    """Makes the protocol of each connection, and knows them all.

    `handlers` makes aiohttp's. Without `callback` all connections are aiohttp's from the start.
    """

    def __init__(
        self,
        config: ServerConfig,
        handlers: web.Server,
        callback: Callback | None,
        on_refused: Callable[[], object],
    ) -> None:
        self.config = config
        self.handlers = handlers
        self.callback = callback
        self.open: set[Connection] = set()
        # Whether connections are closed after their next answer.
        self.draining = False
        self.settled = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.begins = (f"POST {config.callback_path} ".encode(), f"POST {config.callback_path}?".encode())
        self._on_refused = on_refused
        # The parser wants somebody whose reading it could pause. It is given heads alone.
        self._nobody = BaseProtocol(self.loop)

    def __call__(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        if self.connections >= self.config.max_connections:
            self._on_refused()
            return _Full()
        if self.callback is None:
            return self.handlers()
        return Connection(self, self.callback)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self.open) + len(self.handlers.connections)

    def read_head(self, head: bytes) -> RawRequestMessage | None:
        """The head of a request, None when it is malformed."""
        parser = HttpRequestParser(self._nobody, self.loop, MAX_HEAD, auto_decompress=False)
        try:
            messages, _, _ = parser.feed_data(head)
        except HttpProcessingError:
            return None
        return messages[0][0] if messages else None

    async def drain(self, seconds: float) -> None:
        """Close the connections that are idle, and the others once their request is answered, or after so long.
        aiohttp's are not touched.
        """
        self.draining = True
        for connection in list(self.open):
            if not connection.under_way:
                connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while any(connection.under_way for connection in self.open):
                    self.settled.clear()
                    await self.settled.wait()
        for connection in list(self.open):
            connection.close()


class Connection(asyncio.Protocol):
    """One caller's connection, until it is closed or handed to aiohttp."""

    __slots__ = (
        "_answering",
        "_at",
        "_callback",
        "_choked",
        "_due",
        "_ended",
        "_front",
        "_held",
        "_later",
        "_lingering",
        "_message",
        "_missing",
        "_parts",
        "_peer",
        "_remote",
        "_timer",
        "_transport",
    )

    def __init__(self, front: CallbackConnection, callback: Callback) -> None:
        self._front = front
        self._callback = callback
        self._transport: asyncio.Transport | None = None
        self._peer = ""
        # The request whose body arrives or whose answer is due, who sent it, and what is there of the body.
        self._message: RawRequestMessage | None = None
        self._remote = ""
        self._parts: list[bytes] = []
        self._missing = 0
        self._answering = False
        # What came before its turn, from `_at` on; while there is some nothing more is read. It is not cut at each
        # request: a sender that pipelines thousands would have all of it copied each time.
        self._later = b""
        self._at = 0
        # Bytes of the body that count in the callback's budget.
        self._held = 0
        # The caller does not read its answers.
        self._choked = False
        self._lingering = False
        # The caller sends nothing more.
        self._ended = False
        # When the caller has kept us waiting for too long; the timer rings then, or earlier and is set again.
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def under_way(self) -> bool:
        """Whether a request has begun to arrive and has no answer yet."""
        return self._message is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self._front.open.add(self)
        self._wait(self._front.config.header_timeout)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._message is not None and not self._answering:
            self._callback.hung_up(self._remote)
        self._leave()

    def eof_received(self) -> bool:
        # Who has sent all that it had may still read the answer; over TLS there is no such half of a connection.
        self._ended = True
        return self._answering and self._transport is not None and self._transport.can_write_eof()

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        if self._answering or self._choked:
            # Sent before the last was answered (RFC 9112 9.3.2): in its turn.
            self._later = self._later[self._at :] + data
            self._at = 0
            self._pause()
        elif self._message is not None:
            self._read(data, 0)
        else:
            self._begin(data, 0)

    def pause_writing(self) -> None:
        self._choked = True
        self._pause()

    def resume_writing(self) -> None:
        self._choked = False
        self._next()

    def close(self) -> None:
        """End it, whatever is under way."""
        if self._transport is not None:
            self._transport.close()

    def _begin(self, data: bytes, at: int) -> None:
        """Read a request that begins at `at`."""
        front = self._front
        end = data.find(HEAD_END, at, at + MAX_HEAD) + len(HEAD_END)
        if end < len(HEAD_END) or not data.startswith(front.begins, at):
            return self._hand_over(data[at:])
        message = front.read_head(data[at:end])
        if message is None or (length := body_length(message)) is None:
            return self._hand_over(data[at:])
        self._message = message
        self._missing = length
        try:
            self._remote = self._callback.admit(message.method, message.headers, message.url, self._peer)
        except RefusedError as refused:
            self._take(data, end)
            self._refuse(refused, self._peer)
            return None
        self._read(data, end)
        if not self._answering:
            self._wait(front.config.body_timeout)
        return None

    def _take(self, data: bytes, at: int) -> bytes:
        """Return what of the data, from `at` on, is the body's."""
        end = at + self._missing
        if len(data) > end:
            self._later, self._at = data, end
            self._pause()
        body = data[at:end]
        self._missing -= len(body)
        return body

    def _read(self, data: bytes, at: int) -> None:
        data = self._take(data, at)
        if self._missing:
            try:
                self._callback.hold(len(data))
            except RefusedError as refused:
                self._parts = []
                self._refuse(refused, self._remote)
                return
            self._held += len(data)
            self._parts.append(data)
            return
        if self._parts:
            self._parts.append(data)
            data = b"".join(self._parts)
            self._parts = []
        assert self._message is not None
        self._answering = True
        self._callback.receive(self._message.headers, self._remote, data, self._reply)

    def _refuse(self, refused: RefusedError | None, remote: str) -> None:
        assert self._message is not None
        self._answering = True
        self._callback.refuse(self._message.headers, remote, refused, self._reply)

    def _release(self) -> None:
        self._callback.release(self._held)
        self._held = 0

    def _reply(self, answer: Answer) -> None:
        self._release()
        front, message = self._front, self._message
        if self._transport is None or self._transport.is_closing() or message is None:
            return
        # What is still coming of a body that was refused would keep the next request waiting.
        closes = message.should_close or front.draining or answer.closes or self._missing > 0 or self._ended
        self._message = None
        self._answering = False
        self._transport.write(answer.written(closes=closes))
        if self._missing:
            self._linger()
        elif closes:
            self._transport.close()
        else:
            self._due = front.loop.time() + front.config.header_timeout
            if self._later:
                self._next()
        if front.draining:
            front.settled.set()

    def _linger(self) -> None:
        assert self._transport is not None
        self._lingering = True
        self._parts = []
        self._transport.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._wait(LINGER_SECONDS)

    def _next(self) -> None:
        # Reading goes on first: it may be paused again by what comes of the rest, or be aiohttp's.
        if self._transport is None or self._answering or self._choked:
            return
        self._transport.resume_reading()
        if self._later:
            later, at, self._later, self._at = self._later, self._at, b"", 0
            self._begin(later, at)

    def _pause(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def _hand_over(self, data: bytes) -> None:
        transport = self._transport
        assert transport is not None
        self._transport = None
        self._leave()
        handler = self._front.handlers()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        handler.data_received(data)

    def _leave(self) -> None:
        self._front.open.discard(self)
        self._message = None
        self._parts = []
        self._later = b""
        self._release()
        if self._timer is not None:
            self._timer.cancel()
        if self._front.draining:
            self._front.settled.set()

    def _wait(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = self._front.loop.time() + seconds
        self._timer = self._front.loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._transport is None:
            return
        if self._answering:
            # The wait is ours, not the caller's.
            self._wait(self._front.config.header_timeout)
        elif self._front.loop.time() < self._due:
            self._timer = self._front.loop.call_at(self._due, self._ring)
        elif self._message is not None:
            self._refuse(None, self._remote)
        else:
            # What it has not read by now it does not read.
            self._transport.abort()


class _Full(asyncio.Protocol):
    """What a connection beyond max_connections gets."""

    ANSWER = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        full = cast(asyncio.WriteTransport, transport)
        full.write(self.ANSWER)
        full.close()
