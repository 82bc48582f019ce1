"""Holds 500 slow sockets against the daemon while honest callers post at a fixed rate, whatever becomes of the answers.

A slow socket that the daemon has closed is followed by another one, so that the attack never lets up. An honest post is
due at its moment: what it waits for a connection, or for the daemon, is all in its latency.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import aiohttp

from tests.support.daemon import Daemon
from tests.support.notification import batch_body
from tests.torture.figures import Figure, Setting

SLOW = 500
RATE = 100
SECONDS = 30
HEADER_TIMEOUT = 2.0
BODY_TIMEOUT = 3.0
# aiohttp looks after connections that are due to be closed once a second, and reads what is left of a refused body for
# another one.
SLACK = 2.5
WANTED_P99 = 1.0

HEAD = b"POST /notify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@dataclass(frozen=True)
class Habit:
    """How a slow socket begins, what it says again and again, and how long the daemon may bear it."""

    name: str
    start: bytes
    drip: bytes
    pause: float
    deadline: float


HABITS = [
    Habit("silent", b"", b"", 1.0, HEADER_TIMEOUT),
    Habit("half a request line", b"POST /no", b"", 1.0, HEADER_TIMEOUT),
    Habit("request line drip", b"POST /no", b"a", 0.3, HEADER_TIMEOUT),
    Habit("header drip", HEAD, b"X-A: b\r\n", 0.3, HEADER_TIMEOUT),
    Habit("header drip, byte by byte", HEAD + b"X-A: ", b"b", 0.3, HEADER_TIMEOUT),
    Habit("no body", HEAD + b"Content-Length: 5000\r\n\r\n", b"", 1.0, BODY_TIMEOUT),
    Habit("body drip", HEAD + b"Content-Length: 5000\r\n\r\n{", b" ", 0.3, BODY_TIMEOUT),
    Habit("chunk drip", HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.3, BODY_TIMEOUT),
]


@dataclass
class Seen:
    """What became of the slow ones and of the honest ones."""

    opened: int = 0
    closed_late: int = 0
    longest: float = 0.0
    held_by_habit: dict[str, float] = field(default_factory=dict)
    open_now: int = 0
    open_then: list[int] = field(default_factory=list)
    descriptors_then: list[int] = field(default_factory=list)
    refused: int = 0
    latencies: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open, without its record's files: a second reader opens when it is
    needed, and stays.
    """
    number = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            number += "notify.db" not in entry.readlink().name
    return number


class Slow(asyncio.Protocol):
    """One slow socket, from its connection to its end."""

    def __init__(self, habit: Habit) -> None:
        self.ended = asyncio.Event()
        self.heard = b""
        self._habit = habit
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._habit.start)
        if self._habit.drip:
            self._drip()

    def _drip(self) -> None:
        assert self._transport is not None
        self._transport.write(self._habit.drip)
        self._timer = asyncio.get_running_loop().call_later(self._habit.pause, self._drip)

    def data_received(self, data: bytes) -> None:
        self.heard += data

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.ended.set()

    def abort(self) -> None:
        """Close it from this side."""
        assert self._transport is not None
        self._transport.abort()


async def _attack(host: str, port: int, habit: Habit, over: asyncio.Event, seen: Seen) -> None:
    loop = asyncio.get_running_loop()
    while not over.is_set():
        _, slow = await loop.create_connection(lambda: Slow(habit), host, port)
        began = time.monotonic()
        seen.opened += 1
        seen.open_now += 1
        limit = habit.deadline + SLACK
        try:
            async with asyncio.timeout(2 * limit):
                await slow.ended.wait()
        except TimeoutError:
            slow.abort()
        held = time.monotonic() - began
        seen.open_now -= 1
        # Sent away for want of room, it would not have been an attack.
        seen.refused += slow.heard.startswith(b"HTTP/1.1 503")
        seen.closed_late += held > limit
        seen.longest = max(seen.longest, held)
        seen.held_by_habit[habit.name] = max(seen.held_by_habit.get(habit.name, 0.0), held)


async def _post(daemon: Daemon, batch: str, due: float, seen: Seen) -> None:
    try:
        # A connection of its own: one that is kept would not have to be accepted among all the others.
        reply = await daemon.post(batch_body(batch, []), Connection="close")
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        seen.failures.append(f"{batch}: {error!r}")
        return
    if reply.status != 200:
        seen.failures.append(f"{batch}: {reply.status} {reply.body!r}")
    seen.latencies.append(time.monotonic() - due)


async def _honest(daemon: Daemon, number: int, seen: Seen) -> None:
    """Post so many at the rate, each at its moment."""
    began = time.monotonic()
    async with asyncio.TaskGroup() as posts:
        for n in range(number):
            due = began + n / RATE
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            posts.create_task(_post(daemon, f"honest-{n}", due, seen))
            if n % (RATE // 10) == 0:
                seen.open_then.append(seen.open_now)
                seen.descriptors_then.append(descriptors(daemon.pid))


def _share(latencies: list[float], share: float) -> float:
    ordered = sorted(latencies)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("inf")


async def run(setting: Setting) -> list[Figure]:
    """Post for 30 seconds at scale 1, for 4 at least."""
    number = max(setting.times(SECONDS), 4) * RATE
    server = {"header_timeout": HEADER_TIMEOUT, "body_timeout": BODY_TIMEOUT}
    chance = random.Random(setting.seed)
    seen = Seen()
    async with Daemon(setting.work / "daemon", {"server": server}) as daemon:
        found = re.fullmatch(r"http://([0-9.]+):([0-9]+)/notify", daemon.callback)
        assert found
        assert (await daemon.post(batch_body("before", []), Connection="close")).status == 200
        idle = descriptors(daemon.pid)
        over = asyncio.Event()
        habits = [HABITS[n % len(HABITS)] for n in range(SLOW)]
        chance.shuffle(habits)
        attacks = [asyncio.create_task(_attack(found[1], int(found[2]), habit, over, seen)) for habit in habits]
        while seen.open_now < SLOW:
            await asyncio.sleep(0)
        await _honest(daemon, number, seen)
        over.set()
        await asyncio.gather(*attacks)
        began = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SLACK):
                while descriptors(daemon.pid) > idle:
                    await asyncio.sleep(0.02)
        left = descriptors(daemon.pid) - idle
        settling = time.monotonic() - began
        stored = daemon.value("SELECT count(*) FROM notification WHERE batch_id LIKE 'honest-%'")
    for failure in seen.failures[:20]:
        print(failure, file=sys.stderr)
    return _figures(seen, number, stored, left, settling)


def _figures(seen: Seen, number: int, stored: int, left: int, settling: float) -> list[Figure]:
    p50, p99, worst = (_share(seen.latencies, share) for share in (0.5, 0.99, 1.0))
    rounds = {f"longest_seconds, {name}": held for name, held in sorted(seen.held_by_habit.items())}
    # Between one that was closed and the next that takes its place there is a moment; so it is about the mean.
    held, known = mean(seen.open_then), mean(seen.descriptors_then)
    real = held >= 0.9 * SLOW and known >= 0.9 * SLOW and seen.refused == 0
    return [
        Figure(
            f"honest callers' p99 beside {SLOW} slow sockets",
            f"less than {WANTED_P99:.0f} s",
            f"{p99 * 1000:.0f} ms, p50 {p50 * 1000:.1f} ms, max {worst * 1000:.0f} ms",
            p99 < WANTED_P99 and real,
            {
                "posts": number,
                "rate": RATE,
                "p50_seconds": p50,
                "p99_seconds": p99,
                "max_seconds": worst,
                "slow_open_mean": held,
                "slow_open_fewest": min(seen.open_then),
                "descriptors_mean": known,
                "slow_sent_away": seen.refused,
            },
        ),
        Figure(
            "honest posts that failed",
            "0",
            f"{len(seen.failures)} of {number:,}",
            not seen.failures and stored == number,
            {"failed": len(seen.failures), "stored": stored},
        ),
        Figure(
            "sockets closed by their deadline",
            f"all, {HEADER_TIMEOUT:.0f} s for headers, {BODY_TIMEOUT:.0f} s for bodies, {SLACK} s of grace",
            f"{seen.opened - seen.closed_late:,} of {seen.opened:,}, the longest after {seen.longest:.1f} s",
            seen.closed_late == 0 and seen.opened >= SLOW,
            {"opened": seen.opened, "late": seen.closed_late, **rounds},
        ),
        Figure(
            "descriptors left open afterwards",
            "0",
            f"{max(0, left)} after {settling:.1f} s",
            left <= 0,
            {"left": left, "settling_seconds": settling},
        ),
    ]
