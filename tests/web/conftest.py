"""A real daemon to talk to: the app with its SQLite file and its prober, or the whole of `serve` with its listener.

Nothing here leaves the machine: the hosts of every target_url but those a test allows are refused by the guard.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import structlog
import uvloop

from notify_server.store.sqlite import database
from tests.support.app import AppServer, Clock, Events, Signer, Start, start_app, start_serving
from tests.support.waiting import SECONDS

SAMPLE: Final = (Path(__file__).parents[1] / "samples" / "notification.json").read_bytes()

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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def daemon(events: Events, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AppServer]:
    """An app with the default settings that the tests of a module share."""
    daemon = await start_app(tmp_path_factory.mktemp("daemon"), events, Clock(), {})
    yield daemon
    await daemon.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(events: Events, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AppServer]:
    """All of `serve`, with the default settings, that the tests of a module share."""
    daemon = await start_serving(tmp_path_factory.mktemp("served"), events, {})
    yield daemon
    await daemon.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start_shared(events: Events, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Start]:
    """Start apps with settings of their own, each with its database, for all tests of a module."""
    async with contextlib.AsyncExitStack() as stack:

        async def go(**sections: Any) -> AppServer:
            daemon = await start_app(tmp_path_factory.mktemp("shared"), events, Clock(), sections)
            return _stopped_once(daemon, stack)

        yield go


@pytest_asyncio.fixture(loop_scope="module")
async def start(events: Events, tmp_path: Path) -> AsyncIterator[Start]:
    """Start apps of one's own: `start(clock=…, auth={…}, …)`. All of a test's apps have the same database."""
    async with contextlib.AsyncExitStack() as stack:

        async def go(*, clock: Clock | None = None, **sections: Any) -> AppServer:
            daemon = await start_app(tmp_path, events, clock or Clock(), sections)
            return _stopped_once(daemon, stack)

        yield go


@pytest_asyncio.fixture(loop_scope="module")
async def start_server(events: Events, tmp_path: Path) -> AsyncIterator[Start]:
    """Start `serve` with settings of one's own."""
    async with contextlib.AsyncExitStack() as stack:

        async def go(**sections: Any) -> AppServer:
            return _stopped_once(await start_serving(tmp_path, events, sections), stack)

        yield go


def _stopped_once(daemon: AppServer, stack: contextlib.AsyncExitStack) -> AppServer:
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
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 50)


Locked = Callable[[AppServer], contextlib.AbstractContextManager[None]]


@pytest.fixture
def locked() -> Locked:
    """`with locked(daemon):` another process holds the write lock of the daemon's database."""

    @contextlib.contextmanager
    def hold(daemon: AppServer) -> Iterator[None]:
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
                assert process.wait(SECONDS) == 0

    return hold
