"""A prober as a process, spoken to over its pipes, and origins on loopback that answer as they like.

Sleeps are the hostile origins' own drips.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import sys
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import certifi
import msgspec

from notify_server.model import Evidence, Request
from notify_server.processes.frames import FRAME_HEADER, frame
from notify_server.processes.prober_protocol import ProberConfig, Ready

TIMEOUT = 0.4
PATIENCE = 30.0
LOOPBACK = ("127.0.0.0/8",)
AGENT = "notify-server/test"

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(list[Evidence]).decode
decode_ready = msgspec.msgpack.Decoder(Ready).decode


class Prober:
    """A prober process, spoken to as the daemon does."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._last_id = 0

    @classmethod
    async def start(
        cls,
        *,
        networks: Sequence[str] = LOOPBACK,
        hosts: Sequence[str] = (),
        ports: Sequence[int] = (),
        ca_file: str | None = None,
        concurrency: int = 64,
        environ: Mapping[str, str] | None = None,
    ) -> Prober:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "notify_server.processes.prober"),
            stdin=PIPE,
            stdout=PIPE,
            env={**os.environ, **(environ or {})},
        )
        prober = cls(process)
        config = ProberConfig(list(hosts), list(networks), list(ports), AGENT, ca_file or certifi.where(), concurrency)
        prober.write(frame(encode(config)))
        assert decode_ready(await prober.receive_frame()).libcurl
        return prober

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)

    def request(
        self, url: str, method: str = "HEAD", *, timeout: float = TIMEOUT, fresh: bool = False, keep: bool = True
    ) -> Request:
        self._last_id += 1
        return Request(self._last_id, method, url, round(timeout * 1000), round(timeout * 1000), fresh, keep)

    def send(self, requests: Sequence[Request]) -> None:
        self.write(frame(encode(requests)))

    async def receive_frame(self) -> bytes:
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            (length,) = FRAME_HEADER.unpack(await self.process.stdout.readexactly(FRAME_HEADER.size))
            return await self.process.stdout.readexactly(length)

    async def receive(self) -> list[Evidence]:
        return decode(await self.receive_frame())

    async def ask(
        self, url: str, method: str = "HEAD", *, timeout: float = TIMEOUT, fresh: bool = False, keep: bool = True
    ) -> Evidence:
        (evidence,) = await self.ask_all([self.request(url, method, timeout=timeout, fresh=fresh, keep=keep)])
        return evidence

    async def ask_all(self, requests: Sequence[Request]) -> list[Evidence]:
        """The evidence of all of them, in the order in which it came."""
        self.send(requests)
        found: list[Evidence] = []
        while len(found) < len(requests):
            found += await self.receive()
        assert sorted(evidence.id for evidence in found) == sorted(request.id for request in requests)
        return found

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def close_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    async def end(self) -> int:
        """Close its input and wait for it; its exit status."""
        self.close_input()
        async with asyncio.timeout(PATIENCE):
            # What it still says must not keep it from ending.
            assert self.process.stdout is not None
            await self.process.stdout.read()
            return await self.process.wait()


@contextlib.asynccontextmanager
async def probing(
    *,
    networks: Sequence[str] = LOOPBACK,
    hosts: Sequence[str] = (),
    ports: Sequence[int] = (),
    ca_file: str | None = None,
    concurrency: int = 64,
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator[Prober]:
    prober = await Prober.start(
        networks=networks, hosts=hosts, ports=ports, ca_file=ca_file, concurrency=concurrency, environ=environ
    )
    try:
        yield prober
    finally:
        await prober.end()


Behaviour = Callable[[StreamReader, StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = b"Content-Length: 0\r\n\r\n"


class Origin:
    """A server on loopback. `connections` counts those accepted."""

    def __init__(self, scheme: str, port: int) -> None:
        self.port = port
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.connections = 0
        self.connected = asyncio.Condition()

    async def wait_for(self, connections: int) -> None:
        async with asyncio.timeout(PATIENCE), self.connected:
            await self.connected.wait_for(lambda: self.connections >= connections)


@contextlib.asynccontextmanager
async def serving(
    behave: Behaviour, *, listener: socket.socket | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Origin]:
    listener = listener or socket.create_server(("127.0.0.1", 0), backlog=1024)
    origin = Origin("https" if tls else "http", listener.getsockname()[1])
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        async with origin.connected:
            origin.connections += 1
            origin.connected.notify_all()
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await behave(reader, writer)
        writer.transport.abort()

    server = await asyncio.start_server(connected, sock=listener, ssl=tls, backlog=1024)
    try:
        yield origin
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


async def read_head(reader: StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


def path_of(head: bytes) -> bytes:
    return head.split(b" ", 2)[1]


async def mute(reader: StreamReader, writer: StreamWriter) -> None:
    """Take everything, say nothing."""
    while await reader.read(65536):
        pass


async def well_behaved(reader: StreamReader, writer: StreamWriter) -> None:
    """/missing does not exist, any other path does; the ETag is the requested path."""
    while True:
        head = await read_head(reader)
        if path_of(head) == b"/missing":
            writer.write(b"HTTP/1.1 404 Not Found\r\n" + EMPTY)
        elif head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 206 Partial Content\r\nETag: " + path_of(head) + b"\r\nContent-Length: 1\r\n")
            writer.write(b"Content-Range: bytes 0-0/1234\r\n\r\nx")
        else:
            writer.write(OK + b"ETag: " + path_of(head) + b"\r\nContent-Length: 1234\r\n\r\n")


def then_hold(*parts: bytes) -> Behaviour:
    """Say this once, and leave the connection open."""

    async def behave(reader: StreamReader, writer: StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"".join(parts))
        await mute(reader, writer)

    return behave


def then_close(*parts: bytes) -> Behaviour:
    async def behave(reader: StreamReader, writer: StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"".join(parts))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    return behave


def then_half_close(*parts: bytes) -> Behaviour:
    async def behave(reader: StreamReader, writer: StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"".join(parts))
        writer.write_eof()
        await mute(reader, writer)

    return behave


def then_reset(*parts: bytes) -> Behaviour:
    async def behave(reader: StreamReader, writer: StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"".join(parts))
        await writer.drain()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return behave


def then_forever(begin: bytes, again: bytes, *, every: float = 0.0) -> Behaviour:
    """Say `again` without end, as fast as it is taken, or drop by drop."""

    async def behave(reader: StreamReader, writer: StreamWriter) -> None:
        await read_head(reader)
        writer.write(begin)
        while True:
            writer.write(again)
            await writer.drain()
            if every:
                await asyncio.sleep(every)

    return behave
