"""`make bench`: what the daemon does, side by side with what it could do at best, in one run.

Peers take turns (A B A B …) and the median counts: ratios hold on a busy machine where absolute figures do not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from notify_server.clock import unix_ms
from notify_server.model import Delivery
from notify_server.store.expander import Expander
from notify_server.store.sqlite import SqliteStore
from notify_server.verify.guard import Guard
from tests.bench.servers import MissingToolError, bare_aiohttp, cpu_seconds, daemon, nginx, resident_mib, tool

LUA = Path(__file__).with_name("notification.lua")
ROUNDS = 3
FILES_A_BATCH = 100

Server = AbstractContextManager[tuple[subprocess.Popen[bytes], int]]


class AckRun(msgspec.Struct):
    """One run of wrk: what it measured, and the server's CPU time for a request in microseconds."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    errors: int
    cpu_us: float = 0.0

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def wrk(server: Server, connections: int, seconds: int, files: int, salt: str) -> AckRun:
    """Load a server with notifications, as fast as it answers."""
    with server as (process, port):
        before = cpu_seconds(process.pid)
        command = [tool("wrk"), "-t1", f"-c{connections}", f"-d{seconds}", "-s", str(LUA)]
        command += [f"http://127.0.0.1:{port}/notify", "--", str(files), salt]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spent = cpu_seconds(process.pid) - before
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    run = msgspec.json.decode(line.removeprefix("RESULT "), type=AckRun)
    run.cpu_us = spent / run.requests * 1e6
    return run


def bench_acks(console: Console, work: Path, seconds: int) -> dict[str, object]:
    """Acks a second: the daemon, all of it working, beside an aiohttp handler that keeps nothing."""
    peers: dict[str, Callable[[int], Server]] = {
        "bare aiohttp handler": lambda turn: bare_aiohttp(),
        "notify_server": lambda turn: daemon(work / f"ack-{turn}.db"),
    }
    runs: dict[str, list[AckRun]] = {name: [] for name in peers}
    for turn in range(ROUNDS):
        for name, start in peers.items():
            runs[name].append(wrk(start(turn), 64, seconds, 7, f"{turn}"))
    table = Table(title=f"Acks, 7 files each, 64 connections, median of {ROUNDS} x {seconds} s")
    for column in ("", "acks/s", "p50 ms", "p99 ms", "CPU µs/ack", "errors", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    limit = statistics.median(run.rate for run in runs["bare aiohttp handler"])
    rows = {}
    for name, measured in runs.items():
        rate = statistics.median(run.rate for run in measured)
        row = {
            "rate": rate,
            "p50_ms": statistics.median(run.p50_ms for run in measured),
            "p99_ms": statistics.median(run.p99_ms for run in measured),
            "cpu_us": statistics.median(run.cpu_us for run in measured),
            "errors": sum(run.errors for run in measured),
            "ratio": rate / limit,
        }
        rows[name] = row
        table.add_row(
            name, f"{rate:,.0f}", f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}", f"{row['cpu_us']:.0f}",
            f"{row['errors']}", f"{row['ratio']:.2f}",
        )  # fmt: skip
    console.print(table)
    return {"rows": rows, "runs": {name: [msgspec.to_builtins(run) for run in many] for name, many in runs.items()}}


async def fill(path: Path, files: int, url: str) -> None:
    """A store with so many pending files, in batches of FILES_A_BATCH, all at `url`."""
    store = await SqliteStore.open(path)
    left = files

    guard = Guard((), ("127.0.0.0/8",), ())
    expander = Expander(
        store, guard, now=unix_ms, on_files=lambda _: None, on_verdicts=lambda _: None, on_unknown_fields=lambda _: None
    )
    task = asyncio.create_task(expander.run())
    batch = 0
    while left > 0:
        count = min(left, FILES_A_BATCH)
        entries = [
            {"oss_object_name": f"k{batch}/{n}", "status": "FINISHED", "target_url": f"{url}/IMAGE/{batch}/{n}"}
            for n in range(count)
        ]
        body = msgspec.json.encode({"batch_id": f"bench-{batch}", "api_code": "bench", "file_list": entries})
        await store.accept(Delivery(f"bench-{batch}", "bench", body, count, unix_ms(), "127.0.0.1", "none", "-"))
        left -= count
        batch += 1
    while await store.inbox(1):
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await store.close()


class ProbeRun(msgspec.Struct):
    """One drain: files a second, CPU microseconds a file, and resident memory at its end."""

    rate: float
    cpu_us: float
    memory_mib: float


def drain(store: Path, files: int, concurrency: int) -> ProbeRun:
    """Start the daemon on a store of pending files, and measure from its first request to its last verdict."""
    settings = {"verify__concurrency": str(concurrency), "verify__per_host_concurrency": str(concurrency)}
    with daemon(store, **settings) as (process, _), closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
        while db.execute("SELECT count(*) FROM batch WHERE verdict = 'pending'").fetchone()[0]:
            time.sleep(0.1)
        spent = cpu_seconds(process.pid)
        memory = resident_mib(process.pid)
        (bad,) = db.execute("SELECT count(*) FROM file WHERE state <> 'available'").fetchone()
        first, last = db.execute("SELECT min(started_at), max(started_at) FROM attempt").fetchone()
    if bad:
        raise RuntimeError(f"{bad} files were not found available")
    return ProbeRun(files / ((last - first) / 1000), spent / files * 1e6, memory)


def libcurl(files: int, url: str, concurrency: int) -> ProbeRun:
    """The same number of HEADs by libcurl alone."""
    command = [sys.executable, "-m", "tests.bench.libcurl_alone", str(files), url, str(concurrency)]
    return msgspec.json.decode(subprocess.run(command, capture_output=True, check=True).stdout, type=ProbeRun)


def bench_probes(console: Console, work: Path, files: int) -> dict[str, object]:
    """HEADs recorded a second, beside as many HEADs by libcurl alone that are not even looked at."""
    runs: dict[str, list[ProbeRun]] = {"libcurl alone": [], "notify_server": []}
    with nginx(work) as port:
        url = f"http://127.0.0.1:{port}"
        for turn in range(ROUNDS):
            store = work / f"probe-{turn}.db"
            asyncio.run(fill(store, files, url))
            runs["libcurl alone"].append(libcurl(files, url, 64))
            runs["notify_server"].append(drain(store, files, 64))
    table = Table(title=f"HEADs of {files:,} files, nginx on loopback, 64 at a time, median of {ROUNDS}")
    for column in ("", "files/s", "CPU µs/file", "memory MiB", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    limit = statistics.median(run.rate for run in runs["libcurl alone"])
    rows = {}
    for name, measured in runs.items():
        rate = statistics.median(run.rate for run in measured)
        cpu = statistics.median(run.cpu_us for run in measured)
        memory = statistics.median(run.memory_mib for run in measured)
        rows[name] = {"rate": rate, "cpu_us": cpu, "memory_mib": memory, "ratio": rate / limit}
        table.add_row(name, f"{rate:,.0f}", f"{cpu:.0f}", f"{memory:.0f}", f"{rate / limit:.2f}")
    console.print(table)
    return {"rows": rows, "runs": {name: [msgspec.to_builtins(run) for run in many] for name, many in runs.items()}}


def bench_backlog(console: Console, work: Path, files: int) -> dict[str, object]:
    """A large backlog: memory, and how soon after a start the first file is asked for."""
    store = work / "backlog.db"
    with nginx(work) as port:
        asyncio.run(fill(store, files, f"http://127.0.0.1:{port}"))
        started = unix_ms()
        with daemon(store) as (process, _), closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
            while (first := db.execute("SELECT min(started_at) FROM attempt").fetchone()[0]) is None:
                time.sleep(0.02)
            time.sleep(5)
            memory = resident_mib(process.pid)
            (pending,) = db.execute("SELECT sum(pending) FROM batch").fetchone()
    row = {"first_probe_seconds": (first - started) / 1000, "memory_mib": memory, "still_pending": pending}
    table = Table(title=f"A backlog of {files:,} files")
    for column in ("start to first probe s", "memory MiB while draining", "still pending then", "file on disk MiB"):
        table.add_column(column, justify="right")
    size = store.stat().st_size / 2**20
    table.add_row(f"{row['first_probe_seconds']:.1f}", f"{memory:.0f}", f"{pending:,}", f"{size:,.0f}")
    console.print(table)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("parts", nargs="*", help="acks, probes, backlog; all when none is named")
    parser.add_argument("--seconds", type=int, default=6, help="of each run of wrk")
    parser.add_argument("--files", type=int, default=60_000, help="of each drain")
    parser.add_argument("--backlog", type=int, default=1_000_000, help="files of the backlog")
    parser.add_argument("--json", type=Path, help="write the raw figures there")
    options = parser.parse_args()
    wanted = options.parts or ["acks", "probes", "backlog"]
    console = Console()
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="notify-bench-") as directory:
        work = Path(directory)
        try:
            if "acks" in wanted:
                results["acks"] = bench_acks(console, work, options.seconds)
            if "probes" in wanted:
                results["probes"] = bench_probes(console, work, options.files)
            if "backlog" in wanted:
                results["backlog"] = bench_backlog(console, work, options.backlog)
        except MissingToolError as error:
            print(f"make bench: {error}", file=sys.stderr)
            return 1
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
