"""The answer to a callback that was accepted."""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import SERVER_SOFTWARE

from notify_server.config import AckConfig

# Answers with these have no body (RFC 9110 15.3.5, 15.3.6), and are aiohttp's to write.
_BODILESS = frozenset({204, 205})
REQUEST_ID = "{request_id}"


class AckForm:
    """What all acks have in common: all but the id of the request, and the date."""

    def __init__(self, config: AckConfig) -> None:
        self._status = config.status
        self._headers = {"Content-Type": config.content_type}
        self._parts = [part.encode() for part in config.body.split(REQUEST_ID)]
        self._reason = HTTPStatus(config.status).phrase if config.status in set(HTTPStatus) else ""
        self._second = 0
        self._head = b""

    def answer(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        """The ack of a request."""
        body = request_id.encode().join(self._parts)
        if request.version == HttpVersion11 and request.keep_alive and self._status not in _BODILESS:
            return Ack(self._status, self._head_of(len(body)), body)
        return web.Response(body=body, status=self._status, headers=self._headers)

    def _head_of(self, length: int) -> bytes:
        # Ids are all of one length, and a second sees many acks.
        second = int(time.time())
        if second != self._second:
            fields = {
                **self._headers,
                "Content-Length": length,
                "Date": formatdate(second, usegmt=True),
                "Server": SERVER_SOFTWARE,
            }
            lines = [f"HTTP/1.1 {self._status} {self._reason}", *(f"{name}: {value}" for name, value in fields.items())]
            self._head = "".join(f"{line}\r\n" for line in lines).encode()
            self._second = second
        return self._head


class Ack(web.StreamResponse):
    """An answer that is written in one piece as it is. To have aiohttp put it together takes a quarter of an ack."""

    def __init__(self, status: int, head: bytes, body: bytes) -> None:
        super().__init__(status=status)
        self._head = head
        self._bytes = body
        self._writer: AbstractStreamWriter | None = None
        self._closes = False

    @property
    def keep_alive(self) -> bool:
        return not self._closes

    def force_close(self) -> None:
        self._closes = True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        self._writer = request.writer
        return self._writer

    async def write_eof(self, data: bytes = b"") -> None:
        assert self._writer is not None
        connection = b"Connection: close\r\n" if self._closes else b""
        await self._writer.write_eof(b"%b%b\r\n%b" % (self._head, connection, self._bytes))
