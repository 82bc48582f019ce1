"""The commands on a record that is on PostgreSQL: beside the servers that share it, and without any."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from notify_server.config import without_secrets
from notify_server.store.postgres.schema import migrate_at
from notify_server.store.sql import load_migrations
from tests.cli.test_record import RETRY, fill_through
from tests.support.daemon import Daemon, Finished, clean_environment, run_command
from tests.support.notification import batch_body
from tests.support.origin import Answer, Origin
from tests.support.postgres import fetch, new_schema
from tests.support.waiting import free_port

LATEST = len(load_migrations("postgres"))


@pytest.fixture
async def url() -> str:
    return await new_schema()


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with Origin() as origin:
        origin.on("/gone", Answer(410, close=True))
        yield origin


@contextlib.asynccontextmanager
async def started(folder: Path, url: str, **config: Any) -> AsyncIterator[Daemon]:
    sections = {
        "server": {"port": free_port(), "shutdown_grace": "1s"},
        "store": {"url": url},
        "verify": RETRY,
        **config,
    }
    base = {"allowed_networks": ["127.0.0.0/8"], "allowed_ports": []}
    sections["verify"] = base | sections["verify"]
    async with Daemon(folder, sections) as daemon:
        yield daemon


async def fill(daemon: Daemon, origin: Origin, url: str) -> None:
    await fill_through(daemon, origin)
    await eventually(url, "SELECT count(*) = 4 FROM batch WHERE verdict <> 'pending'")
    await eventually(url, "SELECT count(*) = 2 FROM rejection")


async def eventually(url: str, query: str) -> None:
    async with asyncio.timeout(30):
        while await fetch(url, query) != [(True,)]:
            await asyncio.sleep(0.02)


async def command(daemon: Daemon, *arguments: str) -> Finished:
    return await run_command("--verbose", *arguments, cwd=daemon.folder)


async def test_the_record_is_shown_the_same_from_the_database_and_over_the_api(
    tmp_path: Path, url: str, origin: Origin
) -> None:
    async with started(tmp_path, url) as daemon:
        await fill(daemon, origin, url)
        server = daemon.callback.removesuffix("/notify")
        ((token,),) = await fetch(url, "SELECT value FROM secret WHERE name = 'admin_token'")
        environ = clean_environment(NOTIFY_SERVER__AUTH__ADMIN_TOKEN=token)
        # In the folder of the configuration the command finds the token by itself.
        assert (await command(daemon, "batches", "--url", server)).code == 0
        asked = [
            ["batches", "--json", "--verdict", "incomplete"],
            ["batches", "--json", "--api-code", "two", "--since", "1h"],
            ["show", "bad", "--json"],
            ["rejections", "--json"],
            ["export"],
            ["export", "--format", "ndjson", "--batch", "bad", "--host", "10.0.0.1"],
            ["status", "--json"],
        ]
        for arguments in asked:
            own, remote = await asyncio.gather(
                command(daemon, *arguments),
                run_command(*arguments, "--url", server, cwd=tmp_path / "..", environ=environ),
            )
            if arguments[0] == "status":
                assert json.loads(own.stdout)["totals"] == json.loads(remote.stdout)["totals"]
            else:
                assert (own.code, own.stdout) == (remote.code, remote.stdout), arguments
            assert own.stdout
            assert re.fullmatch(
                rf"using {re.escape(without_secrets(url))} \(servers running: \S+:{daemon.pid}\)\n", own.stderr
            ), own.stderr
        for arguments in (["show", "bad"], ["show", "good"], ["batches"], ["rejections"], ["status"]):
            end = await command(daemon, *arguments)
            assert end.code == (1 if arguments == ["show", "bad"] else 0)
            assert "\x1b" not in end.stdout
        assert re.fullmatch(
            rf"{re.escape(without_secrets(url))} \(servers running: \S+:{daemon.pid}\)", end.stdout.splitlines()[0]
        )
        assert "search_path" not in end.stdout + end.stderr


async def test_a_recheck_beside_a_server_takes_effect_at_once(tmp_path: Path, url: str, origin: Origin) -> None:
    async with started(tmp_path, url) as daemon:
        await fill(daemon, origin, url)
        before = await fetch(url, "SELECT last_value FROM node_id"), await fetch(url, "SELECT id FROM node")
        dry = await command(daemon, "recheck", "--batch", "bad", "--dry-run")
        assert (dry.code, dry.stdout) == (0, "2 files would be rechecked (dry run)\n")
        assert dry.stderr.splitlines()[-1] == "acting through this command, on the database itself"
        origin.on("/gone", Answer())
        end = await command(daemon, "recheck", "--reason", "http_410", "--yes", "--json")
        assert (end.code, end.stdout) == (0, '{"files":1}\n')
        assert (await daemon.verdict("bad", number=2))["available"] == 2
        ((id,),) = await fetch(url, "SELECT id FROM file WHERE oss_object_name = 'gone' AND state = 'available'")
        end = await command(daemon, "recheck", "--file", str(id), "-y")
        assert (end.code, end.stdout) == (0, "1 file queued for recheck\n")
        await daemon.verdict("bad", number=3)
        # The command was no node: no node's share of the work became smaller.
        assert before == (await fetch(url, "SELECT last_value FROM node_id"), await fetch(url, "SELECT id FROM node"))
        assert daemon.count("sharing the work") == 1


async def test_an_attempt_in_flight_at_a_recheck_does_not_answer_it(tmp_path: Path, url: str, origin: Origin) -> None:
    async with started(tmp_path, url) as daemon:
        gate = asyncio.Event()
        origin.on("/slow", Answer(410, gate=gate, close=True), Answer())
        await daemon.deliver("slow", [origin.url("/slow")])
        await origin.reached(1, "/slow")
        end = await command(daemon, "recheck", "--batch", "slow", "-y")
        assert (end.code, end.stdout) == (0, "1 file queued for recheck\n")
        gate.set()
        assert (await daemon.verdict("slow"))["verdict"] == "complete"
        assert origin.count["/slow"] == 2


@pytest.mark.parametrize("runs", [True, False], ids=["a server runs", "no server runs"])
async def test_refused_bodies_are_replayed_and_old_ones_deleted(
    tmp_path: Path, url: str, origin: Origin, runs: bool
) -> None:
    async with started(tmp_path, url, contract={"max_files": 1}) as daemon:
        for name in ("x", "y"):
            assert (await daemon.post(batch_body(name, [origin.url("/1"), origin.url("/2")]))).status == 400
        assert (await daemon.post(b"{}")).status == 400
        await eventually(url, "SELECT count(*) = 3 FROM rejection")
        ids = [str(id) for (id,) in await fetch(url, "SELECT id FROM rejection ORDER BY id")]
        assert await daemon.terminate() == 0
        config = tmp_path / "config.toml"
        config.write_text(config.read_text().replace("max_files = 1", "max_files = 10"))
        if runs:
            await daemon.start()
        end = await command(daemon, "replay", *ids)
        assert end.code == 1
        assert [line.partition(",")[0] for line in end.stdout.splitlines()] == [
            f"rejection {ids[0]}: accepted as delivery 1", f"rejection {ids[1]}: accepted as delivery 2"
        ]  # fmt: skip
        assert "it is still refused: batch_id" in end.stderr.splitlines()[-1]
        again = await command(daemon, "replay", "--json", ids[0])
        assert json.loads(again.stdout)["problem"] == "there is none; it may have been processed"
        end = await command(daemon, "prune", "--rejections", "0s", "--yes")
        assert (end.code, end.stdout) == (0, "1 rows deleted\n"), end.stderr
        kept = await command(daemon, "prune", "--yes", "--json")
        assert (kept.code, kept.stdout) == (0, '{"rows":0}\n')
        if not runs:
            status = await command(daemon, "status", "--once")
            assert status.stdout.startswith(f"{without_secrets(url)} (no server running)\n")
            assert await fetch(url, "SELECT count(*) FROM batch") == [(0,)]
            await daemon.start()
        assert (await daemon.verdict("x"))["available"] == 2
        assert (await daemon.verdict("y"))["available"] == 2


async def test_without_a_server_a_recheck_takes_effect_as_soon_as_one_runs(
    tmp_path: Path, url: str, origin: Origin
) -> None:
    async with started(tmp_path, url) as daemon:
        await fill(daemon, origin, url)
        assert await daemon.terminate() == 0
        origin.on("/gone", Answer())
        end = await command(daemon, "recheck", "--batch", "bad", "--state", "unavailable", "--yes")
        assert (end.code, end.stdout) == (0, "1 file queued for recheck: the server checks it when it runs\n")
        await daemon.start()
        assert (await daemon.verdict("bad"))["available"] == 2
        rows = await fetch(url, "SELECT count(*) FROM batch WHERE completed_at IS NOT NULL")
        end = await command(daemon, "prune", "--completed", "0s", "--yes")
        assert (rows, end.code) == ([(4,)], 0)
        assert await fetch(url, "SELECT (SELECT count(*) FROM batch), (SELECT count(*) FROM attempt)") == [(0, 0)]


async def test_a_wrong_argument_is_reported_in_one_line(tmp_path: Path, url: str) -> None:
    await migrate_at(url)
    asked = [
        (["show", "none"], 1, 'there is no batch "none": `notify-server batches` lists them'),
        (["batches", "--since", "soon"], 2, '"soon" is not a time'),
        (["recheck"], 2, "name files with --file, --batch or --reason"),
        (["recheck", "--file", "4711", "--yes"], 1, 'there is no file "4711"'),
        (["replay", str(2**63)], 1, "there is none; it may have been processed"),
        (["replay", "4711"], 1, "rejection 4711: there is none; it may have been processed"),
        (["prune"], 2, "not a terminal: add --yes to confirm"),
    ]
    environ = clean_environment(NOTIFY_SERVER__STORE__URL=url)
    ends = await asyncio.gather(*(run_command(*arguments, cwd=tmp_path, environ=environ) for arguments, *_ in asked))
    for (arguments, code, said), end in zip(asked, ends, strict=True):
        assert (end.code, end.stdout) == (code, ""), arguments
        assert said in end.stderr.splitlines()[-1], end.stderr
        assert "Traceback" not in end.stderr


@pytest.mark.parametrize("arguments", [["status"], ["export"], ["prune", "-y"]])
async def test_where_there_is_no_record_it_is_said_and_none_is_made(
    tmp_path: Path, url: str, arguments: list[str]
) -> None:
    environ = clean_environment(NOTIFY_SERVER__STORE__URL=url)
    end = await run_command(*arguments, cwd=tmp_path, environ=environ)
    assert (end.code, end.stdout) == (1, "")
    told = "there is no record: start the daemon, or name its database"
    assert end.stderr == f"notify_server: {without_secrets(url)}: {told}\n"
    schema = url.rpartition("=")[2]
    assert await fetch(url, f"SELECT count(*) FROM pg_class WHERE relnamespace = '{schema}'::regnamespace") == [(0,)]


async def test_a_record_of_another_version_or_out_of_reach_is_reported_with_a_remedy(tmp_path: Path, url: str) -> None:
    await migrate_at(url)
    nowhere = "postgresql://u:geheim@127.0.0.1:1/d"
    for version, store, said in (
        (-1, url, f"has schema version -1, this program needs {LATEST}: run `notify-server migrate`"),
        (999, url, f"has schema version 999, this program knows {LATEST}: use the newer notify_server that wrote it"),
        (LATEST, nowhere, "start PostgreSQL, or correct [store] url"),
    ):
        await fetch(url, f"UPDATE schema_version SET version = {version}")
        end = await run_command("batches", cwd=tmp_path, environ=clean_environment(NOTIFY_SERVER__STORE__URL=store))
        assert (end.code, end.stdout) == (1, "")
        (line,) = end.stderr.splitlines()
        assert line.startswith("notify_server: postgresql://")
        assert line.endswith(said)
        assert "geheim" not in line


async def test_migrate_brings_a_database_up_to_date_and_leaves_a_newer_one(tmp_path: Path, url: str) -> None:
    environ = clean_environment(NOTIFY_SERVER__STORE__URL=url)
    names = ", ".join(step.name for step in load_migrations("postgres"))
    for said in (
        f"migrated from schema version 0 to {LATEST} ({names})",
        f"has schema version {LATEST}, the latest: nothing to do",
    ):
        end = await run_command("migrate", cwd=tmp_path, environ=environ)
        assert (end.code, end.stdout, end.stderr) == (0, f"{without_secrets(url)}: {said}\n", "")
    await fetch(url, "UPDATE schema_version SET version = 999")
    end = await run_command("migrate", cwd=tmp_path, environ=environ)
    assert (end.code, end.stdout) == (1, "")
    assert "has schema version 999, this program knows" in end.stderr and len(end.stderr.splitlines()) == 1
    assert await fetch(url, "SELECT version FROM schema_version") == [(999,)]


async def test_one_that_migrates_waits_for_another_that_does(tmp_path: Path, url: str) -> None:
    environ = clean_environment(NOTIFY_SERVER__STORE__URL=url)
    ends = await asyncio.gather(*(run_command("migrate", cwd=tmp_path, environ=environ) for _ in range(3)))
    assert [(end.code, end.stderr) for end in ends] == [(0, "")] * 3
    assert await fetch(url, "SELECT version FROM schema_version") == [(LATEST,)]
