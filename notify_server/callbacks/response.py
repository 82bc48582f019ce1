"""Builds answers to callbacks as bytes: aiohttp's own would cost a quarter of an ack."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import NamedTuple, Self

import msgspec
from aiohttp import web

from notify_server.callbacks.errors import RefusedError, error_body
from notify_server.config import AckConfig

REQUEST_ID = "{request_id}"
# Without a version, which helps only attackers.
SERVER_NAME = "notify_server"
# RFC 9110 8.6, 15.3.5, 15.3.6: a 204 has neither a body nor a Content-Length, a 205 has no body.
NO_CONTENT, RESET_CONTENT = 204, 205


class Answer(NamedTuple):
    """A response. `head` is its bytes without the blank line at the end; `closes` closes the connection after it."""

    status: int
    fields: Mapping[str, str]
    head: bytes
    body: bytes
    closes: bool = False

    @classmethod
    def of(cls, request_id: str, refused: RefusedError) -> Self:
        """Return the answer to a request that is refused."""
        body = error_body(request_id, refused.code, refused.message)
        closes = refused.headers.get("Connection", "").lower() == "close"
        fields = {"Content-Type": "application/json; charset=utf-8"}
        fields |= {name: value for name, value in refused.headers.items() if name != "Connection"}
        return cls(refused.status, fields, _head(refused.status, fields, len(body), int(time.time())), body, closes)

    @classmethod
    def with_data(cls, request_id: str, data: object) -> Self:
        """Return a 200 in the platform's form with data."""
        body = msgspec.json.encode({"request_id": request_id, "code": "000", "msg": "成功", "data": data})
        fields = {"Content-Type": "application/json; charset=utf-8"}
        return cls(200, fields, _head(200, fields, len(body), int(time.time())), body)

    def written(self, *, closes: bool) -> bytes:
        """Return all of its bytes, with a header that the connection is closed when it is."""
        return b"%b%b\r\n%b" % (self.head, b"Connection: close\r\n" if closes else b"", self.body)

    def response(self) -> web.Response:
        """Return the response for a request that aiohttp has read."""
        response = web.Response(body=self.body, status=self.status, headers=self.fields)
        if self.closes:
            response.force_close()
        return response


class AckForm:
    """The common part of all acks: everything but the id of the request, and the date."""

    def __init__(self, config: AckConfig) -> None:
        self._status = config.status
        self._fields = {"Content-Type": config.content_type}
        text = config.body if config.status not in (NO_CONTENT, RESET_CONTENT) else ""
        self._parts = [part.encode() for part in text.split(REQUEST_ID)]
        self._second = 0
        self._head = b""

    def answer(self, request_id: str) -> Answer:
        """Return the ack of a request."""
        body = request_id.encode().join(self._parts)
        # Ids have one length, and a second sees many acks.
        second = int(time.time())
        if second != self._second:
            self._head = _head(self._status, self._fields, len(body), second)
            self._second = second
        return Answer(self._status, self._fields, self._head, body)


def _head(status: int, fields: Mapping[str, str], length: int, second: int) -> bytes:
    reason = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
    size = {"Content-Length": str(length)} if status != NO_CONTENT else {}
    date = {"Date": formatdate(second, usegmt=True), "Server": SERVER_NAME}
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in {**fields, **size, **date}.items())]
    return "".join(f"{line}\r\n" for line in lines).encode()
