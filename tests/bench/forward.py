"""Forwarding: the time from a verdict to its delivery, the price of a dead endpoint, and what acks and probing pay."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web

from tests.bench.acks import SMALL, wrk
from tests.bench.figures import Column, Outcome, Row, Setting, Sheet, in_turn, median_by, quantile
from tests.bench.probes import Probing, Task, ours
from tests.bench.servers import MANY_HOSTS, daemon, module, nginx, running
from tests.support.notification import batch_body, failed
from tests.support.waiting import free_port

RATE = 500
CONNECTIONS = 64
PATIENCE_SECONDS = 60.0
ALONE, BESIDE = "a good endpoint alone", "beside a dead one"
OFF, ON = "off", "on"
# No host that the notifications name: every batch has its verdict, and its event, as soon as it is expanded.
BLOCKED = {"verify__allowed_hosts": '["nowhere.example.com"]'}


class Delivered(msgspec.Struct):
    """Milliseconds from each event to its arrival, sorted; and how many events arrived a second."""

    sent: int
    milliseconds: list[float]
    rate: float


def endpoint(name: str, port: int) -> dict[str, object]:
    """Return a `[[forward]]` table of an endpoint on this machine."""
    return {
        "name": name,
        "url": f"http://127.0.0.1:{port}/",
        "secrets": ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        "allowed_networks": ["127.0.0.0/8"],
        "events": ["batch.*"],
    }


class _Receiver:
    """Notes how long after its event each delivery arrives."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []
        self.last = 0.0

    async def answer(self, request: web.BaseRequest) -> web.Response:
        payload = json.loads(await request.read())
        self.last = time.time()
        self.milliseconds.append(1000 * (self.last - datetime.fromisoformat(payload["timestamp"]).timestamp()))
        return web.Response(status=204)


@asynccontextmanager
async def _receiving(port: int) -> AsyncIterator[_Receiver]:
    receiver = _Receiver()
    runner = web.ServerRunner(web.Server(receiver.answer, access_log=None), shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    try:
        yield receiver
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _silent() -> AsyncIterator[int]:
    """A port at which connections are accepted and never answered."""

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(-1)
        finally:
            writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0, backlog=1024)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def deliver(store: Path, number: int, rate: float, *, dead: bool) -> Delivered:
    """Post so many incomplete batches, at this rate or as fast as they are acked (0), and wait for their events."""
    hook = free_port()
    async with _receiving(hook) as receiver, _silent() as silent:
        endpoints = [endpoint("good", hook), *([endpoint("dead", silent)] if dead else [])]
        with await asyncio.to_thread(_start, store, endpoints) as port:
            began = time.time()
            await _post(port, number, rate)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while len(receiver.milliseconds) < number and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
    arrived = len(receiver.milliseconds)
    return Delivered(number, sorted(receiver.milliseconds), arrived / (receiver.last - began) if arrived else 0.0)


@contextmanager
def _run(store: Path, endpoints: Sequence[object]) -> Iterator[int]:
    with daemon(store, forward=json.dumps(endpoints)) as server:
        yield server.port


class _Started:
    """Stops the daemon at the end of a block, although it was started in another thread."""

    def __init__(self, store: Path, endpoints: Sequence[object]) -> None:
        self._running = _run(store, endpoints)
        self._port = self._running.__enter__()

    def __enter__(self) -> int:
        return self._port

    def __exit__(self, *_: object) -> None:
        self._running.__exit__(None, None, None)


def _start(store: Path, endpoints: Sequence[object]) -> _Started:
    return _Started(store, endpoints)


async def _post(port: int, number: int, rate: float) -> None:
    url = f"http://127.0.0.1:{port}/notify"
    numbers = iter(range(number))
    began = time.monotonic()

    async def work(session: aiohttp.ClientSession) -> None:
        for which in numbers:
            if rate and (early := began + which / rate - time.monotonic()) > 0:
                await asyncio.sleep(early)
            body = batch_body(f"bench-{which}", [failed("k")])
            async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                response.raise_for_status()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
        await asyncio.gather(*(work(session) for _ in range(CONNECTIONS)))


def _latency(setting: Setting) -> tuple[Sheet, object]:
    seconds = setting.of(10, 1)
    runs, _ = in_turn(setting, {
        f"{RATE} events a second": lambda turn: asyncio.run(
            deliver(setting.work / f"latency-{turn}.db", RATE * seconds, RATE, dead=False)
        ),
    })  # fmt: skip

    def figure(found: Sequence[Delivered], share: float) -> float:
        return median_by(found, lambda run: quantile(run.milliseconds, share))

    rows: list[Row] = []
    for name, found in runs.items():
        missing = sum(run.sent - len(run.milliseconds) for run in found)
        rows.append([name, *(figure(found, share) for share in (0.5, 0.99, 1.0)), float(missing)])
    columns = [Column("open loop"), *(Column(f"{name} ms", ",.1f") for name in ("p50", "p99", "max"))]
    sheet = Sheet(
        f"From an event to its delivery, median of {setting.rounds} x {seconds} s",
        [*columns, Column("never came", ",.0f")],
        rows,
    )
    return sheet, msgspec.to_builtins(runs)


def _dead(setting: Setting) -> tuple[Sheet, object]:
    number = setting.of(3000, 200)

    def measure(turn: int, *, dead: bool) -> Delivered:
        return asyncio.run(deliver(setting.work / f"dead-{dead}-{turn}.db", number, 0, dead=dead))

    runs, _ = in_turn(setting, {ALONE: partial(measure, dead=False), BESIDE: partial(measure, dead=True)})
    alone = median_by(runs[ALONE], lambda run: run.rate)
    rows: list[Row] = [
        [name, (rate := median_by(found, lambda run: run.rate)), rate / alone] for name, found in runs.items()
    ]
    sheet = Sheet(
        f"{number:,} events as fast as they are delivered, median of {setting.rounds}",
        [Column("events"), Column("delivered/s", ",.0f"), Column("ratio", ".2f")],
        rows,
        "The dead endpoint accepts connections and never answers.",
    )
    return sheet, msgspec.to_builtins(runs)


def _costs(setting: Setting) -> tuple[Sheet, object]:
    seconds, files = setting.of(4, 1), setting.of(30_000, 2_000)
    hook = free_port()
    forward: dict[str, dict[str, str]] = {OFF: {}, ON: {"forward": json.dumps([endpoint("good", hook)])}}

    def acks(turn: int, keys: Mapping[str, str]) -> float:
        store = setting.work / f"acks-{time.time_ns()}.db"
        with daemon(store, **keys) as server:
            return wrk(server, CONNECTIONS, seconds, SMALL).rate

    with nginx(setting.work) as origin, running(module("forward", hook), hook):
        addresses = origin.addresses(files, MANY_HOSTS)
        task = Task(origin, addresses, setting.work / "unused", setting.work)

        def probing(turn: int, keys: Mapping[str, str]) -> Probing:
            return ours(task, settings=keys)

        acked, _ = in_turn(setting, {name: partial(acks, keys=keys) for name, keys in forward.items()})
        blocked, _ = in_turn(setting, {name: partial(acks, keys=keys | BLOCKED) for name, keys in forward.items()})
        probed, _ = in_turn(setting, {name: partial(probing, keys=keys) for name, keys in forward.items()})
    rows: list[Row] = []
    for what, of in (
        ("acks/s, verdicts later", {name: median_by(found, float) for name, found in acked.items()}),
        ("acks/s, a verdict for each at once", {name: median_by(found, float) for name, found in blocked.items()}),
        ("files/s", {name: median_by(found, lambda run: run.rate) for name, found in probed.items()}),
    ):
        rows.append([what, of[OFF], of[ON], of[ON] / of[OFF]])
    sheet = Sheet(
        f"Forwarding off and on, median of {setting.rounds}",
        [Column(""), Column(OFF, ",.0f"), Column(ON, ",.0f"), Column("ratio", ".2f")],
        rows,
        f"{CONNECTIONS} connections (wrk), 7 files each; files at 100 hosts. The receiver is a process of its own.",
    )
    return sheet, {"acks": acked, "acks with verdicts": blocked, "probing": msgspec.to_builtins(probed)}


def run(setting: Setting) -> Outcome:
    """Latency, the dead endpoint, and what acks and probing pay."""
    latency, dead, costs = _latency(setting), _dead(setting), _costs(setting)
    return Outcome([latency[0], dead[0], costs[0]], {"latency": latency[1], "dead": dead[1], "costs": costs[1]})


if __name__ == "__main__":
    import sys

    async def _serve(port: int) -> None:
        async with _receiving(port):
            await asyncio.Event().wait()

    asyncio.run(_serve(int(sys.argv[1])))
