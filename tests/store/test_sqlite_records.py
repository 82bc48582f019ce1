"""SQLite only: reading beside the writer, with failures, time limits and held transactions."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest

from notify_server.errors import StoreRefusedError, StoreUnavailableError
from notify_server.store.reading.queries import READ_SECONDS
from notify_server.store.reading.types import BatchFilter, FileFilter
from notify_server.store.sqlite import records as sqlite_records
from notify_server.store.sqlite.read_connection import ReadConnection, connect_read_only
from notify_server.store.sqlite.records import SqliteRecords
from notify_server.store.sqlite.store import SqliteStore
from tests.store.builders import NOW, claim, delivery, finished, missing, take_in
from tests.support.sqlite_faults import HOLD_ALL, child, connection_of, opened


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    async with opened(path) as store:
        yield store


@pytest.fixture
async def records(store: SqliteStore, path: Path) -> AsyncIterator[SqliteRecords]:
    records = SqliteRecords(path, progress_steps=10)
    yield records
    await records.close()


async def unavailable(records: SqliteRecords) -> str:
    """The one line with which the record cannot be read."""
    with pytest.raises(StoreUnavailableError) as caught:
        await records.totals()
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def every_call(records: SqliteRecords) -> None:
    """Each call of the Protocol, and each kind of listing, once."""
    await records.totals()
    page = await records.batches(BatchFilter(), None, 1)
    await records.batches(BatchFilter(), page.next, 1)
    await records.batch(1)
    await records.files(FileFilter(), None, 1)
    await records.files(FileFilter(batch=1), None, 1)
    await records.files(FileFilter(reason="http_410"), None, 1)
    await records.count(FileFilter(host="nowhere"))
    await records.file(1)
    await records.failures(1)
    await records.backlog(1)
    await records.rejections(None, 1)
    await records.rejection(1)
    await records.rejected_body(1)
    await records.search("b", 1)


# What fails


async def test_a_database_that_is_not_there_yet_is_unavailable_and_read_once_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notify.db"
    records = SqliteRecords(path)
    assert await unavailable(records) == f"{path}: there is no record: start the daemon, or name its database"
    async with opened(path):
        assert (await records.totals()).batches == 0
        await records.close()


async def test_a_database_that_is_deleted_is_unavailable_to_whoever_opens_it_then(
    store: SqliteStore, records: SqliteRecords, path: Path
) -> None:
    await take_in(store, finished())
    path.unlink()
    assert "there is no record" in await unavailable(records)


async def test_a_database_that_is_locked_is_unavailable_and_read_again_once_it_is_free(
    impatient: None, path: Path
) -> None:
    async with opened(path) as store:
        await take_in(store, finished())
    records = SqliteRecords(path)
    async with child(HOLD_ALL, path) as holder:
        await holder.says("locked")
        assert "cannot be read (database is locked)" in await unavailable(records)
        await holder.finish("free")
    async with opened(path):
        assert (await records.totals()).files == 1
        await records.close()


async def test_a_database_that_is_damaged_under_it_is_unavailable_and_read_again_once_it_is_whole(path: Path) -> None:
    async with opened(path) as store:
        await take_in(store, *(finished(str(n)) for n in range(500)))
    whole = path.read_bytes()
    async with opened(path):
        records = SqliteRecords(path)
        # Both connections are open.
        await asyncio.gather(*(records.totals() for _ in range(10)))
        path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
        for _ in range(10):
            with pytest.raises(StoreUnavailableError, match="cannot be read: database disk image is malformed"):
                await records.files(FileFilter(batch=1), None, 1000)
        path.write_bytes(whole)
        for _ in range(10):
            assert len((await records.files(FileFilter(batch=1), None, 1000)).items) == 500
        assert len(records._idle) <= sqlite_records.MAX_CONNECTIONS
        await every_call(records)
        await records.close()


async def test_nothing_can_be_written_by_it(store: SqliteStore, path: Path) -> None:
    async with await ReadConnection.open(path) as connection:
        for statement in ("DELETE FROM batch", "CREATE TABLE mine (id)", "PRAGMA user_version = 9"):
            with pytest.raises(StoreUnavailableError, match="readonly"):
                await connection.rows(statement)
    with pytest.raises(StoreRefusedError, match="there is no record"):
        await ReadConnection.open(path.with_name("another.db"))
    await store.ping(NOW)


# What lasts


async def test_a_read_that_takes_too_long_is_cut_off_and_the_next_one_is_answered(
    store: SqliteStore, records: SqliteRecords
) -> None:
    await take_in(store, *(finished(str(n)) for n in range(2000)))
    records.read_seconds = 0.0
    for _ in range(4):
        with pytest.raises(StoreUnavailableError, match="that is too much to read at once"):
            await records.count(FileFilter(host="nowhere"))
    records.read_seconds = READ_SECONDS
    opened_by_then = list(records._idle)
    assert await records.count(FileFilter(host="nowhere")) == 0
    await every_call(records)
    assert opened_by_then == records._idle
    assert not any(connection.in_transaction for connection in records._idle)


async def test_a_cancelled_read_is_interrupted_and_its_connection_is_used_again(store: SqliteStore, path: Path) -> None:
    endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    async with await ReadConnection.open(path) as connection:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()
        is_late = connection._is_late

        def observed() -> bool:
            loop.call_soon_threadsafe(begun.set)
            return is_late()

        await connection._connection.set_progress_handler(observed, 100)
        reading = asyncio.create_task(connection.rows(endless))
        await begun.wait()
        # A second cancellation must not abandon the statement either.
        reading.cancel()
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert not connection.in_transaction
        assert await connection.rows("SELECT 1") == [(1,)]


async def test_cancelled_calls_give_their_connection_back(
    store: SqliteStore, records: SqliteRecords, path: Path
) -> None:
    await take_in(store, *(finished(str(n)) for n in range(100)))
    for turns in range(12):
        calls = [asyncio.create_task(records.files(FileFilter(), None, 100)) for _ in range(5)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert len((await records.files(FileFilter(), None, 200)).items) == 100
    assert len(records._idle) <= sqlite_records.MAX_CONNECTIONS


async def test_reads_hold_no_transaction_so_that_the_wal_can_be_cut_short_afterwards(
    store: SqliteStore, records: SqliteRecords, path: Path
) -> None:
    await take_in(store, *map(finished, "abc"))
    await store.record([missing(file) for file in await claim(store, n=1)], NOW)
    wal = path.with_name(path.name + "-wal")
    for seconds in (5.0, 0.0):
        records.read_seconds = seconds
        calls = (every_call(records) for _ in range(4))
        cut_off = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(each) for each in cut_off} == {type(None) if seconds else StoreUnavailableError}
        await store.accept(delivery())
        assert wal.stat().st_size > 0
        assert connection_of(store).execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        assert wal.stat().st_size == 0


async def test_a_read_that_lasts_keeps_no_delivery_waiting(
    store: SqliteStore, records: SqliteRecords, path: Path
) -> None:
    await take_in(store, finished())
    connection = await connect_read_only(path)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(connection.close)
        cursor = await stack.enter_async_context(connection.execute("SELECT * FROM file, (VALUES (1), (2))"))
        await cursor.fetchone()
        assert await store.accept(delivery())
        await take_in(store, finished("b"))
        assert (await records.totals()).files == 2


async def test_closing_it_last_or_first_leaves_one_whole_file(path: Path) -> None:
    for last in (False, True):
        store = await SqliteStore.open(path)
        records = SqliteRecords(path)
        await take_in(store, finished(str(last)), batch_id=str(last))
        await every_call(records)
        for each in (store, records) if last else (records, store):
            await each.close()
    async with opened(path):
        pass
    assert {entry.name for entry in path.parent.iterdir()} == {"notify.db", "notify.db.lock"}
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM file").fetchone() == (2,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
