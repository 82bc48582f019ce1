"""Every case that asks for `store` or `backend` runs once for each backend."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from notify_server.store.base import Engine
from notify_server.store.reading.types import Records
from notify_server.store.sqlite import database, read_connection
from tests.store.backends import BACKENDS, Backend


@pytest.fixture(params=BACKENDS)
def new_backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Backend]:
    """Makes a backend with an empty database each time it is called."""
    kind = BACKENDS[request.param]
    return lambda: kind(tmp_path_factory.mktemp("store"))


@pytest.fixture
async def backend(new_backend: Callable[[], Backend]) -> AsyncIterator[Backend]:
    backend = new_backend()
    yield backend
    await backend.close()


@pytest.fixture
async def store(backend: Backend) -> Engine:
    return await backend.open()


@pytest.fixture
async def records(backend: Backend, store: Engine) -> Records:
    """Return the records that people read beside `store`."""
    return await backend.records()


# SQLite alone


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "notify.db"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for locks for next to no time. Must come before the store."""
    for module in (database, read_connection):
        monkeypatch.setattr(module, "BUSY_TIMEOUT_MS", 20)
