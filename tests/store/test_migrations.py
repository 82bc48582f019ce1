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
from notify_server.store import sqlite_writer
from notify_server.store.queries import Migration, load_migrations
from notify_server.store.sqlite_writer import connect, migrate, schema_version

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
    patch.setattr(sqlite_writer, "load_migrations", lambda dialect: tuple(migrations))


def test_migrations_are_numbered_from_one_without_a_gap_and_named_for_what_they_do() -> None:
    scripts = sorted(
        entry.name for entry in (files("notify_server.store") / "sql" / "sqlite").iterdir() if entry.name[0].isdigit()
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
    assert connection.execute("PRAGMA application_id").fetchone() == (sqlite_writer.APPLICATION_ID,)


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
