"""A store on SQLite, a receiver, and a sender between them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from aiohttp import web
from pytest_aiohttp.plugin import AiohttpServer

from notify_server.clock import unix_ms
from notify_server.config import Config
from notify_server.forward.sender import Sender
from notify_server.store.outbox import Outbox
from notify_server.store.sqlite.store import SqliteStore
from tests.support.waiting import Bell, eventually


class Hit(NamedTuple):
    """A request that reached the receiver."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def payload(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.body)
        return loaded


class Receiver:
    """Answers with `answers`, one after the other, the last one for ever; holds its answers while `gate` is cleared."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes, dict[str, str]]] = [(200, b"", {})]
        self.hits: list[Hit] = []
        self.busy = 0
        self.busiest = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.bell = Bell()
        self.url = ""

    def answer(self, status: int, body: bytes | dict[str, Any] = b"", **headers: str) -> None:
        """Answer like this from now on."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.answers = [(status, data, {name.replace("_", "-"): value for name, value in headers.items()})]

    async def handle(self, request: web.Request) -> web.Response:
        self.hits.append(Hit(request.path, {k.lower(): v for k, v in request.headers.items()}, await request.read()))
        self.busy += 1
        self.busiest = max(self.busy, self.busiest)
        self.bell.ring()
        await self.gate.wait()
        self.busy -= 1
        status, body, headers = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(status=status, body=body, headers=headers)

    async def reached(self, number: int) -> None:
        await self.bell.until(lambda: len(self.hits) >= number)


@pytest.fixture
async def receiver(aiohttp_server: AiohttpServer) -> Receiver:
    receiver = Receiver()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", receiver.handle)
    server = await aiohttp_server(app)
    receiver.url = str(server.make_url("/"))
    return receiver


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(tmp_path / "notify.db")
    yield store
    await store.close()


class Time:
    """Unix ms that a test moves."""

    def __init__(self) -> None:
        self.at = unix_ms()

    def __call__(self) -> int:
        return self.at


@pytest.fixture
def time() -> Time:
    return Time()


Send = Callable[..., Awaitable[Sender]]


@pytest.fixture
async def send(store: SqliteStore, time: Time) -> AsyncIterator[Send]:
    """Start a sender with these `[[forward]]` tables."""
    senders: list[Sender] = []

    async def start(*tables: dict[str, Any], outbox: Outbox | None = None, **options: Any) -> Sender:
        config = Config(forward=tables)  # type: ignore[arg-type]
        sender = Sender(config.forward, outbox or store.outbox, now=time, chance=lambda: 0.5, **options)
        senders.append(sender)
        await sender.start()
        return sender

    yield start
    for sender in senders:
        await sender.stop(0.0)


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    """Call a coroutine function until it returns True. Raises TimeoutError."""
    await eventually(cast("Callable[[], bool]", check))
