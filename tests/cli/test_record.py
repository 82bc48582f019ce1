"""The commands that look at the record and act on it, as a user runs them: beside a daemon, through it, without one."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import fcntl
import io
import json
import os
import pty
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import zipfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme

from notify_server.cli.common import UsageError
from notify_server.cli.listing import moment
from notify_server.store.reading.types import BatchDetail, BatchItem, FileItem, RejectionItem, Totals
from notify_server.store.sql import load_migrations
from notify_server.web.api.types import Host, Status
from tests.support.cli import on_terminal, running
from tests.support.daemon import Daemon, Finished, clean_environment, run_command
from tests.support.notification import batch_body, failed, finished
from tests.support.origin import Answer, Origin
from tests.support.waiting import SECONDS, free_port

TOKEN = "correct-horse-battery"
RETRY = {"retry_schedule": ["1h"]}


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with Origin() as origin:
        origin.on("/gone", Answer(410, close=True))
        yield origin


@contextlib.asynccontextmanager
async def started(folder: Path, **config: Any) -> AsyncIterator[Daemon]:
    """A daemon on a port that its configuration names, which is `config.toml` in the folder."""
    sections = {"server": {"port": free_port()}, "verify": RETRY, **config}
    base = {"allowed_networks": ["127.0.0.0/8"], "allowed_ports": []}
    sections["verify"] = base | sections["verify"]
    async with Daemon(folder, sections) as daemon:
        yield daemon


async def fill_through(daemon: Daemon, origin: Origin) -> None:
    """A complete batch `good`; an incomplete one `bad` of 4 files; `both` under two api_codes; two refused bodies."""
    await daemon.deliver("good", [finished(origin.url("/a"), "a"), finished(origin.url("/b"), "=b")])
    await daemon.verdict("good")
    await daemon.deliver(
        "bad",
        [
            finished(origin.url("/c"), "c"),
            finished(origin.url("/gone"), "gone"),
            finished("http://10.0.0.1/x", "blocked"),
            failed("failed"),
        ],
    )
    await daemon.verdict("bad")
    for code in ("one", "two"):
        body = {"batch_id": "both", "api_code": code, "file_list": [finished(origin.url("/d"))]}
        assert (await daemon.post(json.dumps(body).encode())).status == 200
    for refused in (b'{"batch_id": "refused\\u001b[2J"}', b"{}"):
        assert (await daemon.post(refused)).status == 400


async def fill(daemon: Daemon, origin: Origin) -> None:
    """The same, until all of it is in the file."""
    await fill_through(daemon, origin)
    await daemon.eventually("SELECT count(*) = 4 FROM batch WHERE verdict <> 'pending'")
    await daemon.eventually("SELECT count(*) = 2 FROM rejection")


async def command(daemon: Daemon, *arguments: str) -> Finished:
    return await run_command("--verbose", *arguments, cwd=daemon.folder)


def lines(end: Finished, kind: type[Any]) -> list[Any]:
    assert end.code == 0, end
    return [msgspec.json.decode(line, type=kind) for line in end.stdout.splitlines()]


async def test_the_record_is_shown_the_same_from_the_file_and_over_the_api(tmp_path: Path, origin: Origin) -> None:
    async with started(tmp_path) as daemon:
        await fill(daemon, origin)
        url = daemon.callback.removesuffix("/notify")
        token = (tmp_path / "admin_token").read_text().strip()
        environ = clean_environment(NOTIFY_SERVER__AUTH__ADMIN_TOKEN=token)
        asked = [
            ["batches", "--json", "--verdict", "incomplete"],
            ["batches", "--json", "--api-code", "two", "--since", "1h"],
            ["show", "bad", "--json"],
            ["rejections", "--json"],
            ["export"],
            ["export", "--format", "ndjson", "--batch", "bad", "--host", "10.0.0.1"],
        ]
        for arguments in asked:
            file, remote = await asyncio.gather(
                command(daemon, *arguments),
                run_command("--verbose", *arguments, "--url", url, cwd=tmp_path / "..", environ=environ),
            )
            assert (file.code, file.stdout) == (remote.code, remote.stdout), arguments
            assert file.stdout
            assert file.stderr == f"using {daemon.database} (server running, pid {daemon.pid})\n"
            assert remote.stderr == f"using the server at {url}\n"


async def test_printed_json_has_the_documented_types(tmp_path: Path, origin: Origin) -> None:
    async with started(tmp_path) as daemon:
        await fill(daemon, origin)
        batches, bad, refused, status, exported = await asyncio.gather(
            command(daemon, "batches", "--json", "--limit", "3"),
            command(daemon, "show", "bad", "--json", "--limit", "2"),
            command(daemon, "rejections", "--json"),
            command(daemon, "status", "--json"),
            command(daemon, "export"),
        )
        assert len(lines(batches, BatchItem)) == 3
        content = json.loads(bad.stdout)
        batch = msgspec.convert(content["batch"], BatchDetail)
        files = msgspec.convert(content["files"], list[FileItem])
        assert (bad.code, batch.verdict, len(files)) == (1, "incomplete", 2)
        assert {file.state for file in files} <= {"unavailable", "blocked", "upload_failed"}
        assert lines(refused, RejectionItem)
        content = json.loads(status.stdout)
        assert msgspec.convert(content["totals"], Totals).files == 8
        assert msgspec.convert(content["status"], Status).in_flight == 0
        assert msgspec.convert(content["hosts"], list[Host])[0].host == f"127.0.0.1:{origin.port}"
        rows = list(csv.DictReader(io.StringIO(exported.stdout, newline="")))
        assert {row["oss_object_name"] for row in rows} >= {"a", "'=b", "gone"}


async def test_tables_are_for_people_and_harmless_to_terminals(tmp_path: Path, origin: Origin) -> None:
    async with started(tmp_path) as daemon:
        await fill(daemon, origin)
        bad, good, refused, batches, status = await asyncio.gather(
            command(daemon, "show", "bad"),
            command(daemon, "show", "good"),
            command(daemon, "rejections"),
            command(daemon, "batches", "--limit", "1"),
            command(daemon, "status"),
        )
        assert bad.code == 1 and good.code == 0
        assert all(word in bad.stdout for word in ("http_410", "private_address", "upload_failed", "4 files"))
        assert "Every file is available." in good.stdout
        assert "api_code" in refused.stdout
        assert "the latest 1: --limit shows more" in batches.stdout
        assert "rejected notifications are kept" in status.stdout and "circuit" in status.stdout
        for end in (bad, good, refused, batches, status):
            assert "\x1b" not in end.stdout


async def test_a_wrong_argument_is_reported_in_one_line(tmp_path: Path, origin: Origin) -> None:
    async with started(tmp_path) as daemon:
        await fill(daemon, origin)
        nowhere = f"http://127.0.0.1:{free_port()}"
        asked = [
            (["show", "none\x1b"], 1, r'there is no batch "none\x1b": `notify-server batches` lists them'),
            (["show", "both"], 2, "there are several with this batch_id: name one of two, one with --api-code"),
            (["batches", "--since", "soon"], 2, '"soon" is not a time: write 2026-11-23T08:00:00Z, 2026-11-23'),
            (["recheck"], 2, "name files with --file, --batch or --reason"),
            (["recheck", "--file", "4711", "--yes"], 1, 'there is no file "4711": `notify-server show BATCH` lists'),
            (["recheck", "--file", "1", "--reason", "http_410", "-y"], 1, "file: name it alone, without batch"),
            (["recheck", "--reason", "http_410"], 2, "not a terminal: add --yes to confirm"),
            (["replay", "4711"], 1, "rejection 4711: there is none; it may have been processed"),
            (["export", "-o", "/nowhere/x.csv"], 2, "/nowhere/x.csv: cannot be written (No such file or directory)"),
            (["batches", "--url", nowhere], 1, f"notify_server: {nowhere}: the server does not respond"),
            (["batches", "--url", origin.url("")], 1, f"{origin.url('')}: answers 200, and not as a notify_server"),
        ]
        for (arguments, code, said), end in zip(
            asked, await asyncio.gather(*(command(daemon, *arguments) for arguments, _, _ in asked)), strict=True
        ):
            assert (end.code, end.stdout) == (code, ""), arguments
            assert said in end.stderr.splitlines()[-1], end.stderr
            assert "Traceback" not in end.stderr


async def test_a_recheck_through_the_daemon_requests_files_at_once(tmp_path: Path, origin: Origin) -> None:
    async with started(tmp_path) as daemon:
        await fill(daemon, origin)
        dry = await command(daemon, "recheck", "--batch", "bad", "--dry-run")
        assert (dry.code, dry.stdout) == (0, "2 files would be rechecked (dry run)\n")
        assert f"acting through the server at {daemon.callback.removesuffix('/notify')}" in dry.stderr
        origin.on("/gone", Answer())
        end = await command(daemon, "recheck", "--reason", "http_410", "--yes", "--json")
        assert (end.code, end.stdout) == (0, '{"files":1}\n')
        assert (await daemon.verdict("bad", number=2))["available"] == 2
        assert daemon.files("bad")["gone"]["state"] == "available"
        (id,) = (row["id"] for name, row in daemon.files("bad").items() if name == "gone")
        end = await command(daemon, "recheck", "--file", str(id), "-y")
        assert (end.code, end.stdout) == (0, "1 file queued for recheck\n")
        await daemon.verdict("bad", number=3)


async def test_a_recheck_on_the_database_file_takes_effect_when_a_daemon_runs(tmp_path: Path, origin: Origin) -> None:
    async with started(tmp_path) as daemon:
        await fill(daemon, origin)
        assert await daemon.terminate() == 0
        origin.on("/gone", Answer())
        end = await command(daemon, "recheck", "--batch", "bad", "--state", "unavailable", "--yes")
        assert (end.code, end.stdout) == (0, "1 file queued for recheck: the server checks it when it runs\n")
        assert end.stderr.splitlines() == [
            f"using {daemon.database} (no server running)",
            "acting through this command, on the file itself",
        ]
        assert daemon.files("bad")["gone"]["state"] == "pending"
        await daemon.start()
        await daemon.verdict("bad")
        assert daemon.files("bad")["gone"]["state"] == "available"


@pytest.mark.parametrize("runs", [True, False], ids=["a daemon runs", "no daemon runs"])
async def test_refused_bodies_are_replayed_and_old_ones_deleted(tmp_path: Path, origin: Origin, runs: bool) -> None:
    strict = {"contract": {"max_files": 1}}
    async with started(tmp_path, **strict) as daemon:
        for name in ("x", "y"):
            body = batch_body(name, [origin.url("/1"), origin.url("/2")])
            assert (await daemon.post(body)).status == 400
        assert (await daemon.post(b"{}")).status == 400
        await daemon.eventually("SELECT count(*) = 3 FROM rejection")
        ids = [str(row["id"]) for row in daemon.sql("SELECT id FROM rejection ORDER BY id")]
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
        assert (end.code, end.stdout) == (0, "1 rows deleted\n")
        kept = await command(daemon, "prune", "--yes", "--json")
        assert (kept.code, kept.stdout) == (0, '{"rows":0}\n')
        if not runs:
            await daemon.start()
        assert (await daemon.verdict("x"))["available"] == 2
        assert (await daemon.verdict("y"))["available"] == 2


async def test_a_daemon_with_a_token_gets_it_and_a_wrong_one_is_reported(tmp_path: Path, origin: Origin) -> None:
    async with started(tmp_path, auth={"admin_token": TOKEN}) as daemon:
        await fill(daemon, origin)
        wrong = clean_environment(NOTIFY_SERVER__AUTH__ADMIN_TOKEN="another-token")
        right, refused, shown, remote = await asyncio.gather(
            command(daemon, "recheck", "--batch", "bad", "--dry-run"),
            run_command("recheck", "--batch", "bad", "--dry-run", cwd=tmp_path, environ=wrong),
            run_command("status", "--json", cwd=tmp_path, environ=wrong),
            run_command("batches", "--url", daemon.callback.removesuffix("/notify"), cwd=tmp_path / ".."),
        )
        assert right.stdout == "2 files would be rechecked (dry run)\n"
        assert (refused.code, refused.stdout) == (1, "")
        assert "this is not the admin_token: set NOTIFY_SERVER__AUTH__ADMIN_TOKEN to the server's" in refused.stderr
        # The file can be read all the same.
        assert json.loads(shown.stdout)["totals"]["batches"] >= 4 and json.loads(shown.stdout)["status"] is None
        assert "this is not the admin_token" in shown.stderr
        assert remote.code == 1 and "send the admin_token" in remote.stderr
        for end in (right, refused, shown, remote):
            assert TOKEN not in end.stdout + end.stderr


async def test_a_daemon_on_an_unknown_port_can_be_read_but_not_called(tmp_path: Path, origin: Origin) -> None:
    async with started(tmp_path, server={"port": 0}) as daemon:
        await fill(daemon, origin)
        status, refused, named = await asyncio.gather(
            command(daemon, "status"),
            command(daemon, "recheck", "--batch", "bad", "--yes"),
            command(daemon, "recheck", "--batch", "bad", "--yes", "--url", daemon.callback.removesuffix("/notify")),
        )
        assert status.code == 0 and "current activity is unknown" in status.stdout
        assert refused.code == 1
        assert "[server] port is 0: name the address from the server's log with --url" in refused.stderr
        assert (named.code, named.stdout) == (0, "2 files queued for recheck\n")


async def test_the_daemon_s_own_certificate_is_trusted_and_no_other(tmp_path: Path, origin: Origin) -> None:
    def certificate(name: str) -> dict[str, str]:
        leaf = trustme.CA().issue_cert("notify.example.com")
        leaf.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        for blob in leaf.cert_chain_pems:
            blob.write_to_path(tmp_path / f"{name}.pem", append=True)
        return {"ssl_certificate": str(tmp_path / f"{name}.pem"), "ssl_key": str(tmp_path / f"{name}.key")}

    own, other = certificate("own"), certificate("other")
    port = free_port()
    async with Daemon(
        tmp_path, {"server": {"port": port, **own}, "verify": {"allowed_hosts": ["nowhere.invalid"]}}
    ) as daemon:
        config = tmp_path / "config.toml"
        text = config.read_text()
        for key, path in own.items():
            text = text.replace(path, other[key])
        (tmp_path / "other.toml").write_text(text)
        trusted, refused = await asyncio.gather(
            command(daemon, "status", "--json"), command(daemon, "status", "--json", "--config", "other.toml")
        )
        assert json.loads(trusted.stdout)["status"]["version"]
        assert trusted.stderr.count("\n") == 1
        assert json.loads(refused.stdout)["status"] is None
        assert "certificate" in refused.stderr.lower()


@pytest.mark.parametrize("arguments", [["status"], ["export"], ["prune", "-y"]])
async def test_where_there_is_no_record_it_is_said_and_none_is_made(tmp_path: Path, arguments: list[str]) -> None:
    end = await run_command(*arguments, cwd=tmp_path)
    assert (end.code, end.stdout) == (1, "")
    assert end.stderr.splitlines()[0] == (
        "notify_server: no database at data/notify.db: run this where the server runs, "
        "or use --config FILE or --url http://HOST:8080"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["older", "newer", "another program's"])
async def test_a_record_of_another_version_is_refused_with_what_to_do(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.toml").write_text('[store]\nurl = "sqlite:///notify.db"\n')
    path, known = tmp_path / "notify.db", len(load_migrations("sqlite"))
    path.touch()
    assert (await run_command("migrate", cwd=tmp_path)).code == 0
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        if kind == "another program's":
            connection.execute("PRAGMA application_id = 1")
        else:
            connection.execute(f"PRAGMA user_version = {1 if kind == 'older' else 999}")
    end = await run_command("batches", cwd=tmp_path)
    assert (end.code, end.stdout) == (1, "")
    assert (
        end.stderr
        == "notify_server: notify.db: "
        + {
            "older": f"has schema version 1, this program needs {known}: run `notify-server migrate`\n",
            "newer": f"has schema version 999, this program knows {known}: use the newer notify_server that wrote it\n",
            "another program's": "is not a record of notify_server: name the daemon's database\n",
        }[kind]
    )


async def test_who_has_read_enough_ends_an_export_quietly(tmp_path: Path) -> None:
    async with started(tmp_path) as daemon:
        await daemon.settle("large", [failed(f"{n:04}{'x' * 900}") for n in range(2000)])
        async with running("--verbose", "export", cwd=tmp_path) as process:
            assert process.stdout is not None and process.stderr is not None
            assert (await process.stdout.readline()).startswith(b"id,batch,")
            process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
            said = await process.stderr.read()
            assert await process.wait() == 1
            assert said == f"using {daemon.database} (server running, pid {daemon.pid})\n".encode()


async def test_a_batch_is_named_by_its_id_a_unique_beginning_or_its_row(tmp_path: Path, origin: Origin) -> None:
    ids = ["8ed951a4eb258fb770426b15b00bf05d.139.32350384699553898", "8ed9aa00.1", "1"]
    async with started(tmp_path) as daemon:
        for id in ids:
            await daemon.settle(id, [finished(origin.url("/gone"), name=f"key/{id}"), failed(f"other/{id}")])
        rows = {row["batch_id"]: row["id"] for row in daemon.sql("SELECT id, batch_id FROM batch")}
        url = ["--url", daemon.callback.removesuffix("/notify")]
        for named, meant in [
            (ids[0], ids[0]),
            ("8ed95", ids[0]),
            ("8ed9aa", ids[1]),
            ("1", "1"),
            (str(rows[ids[1]]), ids[1]),
        ]:
            shown = await command(daemon, "show", named, "--json")
            assert json.loads(shown.stdout)["batch"]["batch_id"] == meant, named
        environ = clean_environment(NOTIFY_SERVER__AUTH__ADMIN_TOKEN=(tmp_path / "admin_token").read_text().strip())
        remote, several, exported, by_key, by_beginning, terminal = await asyncio.gather(
            run_command("show", "8ed95", "--json", *url, cwd=tmp_path, environ=environ),
            command(daemon, "show", "8ed9"),
            command(daemon, "export", "--batch", "8ed95"),
            command(daemon, "recheck", "--file", f"key/{ids[0]}", "--dry-run"),
            command(daemon, "recheck", "--batch", "8ed95", "--file", "key/", "--dry-run", "--json"),
            on_terminal("batches", cwd=tmp_path, columns=80),
        )
        assert json.loads(remote.stdout)["batch"]["id"] == rows[ids[0]]
        assert several.code == 2 and 'several batch_ids begin with "8ed9": ' in several.stderr
        assert f"key/{ids[0]}" in exported.stdout and f"key/{ids[1]}" not in exported.stdout
        assert by_key.stdout == "1 file would be rechecked (dry run)\n"
        assert json.loads(by_beginning.stdout)["files"] == 1
        # A terminal of 80 columns shows the ids whole, each on a line with its verdict.
        code, screen = terminal
        assert code == 0
        for id in ids:
            assert re.search(rf"^{re.escape(id)} +\S*incomplete", screen, re.MULTILINE), screen


async def test_prune_counts_first_and_a_dry_run_changes_nothing(tmp_path: Path, origin: Origin) -> None:
    async with started(tmp_path) as daemon:
        await fill(daemon, origin)
        files = daemon.value("SELECT sum(files) FROM batch")
        everything = ("prune", "--completed", "0s", "--rejections", "0s")
        dry = await command(daemon, *everything, "--dry-run")
        assert dry.stdout.startswith(f"4 batches ({files} files) and 2 rejections would be deleted: ")
        counted = await command(daemon, *everything, "--dry-run", "--json")
        assert json.loads(counted.stdout) == {"batches": 4, "files": files, "rejections": 2}
        id = daemon.value("SELECT max(id) FROM rejection")
        replay = await command(daemon, "replay", str(id), "--dry-run")
        assert replay.code == 0 and "would be processed again" in replay.stdout
        assert daemon.value("SELECT count(*) FROM batch") == 4 and daemon.value("SELECT count(*) FROM rejection") == 2
        async with Terminal(*everything, cwd=tmp_path) as terminal:
            await terminal.shows(f"Delete 4 batches ({files} files) and 2 rejections: ".encode())
            terminal.type(b"y\n")
            assert await terminal.ends() == 0
        assert daemon.value("SELECT count(*) FROM batch") == 0


async def test_recheck_of_failed_files_says_that_the_platform_must_deliver_them(tmp_path: Path) -> None:
    async with started(tmp_path) as daemon:
        await daemon.settle("lost", [failed("a"), failed("b")])
        end = await command(daemon, "recheck", "--batch", "lost", "--yes")
        assert (end.code, end.stdout) == (
            0,
            "Nothing to recheck: 2 files reported FAILED by the platform; have it deliver them again.\n",
        )


async def test_without_a_configuration_a_server_with_another_one_is_named(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = tmp_path / "config.toml"
    config.write_text(f'[server]\nport = 0\n[store]\nurl = "sqlite:///{tmp_path}/notify.db"\n')
    # As a service manager runs it: its parent is no Python program.
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", "notify_server", "--config", config.name),
        cwd=tmp_path,
        env=clean_environment(),
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        await process.stderr.readuntil(b"ready for notifications")
        batches, doctor, named = await asyncio.gather(
            run_command("batches", cwd=elsewhere),
            run_command("doctor", "--json", cwd=elsewhere),
            run_command("batches", "--config", str(config), cwd=elsewhere),
        )
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        await process.communicate()
    advice = f"is a server: to see its record, `cd {tmp_path}` and run this again with --config config.toml"
    assert batches.code == 1
    assert any(line.startswith("note: process ") and line.endswith(advice) for line in batches.stderr.splitlines())
    (finding,) = (each for each in json.loads(doctor.stdout)["findings"] if each["check"] == "daemon")
    assert finding["level"] == "warning" and "another server runs here" in finding["text"]
    assert (named.code, named.stderr) == (0, "")


async def test_an_export_is_written_to_the_file_that_is_named(tmp_path: Path, origin: Origin) -> None:
    async with started(tmp_path) as daemon:
        await fill(daemon, origin)
        end = await command(daemon, "export", "--batch", "bad", "-o", "bad.csv")
        assert (end.code, end.stdout) == (0, "")
        assert (tmp_path / "bad.csv").read_bytes().count(b"\r\n") == 5
        full = await command(daemon, "export", "--format", "ndjson", "-o", "/dev/full")
        assert full.code == 1 and "No space left on device" in full.stderr and "Traceback" not in full.stderr


async def test_a_bundle_is_the_same_from_the_record_and_over_the_api_and_its_sums_are_right(
    tmp_path: Path, origin: Origin
) -> None:
    async with started(tmp_path) as daemon:
        await fill(daemon, origin)
        local = await command(daemon, "bundle", "bad", "-o", "a.zip")
        remote = await command(daemon, "bundle", "bad", "-o", "b.zip", "--url", daemon.url)
        missing = await command(daemon, "bundle", "none", "-o", "c.zip")
        nowhere = await command(daemon, "bundle", "bad", "-o", "/nowhere/c.zip")
    assert (local.code, remote.code) == (0, 0), remote.stderr
    assert "sha256sum -c SHA256SUMS" in local.stdout
    entries = []
    for name in ("a", "b"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as archive:
            archive.extractall(tmp_path / name)
            entries.append(
                {each: archive.read(each) for each in archive.namelist() if each.endswith((".csv", ".json"))}
            )
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / name, check=True)
    assert entries[0] == entries[1]
    assert (tmp_path / "a.zip").stat().st_mode & 0o777 == 0o600
    assert (missing.code, nowhere.code) == (1, 2)
    assert nowhere.stderr.endswith("/nowhere/c.zip: cannot be written (No such file or directory)\n")
    assert not list(tmp_path.glob("c.zip*"))


class Terminal:
    """A command on a terminal that can be typed at."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self._arguments = arguments
        self._cwd = cwd
        self.seen = b""

    async def __aenter__(self) -> Terminal:
        self._master, slave = pty.openpty()
        self.before = termios.tcgetattr(self._master)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "notify_server", *self._arguments), cwd=self._cwd,
            env=clean_environment(TERM="xterm"), stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        os.set_blocking(self._master, False)
        self._news = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._master, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._master)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        os.close(self._master)

    def _read(self) -> None:
        try:
            self.seen += os.read(self._master, 1 << 16)
        except OSError:
            asyncio.get_running_loop().remove_reader(self._master)
        self._news.set()

    async def shows(self, text: bytes) -> None:
        async with asyncio.timeout(SECONDS):
            while text not in self.seen:
                self._news.clear()
                await self._news.wait()

    def type(self, text: bytes) -> None:
        os.write(self._master, text)

    async def ends(self) -> int:
        async with asyncio.timeout(SECONDS):
            return await self.process.wait()


async def test_the_status_goes_on_until_it_is_stopped_and_leaves_the_terminal_as_it_was(
    tmp_path: Path,
) -> None:
    async with started(tmp_path) as daemon, Terminal("status", cwd=daemon.folder) as terminal:
        await terminal.shows(b"the last second")
        await daemon.deliver("batch", [failed("x")])
        await daemon.verdict("batch")
        count = terminal.seen.count(b"the last second")
        await terminal.shows(b"upload_failed")
        while terminal.seen.count(b"the last second") == count:
            terminal._news.clear()
            await terminal._news.wait()
        terminal.process.send_signal(signal.SIGINT)
        assert await terminal.ends() == 130
        await terminal.shows(b"\x1b[?1049l")
        assert terminal.seen.index(b"\x1b[?1049h") < terminal.seen.rindex(b"\x1b[?1049l")
        assert terminal.seen.rindex(b"\x1b[?25h") > terminal.seen.rindex(b"\x1b[?25l")
        assert termios.tcgetattr(terminal._master) == terminal.before
        assert b"Traceback" not in terminal.seen


async def test_an_action_is_asked_about_first(tmp_path: Path, origin: Origin) -> None:
    async def asked(daemon: Daemon, typed: bytes | None) -> int:
        async with Terminal("recheck", "--batch", "bad", cwd=daemon.folder) as terminal:
            await terminal.shows(b"Recheck 1 file? [y/N] ")
            if typed is None:
                terminal.process.send_signal(signal.SIGINT)
            else:
                terminal.type(typed)
            code = await terminal.ends()
            assert b"Traceback" not in terminal.seen
            return code

    async with started(tmp_path) as daemon:
        await daemon.settle("bad", [finished(origin.url("/gone"))])
        origin.on("/gone", Answer())
        # A word, an end of file, Ctrl-C.
        assert await asyncio.gather(*(asked(daemon, typed) for typed in (b"\n", b"no\n", b"\x04", None))) == [
            1,
            1,
            1,
            130,
        ]
        assert daemon.value("SELECT state FROM file") == "unavailable"
        assert await asked(daemon, b"y\n") == 0
        assert (await daemon.verdict("bad", number=2))["verdict"] == "complete"


async def test_an_export_over_the_api_that_breaks_off_is_no_success(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/csv\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nid\r\n\r\n"
    async with Origin() as origin:
        origin.default = Answer(raw=head, close=True)
        end = await run_command("export", "--url", origin.url(""), cwd=tmp_path)
    assert end.code == 1
    assert "the answer broke off and is incomplete" in end.stderr


@pytest.mark.parametrize(
    ("text", "ago"),
    [("2h", timedelta(hours=2)), ("90d", timedelta(days=90)), ("0s", timedelta()), ("1.5m", timedelta(seconds=90))],
)
def test_a_time_may_be_so_long_ago(text: str, ago: timedelta) -> None:
    assert abs(datetime.now(UTC) - ago - moment(text)) < timedelta(seconds=5)


def test_a_time_may_be_rfc_3339_or_a_date_of_this_machine() -> None:
    assert moment("2026-11-23T08:00:00+08:00") == datetime(2026, 11, 23, tzinfo=UTC)
    assert moment("2026-11-23T00:00:00Z") == datetime(2026, 11, 23, tzinfo=UTC)
    assert moment("2026-11-23") == moment("20261123") == datetime(2026, 11, 23).astimezone()


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2h ago", "-2h", "12", "1700000000", "99999999d", "0001-01-01", "\x1b[2J"]
)
def test_an_invalid_time_is_reported_with_valid_examples(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"is not a time: write 2026-11-23T08:00:00Z, 2026-11-23, or 2h for two hours"
    ) as e:
        moment(text)
    assert str(e.value).isprintable()
