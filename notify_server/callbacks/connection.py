"""Reads callbacks from their connections; every other request goes to aiohttp.

This reader takes the form that senders use: a complete head at once, with the length of the body in it. At the first
request of another kind (another path or method, chunked, a head in pieces or malformed) the connection is handed to
aiohttp for good, from the first byte of that request. An ack costs a third of what it costs there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol, cast

from aiohttp import web

from notify_server.callbacks.aiohttp_parser import MAX_HEAD, Head, sound_parser
from notify_server.callbacks.connection_limit import ConnectionLimit, Member
from notify_server.callbacks.delegated import Delegated
from notify_server.callbacks.handler import Callback, Exchange
from notify_server.callbacks.response import Answer
from notify_server.config import ServerConfig

HEAD_END = b"\r\n\r\n"
# After a refusal the rest of the body is read and dropped, so that the sender can read the response: until nothing has
# come for this long, and at most for `header_timeout`.
LINGER_SECONDS = 1.0
# Connections beyond max_connections that linger at a time.
MAX_LINGERING = 256
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Open(Protocol):
    """A connection that draining waits for while a request is under way."""

    @property
    def under_way(self) -> bool:
        """True when a request has begun to arrive and has no answer yet."""
        ...

    def close(self) -> None:
        """Close it, whatever is under way."""
        ...


class CallbackConnection:
    """Makes the protocol of each connection, and knows them all.

    `handlers` makes aiohttp's protocols. Without `callback`, or where the parser is not sound, aiohttp reads
    everything.
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
        self.loop = asyncio.get_running_loop()
        self.parser = sound_parser(self.loop) if callback is not None else None
        self.begins = (f"POST {config.callback_path} ".encode(), f"POST {config.callback_path}?".encode())
        self.limit = ConnectionLimit(config.max_connections, config.trusted_proxies, self.loop.time)
        self.on_refused = on_refused
        self.open: set[Open] = set()
        self.lingering = 0
        # True once connections are closed after their next answer.
        self.draining = False
        self.settled = asyncio.Event()

    def __call__(self) -> asyncio.Protocol:
        """Return the protocol of a new connection."""
        return Connection(self)

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self.limit)

    async def drain(self, seconds: float) -> None:
        """Close the connections that are idle, and the others once their request is answered, or after `seconds`.

        Connections of aiohttp stay as they are.
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
    """One caller's connection, until it is closed or handed to aiohttp.

    What has been received and not been used yet is `_unread` from `_at` on; while there is some, reading is paused. It
    is not cut at each request: a sender that pipelines thousands would have all of it copied each time.
    """

    __slots__ = (
        "_answering", "_at", "_choked", "_counted", "_due", "_ended", "_exchange", "_front", "_head", "_linger_until",
        "_lingering", "_missing", "_parts", "_paused", "_place", "_served", "_timer", "_transport", "_unread", "peer",
        "since",
    )  # fmt: skip

    def __init__(self, front: CallbackConnection, place: Member | None = None) -> None:
        self.peer = ""
        self.since = 0.0
        self._front = front
        # The handshake whose place in the limit it takes.
        self._place = place
        self._transport: asyncio.Transport | None = None
        # The request whose body is arriving or whose answer is pending, and the received part of the body.
        self._head: Head | None = None
        self._exchange: Exchange | None = None
        self._parts: list[bytes] = []
        self._missing = 0
        self._answering = False
        self._served = False
        self._unread = b""
        self._at = 0
        # The part of `_unread` that counts in the budget.
        self._counted = 0
        self._paused = False
        # True while the caller does not read its answers.
        self._choked = False
        self._lingering = False
        self._linger_until = 0.0
        # True once the caller has closed its side.
        self._ended = False
        # Deadline for the caller. The timer fires then, or earlier and is set again.
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def under_way(self) -> bool:
        """True when a request has begun to arrive and has no answer yet."""
        return self._head is not None

    @property
    def awaits_request(self) -> bool:
        """True while the server waits for the caller to send a request, or the rest of one, or to read an answer."""
        return not self._answering and (self._head is not None or not self._served or self._choked)

    @property
    def is_idle(self) -> bool:
        """True while the connection is kept alive between two requests."""
        return not self._answering and self._head is None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        front = self._front
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self.since = front.loop.time()
        if not (front.limit.join(self) if self._place is None else front.limit.replace(self._place, self)):
            front.on_refused()
            self._transport.write(FULL)
            if front.lingering < MAX_LINGERING:
                self._linger()
            else:
                self._transport.close()
        elif front.parser is None:
            self._hand_over(b"")
        else:
            front.open.add(self)
            self._wait(front.config.header_timeout)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._exchange is not None and not self._answering and self._front.callback is not None:
            self._front.callback.hung_up(self._exchange)
        self._front.limit.leave(self)
        self._leave()

    def eof_received(self) -> bool:
        # A caller that has closed its side may still read the answer; TLS has no half-closed connections.
        self._ended = True
        return self._answering and self._transport is not None and self._transport.can_write_eof()

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            self._due = min(self._front.loop.time() + LINGER_SECONDS, self._linger_until)
            return
        if self._answering and self._missing:
            # The rest of a body that is being refused.
            return
        # A request that arrives before the last was answered waits for its turn (RFC 9112 9.3.2).
        self._unread = self._unread[self._at :] + data if self._unread else data
        self._at = 0
        self._advance()

    def pause_writing(self) -> None:
        self._choked = True
        self._pause()

    def resume_writing(self) -> None:
        self._choked = False
        self._advance()

    def close(self) -> None:
        """Close the connection, whatever is under way."""
        if self._transport is not None:
            self._transport.close()

    def _advance(self) -> None:
        """Use what has been received, up to the end of it or to a request that has to be answered first."""
        if self._transport is None or self._transport.is_closing() or self._lingering:
            return
        if self._at < len(self._unread) and not self._answering and not self._choked:
            if self._head is None:
                self._begin()
            else:
                self._read()
        if self._at < len(self._unread):
            self._pause()
            self._count_unread()
        elif self._unread:
            self._unread, self._at = b"", 0
            if self._paused:
                self._resume()
                self._count_unread()

    def _begin(self) -> None:
        front, data, at = self._front, self._unread, self._at
        callback, parser = front.callback, front.parser
        assert callback is not None
        assert parser is not None
        end = data.find(HEAD_END, at, at + MAX_HEAD) + len(HEAD_END)
        if end < len(HEAD_END) or not data.startswith(front.begins, at):
            return self._hand_over(data[at:])
        head = parser.parse(data[at:end])
        if head is None:
            return self._hand_over(data[at:])
        self._head = head
        self._missing = head.length
        self._at = end
        self._exchange, admitted = callback.open(
            head.method, head.headers, head.url, head.length, self.peer, self._reply
        )
        if not admitted:
            self._answering = True
            self._take()
            return None
        self._read()
        if not self._answering:
            self._wait(front.config.body_timeout)
        return None

    def _take(self) -> bytes:
        """Return what has been received of the body."""
        part = self._unread[self._at : self._at + self._missing]
        self._at += len(part)
        self._missing -= len(part)
        return part

    def _read(self) -> None:
        """Keep a part of the body, and hand over the whole when it is the last one."""
        callback, exchange = self._front.callback, self._exchange
        assert callback is not None
        assert exchange is not None
        part = self._take()
        if not callback.hold(exchange, len(part), whole=not self._missing and not self._parts):
            self._answering = True
            self._parts = []
            return
        if self._missing:
            self.since = self._front.loop.time()
            self._parts.append(part)
            return
        if self._parts:
            self._parts.append(part)
            part = b"".join(self._parts)
            self._parts = []
        self._answering = True
        callback.receive(exchange, part)

    def _reply(self, answer: Answer) -> None:
        front, head = self._front, self._head
        if self._transport is None or self._transport.is_closing() or head is None:
            return
        # The rest of a refused body would delay the next request.
        closes = head.should_close or front.draining or answer.closes or self._missing > 0 or self._ended
        self._head = self._exchange = None
        self._answering = False
        self._served = True
        self._transport.write(answer.written(closes=closes))
        if self._missing:
            self._linger()
        elif closes:
            self._transport.close()
        else:
            self.since = front.loop.time()
            self._due = self.since + front.config.header_timeout
            if self._unread:
                self._advance()
        if front.draining:
            front.settled.set()

    def _linger(self) -> None:
        assert self._transport is not None
        self._lingering = True
        self._front.lingering += 1
        self._unread, self._at = b"", 0
        self._count_unread()
        self._resume()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._linger_until = self._front.loop.time() + self._front.config.header_timeout
        self._wait(LINGER_SECONDS)

    def _pause(self) -> None:
        if self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._transport is not None and self._paused and not self._choked:
            self._paused = False
            self._transport.resume_reading()

    def _count_unread(self) -> None:
        """Count the unread bytes of waiting requests; a caller beyond the budget is disconnected."""
        callback = self._front.callback
        if callback is None or len(self._unread) == self._counted:
            return
        callback.budget.give_back(self._counted)
        self._counted = len(self._unread)
        if not callback.budget.take(self._counted, whole=True):
            self._counted = 0
            if self._transport is not None:
                self._transport.abort()

    def _hand_over(self, data: bytes) -> None:
        transport, front = self._transport, self._front
        assert transport is not None
        if self._paused:
            transport.resume_reading()
        self._transport = None
        delegated = Delegated(self.peer, front.handlers(), front.limit.leave, front.loop.time)
        front.limit.replace(self, delegated)
        self._leave()
        transport.set_protocol(delegated)
        delegated.connection_made(transport)
        if data:
            delegated.data_received(data)

    def _leave(self) -> None:
        self._front.open.discard(self)
        if self._lingering:
            self._front.lingering -= 1
            self._lingering = False
        self._head = self._exchange = None
        self._parts = []
        self._unread, self._at = b"", 0
        self._count_unread()
        if self._timer is not None:
            self._timer.cancel()
        if self._front.draining:
            self._front.settled.set()

    def _wait(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = self._front.loop.time() + seconds
        self._timer = self._front.loop.call_at(self._due, self._fire)

    def _fire(self) -> None:
        self._timer = None
        if self._transport is None:
            return
        if self._answering:
            # The server is waited for, not the caller.
            self._wait(self._front.config.header_timeout)
        elif self._front.loop.time() < self._due:
            self._timer = self._front.loop.call_at(self._due, self._fire)
        elif self._exchange is not None and self._front.callback is not None and not self._lingering:
            self._answering = True
            self._front.callback.late(self._exchange)
        else:
            # A caller that has not read its answer by now does not read it.
            self._transport.abort()
