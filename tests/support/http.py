"""HTTP as a client sees it: answers, and connections for requests that no client would send."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

from tests.support.waiting import SECONDS


class Reply(NamedTuple):
    """An HTTP answer that has been read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def __repr__(self) -> str:
        return f"<{self.status} {self.body[:200]!r}>"

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The platform's code in the answer, "000" for success."""
        return str(self.json["code"])

    def refusal(self, status: int, code: str) -> str:
        """The `msg` of a refusal with this status and code, and the one shape that refusals have."""
        assert self.status == status, self
        assert self.headers["Content-Type"].partition(";")[0] == "application/json"
        content = self.json
        assert list(content) == ["request_id", "code", "msg", "data"]
        assert content["code"] == code, self
        assert content["data"] is None
        assert str(UUID(content["request_id"])) == content["request_id"]
        message = content["msg"]
        assert isinstance(message, str)
        assert message
        return message

    def accepted(self) -> str:
        """The request id in the default ack."""
        assert self.status == 200, self
        content = self.json
        assert content == {"request_id": content["request_id"], "code": "000", "msg": "成功", "data": None}
        return str(UUID(content["request_id"]))


class Connection:
    """A socket, for what no HTTP client would send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        # That the other side has gone is for the reading end to tell.
        with contextlib.suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()

    def end(self) -> None:
        """Send nothing more."""
        self._writer.write_eof()

    async def answer(self, *, bodiless: bool = False) -> Reply:
        """Read one answer."""
        async with asyncio.timeout(SECONDS):
            head = await self._reader.readuntil(b"\r\n\r\n")
            status_line, *lines = head.decode("latin-1").strip().split("\r\n")
            headers = {name.title(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            status = int(status_line.split()[1])
            length = 0 if bodiless or status < 200 else int(headers["Content-Length"])
            return Reply(status, headers, await self._reader.readexactly(length))

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        async with asyncio.timeout(SECONDS):
            try:
                return await self._reader.read()
            except ConnectionError:
                return b""

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
