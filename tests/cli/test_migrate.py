"""`migrate`, as a user runs it."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from notify_server.store.sql import load_migrations
from notify_server.store.sqlite.database import connect
from tests.support.daemon import Daemon, run_command

LATEST = len(load_migrations("sqlite"))


@pytest.fixture
def record(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text('[store]\nurl = "sqlite:///notify.db"\n')
    return tmp_path / "notify.db"


async def test_missing_migrations_are_applied_and_reported(tmp_path: Path, record: Path) -> None:
    record.touch()
    end = await run_command("migrate", cwd=tmp_path)
    names = ", ".join(step.name for step in load_migrations("sqlite"))
    assert (end.code, end.stderr) == (0, "")
    assert end.stdout == f"notify.db: migrated from schema version 0 to {LATEST} ({names})\n"
    end = await run_command("migrate", cwd=tmp_path)
    assert (end.code, end.stdout) == (0, f"notify.db: has schema version {LATEST}, the latest: nothing to do\n")
    with contextlib.closing(sqlite3.connect(record)) as connection:
        assert connection.execute("SELECT count(*) FROM notification").fetchone() == (0,)


async def test_no_record_is_made(tmp_path: Path, record: Path) -> None:
    end = await run_command("migrate", cwd=tmp_path)
    assert end.code == 0
    assert end.stdout.startswith("notify.db: there is no record yet")
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


async def test_a_record_that_a_daemon_holds_is_left_alone(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        end = await run_command("migrate", cwd=tmp_path)
        assert (end.code, end.stdout) == (1, "")
        assert f"in use by another notify_server (process {daemon.pid})" in end.stderr
        assert len(end.stderr.splitlines()) == 1
        assert await daemon.terminate() == 0


@pytest.mark.parametrize("kind", ["newer", "another program's", "damaged"])
async def test_a_file_that_cannot_be_migrated_is_refused_and_stays_as_it_is(
    tmp_path: Path, record: Path, kind: str
) -> None:
    if kind == "damaged":
        record.write_bytes(b"no database " * 1000)
    else:
        if kind == "newer":
            connect(record).close()
        with contextlib.closing(sqlite3.connect(record, isolation_level=None)) as connection:
            connection.execute("PRAGMA user_version = 999" if kind == "newer" else "CREATE TABLE theirs (x)")
    before = record.read_bytes()
    end = await run_command("migrate", cwd=tmp_path)
    assert (end.code, end.stdout) == (1, "")
    assert end.stderr.startswith("notify_server: notify.db: ")
    assert len(end.stderr.splitlines()) == 1
    assert record.read_bytes() == before
