"""A real daemon to talk to: the app with its SQLite file and its prober, or the whole of `serve` with its listener.

Nothing here leaves the machine: the hosts of every target_url but those a test allows are refused by the guard.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import io
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import UUID

import aiohttp
import pytest
import pytest_asyncio
import structlog
import uvloop
from aiohttp import web
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from notify_server.app import POOL, make_app, make_front, serve
from notify_server.clock import unix_ms
from notify_server.config.config import Config
from notify_server.contract.signature import load_platform_key
from notify_server.store.sqlite import writer as sqlite_writer

SAMPLE: Final = (Path(__file__).parents[1] / "samples" / "notification.json").read_bytes()
JSON: Final = {"Content-Type": "application/json"}
PATIENCE: Final = 10.0

# Keeps a database locked for writing from its first line of output to its first line of input.
HOLD_LOCK: Final = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
"""


# An app takes 0.3 s to start: the tests of a module share a loop, so that they can share apps.
IN_THE_MODULES_LOOP: Final = pytest.mark.asyncio(loop_scope="module")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Where the loop's factory takes its scope from.
    if inspect.iscoroutinefunction(metafunc.function):
        metafunc.definition.add_marker(IN_THE_MODULES_LOOP, append=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and pytest_asyncio.is_async_test(item):
            item.add_marker(IN_THE_MODULES_LOOP, append=False)


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


async def eventually(check: Callable[[], object]) -> None:
    """Wait until `check` gives something true."""
    async with asyncio.timeout(PATIENCE):
        while not check():
            await asyncio.sleep(0.01)


class Clock:
    """Unix ms: the machine's, until a test sets `fixed`."""

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed

    def __call__(self) -> int:
        return unix_ms() if self.fixed is None else self.fixed


class Events:
    """What is logged, as it is logged: something to wait for."""

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


class Answer:
    """An HTTP answer that has been read to its end."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def __repr__(self) -> str:
        return f"<{self.status} {self.body[:200]!r}>"

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def refusal(self, status: int, code: str) -> str:
        """The `msg` of a refusal with this status and code, and the one shape that refusals have."""
        assert self.status == status, self
        assert self.headers["Content-Type"].partition(";")[0] == "application/json"
        content = self.json
        assert list(content) == ["request_id", "code", "msg", "data"]
        assert content["code"] == code, self
        assert content["data"] is None
        assert str(UUID(content["request_id"])) == content["request_id"]
        message = content["msg"]
        assert isinstance(message, str)
        assert message
        return message

    def accepted(self) -> str:
        """The request id in the default ack."""
        assert self.status == 200, self
        content = self.json
        assert content == {"request_id": content["request_id"], "code": "000", "msg": "成功", "data": None}
        return str(UUID(content["request_id"]))


class Connection:
    """A socket, for what no HTTP client would send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        # That the other side has gone is for the reading end to tell.
        with contextlib.suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()

    def end(self) -> None:
        """Send nothing more."""
        self._writer.write_eof()

    async def answer(self, *, bodiless: bool = False) -> Answer:
        """Read one answer."""
        async with asyncio.timeout(PATIENCE):
            head = await self._reader.readuntil(b"\r\n\r\n")
            status_line, *lines = head.decode("latin-1").strip().split("\r\n")
            headers = {name.title(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            status = int(status_line.split()[1])
            length = 0 if bodiless or status < 200 else int(headers["Content-Length"])
            return Answer(status, headers, await self._reader.readexactly(length))

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        async with asyncio.timeout(PATIENCE):
            try:
                return await self._reader.read()
            except ConnectionError:
                return b""

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


_numbers = iter(range(1, 1_000_000))


def entry(**changes: Any) -> dict[str, Any]:
    """An entry of a file_list, whose host the guard refuses; a field set to ... is left out."""
    number = next(_numbers)
    fields = {"oss_object_name": f"key/{number}", "target_url": f"http://nowhere.invalid/{number}"}
    return _changed({**fields, "status": "FINISHED"}, changes)


def notification(*entries: Any, **changes: Any) -> dict[str, Any]:
    """A notification of a batch of its own, with one file unless told; a field set to ... is left out."""
    fields = {"batch_id": f"batch-{next(_numbers)}", "api_code": "code", "file_list": list(entries) or [entry()]}
    return _changed(fields, changes)


def _changed(fields: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**fields, **changes}.items() if value is not ...}


class Stop(Protocol):
    def __call__(self, *, hang_up: bool = True) -> Coroutine[Any, Any, None]:
        """Stop the daemon and wait until it has stopped; `hang_up`: after closing the test's own sockets."""


class Daemon:
    """A running daemon, its database, and a client of it."""

    entry = staticmethod(entry)
    notification = staticmethod(notification)
    eventually = staticmethod(eventually)

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

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        async with self._session.request(method, path, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.ask("GET", path, **options)

    async def post(
        self, body: Any, headers: Mapping[str, str] | None = None, *, path: str = "/notify", **options: Any
    ) -> Answer:
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
        number = next(_numbers)
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


@pytest.fixture(scope="session")
def signer() -> Signer:
    return Signer()


@pytest.fixture(scope="session")
def other_signer() -> Signer:
    return Signer()


@pytest.fixture
def clock() -> Clock:
    """Stands still at the moment of the platform's signature example until a test moves it."""
    return Clock(1_604_990_109_987)


@pytest.fixture(scope="session")
def sample() -> bytes:
    """The example that the platform publishes."""
    return SAMPLE


@pytest.fixture(scope="module")
def events() -> Iterator[Events]:
    """Everything the module's daemons log."""
    events = Events()
    # Whatever level another module has left behind.
    structlog.reset_defaults()
    structlog.configure(processors=[events])
    yield events
    structlog.reset_defaults()


Start = Callable[..., Awaitable[Daemon]]


def build_config(directory: Path, sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """A configuration whose daemon keeps to itself; `sections` change it."""
    base: dict[str, dict[str, Any]] = {
        "server": {"port": 0},
        "store": {"url": f"sqlite:///{directory}/notify.db"},
        "verify": {"allowed_hosts": ["files.invalid", "127.0.0.1"], "retry_schedule": ["1h"]},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    values: dict[str, Any] = base
    return Config(**values)


async def start_app(directory: Path, events: Events, clock: Clock, sections: Mapping[str, Any]) -> Daemon:
    """Run the app behind its front, with what `serve` sets that has to do with requests."""
    config = build_config(directory, sections)
    app = make_app(config, wall=clock, now=clock)
    runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=1.0)
    await runner.setup()
    assert runner.server is not None
    front = make_front(app, runner.server, config.server)
    listener = await asyncio.get_running_loop().create_server(front, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    session = aiohttp.ClientSession(f"http://127.0.0.1:{port}")
    daemon = Daemon(config, port, session, events, clock)
    daemon.app = app
    daemon.handlers = runner.server

    async def stop(*, hang_up: bool = True) -> None:
        if hang_up:
            await daemon.hang_up()
        # As `serve` does: what has not been asked for yet need not be.
        pool = app[POOL]
        assert pool is not None
        pool.finish()
        listener.close()
        await session.close()
        await front.drain(1.0)
        await runner.cleanup()

    daemon.stop = stop
    return daemon


async def start_serving(directory: Path, events: Events, sections: Mapping[str, Any]) -> Daemon:
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
    daemon = Daemon(config, port, session, events, Clock())

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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def daemon(events: Events, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """An app with the default settings that the tests of a module share."""
    daemon = await start_app(tmp_path_factory.mktemp("daemon"), events, Clock(), {})
    yield daemon
    await daemon.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(events: Events, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """All of `serve`, with the default settings, that the tests of a module share."""
    daemon = await start_serving(tmp_path_factory.mktemp("served"), events, {})
    yield daemon
    await daemon.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start_shared(events: Events, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Start]:
    """Start apps with settings of their own, each with its database, for all tests of a module."""
    async with contextlib.AsyncExitStack() as stack:

        async def go(**sections: Any) -> Daemon:
            daemon = await start_app(tmp_path_factory.mktemp("shared"), events, Clock(), sections)
            return _stopped_once(daemon, stack)

        yield go


@pytest_asyncio.fixture(loop_scope="module")
async def start(events: Events, tmp_path: Path) -> AsyncIterator[Start]:
    """Start apps of one's own: `start(clock=…, auth={…}, …)`. All of a test's apps have the same database."""
    async with contextlib.AsyncExitStack() as stack:

        async def go(*, clock: Clock | None = None, **sections: Any) -> Daemon:
            daemon = await start_app(tmp_path, events, clock or Clock(), sections)
            return _stopped_once(daemon, stack)

        yield go


@pytest_asyncio.fixture(loop_scope="module")
async def start_server(events: Events, tmp_path: Path) -> AsyncIterator[Start]:
    """Start `serve` with settings of one's own."""
    async with contextlib.AsyncExitStack() as stack:

        async def go(**sections: Any) -> Daemon:
            return _stopped_once(await start_serving(tmp_path, events, sections), stack)

        yield go


def _stopped_once(daemon: Daemon, stack: contextlib.AsyncExitStack) -> Daemon:
    """Have the daemon stopped at the end of the test, unless the test does."""
    stop = daemon.stop
    task: asyncio.Task[None] | None = None

    async def once(*, hang_up: bool = True) -> None:
        nonlocal task
        task = task or asyncio.create_task(stop(hang_up=hang_up))
        await task

    daemon.stop = once
    stack.push_async_callback(once)
    return daemon


@pytest.fixture
def impatient_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores opened from here on give up on a locked file at once, or nearly."""
    monkeypatch.setattr(sqlite_writer, "BUSY_TIMEOUT_MS", 50)


Locked = Callable[[Daemon], contextlib.AbstractContextManager[None]]


@pytest.fixture
def locked() -> Locked:
    """`with locked(daemon):` another process holds the write lock of the daemon's database."""

    @contextlib.contextmanager
    def hold(daemon: Daemon) -> Iterator[None]:
        command = [sys.executable, "-c", HOLD_LOCK, str(daemon.path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            try:
                yield
            finally:
                process.stdin.write(b"\n")
                process.stdin.flush()
                # Not before it has let go.
                assert process.wait(PATIENCE) == 0

    return hold
