"""Acks a second, as many as can be had, beside what keeps nothing and beside what a team would write."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import msgspec

from tests.bench.figures import Column, Outcome, Row, Setting, Sheet, in_turn, median_by, row_name
from tests.bench.servers import Server, bare_aiohttp, daemon, fastapi, mortal, tool, webhook
from tests.bench.usage import cpu_seconds

LUA = Path(__file__).with_name("notification.lua")
CONNECTIONS = (1, 16, 64, 256)
# Connections with 7 files each, and with 1,000.
SMALL, LARGE = 7, 1000
LARGE_CONNECTIONS = 16

OURS = "notify_server"
LIMIT = "bare aiohttp"
FASTAPI = "FastAPI + aiosqlite"

Peer = Callable[[Path], AbstractContextManager[Server]]

PEERS: Mapping[str, Peer] = {
    "bare aiohttp, no routes": lambda work: bare_aiohttp("server"),
    LIMIT: lambda work: bare_aiohttp("application"),
    OURS: lambda work: daemon(work / f"acks-{time.time_ns()}.db"),
    FASTAPI: fastapi,
    "webhook, no command": webhook,
}


class Acks(msgspec.Struct):
    """One run of wrk. `cpu_us` is the server's CPU time for a request, with all that it does about it afterwards, which
    took `settle_seconds` after the last request.
    """

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    errors: int
    connections: int = 0
    files: int = 0
    cpu_us: float = 0.0
    settle_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Requests answered a second."""
        return self.requests / self.seconds


def wrk(server: Server, connections: int, seconds: int, files: int) -> Acks:
    """Load a server with notifications that are all different, as fast as it answers."""
    before = cpu_seconds(server.pid)
    command = [tool("wrk"), "-t1", f"-c{connections}", f"-d{seconds}", "-s", str(LUA)]
    command += [f"http://127.0.0.1:{server.port}/notify", "--", str(files), str(time.time_ns())]
    done = subprocess.run(mortal(command), capture_output=True, text=True, check=True, timeout=seconds + 60)
    ended = time.monotonic()
    server.settle()
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    run = msgspec.json.decode(line.removeprefix("RESULT "), type=Acks)
    run.connections, run.files = connections, files
    run.settle_seconds = time.monotonic() - ended
    run.cpu_us = (cpu_seconds(server.pid) - before) / max(1, run.requests) * 1e6
    return run


def run(setting: Setting) -> Outcome:
    """All peers at all numbers of connections."""
    seconds = setting.of(3, 1)
    tool("wrk")

    def measure(peer: Peer, turn: int) -> list[Acks]:
        with peer(setting.work) as server:
            runs = [wrk(server, connections, seconds, SMALL) for connections in CONNECTIONS]
            runs.append(wrk(server, LARGE_CONNECTIONS, seconds, LARGE))
        return runs

    runs, missing = in_turn(setting, {name: partial(measure, peer) for name, peer in PEERS.items()})

    def rate(name: str, place: int) -> float:
        return median_by(runs[name], lambda run: run[place].rate)

    small = CONNECTIONS.index(64)
    rows: list[Row] = []
    for name in PEERS:
        cpu = median_by(runs[name], lambda run: run[small].cpu_us)
        p99 = median_by(runs[name], lambda run: run[small].p99_ms)
        settle = median_by(runs[name], lambda run: run[small].settle_seconds)
        errors = sum(one.errors for run in runs[name] for one in run)
        rates = [rate(name, place) for place in range(len(CONNECTIONS) + 1)]
        rows.append([row_name(name, missing), *rates, rate(name, small) / rate(LIMIT, small), p99, cpu, settle, errors])
    sheet = Sheet(
        f"Acks a second by connections, median of {setting.rounds} x {seconds} s (wrk)",
        [
            Column("7 files each"),
            *(Column(f"{connections}", ",.0f") for connections in CONNECTIONS),
            Column("1,000 files, 16", ",.0f"),
            Column("ratio at 64", ".2f"),
            Column("p99 ms at 64", ".1f"),
            Column("CPU µs/ack", ",.0f"),
            Column("then s", ".1f"),
            Column("errors", "d"),
        ],
        rows,
        "notify_server and FastAPI commit to disk before they answer. notify_server's CPU includes the expansion into "
        "rows, for which it takes what is left of the time, and then as long as the column before the last says.",
    )
    return Outcome([sheet], {"runs": msgspec.to_builtins(runs), "missing": missing})
