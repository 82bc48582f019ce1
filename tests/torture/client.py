"""A platform's connection that knows how far each of its requests has got."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple, Self
from urllib.parse import urlsplit


class Posted(NamedTuple):
    """A callback that was posted. `status` is that of a complete answer, None when there was none, or half of one.

    `sent_at` is when the kernel had the request's last byte, `answered_at` when the answer or the connection had ended:
    Unix nanoseconds. `sent_at` is 0 when there was no connection to send it by.
    """

    batch: str
    status: int | None
    sent_at: int
    answered_at: int


class Connection:
    """One connection to the daemon, for one request after the other. Use it with `async with`.

    Raises OSError where it cannot be opened.
    """

    def __init__(self, callback: str) -> None:
        parts = urlsplit(callback)
        assert parts.hostname is not None and parts.port is not None
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        self._streams = await asyncio.open_connection(self._host, self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._streams is not None
        self._streams[1].transport.abort()

    def head(self, length: int, *lines: str) -> bytes:
        """The head of a request whose body has this length."""
        more = "".join(f"{line}\r\n" for line in lines)
        return (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n{more}\r\n"
        ).encode()

    async def post(self, batch: str, body: bytes) -> Posted:
        """Send a callback and wait for its answer."""
        return await self.finish(batch, self.head(len(body)) + body)

    async def begin(self, body: bytes, part: int) -> None:
        """Send the head and `part` bytes of the body, and return once a handler is known to wait for the rest."""
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(self.head(len(body), "Expect: 100-continue"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(body[:part])
        await writer.drain()

    async def finish(self, batch: str, rest: bytes) -> Posted:
        """Send the rest of a request, and wait for its answer."""
        assert self._streams is not None
        reader, writer = self._streams
        sent_at = 0
        status = None
        try:
            writer.write(rest)
            # What the kernel does not take at once is sent by the event loop, later.
            while writer.transport.get_write_buffer_size():
                await writer.drain()
                await asyncio.sleep(0)
            sent_at = time.time_ns()
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            await reader.readexactly(int(fields["content-length"]))
            status = int(head[0].split(" ", 2)[1])
        except (OSError, EOFError):
            pass
        return Posted(batch, status, sent_at, time.time_ns())
