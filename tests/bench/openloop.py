"""A client that sends notifications at a fixed rate, whatever becomes of the earlier ones, and counts the latency of
each from the moment when it was due.

A client that waits for an answer before it sends again is slowed down by the server's pauses together with it, and sees
each of them once where callers who come on their own would have seen hundreds: "coordinated omission". Here a request
that finds no connection free waits in a queue, and its waiting counts.

It runs as a process of its own: `python -m tests.bench.openloop PORT --rate 500 …` prints a `Load` as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from tests.bench.figures import quantile
from tests.bench.record import body_of, object_name
from tests.bench.servers import module, mortal

# A request still unanswered so long after the last one was due counts with its waiting time until then.
PATIENCE_SECONDS = 10.0
# Where the curve of latencies is sampled: closer and closer to 1.
SHARES = tuple(1 - 10 ** (-step / 10) for step in range(41))
REQUEST = b"POST /notify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


class Load(msgspec.Struct):
    """One run. Latencies in milliseconds, from when each request was due until its answer was complete.

    `late_p99_ms` is how much later than it could have the client itself sent; `busy` its share of one core. With both
    small the figures are the server's. `curve` has (share, latency) at SHARES.
    """

    rate: float
    sent: int
    answered: int
    errors: int
    unanswered: int
    answered_a_second: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    late_p99_ms: float
    busy: float
    curve: list[tuple[float, float]]


class _Connection(asyncio.Protocol):
    """A connection that carries one request at a time."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._buffer = b""
        self.due: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._client.free(self)

    def send(self, request: bytes, due: float) -> None:
        self.due = due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer = self._buffer + data if self._buffer else data
        head, found, body = buffer.partition(b"\r\n\r\n")
        if not found:
            return
        _, found, length = head.lower().partition(b"content-length:")
        if not found:
            raise RuntimeError("the server sends answers without a Content-Length")
        if len(body) < int(length.partition(b"\r\n")[0]):
            return
        self._buffer = b""
        assert self.due is not None
        due, self.due = self.due, None
        self._client.answered(due, head.startswith(b"HTTP/1.1 200"))
        self._client.free(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._client.lost(self)

    def close(self) -> None:
        self._transport.abort()


class _Client:
    def __init__(self, rate: float, bodies: Sequence[bytes], connections: int, started: float) -> None:
        self._bodies = bodies
        self._rate = rate
        self._connections = connections
        self._started = started
        self._next = 0
        self._idle: list[_Connection] = []
        self._waiting: deque[tuple[bytes, float]] = deque()
        self._open: set[_Connection] = set()
        self._ending = False
        self.latencies: list[float] = []
        self.lateness: list[float] = []
        self.errors = 0
        self.done = asyncio.Event()

    @property
    def sent(self) -> int:
        return self._next

    async def connect(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(self._connections):
            await loop.create_connection(lambda: _Connection(self), "127.0.0.1", port)

    def tick(self) -> None:
        """Send, or queue, every request that is due, and come back when the next one is."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._next < len(self._bodies) and (due := self._started + self._next / self._rate) <= now:
            if self._idle:
                self.lateness.append(now - due)
                self._idle.pop().send(self._bodies[self._next], due)
            else:
                self._waiting.append((self._bodies[self._next], due))
            self._next += 1
        if self._next < len(self._bodies):
            loop.call_at(self._started + self._next / self._rate, self.tick)

    def free(self, connection: _Connection) -> None:
        self._open.add(connection)
        if self._waiting:
            connection.send(*self._waiting.popleft())
        else:
            self._idle.append(connection)

    def answered(self, due: float, well: bool) -> None:
        self.latencies.append(asyncio.get_running_loop().time() - due)
        self.errors += not well
        if len(self.latencies) == len(self._bodies):
            self.done.set()

    def lost(self, connection: _Connection) -> None:
        if self._ending:
            return
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.due is not None:
            # Its caller has no answer, and knows it now.
            self.answered(connection.due, False)
        if not self._open:
            self.done.set()

    def end(self) -> list[float]:
        """Close, and return what was not answered as the seconds it has waited."""
        self._ending = True
        now = asyncio.get_running_loop().time()
        waited = [now - connection.due for connection in self._open if connection.due is not None]
        waited += [now - due for _, due in self._waiting]
        for connection in self._open:
            connection.close()
        return waited


def requests(number: int, files: int, salt: int) -> list[bytes]:
    """So many different notifications of `files` files each, as HTTP requests. `salt` sets them apart from others'."""
    # No origin listens: the files wait, and only the acks are measured.
    addresses = [f"https://files.invalid/{object_name(file)}" for file in range(files)]
    start, _, end = body_of(0, addresses).encode().partition(b'"batch_id":"')
    _, _, end = end.partition(b'"')
    found = []
    for place in range(number):
        body = b'%s"batch_id":"open-loop.%d.%d"%s' % (start, salt, place, end)
        found.append(REQUEST % (len(body), body))
    return found


async def measure(
    port: int, bodies: Sequence[bytes], rate: float, connections: int, patience: float = PATIENCE_SECONDS
) -> Load:
    """Send the requests to 127.0.0.1, `rate` a second, over so many connections."""
    loop = asyncio.get_running_loop()
    client = _Client(rate, bodies, connections, 0.0)
    await client.connect(port)
    client._started = loop.time() + 0.1
    cpu = time.process_time()
    loop.call_at(client._started, client.tick)
    seconds = len(bodies) / rate
    try:
        async with asyncio.timeout(0.1 + seconds + patience):
            await client.done.wait()
    except TimeoutError:
        pass
    finished = loop.time()
    waited = client.end()
    cpu = time.process_time() - cpu
    latencies = sorted(client.latencies + waited)
    return Load(
        rate,
        client.sent,
        len(client.latencies),
        client.errors,
        len(waited),
        len(client.latencies) / (finished - client._started),
        quantile(latencies, 0.5) * 1000,
        quantile(latencies, 0.99) * 1000,
        quantile(latencies, 0.999) * 1000,
        quantile(latencies, 1.0) * 1000,
        quantile(sorted(client.lateness), 0.99) * 1000,
        cpu / (finished - client._started),
        [(share, quantile(latencies, share) * 1000) for share in SHARES],
    )


def new_loop() -> asyncio.AbstractEventLoop:
    """A loop that wakes up on the microsecond: epoll, and uvloop, know milliseconds only."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def start(port: int, rate: float, seconds: float, *, files: int = 7, connections: int = 64, salt: int = 0) -> Running:
    """Start the client as a process."""
    arguments = ("--rate", rate, "--seconds", seconds, "--files", files, "--connections", connections, "--salt", salt)
    command = module("openloop", port, *arguments)
    return Running(subprocess.Popen(mortal(command), stdout=subprocess.PIPE), seconds + PATIENCE_SECONDS + 30)


class Running:
    """A client that is at work in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self._process = process
        self._seconds = seconds

    def result(self) -> Load:
        """What it measured, once it is done. Raises TimeoutExpired, RuntimeError."""
        try:
            output, _ = self._process.communicate(timeout=self._seconds)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        if self._process.returncode:
            raise RuntimeError("the client has failed")
        return msgspec.json.decode(output, type=Load)


def main(given: Sequence[str]) -> None:
    """Run one measurement and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--files", type=int, default=7)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--salt", type=int, default=0)
    options = parser.parse_args(given)
    bodies = requests(round(options.rate * options.seconds), options.files, options.salt)
    # Its own pauses would be taken for the server's.
    gc.collect()
    gc.freeze()
    gc.disable()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        load = runner.run(measure(options.port, bodies, options.rate, options.connections))
    sys.stdout.write(msgspec.json.encode(load).decode())


if __name__ == "__main__":
    main(sys.argv[1:])
