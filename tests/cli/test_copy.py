"""`copy`, as a user runs it: from a file to a database and back, stopped in the middle, refused, found different."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import asyncpg
import pytest

from notify_server.config import without_secrets
from notify_server.store.copying.copy import TABLES
from notify_server.store.postgres.schema import migrate_at
from notify_server.store.sql import load_migrations
from notify_server.store.sqlite.database import connect
from notify_server.store.sqlite.store import SqliteStore
from tests.store.builders import API_CODE, NOW, delivery
from tests.store.copies import dump, fill, writing
from tests.support.cli import on_terminal, running
from tests.support.daemon import Daemon, Finished, clean_environment, run_command
from tests.support.notification import batch_body, finished
from tests.support.origin import SILENCE, Answer, Origin
from tests.support.postgres import fetch, new_schema
from tests.support.waiting import SECONDS

MANY = 12_000
# Requests that are never answered are not waited for.
HURRIED = {"server": {"shutdown_grace": "1s"}}


@pytest.fixture
async def url() -> str:
    return await new_schema()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "notify.db"


async def copy(source: Path | str, target: Path | str, *options: str) -> Finished:
    addresses = [f"sqlite:///{each}" if isinstance(each, Path) else each for each in (source, target)]
    folder = next(each for each in (source, target) if isinstance(each, Path)).parent
    return await run_command("copy", "--from", addresses[0], "--to", addresses[1], *options, cwd=folder)


def line_of(end: Finished) -> str:
    """The one line that a command which was refused has said."""
    assert (end.code, end.stdout) == (1, ""), end
    (line,) = end.stderr.splitlines()
    return line


async def refused_daemon(folder: Path, store: str) -> str:
    """The one line of a server that does not start on this."""
    variables = {"NOTIFY_SERVER__STORE__URL": store, "NOTIFY_SERVER__SERVER__PORT": "0"}
    return line_of(await run_command("serve", cwd=folder, environ=clean_environment(**variables)))


def fill_many(path: Path, files: int = MANY) -> None:
    """A batch of more files than go over in a transaction, each with an attempt."""
    with writing(path) as connection:
        connection.execute(
            "INSERT INTO batch (id, batch_id, api_code, first_received_at, last_received_at, files, available)"
            " VALUES (1, 'b', 'a', 1, 1, ?, ?)",
            (files, files),
        )
        connection.execute(
            "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ?)"
            " INSERT INTO file (id, batch, oss_object_name, host, reported_status, state)"
            " SELECT n, 1, n, 'h', 'FINISHED', 'available' FROM n",
            (files,),
        )
        connection.execute(
            "INSERT INTO attempt (file, started_at, method, total_ms) SELECT id, 1, 'GET', 0.1 FROM file"
        )


@asynccontextmanager
async def stuck_on_postgres(
    path: Path, url: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, asyncpg.Connection[asyncpg.Record]]]:
    """The copy to the database, which waits in the middle of the files for a row that this connection has there."""
    await migrate_at(url)
    other = await asyncpg.connect(url)
    try:
        await other.execute("BEGIN")
        await other.execute(
            "INSERT INTO batch (id, batch_id, api_code, first_received_at, last_received_at) VALUES (9, '', '', 1, 1)"
        )
        await other.execute(
            "INSERT INTO file (id, batch, oss_object_name, host, reported_status, state)"
            " VALUES (7000, 9, '', '', 'FAILED', 'upload_failed')"
        )
        async with running("copy", "--from", f"sqlite:///{path}", "--to", url, cwd=path.parent) as process:
            await said(process, "copying file: 0 of 12,000")
            waiting = (
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
            )
            async with asyncio.timeout(SECONDS):
                while not await other.fetchval(waiting):
                    await asyncio.sleep(0.005)
            yield process, other
    finally:
        await other.close()


async def said(process: asyncio.subprocess.Process, line: str) -> None:
    assert process.stderr is not None
    async with asyncio.timeout(SECONDS):
        while raw := await process.stderr.readline():
            if raw.decode().rstrip("\n") == line:
                return
    raise AssertionError(f"ended without saying {line!r}")


async def test_a_record_goes_to_postgresql_and_back_the_same(path: Path, url: str) -> None:
    fill(path)
    before = dump(path)
    end = await copy(path, url, "--json")
    report = json.loads(end.stdout)
    assert (end.code, report["verified"], report["from"]) == (0, True, str(path))
    assert report["to"] == f"{without_secrets(url)}, schema {schema_of(url)}"
    assert [table["table"] for table in report["tables"]] == list(TABLES)
    for table in report["tables"]:
        assert (table["rows"], table["checksum"]) == (table["copy_rows"], table["copy_checksum"])
        assert re.fullmatch(r"[0-9a-f]{32}", table["checksum"]) and table["rows"] > 0
    lines = end.stderr.splitlines()
    assert lines[0] == f"{path} -> {report['to']}"
    assert "copying file: 200 of 200" in lines and "verifying file: 400 of 400" in lines

    back = await copy(url, path.with_name("back.db"))
    assert back.code == 0
    assert "Verified:" in back.stdout and "DIFFERENT" not in back.stdout
    assert dump(path.with_name("back.db")) == before == dump(path)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
async def test_a_copy_to_postgresql_that_was_stopped_is_gone_on_with(
    path: Path, url: str, stop: signal.Signals
) -> None:
    fill_many(path)
    async with stuck_on_postgres(path, url) as (process, _):
        process.send_signal(stop)
        assert process.stderr is not None
        rest = (await process.stderr.read()).decode()
        code = await process.wait()
    if stop is not signal.SIGKILL:
        assert (code, rest.splitlines()[-1]) == (128 + stop, "stopped: the same command continues from here")
    assert await fetch(url, "SELECT count(*), max(id) FROM file") == [(5000, 5000)]
    end = await copy(path, url)
    assert end.code == 0, end
    assert "copying file: 5,000 of 12,000" in end.stderr.splitlines()
    assert "copying file: 0 of 12,000" not in end.stderr.splitlines()
    assert await fetch(url, "SELECT count(*), max(id) FROM file") == [(MANY, MANY)]
    back = path.with_name("back.db")
    assert (await copy(url, back)).code == 0
    assert dump(back) == dump(path)


async def test_a_lost_database_is_reported_in_one_line_and_its_copy_resumed(path: Path, url: str) -> None:
    fill_many(path)
    async with stuck_on_postgres(path, url) as (process, other):
        await other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE pg_backend_pid() = ANY(pg_blocking_pids(pid))"
        )
        assert process.stderr is not None
        (line,) = (await process.stderr.read()).decode().splitlines()
        assert await process.wait() == 1
    assert re.fullmatch(r"notify_server: postgresql://.*: the same command continues from here", line), line
    assert (await copy(path, url)).code == 0


async def test_a_copy_to_sqlite_that_was_killed_is_gone_on_with(path: Path, url: str) -> None:
    fill_many(path, 60_000)
    assert (await copy(path, url)).code == 0
    back = path.with_name("back.db")
    async with running("copy", "--from", url, "--to", f"sqlite:///{back}", cwd=path.parent) as process:
        await said(process, "copying file: 0 of 60,000")
        # It stands still while it is looked at how far it has come.
        process.send_signal(signal.SIGSTOP)
        with closing(sqlite3.connect(back)) as other:
            ((source,),) = other.execute("SELECT source FROM copying").fetchall()
            (copied,) = other.execute("SELECT count(*) FROM attempt").fetchone()
        process.kill()
        await process.wait()
    assert source.startswith(without_secrets(url)) and copied < 60_000
    assert f"an unfinished copy of {without_secrets(url)}" in await refused_daemon(path.parent, f"sqlite:///{back}")
    end = await copy(url, back)
    assert end.code == 0, end
    assert dump(back) == dump(path)


async def test_nothing_starts_on_a_copy_that_is_not_finished(tmp_path: Path, path: Path, url: str) -> None:
    fill_many(path)
    async with stuck_on_postgres(path, url) as (process, _):
        process.kill()
        await process.wait()
    told = f"is an unfinished copy of {path}: finish it with the same `notify-server copy` that began it"
    half = tmp_path / "half.db"
    with closing(connect(half)) as connection:
        connection.execute("CREATE TABLE copying (source TEXT NOT NULL)")
        connection.execute("INSERT INTO copying VALUES (?)", (str(path),))
    for store in (url, f"sqlite:///{half}"):
        assert (await refused_daemon(tmp_path, store)).endswith(told)
        environ = clean_environment(NOTIFY_SERVER__STORE__URL=store)
        doctor, *refused = await asyncio.gather(
            *(
                run_command(*command, cwd=tmp_path, environ=environ)
                for command in (["doctor", "--json"], ["batches"], ["migrate"], ["recheck", "--file", "1", "-y"])
            )
        )
        assert all(line_of(end).endswith(told) for end in refused)
        (finding,) = [each for each in json.loads(doctor.stdout)["findings"] if each["check"] == "schema"]
        assert (doctor.code, finding["level"], finding["remedy"]) == (1, "problem", told.partition(": ")[2])
    # Nor is it a source.
    assert line_of(await copy(url, tmp_path / "other.db")).endswith(told)
    assert not (tmp_path / "other.db").exists()


async def test_a_copy_that_differs_is_found_out_and_cannot_be_served(path: Path, url: str) -> None:
    fill_many(path)
    async with stuck_on_postgres(path, url) as (process, _):
        process.kill()
        await process.wait()
    await fetch(url, "UPDATE file SET host = 'tampered' WHERE id = 4711")
    end = await copy(path, url, "--json")
    report = json.loads(end.stdout)
    different = [table for table in report["tables"] if table["checksum"] != table["copy_checksum"]]
    assert (end.code, report["verified"], [table["table"] for table in different]) == (1, False, ["file"])
    assert different[0]["rows"] == different[0]["copy_rows"] == MANY
    again = await copy(path, url)
    assert again.code == 1
    assert "The copy differs in file, and no server will start on it: --restart starts over." in again.stdout
    assert "unfinished copy" in await refused_daemon(path.parent, url)
    anew = await copy(path, url, "--restart")
    assert (anew.code, "copying file: 0 of 12,000" in anew.stderr) == (0, True)
    assert await fetch(url, "SELECT count(*) FROM file WHERE host = 'tampered'") == [(0,)]


async def test_a_row_too_many_is_found_out_in_a_file(path: Path, url: str) -> None:
    fill(path)
    assert (await copy(path, url)).code == 0
    back = path.with_name("back.db")
    with writing(back) as connection:
        connection.execute("CREATE TABLE copying (source TEXT NOT NULL)")
        source = f"{without_secrets(url)}, schema {schema_of(url)}"
        connection.execute("INSERT INTO copying VALUES (?)", (source,))
        connection.execute(
            "INSERT INTO rejection (received_at, remote_addr, code, detail, body) VALUES (1, '', '', '', x'')"
        )
    end = await copy(url, back)
    assert end.code == 1
    assert "The copy differs in rejection," in end.stdout


def schema_of(url: str) -> str:
    return url.rpartition("search_path=")[2]


async def test_a_running_server_on_either_side_has_to_be_stopped_first(tmp_path: Path, url: str) -> None:
    async with Daemon(tmp_path / "file") as daemon:
        line = line_of(await copy(daemon.database, url))
        assert line == (
            f"notify_server: {daemon.database}: in use by process {daemon.pid}: stop it first, or the copy"
            " cannot be verified"
        )
        line = line_of(await copy(await new_schema_migrated(), daemon.database))
        assert f"in use by process {daemon.pid}" in line
    async with Daemon(tmp_path / "node", {"store": {"url": url, "lease": "90s"}}) as daemon:
        fill(tmp_path / "notify.db")
        for end in (await copy(tmp_path / "notify.db", url), await copy(url, tmp_path / "new.db")):
            line = line_of(end)
            assert re.search(rf"in use by \S+:{daemon.pid}: stop them first, .* counts for another \d+ s$", line), line
        assert await daemon.terminate() == 0
    assert (await copy(tmp_path / "notify.db", url)).code == 0


async def new_schema_migrated() -> str:
    url = await new_schema()
    await migrate_at(url)
    return url


async def test_a_copy_needs_an_empty_target_or_one_begun_from_the_same_source(path: Path, url: str) -> None:
    fill(path)
    other = path.with_name("other.db")
    fill(other, 3)
    assert (await copy(path, url)).code == 0
    for source in (path, other):
        line = line_of(await copy(source, url, "--restart"))
        assert line.endswith("is not empty (there are rows in notification): copy into a new file or an empty database")
    line = line_of(await copy(url, other))
    assert line.startswith(f"notify_server: {other}: is not empty")
    await fetch(url, "CREATE TABLE copying (source text)")
    await fetch(url, f"INSERT INTO copying VALUES ('{path}')")
    line = line_of(await copy(other, url))
    assert line.endswith(f"is an unfinished copy of {path}: continue with --from that, or start over with --restart")
    assert (await copy(other, url, "--restart")).code == 0
    assert await fetch(url, "SELECT count(*) FROM file") == [(6,)]


async def test_one_that_is_not_of_this_version_is_migrated_first(path: Path, url: str) -> None:
    fill(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA user_version = 1")
    needed = {dialect: len(load_migrations(dialect)) for dialect in ("sqlite", "postgres")}
    line = line_of(await copy(path, url))
    assert line.endswith(f"this program needs {needed['sqlite']}: run `notify-server migrate`")
    line = line_of(await copy(url, path.with_name("new.db")))
    assert line.endswith(f"has schema version 0, this program needs {needed['postgres']}: run `notify-server migrate`")
    await migrate_at(url)
    await fetch(url, "UPDATE schema_version SET version = 999")
    line = line_of(await copy(url, path.with_name("new.db")))
    known = f"this program knows {needed['postgres']}"
    assert line.endswith(f"has schema version 999, {known}: use the newer notify_server that wrote it")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name --from, --to or both: the other one is [store] url"),
        (["--from", "mysql://x"], '--from: must be like "sqlite:///data/notify.db"'),
        (["--to", "postgresql://u:geheim@h/d?sslmode=no"], "--to: "),
        (
            ["--to", "sqlite:///other.db"],
            "--from and --to: one is a file of SQLite, the other a database on PostgreSQL",
        ),
        (["--frm", "x"], "No such option: --frm. Did you mean --from?"),
    ],
)
async def test_a_wrong_argument_is_reported_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    end = await run_command("copy", *arguments, cwd=tmp_path)
    assert (end.code, end.stdout) == (2, "")
    (line,) = end.stderr.splitlines()
    assert line.startswith(said)
    assert "geheim" not in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        ("sqlite:///none.db", "{url}", "none.db: there is no record"),
        ("sqlite:///notify.db", "postgresql://u:geheim@127.0.0.1:1/d", "cannot be reached (.*): .* or correct --to"),
        ("postgresql://u:geheim@127.0.0.1:1/d", "sqlite:///x.db", "cannot be reached (.*): .* or correct --from"),
        ("{url}", "sqlite:////proc/x/notify.db", "/proc/x: cannot be created"),
    ],
)
async def test_a_database_that_cannot_be_opened_is_reported_without_secrets(
    path: Path, url: str, source: str, target: str, told: str
) -> None:
    fill(path, 1)
    await migrate_at(url)
    arguments = "--from", source.format(url=url), "--to", target.format(url=url)
    line = line_of(await run_command("copy", *arguments, cwd=path.parent))
    assert line.startswith("notify_server: ")
    assert re.search(told.replace("(", r"\(").replace(")", r"\)"), line), line
    assert "geheim" not in line


async def test_the_side_that_is_not_named_is_the_configured_one(path: Path, url: str) -> None:
    fill(path)
    (path.parent / "config.toml").write_text('[store]\nurl = "sqlite:///notify.db"\n')
    assert (await run_command("copy", "--to", url, cwd=path.parent)).code == 0
    (path.parent / "config.toml").write_text(f'[store]\nurl = "{url}"\n')
    assert (await run_command("copy", "--to", "sqlite:///back.db", cwd=path.parent)).code == 0
    assert dump(path.parent / "back.db") == dump(path)


async def test_a_terminal_shows_bars_and_the_replaced_characters(path: Path, url: str) -> None:
    with writing(path) as connection:
        connection.execute(
            "INSERT INTO rejection (received_at, remote_addr, code, detail, body)"
            " VALUES (1, '', '400', 'a' || char(0), x'00')"
        )
    code, text = await on_terminal("copy", "--from", f"sqlite:///{path}", "--to", url, cwd=path.parent)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert code == 0
    assert "copying rejection" in plain and "verifying rejection" in plain and "━" in plain
    assert "rejection: values with NUL, which PostgreSQL cannot hold, have U+FFFD in its place: 1 in detail" in plain
    assert "Verified: 1 rows" in plain


async def test_a_server_on_the_copy_goes_on_with_what_was_pending(tmp_path: Path, url: str) -> None:
    async with Origin() as origin:
        origin.default = SILENCE
        async with Daemon(tmp_path / "a", HURRIED) as daemon:
            await daemon.deliver("pending", [origin.url("/1"), origin.url("/2")])
            await origin.reached(2)
            assert await daemon.terminate() == 0
        # Only acked notifications: none is expanded.
        opened = await SqliteStore.open(daemon.database)
        await opened.accept(delivery("acked", body=batch_body("acked", [finished(origin.url("/3"))]), received_at=NOW))
        await opened.close()
        assert (await copy(daemon.database, url)).code == 0
        origin.default = Answer()
        async with Daemon(tmp_path / "b", HURRIED | {"store": {"url": url}}) as node:
            for batch_id, available in (("pending", 2), ("acked", 1)):
                verdict = await node.verdict(batch_id)
                assert (verdict["verdict"], verdict["available"]) == ("complete", available)
            origin.default = SILENCE
            seen = len(origin.hits)
            await node.deliver("again", [origin.url("/4")])
            await origin.reached(seen + 1)
            assert await node.terminate() == 0
        assert (await copy(url, tmp_path / "back.db")).code == 0
        origin.default = Answer()
        async with Daemon(tmp_path / "c", {"store": {"url": f"sqlite:///{tmp_path / 'back.db'}"}}) as back:
            assert (await back.verdict("again"))["verdict"] == "complete"
            rows = back.sql("SELECT batch_id, verdict, api_code FROM batch_summary ORDER BY batch_id")
            assert [tuple(row) for row in rows] == [
                (name, "complete", API_CODE) for name in ("acked", "again", "pending")
            ]


async def test_help_names_every_option(tmp_path: Path) -> None:
    end = await run_command("copy", "--help", cwd=tmp_path, environ=clean_environment(COLUMNS="200", TERM="dumb"))
    assert end.code == 0
    assert all(option in end.stdout for option in ("--from", "--to", "--restart", "--json", "--config"))
