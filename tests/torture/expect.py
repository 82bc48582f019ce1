"""Registers submissions of which some are never notified or come short, with an outage of every server in between.

Of 1,000 submissions 50 are never notified, 30 list fewer files than submitted, and 20 are notified before they are
registered. Every server is killed half-way and stays away for longer than the limit. Then exactly the 50 are late and
exactly the 30 short, each told once to a receiver, and the late ones within five seconds of their limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.support.daemon import Daemon
from tests.support.notification import API_CODE, batch_body, failed
from tests.support.postgres import new_schema
from tests.torture.figures import Figure, Setting
from tests.torture.nodes import postgres

SUBMISSIONS = 1_000
FILES = 3
# Long enough for every notification to be posted in time on a busy machine.
NOTIFY_SECONDS = 20.0
AWAY_SECONDS = 24.0
TOGETHER = 50
TOLD_SECONDS = 30.0
LATE_SECONDS = 5.0
PROBLEMS = ("batch.late", "batch.short")


class Receiver:
    """Takes every event; `told` has the type and reference of each, by its webhook-id."""

    def __init__(self) -> None:
        self.told: dict[str, tuple[str, str]] = {}
        self.delays: list[float] = []

    async def handle(self, request: web.Request) -> web.Response:
        payload = await request.json()
        data = payload["data"]
        self.told[request.headers["webhook-id"]] = payload["type"], data.get("reference")
        if payload["type"] == "batch.late":
            at, limit = (datetime.fromisoformat(text) for text in (payload["timestamp"], data["limit_at"]))
            self.delays.append((at - limit).total_seconds())
        return web.Response()

    def references(self, kind: str) -> list[str]:
        """The references of the events of a type, one for each event."""
        return sorted(reference for type, reference in self.told.values() if type == kind)


async def register(daemon: Daemon, submissions: Sequence[str], notify_seconds: float) -> None:
    """Register submissions of FILES files each; a batch_id is its reference."""
    lines = [
        {"reference": each, "api_code": API_CODE, "batch_id": each, "files": FILES,
         "notify_within": notify_seconds, "verdict_within": "1h"}
        for each in submissions
    ]  # fmt: skip
    body = "".join(json.dumps(line) + "\n" for line in lines)
    headers = {"Content-Type": "application/x-ndjson", **daemon.admin}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{daemon.url}/api/v1/expectations", data=body, headers=headers) as response,
    ):
        assert response.status == 201, await response.text()


async def notify(nodes: Sequence[Daemon], submissions: Sequence[str], short: set[str]) -> None:
    """Post the notifications, TOGETHER at a time, to each node in turn."""

    async def post(place: int, name: str) -> None:
        files = FILES - 1 if name in short else FILES
        reply = await nodes[place % len(nodes)].post(batch_body(name, [failed(f"k{n}") for n in range(files)]))
        assert reply.status == 200, reply

    for start in range(0, len(submissions), TOGETHER):
        part = submissions[start : start + TOGETHER]
        await asyncio.gather(*(post(place, name) for place, name in enumerate(part)))


async def play(
    setting: Setting, nodes: Sequence[Daemon], receiver: Receiver, notify_seconds: float, away_seconds: float
) -> list[Figure]:
    """Register, notify, kill and start again; the figures of one store."""
    number = max(20, setting.times(SUBMISSIONS))
    names = [f"order-{n}" for n in range(number)]
    random.Random(setting.seed).shuffle(names)
    never, short, early = names[: number // 20], names[number // 20 :][: number * 3 // 100 or 1], names[-number // 50 :]
    others = [name for name in names if name not in {*never, *early}]
    half = len(others) // 2
    await notify(nodes, early, set(short))
    await register(nodes[0], names, notify_seconds)
    await notify(nodes, others[:half], set(short))
    for node in nodes:
        await node.kill()
    await asyncio.sleep(away_seconds)
    for node in nodes:
        await node.start()
    await notify(nodes, others[half:], set(short))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TOLD_SECONDS + notify_seconds):
            while len(receiver.references("batch.late")) < len(never):
                await asyncio.sleep(0.1)
    # No other event comes in the seconds in which false alarms would come.
    await asyncio.sleep(notify_seconds / 2)
    late, told_short = receiver.references("batch.late"), receiver.references("batch.short")
    states = Counter()  # type: Counter[str]
    for state in ("waiting", "late", "short", "met"):
        page = json.loads((await nodes[0].get(f"/api/v1/expectations?state={state}&limit=500")).body)
        states[state] = len(page["items"])
    slowest = max(receiver.delays, default=0.0)
    return [
        Figure("late", "those never notified, once each", f"{len(late):,} of {len(never):,}", late == sorted(never),
               {"late": len(late), "never": len(never)}),
        Figure("short", "those with fewer files, once each", f"{len(told_short):,} of {len(short):,}",
               told_short == sorted(short), {"short": len(told_short)}),
        Figure("states", "the others are met", ", ".join(f"{n:,} {s}" for s, n in states.items()),
               (states["late"], states["short"], states["waiting"]) == (len(never), len(short), 0)),
        Figure("slowest alarm after its limit", f"at most {LATE_SECONDS:g} s", f"{slowest:.1f} s",
               bool(receiver.delays) and slowest <= LATE_SECONDS, {"seconds": slowest}),
    ]  # fmt: skip


@contextlib.asynccontextmanager
async def started(folder: Path, urls: Sequence[str | None]) -> AsyncIterator[tuple[list[Daemon], Receiver]]:
    """A daemon for each address of a store (None: a file of its own), which forward to the receiver."""
    receiver, app = Receiver(), web.Application()
    app.router.add_post("/", receiver.handle)
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(TestServer(app))
        forward = [{"name": "a", "url": str(server.make_url("/")), "allowed_networks": ["127.0.0.0/8"]}]
        nodes = []
        for place, url in enumerate(urls):
            config: dict[str, Any] = {"forward": forward, "auth": {"admin_token": "correct-horse-battery"}}
            if url is not None:
                config["store"] = {"url": url, "lease": "5s"}
            nodes.append(await stack.enter_async_context(Daemon(folder / str(place), config)))
        yield nodes, receiver


async def on_sqlite(
    setting: Setting, notify_seconds: float = NOTIFY_SECONDS, away_seconds: float = AWAY_SECONDS
) -> list[Figure]:
    """One server on a file."""
    async with started(setting.work / "sqlite", [None]) as (nodes, receiver):
        return await play(setting, nodes, receiver, notify_seconds, away_seconds)


async def on_postgres(setting: Setting) -> list[Figure]:
    """Two servers on one database."""
    with postgres() as server:
        url = await new_schema(server)
        async with started(setting.work / "postgres", [url, url]) as (nodes, receiver):
            return await play(setting, nodes, receiver, NOTIFY_SECONDS, AWAY_SECONDS)


async def run(setting: Setting) -> list[Figure]:
    """1,000 submissions at scale 1, on SQLite and on two nodes of PostgreSQL."""
    figures = await on_sqlite(setting)
    return [
        *figures,
        *(Figure(f"{f.name}, two nodes", f.wanted, f.seen, f.met, f.counts) for f in await on_postgres(setting)),
    ]
