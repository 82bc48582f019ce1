"""The schema is the sum of its migrations, reached step by step and never by halves."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.resources import files
from pathlib import Path

import pytest

from notify_server.errors import StoreRefusedError
from notify_server.simulator.record import RecordViews
from notify_server.store.reading.types import FileFilter
from notify_server.store.sql import Migration, load_migrations
from notify_server.store.sqlite import database
from notify_server.store.sqlite.database import connect, migrate, schema_version
from notify_server.store.sqlite.records import SqliteRecords
from tests.store.builders import NOW, chunk, delivery, failed, found, rejection
from tests.support.sqlite_faults import opened

Schema = list[tuple[str, ...]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "notify.db"


@pytest.fixture
def connection(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(connect(path)) as connection:
        yield connection


def schema(connection: sqlite3.Connection) -> Schema:
    return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()


def read(path: Path) -> tuple[int, Schema]:
    """The version and the schema as another program sees them."""
    with closing(sqlite3.connect(path)) as connection:
        return schema_version(connection), schema(connection)


def known_to_be(patch: pytest.MonkeyPatch, migrations: Sequence[Migration]) -> None:
    patch.setattr(database, "load_migrations", lambda dialect: tuple(migrations))


def test_migrations_are_numbered_from_one_without_a_gap_and_named_for_what_they_do() -> None:
    scripts = sorted(
        entry.name for entry in (files("notify_server.store") / "sqlite").iterdir() if entry.name[0].isdigit()
    )
    migrations = load_migrations("sqlite")
    assert [f"{step.name}.sql" for step in migrations] == scripts
    assert [step.version for step in migrations] == list(range(1, len(scripts) + 1))
    assert all(re.fullmatch(rf"{step.version:04}_[a-z0-9_]+", step.name) for step in migrations)


def test_migrations_leave_transactions_and_versions_to_the_program() -> None:
    for step in load_migrations("sqlite"):
        assert not re.search(r"^\s*(BEGIN|COMMIT|ROLLBACK|PRAGMA|VACUUM)\b", step.script, re.MULTILINE | re.IGNORECASE)


def test_a_new_database_reaches_the_version_of_the_last_migration(connection: sqlite3.Connection) -> None:
    assert schema_version(connection) == len(load_migrations("sqlite"))
    assert connection.execute("PRAGMA application_id").fetchone() == (database.APPLICATION_ID,)


def test_the_schema_equals_the_sum_of_the_migrations(connection: sqlite3.Connection) -> None:
    with closing(sqlite3.connect(":memory:")) as summed:
        for step in load_migrations("sqlite"):
            summed.executescript(step.script)
        assert schema(connection) == schema(summed)


def test_migrating_twice_is_a_no_op(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("INSERT INTO heartbeat (id, checked_at) VALUES (1, 7)")
    before = schema(connection), connection.execute("PRAGMA schema_version").fetchone()
    migrate(connection, path)
    with closing(connect(path)) as again:
        assert (schema(again), again.execute("PRAGMA schema_version").fetchone()) == before
        assert again.execute("SELECT checked_at FROM heartbeat").fetchall() == [(7,)]


def test_a_database_of_any_earlier_version_is_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    migrations = load_migrations("sqlite")
    later = [
        *migrations,
        Migration(len(migrations) + 1, "next", "ALTER TABLE heartbeat ADD COLUMN one INTEGER;"),
        Migration(len(migrations) + 2, "after", "ALTER TABLE heartbeat ADD COLUMN two INTEGER;"),
    ]
    for version in range(1, len(later) + 1):
        file = path.with_name(f"{version}.db")
        known_to_be(monkeypatch, later[:version])
        connect(file).close()
        assert read(file)[0] == version
        known_to_be(monkeypatch, later)
        connect(file).close()
        assert read(file)[0] == len(later)
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("SELECT one, two FROM heartbeat").fetchall() == []


@pytest.mark.parametrize(
    "broken", ["CREATE TABLE half (id INTEGER); CREATE TABLE heartbeat (id INTEGER);", "NONSENSE;"]
)
def test_a_migration_that_fails_leaves_the_previous_version_intact(
    path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    migrations = load_migrations("sqlite")
    known_to_be(monkeypatch, migrations)
    with closing(connect(path)) as connection:
        connection.execute("INSERT INTO heartbeat (id, checked_at) VALUES (1, 7)")
    before = read(path)
    good = Migration(len(migrations) + 1, "good", "CREATE TABLE good (id INTEGER);")
    known_to_be(monkeypatch, [*migrations, Migration(good.version, "broken", broken)])
    with pytest.raises(StoreRefusedError):
        connect(path)
    assert read(path) == before

    known_to_be(monkeypatch, [*migrations, good, Migration(good.version + 1, "broken", broken)])
    with pytest.raises(StoreRefusedError):
        connect(path)
    assert read(path)[0] == good.version
    known_to_be(monkeypatch, [*migrations, good])
    with closing(connect(path)) as connection:
        assert connection.execute("SELECT checked_at FROM heartbeat").fetchall() == [(7,)]
        assert connection.execute("SELECT * FROM good").fetchall() == []


def test_a_failed_first_migration_leaves_an_empty_database_that_can_be_used_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_to_be(monkeypatch, [Migration(1, "broken", "CREATE TABLE half (id INTEGER); NONSENSE;")])
    with pytest.raises(StoreRefusedError):
        connect(path)
    assert read(path) == (0, [])
    monkeypatch.undo()
    connect(path).close()
    assert read(path)[0] == len(load_migrations("sqlite"))


def test_a_newer_schema_is_refused_and_left_as_it_is(connection: sqlite3.Connection, path: Path) -> None:
    newer = len(load_migrations("sqlite")) + 1
    connection.execute(f"PRAGMA user_version = {newer}")
    with pytest.raises(StoreRefusedError, match=f"has schema version {newer}, this program knows {newer - 1}"):
        connect(path)
    assert read(path)[0] == newer


# What each step makes of what was there


def as_the_first_version_left_it(path: Path) -> list[tuple[str, ...]]:
    """A database of version 1 with something in every table; its views' rows."""
    (first, *_) = load_migrations("sqlite")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(
            f"""
            {first.script}
            PRAGMA application_id = {database.APPLICATION_ID};
            PRAGMA user_version = 1;
            INSERT INTO notification VALUES
                (3, 'b1', 'a', {NOW}, '198.18.0.1', 'none', 'r-3', 3, {NOW}, '{{"batch_id":"b1"}}'),
                (4, 'b2', 'a', {NOW + 1}, '198.18.0.1', 'none', 'r-4', 1, NULL, '{{"batch_id":"b2"}}');
            INSERT INTO batch (id, batch_id, api_code, first_received_at, last_received_at, deliveries, verdict,
                               completed_at, files, available, unavailable)
                VALUES (1, 'b1', 'a', {NOW}, {NOW}, 1, 'incomplete', {NOW + 5}, 2, 1, 1);
            INSERT INTO batch (id, batch_id, api_code, first_received_at, last_received_at, deliveries, files, pending)
                VALUES (2, 'b3', 'a', {NOW + 2}, {NOW + 2}, 1, 1, 1);
            INSERT INTO file (id, batch, oss_object_name, target_url, host, reported_status, state, reason, attempts,
                              next_attempt_at, http_status, verified_at) VALUES
                (1, 1, 'k1', 'https://h/k1', 'h', 'FINISHED', 'available', NULL, 1, NULL, 200, {NOW + 4}),
                (2, 1, 'k2', 'https://h/k2', 'h', 'FINISHED', 'unavailable', 'http_410', 1, NULL, 410, {NOW + 5}),
                (3, 2, 'k1', 'https://h/k3', 'h', 'FINISHED', 'pending', 'timeout', 1, {NOW + 9}, NULL, NULL);
            INSERT INTO attempt (file, started_at, method, total_ms) VALUES (2, {NOW + 3}, 'HEAD', 1.5);
            INSERT INTO rejection VALUES
                (5, {NOW}, '198.18.0.2', '400', 'batch_id: missing', x'00ff'),
                (7, {NOW + 1}, '::1', '403001', '签名', '');
            INSERT INTO nonce VALUES ('used', {NOW + 60_000});
            INSERT INTO heartbeat VALUES (1, {NOW});
            """
        )
        return views(connection)


def views(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
    return [row for view in VIEWS for row in connection.execute(f"SELECT * FROM {view} ORDER BY batch_id")]


VIEWS = ("batch_summary", "file_result")


def test_everything_in_a_database_of_the_first_version_is_there_after_the_upgrade(path: Path) -> None:
    before = as_the_first_version_left_it(path)
    tables = {
        "notification": "id, batch_id, body, received_at, expanded_at",
        "batch": "id, batch_id, verdict, files, completed_at",
        "file": "id, batch, oss_object_name, state, reason, next_attempt_at",
        "attempt": "id, file, started_at, total_ms",
        "rejection": "id, received_at, remote_addr, code, detail, body",
        "nonce": "key, expires_at",
        "heartbeat": "id, checked_at",
    }

    def contents(connection: sqlite3.Connection) -> list[list[tuple[object, ...]]]:
        return [connection.execute(f"SELECT {columns} FROM {table}").fetchall() for table, columns in tables.items()]

    with closing(sqlite3.connect(path)) as connection:
        was = contents(connection)
    with closing(connect(path)) as connection:
        assert contents(connection) == was
        assert all(was)
        # Columns are added behind those that were there.
        assert [row[: len(was)] for row, was in zip(views(connection), before, strict=True)] == before
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT DISTINCT request_id FROM rejection").fetchall() == [(None,)]
        arrivals = connection.execute("SELECT api_code, received_at, quiet_since, told_at FROM arrival").fetchall()
        assert arrivals == [("a", NOW + 2, NOW + 2, None)]
        connection.execute("DELETE FROM rejection")
        connection.execute(
            "INSERT INTO rejection (received_at, remote_addr, code, detail, body) VALUES (1,'','','','')"
        )
        assert connection.execute("SELECT id FROM rejection").fetchall() == [(8,)]


async def test_a_database_of_the_first_version_works_after_the_upgrade(path: Path) -> None:
    as_the_first_version_left_it(path)
    async with opened(path) as store:
        records = SqliteRecords(path)
        try:
            assert store.backlog == 2
            (item,) = await store.inbox(10)
            assert (item.id, item.traceparent) == (4, None)
            totals = await records.totals()
            assert (totals.batches, totals.files, totals.rejections) == (2, 3, 2)
            detail = await records.batch(1)
            assert detail is not None
            assert detail.last_delivery is None
            assert [file.id for file in (await records.files(FileFilter(reason="http_410"), None, 9)).items] == [2]
            assert [(each.id, each.request_id) for each in (await records.rejections(None, 9)).items] == [
                (7, None),
                (5, None),
            ]
            assert await records.rejected_body(5) == b"\x00\xff"

            await store.expand([chunk(item, failed("k"), batch_id="b2")], NOW)
            assert (await store.recheck([1, 2, 3], NOW + 10)).files == 3
            assert await store.accept(delivery(replays=5)) == 5
            await store.reject(rejection())
            assert [each.id for each in (await records.rejections(None, 9)).items] == [8, 7]
            files = await store.claim([("h", 9)], NOW + 10)
            verdicts = await store.record([found(file) for file in files], NOW + 11)
            assert sorted(verdict.batch_id for verdict in verdicts) == ["b1", "b3"]
        finally:
            await records.close()
    async with await RecordViews.open(path) as views:
        (row,) = await views.batches([("b1", "a")])
        file, *_ = [file async for file in views.files("b1", "a")]
        assert (row.verdict, row.available, file.oss_object_name, file.state) == ("complete", 2, "k1", "available")
