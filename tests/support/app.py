"""The application in the test's own event loop: with its SQLite file and its prober, or the whole of `serve`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import sqlite3
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import aiohttp
import structlog
from aiohttp import web
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from notify_server.app import POOL, make_app
from notify_server.clock import unix_ms
from notify_server.config import Config
from notify_server.contract.signature import load_platform_key
from notify_server.serve import make_connections, serve
from notify_server.store.admin_token import read_token
from tests.support.http import Connection, Reply
from tests.support.notification import entry, notification, numbers
from tests.support.waiting import eventually

JSON: Final = {"Content-Type": "application/json"}
# Paths that need no admin_token; /metrics needs one only where one is configured.
OPEN: Final = ("/healthz", "/readyz", "/metrics")


class Clock:
    """Unix ms: the machine's, until a test sets `fixed`."""

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed

    def __call__(self) -> int:
        return unix_ms() if self.fixed is None else self.fixed


class Events:
    """The log lines as they come: something to wait for."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def __call__(self, logger: object, method: str, event: Any) -> Any:
        self.all.append({"level": method, **event})
        raise structlog.DropEvent

    def find(self, name: str, since: int = 0, **fields: object) -> dict[str, Any] | None:
        wanted = {"event": name, **fields}
        return next((event for event in self.all[since:] if wanted.items() <= event.items()), None)

    async def seen(self, name: str, since: int = 0, **fields: object) -> dict[str, Any]:
        """The first event of this name from index `since` on, once there is one."""
        await eventually(lambda: self.find(name, since, **fields))
        found = self.find(name, since, **fields)
        assert found is not None
        return found


class Stop(Protocol):
    def __call__(self, *, hang_up: bool = True) -> Coroutine[Any, Any, None]:
        """Stop the daemon and wait until it has stopped; `hang_up`: after closing the test's own sockets."""


class AppServer:
    """A running daemon, its database, and a client of it."""

    entry = staticmethod(entry)
    notification = staticmethod(notification)

    def __init__(self, config: Config, port: int, session: Any, events: Events, clock: Clock) -> None:
        self.config = config
        self.port = port
        self.path = config.store.path
        self.events = events
        self.clock = clock
        self.app: web.Application | None = None
        self.handlers: web.Server | None = None
        # Given by whoever started it: stops it, and waits until it has stopped.
        self.stop: Stop
        self._session = session
        self._connections: list[Connection] = []

    @property
    def token(self) -> str:
        """The admin_token that the server made for itself."""
        token = read_token(self.path)
        assert token is not None
        return token

    @property
    def admin(self) -> dict[str, str]:
        """The header with that token."""
        return {"Authorization": f"Bearer {self.token}"}

    async def ask(self, method: str, path: str, *, anonymous: bool = False, **options: Any) -> Reply:
        """Send a request, which has the server's own admin_token unless the server has another, the path is open, or
        it is to be `anonymous`.
        """
        if not (
            anonymous or self.config.auth.admin_token or path.startswith((*OPEN, self.config.server.callback_path))
        ):
            options["headers"] = {**self.admin, **(options.get("headers") or {})}
        async with self._session.request(method, path, **options) as response:
            return Reply(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Reply:
        return await self.ask("GET", path, **options)

    async def post(
        self, body: Any, headers: Mapping[str, str] | None = None, *, path: str = "/notify", **options: Any
    ) -> Reply:
        """Send a body (bytes, chunks of them, or something to write as JSON) to the callback path, as JSON."""
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        if isinstance(data, bytes) and len(data) > 2**20:
            data = io.BytesIO(data)
        return await self.ask("POST", path, data=data, headers=JSON if headers is None else headers, **options)

    async def connect(self) -> Connection:
        """A socket of one's own; closed at the end of the test if not before."""
        connection = Connection(*await asyncio.open_connection("127.0.0.1", self.port))
        self._connections.append(connection)
        return connection

    async def hang_up(self) -> None:
        while self._connections:
            await self._connections.pop().close()

    def rows(self, query: str, *parameters: object) -> list[Any]:
        with contextlib.closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as connection:
            return connection.execute(query, parameters).fetchall()

    def count(self, table: str) -> int:
        (count,) = self.rows(f"SELECT count(*) FROM {table}")[0]
        return int(count)

    def counts(self) -> tuple[int, int]:
        """How many notifications there are, and how many rejections."""
        return self.count("notification"), self.count("rejection")

    async def settled(self, batch_id: str) -> dict[str, Any]:
        """The event of the batch's verdict, once there is one."""
        return await self.events.seen("verdict", batch_id=batch_id)

    async def serves(self) -> None:
        """Take a notification all the way to its verdict: every part of the daemon works."""
        body = notification()
        (await self.post(body)).accepted()
        await self.settled(body["batch_id"])


class Signer:
    """The platform's side of the signed envelope, after its gateway document."""

    def __init__(self) -> None:
        self._private_key = rsa.generate_private_key(65537, 1024)
        der = self._private_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.public = base64.b64encode(der).decode()
        self.fingerprint = load_platform_key(self.public).fingerprint

    def sign(self, text: str) -> str:
        return base64.b64encode(self._private_key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA1())).decode()

    def seal(
        self, parameters: dict[str, Any], *, older: bool = False, as_text: bool = False, **changes: Any
    ) -> dict[str, Any]:
        """`parameters` in an envelope signed now, with a nonce of its own, or as `changes` say before it is signed."""
        number = next(numbers)
        head = {
            "appId" if older else "app_id": "8ZAFUPII49GQN2AB",
            "nonce": f"{number:06}",
            "timestamp": time.time_ns() // 1_000_000,
            "apiCode" if older else "api_code": "code",
            **changes,
        }
        signed = {name: value for name, value in {**parameters, **head}.items() if not isinstance(value, dict | list)}
        sign = self.sign("&".join(f"{name}={signed[name]}" for name in sorted(signed)))
        content: Any = json.dumps(parameters, ensure_ascii=False) if as_text else parameters
        return {**head, "params" if older else "request_content": content, "sign": sign}


def build_config(directory: Path, sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """A configuration whose daemon keeps to itself; `sections` change it."""
    base: dict[str, Any] = {
        "server": {"port": 0},
        "store": {"url": f"sqlite:///{directory}/notify.db"},
        "verify": {"allowed_hosts": ["files.invalid", "127.0.0.1"], "retry_schedule": ["1h"]},
    }
    for name, section in sections.items():
        # `forward` is a list of tables.
        base[name] = section if isinstance(section, list) else {**base.get(name, {}), **section}
    values: dict[str, Any] = base
    return Config(**values)


async def start_app(directory: Path, events: Events, clock: Clock, sections: Mapping[str, Any]) -> AppServer:
    """Run the app behind its front, with what `serve` sets that has to do with requests."""
    config = build_config(directory, sections)
    app = make_app(config, wall=clock, now=clock)
    runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=1.0)
    await runner.setup()
    assert runner.server is not None
    front = make_connections(app, runner.server, config.server)
    listener = await asyncio.get_running_loop().create_server(front, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    session = aiohttp.ClientSession(f"http://127.0.0.1:{port}")
    daemon = AppServer(config, port, session, events, clock)
    daemon.app = app
    daemon.handlers = runner.server

    async def stop(*, hang_up: bool = True) -> None:
        if hang_up:
            await daemon.hang_up()
        # As `serve` does: requests that have not begun need not begin.
        pool = app[POOL]
        assert pool is not None
        pool.finish()
        listener.close()
        await session.close()
        await front.drain(1.0)
        await runner.cleanup()

    daemon.stop = stop
    return daemon


async def start_serving(directory: Path, events: Events, sections: Mapping[str, Any]) -> AppServer:
    """Run `serve` itself in this loop."""
    config = build_config(directory, sections)
    stop_asked = asyncio.Event()
    since = len(events.all)
    task = asyncio.create_task(serve(config, stop_asked))
    ready = asyncio.create_task(events.seen("ready for notifications", since))
    await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        ready.cancel()
        task.result()
    port = int((await ready)["url"].rpartition(":")[2].partition("/")[0])
    session = aiohttp.ClientSession(f"http://127.0.0.1:{port}")
    daemon = AppServer(config, port, session, events, Clock())

    async def stop(*, hang_up: bool = True) -> None:
        if hang_up:
            await daemon.hang_up()
            await session.close()
        stop_asked.set()
        await task
        await daemon.hang_up()
        await session.close()

    daemon.stop = stop
    return daemon


Start = Callable[..., Awaitable[AppServer]]
