"""A connection that aiohttp serves, from the first request on that is no callback in the usual form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import structlog
from aiohttp import web

log = structlog.get_logger("notify_server")

BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Delegated(asyncio.Protocol):
    """Passes everything to aiohttp's protocol. An error of its parser is answered with 400, not with a reset."""

    def __init__(
        self,
        peer: str,
        handler: web.RequestHandler,
        on_end: Callable[[Delegated], object],
        clock: Callable[[], float],
    ) -> None:
        self.peer = peer
        self.since = clock()
        self._handler = handler
        self._on_end = on_end
        self._clock = clock
        self._transport: asyncio.Transport | None = None

    # aiohttp does not show which of the two it is.
    awaits_request = False
    is_idle = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._handler.connection_made(transport)

    def connection_lost(self, error: BaseException | None) -> None:
        self._transport = None
        self._on_end(self)
        self._handler.connection_lost(error)

    def data_received(self, data: bytes) -> None:
        self.since = self._clock()
        try:
            self._handler.data_received(data)
        except Exception as error:
            # aiohttp's parser in Python raises such as ValueError at malformed chunks.
            log.info("malformed request", remote=self.peer, error=type(error).__name__)
            if self._transport is not None:
                self._transport.write(BAD_REQUEST)
                self._transport.close()

    def eof_received(self) -> None:
        self._handler.eof_received()

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()

    def close(self) -> None:
        """Close the connection, whatever is under way."""
        if self._transport is not None:
            self._transport.close()
