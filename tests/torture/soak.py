"""Holds the daemon at half of what it can do, and fits a line to its memory, descriptors and threads.

First, for a few seconds, batches are posted as fast as they are acked, and waited for until every file has settled:
what was settled a second is the capacity of the whole, acks and probes together. Then batches come at half that pace by
the clock, whether or not those before them were answered, so that a daemon that slows down is not spared. After a
warm-up the memory, descriptors and threads of the daemon and its probers are read every second. Of memory that is what
no other process shares and no file backs: shared libraries count for more whenever another program that has them ends.

The warm-up is a third of the time, because these grow by design until they are full, and would pass for a leak:
SQLite's page cache (32 MiB of pages, filled by some 30,000 files), the allocator's arenas, which the burst before has
stretched, and one connection to the origin for each probe that may be in flight. One thing goes on growing slowly for
longer than any warm-up here: statements are prepared for each number of rows, some 100 kB each, and the seldom numbers
come late; 512 of them are kept. Settled batches are kept for as long as the run lasts, so that the database grows all
the while, as it does in its first 90 days: 1 kB a file.

Seconds next to each other are alike, so a line through them would seem surer than it is: it is fitted to the means of
BLOCKS stretches, and its standard error is that of their scatter. What is asked of memory is that it grows by less than
LEAST bytes for each file taken, by two standard errors: the smallest of Python's objects, forgotten with every file,
would be 24 bytes, and one of 112 bytes forgotten with every batch would be LEAST. Over so many files that is tens or
hundreds of MB an hour, and three minutes cannot tell less; in half an hour (SCALE=10) the figure seen is finer.
Descriptors must not grow by more than one in a thousand batches, nor threads at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.bench.servers import daemon, nginx
from tests.support.notification import batch_body
from tests.torture.client import Connection
from tests.torture.figures import Figure, Setting

SECONDS = 165
BURST_SECONDS = 4.0
WARM_UP_SHARE = 1 / 3
SHARE = 0.5
CONNECTIONS = 32
FILES = 7
BLOCKS = 12
LEAST = 16.0
TICK_SECONDS = 0.01
SETTLE_SECONDS = 60.0
MIB = 2**20


class Sample(NamedTuple):
    """The daemon and its probers at a moment, `at` in monotonic seconds."""

    at: float
    memory: int
    rss: int
    descriptors: int
    threads: int


class Line(NamedTuple):
    """A fitted line: what it rises by in a second, and the standard error of that."""

    slope: float
    error: float


def fit(points: Sequence[tuple[float, float]], blocks: int = BLOCKS) -> Line:
    """Least squares through the means of so many stretches of the points; at least three points are needed."""
    blocks = min(blocks, len(points))
    cuts = [len(points) * number // blocks for number in range(blocks + 1)]
    stretches = [points[start:end] for start, end in itertools.pairwise(cuts)]
    x = [statistics.fmean(at for at, _ in stretch) for stretch in stretches]
    y = [statistics.fmean(value for _, value in stretch) for stretch in stretches]
    slope, intercept = statistics.linear_regression(x, y)
    rest = sum((value - intercept - slope * at) ** 2 for at, value in zip(x, y, strict=True))
    middle = statistics.fmean(x)
    return Line(slope, (rest / (blocks - 2) / sum((at - middle) ** 2 for at in x)) ** 0.5)


def sample(pid: int) -> Sample:
    """Read /proc of the process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    totals = dict.fromkeys(("Anonymous", "Rss", "descriptors", "Threads"), 0)
    for process in (pid, *map(int, children)):
        folder = Path(f"/proc/{process}")
        lines = (folder / "smaps_rollup").read_text().splitlines()[1:] + (folder / "status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        for name in ("Anonymous", "Rss"):
            totals[name] += int(fields[name].split()[0]) * 1024
        totals["Threads"] += int(fields["Threads"])
        totals["descriptors"] += sum(1 for _ in (folder / "fd").iterdir())
    return Sample(time.monotonic(), *totals.values())


class Load:
    """Posts batches to the daemon over CONNECTIONS connections."""

    def __init__(self, session: aiohttp.ClientSession, port: int, origin: str) -> None:
        self.acked = 0
        self.errors = 0
        self.latencies: list[float] = []
        self._base = f"http://127.0.0.1:{port}"
        self._origin = origin
        self._numbers = itertools.count(1)
        self._due: asyncio.Queue[float] = asyncio.Queue()
        self._session = session

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Post due batches within this block."""
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(self._work()) for _ in range(CONNECTIONS)]
            yield
            for worker in workers:
                worker.cancel()

    async def _work(self) -> None:
        """Post due batches over one connection, and over another after an error."""
        while True:
            async with Connection(f"{self._base}/notify") as connection:
                while await self._post(connection, await self._due.get()):
                    pass

    async def _post(self, connection: Connection, due: float) -> bool:
        batch = f"soak-{next(self._numbers)}"
        files = [f"{self._origin}/IMAGE/{batch}/{number}" for number in range(FILES)]
        posted = await connection.post(batch, batch_body(batch, files))
        self.latencies.append(time.monotonic() - due)
        self._due.task_done()
        if posted.status != 200:
            self.errors += 1
            return False
        self.acked += 1
        return True

    async def burst(self, seconds: float) -> None:
        """As many as are acked in so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while self._due.qsize() < CONNECTIONS:
                self._due.put_nowait(time.monotonic())
            await asyncio.sleep(0.001)
        await self._due.join()

    async def pace(self, rate: float, seconds: float) -> None:
        """So many batches a second, by the clock."""
        began = time.monotonic()
        sent = 0
        while (elapsed := time.monotonic() - began) < seconds:
            while sent < elapsed * rate:
                self._due.put_nowait(began + sent / rate)
                sent += 1
            await asyncio.sleep(TICK_SECONDS)
        await self._due.join()

    async def metrics(self) -> Mapping[str, float]:
        """What the daemon counts, by name, and by label's value where there is a label."""
        async with self._session.get(f"{self._base}/metrics") as response:
            text = await response.text()
        return {
            "/".join((sample.name, *sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def settled(self) -> None:
        """Return once no file is pending."""
        async with asyncio.timeout(SETTLE_SECONDS):
            while (await self.metrics())["notify_server_backlog_files"]:
                await asyncio.sleep(0.05)


async def run(setting: Setting) -> list[Figure]:
    """Soak it for 3 minutes at scale 1."""
    seconds = max(6.0, SECONDS * setting.scale)
    keep = f"{round(seconds * 2 + 600)}s"
    samples: list[Sample] = []
    async with aiohttp.ClientSession() as session:
        with (
            nginx(setting.work) as origin,
            daemon(setting.work / "notify.db", retention__completed=keep) as server,
        ):
            load = Load(session, server.port, f"http://127.0.0.1:{origin.port}")
            began = time.monotonic()
            async with load.connected():
                await load.burst(min(BURST_SECONDS, seconds / 6))
            acks = load.acked / (time.monotonic() - began)
            await load.settled()
            capacity = load.acked / (time.monotonic() - began)
            rate = capacity * SHARE

            # Over new connections: the daemon closes those that were idle meanwhile.
            async with load.connected():
                await load.pace(rate, seconds * WARM_UP_SHARE)
                load.latencies.clear()
                before = load.acked
                began = time.monotonic()
                pacing = asyncio.create_task(load.pace(rate, seconds * (1 - WARM_UP_SHARE)))
                while not pacing.done():
                    samples.append(sample(server.pid))
                    await asyncio.wait([pacing], timeout=1)
                await pacing
                held = (load.acked - before) / (time.monotonic() - began)
            await load.settled()
            counted = await load.metrics()

    hours = (samples[-1].at - samples[0].at) / 3600
    memory = fit([(one.at, one.memory) for one in samples])
    descriptors = fit([(one.at, one.descriptors) for one in samples])
    threads = fit([(one.at, one.threads) for one in samples])
    bound = LEAST * held * FILES
    growth, error = memory.slope * 3600 / 1e6, memory.error * 3600 / 1e6
    complete = round(counted["notify_server_verdicts_total/complete"])
    incomplete = round(counted.get("notify_server_verdicts_total/incomplete", 0))
    latencies = sorted(load.latencies)
    p99 = latencies[int(len(latencies) * 0.99)]
    return [
        Figure(
            f"held at {SHARE:.0%} of capacity",
            f"{rate:,.0f} acks/s, {rate * FILES:,.0f} files/s",
            f"{held:,.0f} acks/s, {held * FILES:,.0f} files/s for {hours * 60:.1f} min",
            held > 0.95 * rate,
            {
                "acks a second in a burst": acks,
                "batches settled a second": capacity,
                "pace": rate,
                "held": held,
                "p50 ms": statistics.median(latencies) * 1000,
                "p99 ms": p99 * 1000,
            },
        ),
        Figure(
            "acks and verdicts",
            "all complete, 0 errors",
            f"{complete:,} complete of {load.acked:,} acked, {load.errors} errors; {complete * FILES:,} files",
            complete == load.acked and not incomplete and not load.errors,
            {"acked": load.acked, "complete": complete, "incomplete": incomplete, "errors": load.errors},
        ),
        Figure(
            "growth of memory, MB an hour",
            f"below {bound * 3600 / 1e6:,.0f} ({LEAST:.0f} bytes a file)",
            f"{growth:+.1f} ± {error:.1f}, at {samples[-1].memory / MIB:.0f} MiB",
            memory.slope + 2 * memory.error < bound,
            {
                "first MiB": samples[0].memory / MIB,
                "last MiB": samples[-1].memory / MIB,
                "MB an hour": growth,
                "standard error": error,
                "bytes a file": memory.slope / (held * FILES),
                "last RSS MiB": samples[-1].rss / MIB,
                "samples": len(samples),
            },
        ),
        Figure(
            "growth of descriptors and threads, an hour",
            f"below {held * 3.6:,.0f} and 0",
            f"{descriptors.slope * 3600:+.1f} ± {descriptors.error * 3600:.1f} at {samples[-1].descriptors}, "
            f"{threads.slope * 3600:+.1f} at {samples[-1].threads}",
            descriptors.slope + 2 * descriptors.error < held / 1000 and threads.slope <= 2 * threads.error,
            {
                "descriptors": samples[-1].descriptors,
                "descriptors an hour": descriptors.slope * 3600,
                "standard error": descriptors.error * 3600,
                "threads": samples[-1].threads,
            },
        ),
    ]
