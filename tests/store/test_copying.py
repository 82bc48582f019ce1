"""Copying between the engines: kept contents, reports of lost characters, and bounded memory."""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest

from notify_server.errors import StoreRefusedError, StoreUnavailableError
from notify_server.store.copying import copy as copying
from notify_server.store.copying.copy import TABLES, Checked, Digest, Row, Side, copy
from notify_server.store.copying.postgres import PostgresSide
from notify_server.store.copying.sqlite import SqliteSide
from notify_server.store.postgres import session as postgres_session
from notify_server.store.postgres.schema import migrate_at
from notify_server.store.postgres.store import PostgresStore
from notify_server.store.sqlite.store import SqliteStore
from tests.store.builders import NOW, delivery
from tests.store.copies import LARGE, dump, fill, writing
from tests.support.postgres import fetch, new_schema
from tests.support.postgres_faults import opened

# About servers that run, or about the schema.
NOT_COPIED = {"heartbeat", "node", "lease", "schema_version", "secret"}


@pytest.fixture
async def url() -> str:
    return await new_schema()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "notify.db"


async def up(path: Path, url: str, *, restart: bool = False) -> dict[str, Checked]:
    """Copy the file to the database."""
    async with AsyncExitStack() as stack:
        source = await SqliteSide.source(path)
        stack.push_async_callback(source.close)
        target = await PostgresSide.target(url)
        stack.push_async_callback(target.close)
        return {table.table: table for table in await copy(source, target, restart=restart)}


async def down(url: str, path: Path) -> dict[str, Checked]:
    """Copy the database to the file."""
    async with AsyncExitStack() as stack:
        source = await PostgresSide.source(url)
        stack.push_async_callback(source.close)
        target = await SqliteSide.target(path)
        stack.push_async_callback(target.close)
        return {table.table: table for table in await copy(source, target)}


async def test_every_table_is_copied_or_known_not_to_be(path: Path, url: str) -> None:
    await migrate_at(url)
    tables = await fetch(
        url, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace"
    )
    assert {name for (name,) in tables} == {*TABLES} | NOT_COPIED
    with writing(path) as connection:
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        assert {name for (name,) in rows} == {*TABLES} | (NOT_COPIED & {"heartbeat"})


async def test_there_and_back_is_the_same_to_the_last_bit(path: Path, url: str) -> None:
    fill(path)
    before = dump(path)
    there = await up(path, url)
    back = await down(url, path.with_name("back.db"))
    assert dump(path.with_name("back.db")) == before == dump(path)
    assert [table.table for table in there.values()] == list(TABLES)
    assert there == back
    assert all(table.same and table.rows and not table.replaced for table in there.values())


async def test_an_id_that_was_given_out_before_is_given_to_nothing_else(path: Path, url: str) -> None:
    fill(path)
    await up(path, url)
    async with opened(url) as store:
        # 70 was the last, and has been deleted.
        assert await store.accept(delivery()) == 71
        files = await fetch(url, "SELECT max(id) FROM file")
        await store.close()
    await down(url, path.with_name("back.db"))
    again = await SqliteStore.open(path.with_name("back.db"))
    assert await again.accept(delivery()) == 72
    await again.close()
    assert await fetch(url, "SELECT nextval('file_id_seq')") == [(files[0][0] + 1,)]


async def test_an_empty_record_can_be_copied(path: Path, url: str) -> None:
    with writing(path):
        pass
    assert all(table.same for table in (await up(path, url)).values())
    async with opened(url) as store:
        assert await store.accept(delivery()) == 1


async def test_characters_that_postgresql_cannot_hold_are_replaced_and_reported(path: Path, url: str) -> None:
    with writing(path) as connection:
        for detail, body in (("a\0b", b"\0"), ("ab", b""), ("\0", b"\0\0")):
            row = NOW, "::1", "400", detail, body
            connection.execute(
                "INSERT INTO rejection (received_at, remote_addr, code, detail, body) VALUES (?,?,?,?,?)", row
            )
        # In the order of the one engine, and not in that of the other.
        connection.executemany("INSERT INTO nonce VALUES (?, ?)", [("k\0", NOW), ("k1", NOW), ("k\uffff", NOW)])
    checked = await up(path, url)
    assert all(table.same for table in checked.values())
    assert {name: table.replaced for name, table in checked.items() if table.replaced} == {
        "rejection": {"detail": 2},
        "nonce": {"key": 1},
    }
    assert await fetch(url, "SELECT detail, body FROM rejection ORDER BY id") == [
        ("a\ufffdb", b"\0"), ("ab", b""), ("\ufffd", b"\0\0")
    ]  # fmt: skip
    assert await fetch(url, "SELECT key FROM nonce ORDER BY key") == [("k1",), ("k\ufffd",), ("k\uffff",)]


async def test_no_more_is_in_memory_than_a_chunk(path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path)
    await up(path, url)
    sides: list[Side] = [await SqliteSide.source(path), await PostgresSide.source(url)]
    monkeypatch.setattr(copying, "CHUNK_ROWS", 7)
    for side in sides:
        columns = await side.columns("notification")
        body = columns.index("body")
        chunks = [chunk async for chunk in side.chunks("notification", columns, -(2**63))]
        # Bodies of 3 MiB, and three that are short.
        assert [len(chunk) for chunk in chunks] == [3, 3], side.place
        assert all(sum(len(row[body]) for row in chunk) < copying.CHUNK_BYTES + LARGE for chunk in chunks)
        columns = await side.columns("file")
        sizes = [len(chunk) async for chunk in side.chunks("file", columns, -(2**63))]
        assert (set(sizes[:-1]), sum(sizes)) == ({7}, 200)
        await side.close()


async def test_notifications_that_a_file_would_not_expand_any_more_are_not_copied_to_one(path: Path, url: str) -> None:
    await migrate_at(url)
    accepted = (
        "INSERT INTO notification (batch_id, api_code, received_at, remote_addr, signature, request_id, files,"
        " expanded_at, body) VALUES ('b', 'a', 1, '', 'none', '', 1, {}, '')"
    )
    for expanded in ("1", "NULL", "1", "NULL"):
        await fetch(url, accepted.format(expanded))
    with pytest.raises(StoreRefusedError, match="1 notifications wait to be expanded that were accepted before others"):
        await down(url, path)
    assert not path.exists()
    await fetch(url, "UPDATE notification SET expanded_at = 1 WHERE id = 2")
    assert (await down(url, path))["notification"].same
    store = await SqliteStore.open(path)
    assert [item.id for item in await store.inbox(10)] == [4]
    await store.close()


async def test_while_it_is_copied_no_server_gets_either_side(
    path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgres_session.SETTINGS, "lock_timeout", "100ms")
    await migrate_at(url)
    for side_of in (PostgresSide.source, PostgresSide.target):
        side = await side_of(url)
        with pytest.raises(StoreRefusedError, match="is locked by another program"):
            await PostgresStore.open(url)
        with pytest.raises(StoreRefusedError, match="is locked by another program"):
            await PostgresSide.target(url)
        await side.close()
    target = await SqliteSide.target(path)
    with pytest.raises(StoreRefusedError, match="in use by another notify_server"):
        await SqliteStore.open(path)
    await target.close()
    source = await SqliteSide.source(path)
    with pytest.raises(StoreRefusedError, match="in use by another notify_server"):
        await SqliteStore.open(path)
    await source.close()
    await (await SqliteStore.open(path)).close()
    await (await PostgresStore.open(url)).close()


async def test_a_row_that_the_other_engine_cannot_have_is_named_and_what_came_before_it_stays(
    path: Path, url: str
) -> None:
    with writing(path) as connection:
        connection.execute(
            "INSERT INTO rejection (id, received_at, remote_addr, code, detail, body)"
            " VALUES (7, 'soon', '', '', '', '')"
        )
        connection.execute(
            "INSERT INTO batch (id, batch_id, api_code, first_received_at, last_received_at) VALUES (1, 'b', 'a', 1, 1)"
        )
    with pytest.raises(StoreRefusedError, match=r"cannot have a row of rejection between 7 and 7 \("):
        await up(path, url)
    assert await fetch(url, "SELECT count(*) FROM batch") == [(1,)]
    with writing(path) as connection:
        connection.execute("UPDATE rejection SET received_at = 1, body = x'00'")
    assert all(table.same for table in (await up(path, url)).values())


async def test_a_server_that_goes_away_leaves_a_copy_that_is_gone_on_with(path: Path, url: str) -> None:
    fill(path)
    source, target = await SqliteSide.source(path), await PostgresSide.target(url)

    def cut(step: str, table: str, done: int, total: int) -> None:
        if table == "file" and done == 0:
            target._work.terminate()

    with pytest.raises(StoreUnavailableError):
        await copy(source, target, progress=cut)
    await source.close()
    await target.close()
    assert (await fetch(url, "SELECT count(*) FROM batch"), await fetch(url, "SELECT count(*) FROM file")) == (
        [(2,)],
        [(0,)],
    )
    assert all(table.same for table in (await up(path, url)).values())


def test_a_digest_is_of_values_and_kinds_and_not_of_their_order() -> None:
    def digest(*rows: Row) -> tuple[int, str]:
        one = Digest()
        for row in rows:
            one.add([row])
        return one.rows, one.checksum

    rows: list[Row] = [(1, "a", None, 0.5, b"x"), (2, "b", 3, 5.0, b"")]
    assert digest(*rows) == digest(*rows[::-1])
    others: list[list[Row]] = [
        [(1, "a", None, 0.5, b"x"), (2, "b", 3, 5.0, b""), (2, "b", 3, 5.0, b"")],
        [(1, "a", None, 0.5, b"x")],
        [(1, "a", None, 0.5, b"x"), (2, "b", 3, 5, b"")],
        [(1, "a", None, 0.5, "x"), (2, "b", 3, 5.0, b"")],
        [(1, "a", "", 0.5, b"x"), (2, "b", 3, 5.0, b"")],
        [(1, "a", None, 0.5000000000000001, b"x"), (2, "b", 3, 5.0, b"")],
        [(2, "a", None, 0.5, b"x"), (1, "b", 3, 5.0, b"")],
    ]
    assert len({digest(*rows), *(digest(*other) for other in others)}) == len(others) + 1
    assert digest() == (0, "0" * 32)


async def test_replaced_characters_are_counted_by_column(url: str) -> None:
    side = await PostgresSide.target(url)
    rows: list[Row] = [("a\0\0", 1, b"\0"), ("b", None, b""), ("\0", 2, None)]
    replaced = Counter[str]()
    side.fit(["text", "number", "bytes"], rows, replaced)
    assert rows == [("a\ufffd\ufffd", 1, b"\0"), ("b", None, b""), ("\ufffd", 2, None)]
    assert replaced == {"text": 2}
    await side.close()


async def test_a_file_with_rows_is_refused_as_it_was(path: Path, url: str) -> None:
    await migrate_at(url)
    fill(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        # As another version would have it.
        connection.execute("PRAGMA user_version = 1")
    before = path.read_bytes()
    with pytest.raises(StoreRefusedError, match="is not empty"):
        await down(url, path)
    assert path.read_bytes() == before
