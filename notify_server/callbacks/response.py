"""Answers to callbacks as the bytes that are sent. To have aiohttp put them together takes a quarter of an ack."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import NamedTuple, Self

from aiohttp import web
from aiohttp.http import SERVER_SOFTWARE

from notify_server.config import AckConfig

REQUEST_ID = "{request_id}"
# RFC 9110 8.6, 15.3.5, 15.3.6: the one has neither a body nor its length, the other has none.
NO_CONTENT, RESET_CONTENT = 204, 205


class Answer(NamedTuple):
    """`head` is all of it but the blank line at its end; `closes` asks for the connection to be closed after it."""

    head: bytes
    body: bytes
    closes: bool = False

    @classmethod
    def of(cls, response: web.Response) -> Self:
        """What a response of aiohttp's says."""
        body = response.body
        assert isinstance(body, bytes)
        closes = response.headers.get("Connection", "").lower() == "close"
        fields = {name: value for name, value in response.headers.items() if name != "Connection"}
        return cls(_head(response.status, fields, len(body), int(time.time())), body, closes)

    def written(self, *, closes: bool) -> bytes:
        """All of it, with a word that the connection is closed after it when that is so."""
        return b"%b%b\r\n%b" % (self.head, b"Connection: close\r\n" if closes else b"", self.body)


class AckForm:
    """What all acks have in common: all but the id of the request, and the date."""

    def __init__(self, config: AckConfig) -> None:
        self._status = config.status
        self._fields = {"Content-Type": config.content_type}
        text = config.body if config.status not in (NO_CONTENT, RESET_CONTENT) else ""
        self._parts = [part.encode() for part in text.split(REQUEST_ID)]
        self._second = 0
        self._head = b""

    def answer(self, request_id: str) -> Answer:
        """The ack of a request."""
        body = self._body(request_id)
        # Ids are all of one length, and a second sees many acks.
        second = int(time.time())
        if second != self._second:
            self._head = _head(self._status, self._fields, len(body), second)
            self._second = second
        return Answer(self._head, body)

    def response(self, request_id: str) -> web.Response:
        """The ack of a request that aiohttp has read."""
        return web.Response(body=self._body(request_id), status=self._status, headers=self._fields)

    def _body(self, request_id: str) -> bytes:
        return request_id.encode().join(self._parts)


def _head(status: int, fields: Mapping[str, str], length: int, second: int) -> bytes:
    reason = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
    size = {"Content-Length": str(length)} if status != NO_CONTENT else {}
    date = {"Date": formatdate(second, usegmt=True), "Server": SERVER_SOFTWARE}
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in {**fields, **size, **date}.items())]
    return "".join(f"{line}\r\n" for line in lines).encode()
