"""A database that is locked, full or failing under a store: nothing acked is lost, nothing is written by halves, and it
is got over without a restart.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from notify_server.errors import StoreUnavailableError
from notify_server.model import InboxItem
from notify_server.store.sqlite import writes
from notify_server.store.sqlite.store import SqliteStore
from tests.store.builders import (
    HOST,
    NOW,
    chunk,
    claim,
    claim_one,
    deliver,
    delivery,
    failed,
    finished,
    found,
    rejection,
    take_in,
)
from tests.support.sqlite_faults import (
    HOLD_LOCK,
    FlakyConnection,
    Interruption,
    child,
    connection_of,
    io_error,
    opened,
    select,
)

TABLES = ("notification", "batch", "file", "attempt", "rejection", "nonce", "heartbeat")


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    async with opened(path) as store:
        yield store


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FlakyConnection]]:
    """Connections of the store fail as `fault` says. Must come before the store."""
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, factory=FlakyConnection, **kwargs))
    yield FlakyConnection
    FlakyConnection.fault = None


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    return {table: select(path, f"SELECT * FROM {table}") for table in TABLES}


class Prepared:
    """A store with something for every verb to do."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store

    async def prepare(self) -> None:
        await take_in(self.store, finished("settled"), batch_id="settled", received_at=NOW - 20, now=NOW - 20)
        self.settled = await claim_one(self.store)
        await self.store.record([found(self.settled)], NOW + 10)
        await take_in(self.store, finished("a"), finished("b"), failed("c"), received_at=NOW - 10)
        await take_in(self.store, failed("old"), batch_id="old", now=NOW - 10, received_at=NOW - 10)
        await self.store.reject(rejection(received_at=NOW - 10))
        self.file = (await claim(self.store, n=1))[0]
        self.item: InboxItem = await deliver(self.store, 3)

    def verbs(self) -> dict[str, Callable[[], Awaitable[object]]]:
        store = self.store
        changed = [finished("a", url="https://new.example/a", host="new.example"), failed("d"), finished("e")]
        return {
            "accept": lambda: store.accept(delivery(nonce=("nonce", NOW + 1), request_id="fixed")),
            "reject": lambda: store.reject(rejection()),
            "expand": lambda: store.expand([chunk(self.item, *changed)], NOW),
            "discard": lambda: store.discard(self.item, "unreadable", NOW),
            "record": lambda: store.record([found(self.file)], NOW),
            "recheck": lambda: store.recheck([self.file.id, self.settled.id], NOW + 5),
            "replay": lambda: store.accept(delivery(replays=1, request_id="fixed")),
            "ping": lambda: store.ping(NOW),
            "prune": lambda: store.prune(NOW, NOW, 10),
        }


VERBS = ("accept", "reject", "expand", "discard", "record", "recheck", "replay", "ping", "prune")


@pytest.mark.parametrize("verb", VERBS)
async def test_a_verb_that_meets_a_lock_raises_has_written_nothing_and_succeeds_once_the_lock_is_gone(
    impatient: None, store: SqliteStore, path: Path, verb: str
) -> None:
    prepared = Prepared(store)
    await prepared.prepare()
    call = prepared.verbs()[verb]
    before, backlog = contents(path), store.backlog
    async with child(HOLD_LOCK, path) as holder:
        await holder.says("locked")
        for _ in range(2):
            with pytest.raises(StoreUnavailableError):
                await call()
        assert (contents(path), store.backlog) == (before, backlog)
        await holder.finish("free")
    await call()
    assert contents(path) != before


@pytest.mark.parametrize("verb", VERBS)
async def test_a_verb_cut_off_at_any_step_has_written_nothing_and_may_be_called_again(
    store: SqliteStore, path: Path, verb: str
) -> None:
    prepared = Prepared(store)
    await prepared.prepare()
    call = prepared.verbs()[verb]
    before, backlog = contents(path), store.backlog
    steps = 0
    while True:
        steps += 1
        interruption = Interruption(connection_of(store), steps)
        try:
            await call()
            break
        except StoreUnavailableError:
            assert interruption.happened
            assert store.backlog == backlog
        finally:
            interruption.lift()
    assert steps > 1 or verb == "ping"
    assert contents(path) != before
    after, backlog = contents(path), store.backlog

    # The same as without any failure.
    undisturbed = path.with_name("undisturbed.db")
    async with opened(undisturbed) as other:
        prepared = Prepared(other)
        await prepared.prepare()
        await prepared.verbs()[verb]()
        assert [len(rows) for rows in contents(undisturbed).values()] == [len(rows) for rows in after.values()]
        assert other.backlog == backlog


@pytest.mark.parametrize("verb", VERBS)
async def test_a_verb_whose_commit_fails_has_written_nothing_and_may_be_called_again(
    flaky: type[FlakyConnection], store: SqliteStore, path: Path, verb: str
) -> None:
    prepared = Prepared(store)
    await prepared.prepare()
    call = prepared.verbs()[verb]
    before, backlog = contents(path), store.backlog
    for code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_FSYNC):
        flaky.fault = lambda sql, code=code: io_error(code) if sql == "COMMIT" else None
        with pytest.raises(StoreUnavailableError):
            await call()
        flaky.fault = None
        assert (contents(path), store.backlog) == (before, backlog)
    await call()
    assert contents(path) != before


async def test_a_claim_that_is_cut_off_at_any_step_holds_nothing(store: SqliteStore) -> None:
    hosts = [f"h{n}.example" for n in range(4)]
    await take_in(store, *(finished(f"{n} {host}", host=host) for host in hosts for n in range(3)))
    steps = 0
    while True:
        steps += 1
        interruption = Interruption(connection_of(store), steps)
        try:
            files = await store.claim([(host, 3) for host in hosts], NOW)
            break
        except StoreUnavailableError:
            assert interruption.happened
        finally:
            interruption.lift()
    assert steps > 12
    assert len(files) == 12


async def test_a_file_that_started_over_in_a_failed_commit_is_still_recorded(
    flaky: type[FlakyConnection], store: SqliteStore
) -> None:
    await take_in(store, finished())
    file = await claim_one(store)
    item = await deliver(store)
    flaky.fault = lambda sql: io_error() if sql == "COMMIT" else None
    with pytest.raises(StoreUnavailableError):
        await store.expand([chunk(item, finished(url="https://new.example/key"))], NOW)
    flaky.fault = None
    (verdict,) = await store.record([found(file)], NOW)
    assert verdict.available == 1


async def test_rejections_that_could_not_be_committed_do_not_count_among_those_kept(
    flaky: type[FlakyConnection], store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writes, "MAX_REJECTIONS", 5)
    for n in range(3):
        await store.reject(rejection(detail=str(n)))
    flaky.fault = lambda sql: io_error(sqlite3.SQLITE_FULL) if sql == "COMMIT" else None
    for _ in range(20):
        with pytest.raises(StoreUnavailableError):
            await store.reject(rejection(detail="lost"))
    flaky.fault = None
    async with asyncio.timeout(10):
        await store.reject(rejection(detail="3"))
    assert select(path, "SELECT detail FROM rejection ORDER BY id") == [("0",), ("1",), ("2",), ("3",)]


async def test_a_failed_read_of_the_inbox_loses_no_entry(flaky: type[FlakyConnection], path: Path) -> None:
    async with opened(path) as store:
        id = await store.accept(delivery())
    async with opened(path) as store:
        await store.wait_inbox()
        flaky.fault = lambda sql: io_error(sqlite3.SQLITE_IOERR_READ)
        with pytest.raises(StoreUnavailableError):
            await store.inbox(10)
        flaky.fault = None
        async with asyncio.timeout(10):
            await store.wait_inbox()
        assert [item.id for item in await store.inbox(10)] == [id]


async def test_a_claim_released_while_the_database_cannot_be_opened_is_free_when_it_can(
    flaky: type[FlakyConnection], store: SqliteStore
) -> None:
    await take_in(store, finished("a"), finished("b"))
    files = await claim(store)
    flaky.fault = lambda sql: io_error()
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            await store.ping(NOW)
    store.release(files)
    with pytest.raises(StoreUnavailableError):
        await store.ping(NOW)
    flaky.fault = None
    assert sorted(file.id for file in await claim(store)) == sorted(file.id for file in files)


async def test_a_connection_broken_by_an_io_error_is_reopened_as_durable_as_before(
    flaky: type[FlakyConnection], store: SqliteStore, path: Path
) -> None:
    await take_in(store, finished())
    file = await claim_one(store)
    broken = connection_of(store)
    flaky.fault = lambda sql: io_error() if sql.startswith("INSERT") else None
    with pytest.raises(StoreUnavailableError, match="disk I/O error"):
        await store.accept(delivery())
    flaky.fault = None
    await store.accept(delivery())
    assert connection_of(store) is not broken
    assert connection_of(store).execute("PRAGMA synchronous").fetchone() == (2,)
    # Claims outlive the connection.
    assert await claim(store, HOST) == []
    assert len(await store.record([found(file)], NOW)) == 1
    assert select(path, "PRAGMA integrity_check") == [("ok",)]


async def test_a_full_database_refuses_deliveries_and_takes_them_again_when_there_is_room(
    store: SqliteStore, path: Path
) -> None:
    connection = connection_of(store)
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 20}")
    acked: list[int] = []
    with pytest.raises(StoreUnavailableError, match="full"):
        while len(acked) < 100:
            acked.append(await store.accept(delivery(body=b"x" * 10_000)))
    for _ in range(3):
        with pytest.raises(StoreUnavailableError, match="full"):
            await store.accept(delivery(body=b"x" * 1_000_000))
    connection.execute("PRAGMA max_page_count = 1000000")
    acked.append(await store.accept(delivery(body=b"x" * 1_000_000)))
    assert [id for (id,) in select(path, "SELECT id FROM notification ORDER BY id")] == acked
    assert select(path, "PRAGMA integrity_check") == [("ok",)]


FILL_DISK = """
import asyncio, json, resource, sys
from pathlib import Path
from notify_server.errors import StoreUnavailableError
from notify_server.store.sqlite.store import SqliteStore
from tests.store.builders import delivery

async def main():
    path = Path(sys.argv[1])
    store = await SqliteStore.open(path)
    acked, refused = [], 0
    async def accept():
        nonlocal refused
        try:
            acked.append(await store.accept(delivery(body=b"x" * 20_000)))
        except StoreUnavailableError:
            refused += 1
    await accept()
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    for _ in range(60):
        await accept()
    while_full = len(acked)
    backlog_full = store.backlog
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for _ in range(10):
        await accept()
    await store.close()
    print(json.dumps({"acked": acked, "while_full": while_full, "backlog_full": backlog_full, "refused": refused}))

asyncio.run(main())
"""


async def test_a_full_disk_loses_nothing_acked_and_is_got_over_without_a_restart(path: Path) -> None:
    async with child(FILL_DISK, path) as filler:
        output, _ = await filler.process.communicate()
    told = json.loads(output.splitlines()[-1])
    assert told["refused"] > 10
    assert told["while_full"] == told["backlog_full"] == 61 - told["refused"]
    assert len(told["acked"]) == told["while_full"] + 10
    assert select(path, "PRAGMA integrity_check") == [("ok",)]
    async with opened(path) as store:
        assert [item.id for item in await store.inbox(1000)] == told["acked"]
