"""A scripted HTTP server that stands for an object store."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

from tests.support.waiting import SECONDS, Bell


@dataclass(frozen=True)
class Answer:
    """What an origin does with a request.

    What is bad and comes on a connection that has been used before is asked again on a fresh one:
    where requests are counted, `close`.

    `raw` is sent as it is, instead of a response made of `status`, `headers` and (to a GET) `body`; then each of
    `later`, so many seconds after what came before it; then the connection is left open, closed or `reset`. `delay` and
    `gate` hold all of that back.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay: float = 0.0
    gate: asyncio.Event | None = None
    raw: bytes | None = None
    later: Sequence[tuple[float, bytes]] = ()
    close: bool = False
    reset: bool = False

    def payload(self, method: str) -> bytes:
        """The bytes of the answer to a request with this method."""
        if self.raw is not None:
            return self.raw
        headers = {"Content-Length": str(len(self.body)), **self.headers}
        if self.close:
            headers["Connection"] = "close"
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        text = f"HTTP/1.1 {self.status} Whatever\r\n{head}\r\n".encode()
        return text if method == "HEAD" else text + self.body


class Hit(NamedTuple):
    """A request that reached an origin; `at` is monotonic seconds, `connection` counts from 1."""

    method: str
    path: str
    headers: Mapping[str, str]
    at: float
    connection: int


class _Never(asyncio.Event):
    """Nobody sets it. One that is waited for belongs to that loop; this one is waited for on every test's own."""

    async def wait(self) -> Literal[True]:
        await asyncio.get_running_loop().create_future()
        raise AssertionError("never")


SILENCE = Answer(gate=_Never())


class Origin:
    """A server on a loopback address with an answer for each path. Use it with `async with`.

    As a trap it needs no instructions: `connections` must stay 0.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, tls: ssl.SSLContext | None = None) -> None:
        self.host = host
        self.port = port
        self.default: Answer | Callable[[Hit], Answer] = Answer()
        self.hits: list[Hit] = []
        self.count: Counter[str] = Counter()
        self.connections = 0
        self.bytes_sent = 0
        self.busy = 0
        self.busiest = 0
        self.bell = Bell()
        self.live: set[_Connection] = set()
        self._tls = tls
        self._answers: dict[str, list[Answer]] = {}
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), self.host, self.port, ssl=self._tls, backlog=2048
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self.live):
            connection.abort()
        await self.bell.until(lambda: not self.live)
        await self._server.wait_closed()

    def url(self, path: str, host: str | None = None) -> str:
        """The address of `path` here, by another name when `host` is given."""
        name = host or self.host
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{f'[{name}]' if ':' in name else name}:{self.port}{path}"

    def on(self, path: str, *answers: Answer) -> None:
        """Answer requests for `path` with these, one after the other, the last one for ever."""
        self._answers[path] = list(answers)

    def of(self, path: str) -> list[Hit]:
        """The requests for `path` so far."""
        return [hit for hit in self.hits if hit.path == path]

    async def reached(self, number: int = 1, path: str | None = None, seconds: float = SECONDS) -> None:
        """Return once so many requests have come, for `path` or at all."""
        await self.bell.until(lambda: (self.count[path] if path else len(self.hits)) >= number, seconds)

    def take(self, hit: Hit) -> Answer:
        """Count a request and choose its answer."""
        self.hits.append(hit)
        self.count[hit.path] += 1
        scripted = self._answers.get(hit.path)
        if scripted is None:
            return self.default if isinstance(self.default, Answer) else self.default(hit)
        return scripted.pop(0) if len(scripted) > 1 else scripted[0]


class Limited:
    """An origin's answers when it serves so many requests in each second, and refuses the others."""

    def __init__(self, most: int, refusal: Answer) -> None:
        self._most = most
        self._refusal = refusal
        self._second = 0
        self._served = 0
        self.refused = 0

    def __call__(self, hit: Hit) -> Answer:
        if int(hit.at) != self._second:
            self._second, self._served = int(hit.at), 0
        if self._served < self._most:
            self._served += 1
            return Answer()
        self.refused += 1
        return self._refusal


class _Connection(asyncio.Protocol):
    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._origin.connections += 1
        self._number = self._origin.connections
        self._origin.live.add(self)
        self._origin.bell.ring()

    def connection_lost(self, error: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()
        self._origin.live.discard(self)
        self._origin.bell.ring()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, self._buffer = self._buffer.partition(b"\r\n\r\n")
        if not found:
            self._buffer = head
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        origin = self._origin
        origin.busy += 1
        origin.busiest = max(origin.busiest, origin.busy)
        answer = origin.take(Hit(method, path, headers, time.monotonic(), self._number))
        if answer.delay or answer.gate is not None:
            self._task = asyncio.get_running_loop().create_task(self._answer_later(method, answer))
        else:
            origin.busy -= 1
            self._answer(method, answer)
        origin.bell.ring()

    async def _answer_later(self, method: str, answer: Answer) -> None:
        try:
            if answer.gate is not None:
                await answer.gate.wait()
            if answer.delay:
                await asyncio.sleep(answer.delay)
        finally:
            self._origin.busy -= 1
        self._answer(method, answer)

    def _answer(self, method: str, answer: Answer) -> None:
        self._write(answer.payload(method))
        if answer.later:
            self._task = asyncio.get_running_loop().create_task(self._trickle(answer))
        else:
            self._finish(answer)

    async def _trickle(self, answer: Answer) -> None:
        for pause, data in answer.later:
            await asyncio.sleep(pause)
            self._write(data)
        self._finish(answer)

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        if data and not self._transport.is_closing():
            self._transport.write(data)
            self._origin.bytes_sent += len(data)

    def _finish(self, answer: Answer) -> None:
        assert self._transport is not None
        if answer.reset:
            raw = self._transport.get_extra_info("socket")
            # Linger for no time at all: a close resets the connection.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            self._transport.abort()
        elif answer.close:
            self._transport.close()
