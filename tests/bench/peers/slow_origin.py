"""An origin that answers 200 to everything, so many seconds after it was asked."""

from __future__ import annotations

import asyncio
import sys

import uvloop

from tests.bench.servers import MANY_HOSTS, ONE_HOST

ANSWER = (
    b"HTTP/1.1 200 OK\r\nServer: slow\r\nContent-Type: image/jpeg\r\nContent-Length: 70000\r\n"
    b'Connection: keep-alive\r\nETag: "0123456789abcdef"\r\n\r\n'
)


class _Connection(asyncio.Protocol):
    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        # HEADs have no body, and no measured client pipelines: each read has one request.
        self._loop.call_later(self._delay, self._answer)

    def _answer(self) -> None:
        if not self._transport.is_closing():
            # uvloop's transports are no subclasses of asyncio's.
            self._transport.write(ANSWER)  # type: ignore[attr-defined]


async def _main(port: int, delay: float) -> None:
    hosts = [*ONE_HOST, *MANY_HOSTS]
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(delay), hosts, port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1]), float(sys.argv[2])))
