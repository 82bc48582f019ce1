"""Faults of the machine around the daemon: processes that die, disks and descriptors that run out, files that are bad.

The default of every test: no acked notification is lost, no attempt is spent on what was not asked, and the daemon
goes on, or says in one line why it cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import typer

from notify_server.cli.main import app as commands
from tests.support.daemon import (
    READY,
    Daemon,
    Finished,
    clean_environment,
    process_gone,
    run_command,
    session_members,
    to_toml,
)
from tests.support.http import Reply
from tests.support.notification import batch_body
from tests.support.origin import SILENCE, Answer, Origin
from tests.support.waiting import SECONDS

SETTLED = "SELECT count(*) = sum(verdict <> 'pending') FROM batch"


async def acks(daemon: Daemon, origin: Origin, prefix: str, size: int = 1) -> AsyncIterator[tuple[str, Reply]]:
    """Post batch after batch until there is no answer any more."""
    for number in itertools.count(1):
        batch = f"{prefix}-{number}"
        try:
            reply = await daemon.post(batch_body(batch, [origin.url(f"/{batch}/{n}") for n in range(size)]))
        except (aiohttp.ClientError, OSError):
            return
        yield batch, reply


def stored(daemon: Daemon) -> set[str]:
    return {row["batch_id"] for row in daemon.sql("SELECT batch_id FROM notification")}


# --- Probers ---


async def test_a_killed_prober_is_replaced_and_its_files_are_probed_again(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        gate = asyncio.Event()
        origin.default = Answer(gate=gate)
        await daemon.deliver("b", [origin.url(f"/{number}") for number in range(50)])
        await origin.reached(32)
        (prober,) = daemon.prober_pids()
        os.kill(prober, signal.SIGKILL)
        # Callbacks are answered while there is no prober.
        replies = await asyncio.gather(*(daemon.post(batch_body(f"c{n}", [])) for n in range(20)))
        assert {reply.status for reply in replies} == {200}
        await daemon.line("prober ended, starting another", pid=prober)
        gate.set()
        assert (await daemon.verdict("b"))["verdict"] == "complete"
        assert daemon.value("SELECT count(*) FROM file WHERE attempts = 1 AND state = 'available'") == 50
        assert daemon.value("SELECT count(*) FROM attempt") == 50
        (successor,) = daemon.prober_pids()
        assert successor != prober
        assert await daemon.terminate() == 0


async def test_probers_killed_again_and_again_under_load_burn_no_attempts(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path, {"verify": {"processes": 2}}) as daemon:
        for batch in range(5):
            await daemon.deliver(f"b{batch}", [origin.url(f"/{batch}/{number}") for number in range(600)])
        for _ in range(8):
            await origin.reached(len(origin.hits) + 150)
            # While the daemon stands still, so that it finds everything at once: the death, what the other prober has
            # found out meanwhile, and callbacks.
            daemon.send(signal.SIGSTOP)
            posted = asyncio.create_task(daemon.post(batch_body("again", [origin.url("/again")])))
            for prober in daemon.prober_pids()[:1]:
                os.kill(prober, signal.SIGKILL)
                await process_gone(prober)
            daemon.send(signal.SIGCONT)
            assert (await posted).status == 200
        for batch in range(5):
            line = await daemon.verdict(f"b{batch}")
            assert (line["verdict"], line["available"]) == ("complete", 600)
        await daemon.verdict("again")
        assert daemon.count("prober ended, starting another") >= 3
        assert daemon.value("SELECT count(*) FROM file WHERE attempts = 1 AND state = 'available'") == 3001
        assert daemon.count("a part of the daemon has stopped, restart it") == 0


async def test_a_daemon_without_a_prober_says_that_it_is_not_ready(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon, aiohttp.ClientSession() as session:
        ready = daemon.callback.replace("/notify", "/readyz")
        async with session.get(ready) as response:
            assert response.status == 200
        (prober,) = daemon.prober_pids()
        os.kill(prober, signal.SIGSTOP)
        os.kill(prober, signal.SIGKILL)
        await daemon.line("prober ended, starting another")
        async with session.get(ready) as response:
            assert response.status == 503
            assert (await response.json())["probers"] != "ok"


# --- Stopping ---


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def connections(daemon: Daemon, number: int) -> AsyncIterator[list[Streams]]:
    """So many connections to the daemon, closed in the end whatever has become of them."""
    host, port, _ = _parts(daemon.callback)
    opened: list[Streams] = []
    try:
        for _ in range(number):
            opened.append(await asyncio.open_connection(host, port))
        yield opened
    finally:
        for _, writer in opened:
            writer.transport.abort()
        for _, writer in opened:
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class Upload:
    """A callback whose body is half sent, and whose handler is known to be waiting for the rest."""

    def __init__(self, streams: Streams, body: bytes) -> None:
        self._reader, self._writer = streams
        self._body = body

    async def begin(self) -> None:
        self._writer.write(
            f"POST /notify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(self._body)}\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert (await self._reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        self._writer.write(self._body[:10])

    async def finish(self) -> bytes:
        """The whole answer, to the end of the connection."""
        self._writer.write(self._body[10:])
        return await self._reader.read()


def _parts(callback: str) -> tuple[str, int, str]:
    found = re.fullmatch(r"http://([0-9.]+):([0-9]+)(/.*)", callback)
    assert found
    return found[1], int(found[2]), found[3]


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "Ctrl-C"])
async def test_a_stop_under_load_answers_requests_in_progress_and_spends_no_attempts(tmp_path: Path, how: str) -> None:
    grace = 3.0
    async with (
        Origin() as slow,
        Origin() as quick,
        Daemon(tmp_path, {"server": {"shutdown_grace": grace}}) as daemon,
        connections(daemon, 20) as half_sent,
        connections(daemon, 10) as idle,
    ):
        slow.default = SILENCE
        await daemon.deliver("slow", [slow.url(f"/{number}") for number in range(100)])
        await slow.reached(32)
        uploads = [
            Upload(streams, batch_body(f"upload-{number}", [quick.url(f"/{number}")]))
            for number, streams in enumerate(half_sent)
        ]
        await asyncio.gather(*(upload.begin() for upload in uploads))
        # Connections that send nothing, or not enough, delay no other.
        for _, writer in idle[5:]:
            writer.write(b"POST /notify HTTP/1.1\r\nHost: x\r\n")

        acked: list[str] = []
        refused: list[Reply] = []

        async def load(name: str) -> None:
            async for batch, reply in acks(daemon, quick, name):
                if reply.status == 200:
                    acked.append(batch)
                else:
                    refused.append(reply)

        loads = [asyncio.create_task(load(f"load{number}")) for number in range(4)]
        await quick.reached(50)
        if how == "Ctrl-C":
            # A terminal's reaches the whole group, the probers too.
            os.killpg(daemon.pid, signal.SIGINT)
        else:
            daemon.send(signal.Signals[how])
        await daemon.line("stopping")
        answers = await asyncio.gather(*(upload.finish() for upload in uploads))
        assert [answer[:12] for answer in answers] == [b"HTTP/1.1 200"] * 20
        # How long it may take is measured by the torture's part "stop".
        assert await daemon.exit_code() == 0
        await asyncio.gather(*loads)

        assert {reply.status for reply in refused} <= {503}
        assert {"slow", *acked, *(f"upload-{number}" for number in range(20))} <= stored(daemon)
        assert len(acked) > 20
        (row,) = daemon.sql("SELECT count(*), sum(state = 'pending'), sum(attempts) FROM file WHERE target_url LIKE ?",
                            slow.url("/%"))  # fmt: skip
        assert tuple(row) == (100, 100, 0)
        assert daemon.value("SELECT count(*) FROM file WHERE attempts > 1 OR reason IS NOT NULL") == 0
        assert daemon.value("PRAGMA integrity_check") == "ok"
        assert session_members(daemon.pid) == []
        assert "Traceback" not in daemon.text

        # And it goes on where it was.
        slow.default = Answer()
        await daemon.start()
        assert (await daemon.verdict("slow"))["verdict"] == "complete"
        await daemon.eventually(SETTLED)
        assert daemon.value("SELECT count(*) FROM file WHERE attempts = 1 AND state = 'available'") == daemon.value(
            "SELECT count(*) FROM file"
        )


async def test_an_idle_daemon_stops_at_once(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        assert await daemon.terminate() == 0
        assert [line["event"] for line in daemon.lines[-2:]] == ["stopping", "stopped"]


async def test_a_log_without_a_reader_stops_nothing(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        await daemon.stop_reading()
        for batch in range(5):
            await daemon.deliver(f"b{batch}", [origin.url(f"/{batch}")])
            complete = "SELECT count(*) FROM batch WHERE batch_id = ? AND verdict = 'complete'"
            await daemon.eventually(complete, f"b{batch}", seconds=10)
        assert await daemon.terminate() == 0


# --- What cannot start ---


async def start_and_fail(folder: Path, *arguments: str, environ: dict[str, str] | None = None) -> Finished:
    """Run the daemon, which must end by itself and leave no process behind."""
    ended = await run_command(*(arguments or ("--config", "config.toml")), cwd=folder, environ=environ)
    assert session_members(ended.pid) == []
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    return ended


def write_config(folder: Path, **sections: dict[str, object]) -> None:
    base: dict[str, dict[str, object]] = {"server": {"port": 0}, "store": {"url": "sqlite:///data/notify.db"}}
    (folder / "config.toml").write_text(to_toml(base | sections), encoding="utf-8")


async def test_a_second_daemon_on_the_same_file_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        ended = await start_and_fail(tmp_path)
        assert ended.code == 1
        (line,) = ended.stderr.splitlines()
        assert str(daemon.database) in line
        assert f"process {daemon.pid}" in line
        assert "stop that one" in line
        reply = await daemon.post(batch_body("b", []))
        assert reply.status == 200
        # A crash leaves no lock behind.
        await daemon.kill()
        await daemon.start()


async def made_database(folder: Path) -> Path:
    """A database of the daemon's, with something in it, closed."""
    async with Daemon(folder, {"store": {"url": "sqlite:///data/notify.db"}}) as daemon, Origin() as origin:
        for batch in range(5):
            await daemon.settle(f"b{batch}", [origin.url(f"/{number}") for number in range(100)])
        assert await daemon.terminate() == 0
    return folder / "data" / "notify.db"


@pytest.mark.parametrize("damage", ["garbage", "no schema", "cut short"])
async def test_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path, damage: str) -> None:
    path = await made_database(tmp_path)
    content = path.read_bytes()
    path.write_bytes(
        {
            "garbage": b"not a database at all\n" * 1000,
            "no schema": content[:100] + b"\xff" * 3996 + content[4096:],
            "cut short": content[: len(content) // 3],
        }[damage]
    )
    before = path.read_bytes()
    ended = await start_and_fail(tmp_path)
    assert ended.code == 1
    (line,) = ended.stderr.splitlines()
    assert "notify.db" in line
    assert "restore it from a backup" in line
    assert path.read_bytes() == before


async def test_a_newer_schema_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = await made_database(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 9999")
    ended = await start_and_fail(tmp_path)
    assert ended.code == 1
    (line,) = ended.stderr.splitlines()
    assert "9999" in line
    assert "newer notify_server" in line


async def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "notify.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE theirs (a); INSERT INTO theirs VALUES (1);")
    before = path.read_bytes()
    write_config(tmp_path)
    ended = await start_and_fail(tmp_path)
    assert ended.code == 1
    (line,) = ended.stderr.splitlines()
    assert "another program" in line
    assert path.read_bytes() == before


async def test_a_bad_configuration_is_refused_key_by_key_before_anything_is_opened(tmp_path: Path) -> None:
    write_config(
        tmp_path,
        server={"port": 70_000, "hots": "127.0.0.1", "header_timeout": "soon"},
        verify={"retry_schedule": ["5s", "later"], "allowed_networks": ["10.0.0.1/8"], "methods": []},
        nonsense={"a": 1},
        log={"level": "loud"},
    )
    environ = clean_environment(
        NOTIFY_SERVER__AUTH__ADMIN_TOKEN="short", NOTIFY_SERVER__STORE__ULR="sqlite:///elsewhere.db"
    )
    ended = await start_and_fail(tmp_path, environ=environ)
    assert ended.code == 2
    lines = ended.stderr.splitlines()
    wanted = [
        "[server] port",
        "[server] hots",
        "[server] header_timeout",
        "[verify] retry_schedule",
        "[verify] allowed_networks",
        "[verify] methods",
        "[nonsense]",
        "[log] level",
        "NOTIFY_SERVER__AUTH__ADMIN_TOKEN",
        "NOTIFY_SERVER__STORE__ULR",
    ]
    assert [key for key in wanted if sum(key in line for line in lines) != 1] == []
    assert len(lines) == len(wanted)
    assert "short" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


async def test_a_configuration_that_is_not_there_or_no_toml_is_refused(tmp_path: Path) -> None:
    ended = await start_and_fail(tmp_path, "--config", "missing.toml")
    assert ended.code == 2
    assert ended.stderr.splitlines() == ["cannot read missing.toml: No such file or directory"]
    (tmp_path / "config.toml").write_text("[server\n")
    ended = await start_and_fail(tmp_path)
    assert ended.code == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("config.toml, line 1: ")


async def test_a_server_waits_for_a_port_in_use_and_says_so_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = Daemon(tmp_path, {"server": {"port": port}})
        starting = asyncio.create_task(daemon.start())
        line = await daemon.line("waiting for the port")
        assert line["level"] == "warning"
        assert line["error"].startswith(f"cannot listen on 127.0.0.1, port {port} (")
        assert "free the port" in line["error"]
    await starting
    assert daemon.callback == f"http://127.0.0.1:{port}/notify"
    assert sum(line["event"] == "waiting for the port" for line in daemon.lines) == 1
    assert await daemon.terminate() == 0


async def test_a_server_that_waits_for_its_port_stops_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        daemon = Daemon(tmp_path, {"server": {"port": taken.getsockname()[1]}})
        starting = asyncio.create_task(daemon.start())
        await daemon.line("waiting for the port")
        assert await daemon.terminate() == 0
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


async def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    write_config(tmp_path)
    ended = await start_and_fail(tmp_path)
    assert ended.code == 1
    (line,) = ended.stderr.splitlines()
    assert "[store] url" in line


# --- The store cannot commit ---


def busy(reply: Reply) -> bool:
    return reply.status == 503 and reply.code == "503" and int(reply.headers["Retry-After"]) > 0


async def test_a_database_locked_by_another_process_is_busy_until_it_is_free(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon, aiohttp.ClientSession() as session:
        gate = asyncio.Event()
        origin.default = Answer(gate=gate)
        await daemon.deliver("before", [origin.url(f"/{number}") for number in range(20)])
        await origin.reached(20)
        with contextlib.closing(sqlite3.connect(daemon.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            gate.set()
            posted = asyncio.create_task(daemon.post(batch_body("during", [])))
            async with session.get(daemon.callback.replace("/notify", "/healthz")) as response:
                assert response.status == 200
            assert busy(await posted)
            other.execute("ROLLBACK")
        assert (await daemon.post(batch_body("after", []))).status == 200
        assert (await daemon.verdict("before"))["verdict"] == "complete"
        await daemon.verdict("after")
        # What was answered 503 may have been written after the answer: sent again, it is merged.
        assert {"before", "after"} <= stored(daemon) <= {"before", "during", "after"}
        assert daemon.value("SELECT count(*) FROM file WHERE attempts = 1") == 20


async def test_a_disk_quota_that_is_used_up_is_busy_until_there_is_space(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        await daemon.settle("before", [origin.url("/before")])
        keeper = daemon.keeper_pid()
        limits = resource.prlimit(keeper, resource.RLIMIT_FSIZE)
        # The log is larger already, but is written from its beginning.
        resource.prlimit(keeper, resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        acked = await fill(daemon, origin)
        resource.prlimit(keeper, resource.RLIMIT_FSIZE, limits)
        await recover(daemon, origin, acked)


async def fill(daemon: Daemon, origin: Origin) -> list[str]:
    """Post until there is no space, and somewhat longer; the batches acked."""
    acked: list[str] = []
    refused = 0
    async for batch, reply in acks(daemon, origin, "during", size=20):
        if reply.status == 200:
            acked.append(batch)
        else:
            assert busy(reply)
            refused += 1
        if refused == 10:
            break
        assert len(acked) < 1000, "the disk does not get full"
    assert refused == 10
    return acked


async def recover(daemon: Daemon, origin: Origin, acked: list[str]) -> None:
    reply = await daemon.post(batch_body("after", [origin.url("/after")]))
    assert reply.status == 200
    for batch in [*acked, "after"]:
        assert (await daemon.verdict(batch))["verdict"] == "complete"
    assert stored(daemon) == {"before", "after", *acked}
    assert daemon.value("SELECT count(*) FROM file WHERE attempts <> 1") == 0
    assert daemon.value("PRAGMA integrity_check") == "ok"
    assert await daemon.terminate() == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, where mounting one is permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_is_busy_until_there_is_space(tmp_path: Path, small_disk: Path) -> None:
    store = {"url": f"sqlite:///{small_disk}/notify.db"}
    async with Origin() as origin, Daemon(tmp_path, {"store": store}) as daemon:
        await daemon.settle("before", [origin.url("/before")])
        filler = small_disk / "filler"
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(b"\0" * (free - 100_000))
        acked = await fill(daemon, origin)
        filler.unlink()
        await recover(daemon, origin, acked)


async def test_a_backlog_at_its_limit_is_busy_until_files_have_settled(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path, {"verify": {"backlog_limit": 50}}) as daemon:
        gate = asyncio.Event()
        origin.default = Answer(gate=gate)
        await daemon.deliver("a", [origin.url(f"/{number}") for number in range(60)])
        assert busy(await daemon.post(batch_body("b", [origin.url("/b")])))
        gate.set()
        await daemon.verdict("a")
        assert (await daemon.post(batch_body("b", [origin.url("/b")]))).status == 200
        await daemon.verdict("b")
        assert stored(daemon) == {"a", "b"}


# --- Descriptors and slow senders ---


async def test_accepting_resumes_after_the_descriptors_had_run_out(tmp_path: Path) -> None:
    async with Daemon(tmp_path, {"server": {"header_timeout": "60s"}}) as daemon:
        assert (await daemon.post(batch_body("before", []))).status == 200
        used = len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))
        limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (used + 20, limits[1]))
        async with connections(daemon, 100):
            # The connection that it has is served whatever comes.
            assert (await daemon.post(batch_body("meanwhile", []))).status == 200
        async with aiohttp.ClientSession() as session, asyncio.timeout(10):
            replies = [await _try(session, daemon.callback, batch_body(f"after-{n}", [])) for n in range(3)]
        assert replies[-1] == 200
        assert (await daemon.post(batch_body("last", []))).status == 200
        await daemon.verdict("last")
        assert await daemon.terminate() == 0
        # Nor did it fill the log with its distress.
        assert len(daemon.lines) < 200


async def _try(session: aiohttp.ClientSession, url: str, body: bytes) -> int:
    try:
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
            return response.status
    except (aiohttp.ClientError, OSError):
        return 0


async def test_slow_senders_are_cut_off_and_delay_no_other(tmp_path: Path) -> None:
    server = {"header_timeout": "1s", "body_timeout": "1s"}
    head = b"POST /notify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    starts = {
        "silent": b"",
        "half a request line": b"POST /no",
        "half a head": head,
        "no body": head + b"Content-Length: 500\r\n\r\n",
        "half a body": head + b'Content-Length: 500\r\n\r\n{"batch_id": ',
        "half a chunk": head + b"Transfer-Encoding: chunked\r\n\r\n100\r\nabc",
    }
    async with Daemon(tmp_path, {"server": server}) as daemon:

        async def dawdle(start: bytes, drip: bytes) -> None:
            async with connections(daemon, 40) as opened:
                for _, writer in opened:
                    writer.write(start)
                ended = asyncio.gather(*(_to_the_end(reader) for reader, _ in opened))
                while not (await asyncio.wait([ended], timeout=0.3))[0]:
                    for _, writer in opened:
                        writer.write(drip)
                await ended

        slow = {
            (name, drip): asyncio.create_task(dawdle(start, drip))
            for name, start in starts.items()
            for drip in (b"", b"a")
        }
        # Until the first of the slow connections is closed, all of them are open beside the honest caller.
        number = 0
        while number < 10 or not any(task.done() for task in slow.values()):
            # On a connection of its own: one that waits a second for its next request is closed too.
            assert (await daemon.post(batch_body(f"honest-{number}", []), Connection="close")).status == 200
            number += 1
        _, late = await asyncio.wait(slow.values(), timeout=SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*slow.values(), return_exceptions=True)
        assert [kind for kind, task in slow.items() if task in late] == []
        assert (await daemon.post(batch_body("last", []))).status == 200


async def _to_the_end(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        await reader.read()


# --- The command line ---


def every_command() -> list[list[str]]:
    found: list[list[str]] = []

    def walk(command: object, path: list[str]) -> None:
        found.append(path)
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, [*path, name])

    walk(typer.main.get_command(commands), [])
    return found


@pytest.mark.parametrize("path", every_command(), ids=lambda path: " ".join(path) or "none")
async def test_every_command_explains_itself(tmp_path: Path, path: list[str]) -> None:
    ended = await run_command(*path, "--help", cwd=tmp_path)
    assert (ended.code, ended.stderr) == (0, "")
    assert "Usage: notify-server" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_installed_script_is_the_same_program() -> None:
    script = Path(sys.executable).with_name("notify-server")
    ended = subprocess.run([script, "--version"], capture_output=True, text=True, check=False, timeout=30)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+\S*\n", ended.stdout)


async def test_without_arguments_it_serves_as_config_toml_in_the_working_directory_says(tmp_path: Path) -> None:
    config = {"server": {"port": 0, "callback_path": "/from-the-file"}}
    async with Daemon(tmp_path, config, arguments=()) as daemon:
        assert daemon.callback.endswith("/from-the-file")
        assert (await daemon.post(batch_body("b", []))).status == 200
        await daemon.verdict("b")
        assert await daemon.terminate() == 0


async def test_the_serve_command_serves_too(tmp_path: Path) -> None:
    async with Daemon(tmp_path, arguments=("serve", "--config", "config.toml")) as daemon:
        assert (await daemon.post(batch_body("b", []))).status == 200
        assert await daemon.terminate() == 0


async def test_variables_win_over_the_file(tmp_path: Path) -> None:
    environ = clean_environment(
        NOTIFY_SERVER__SERVER__CALLBACK_PATH="/from-a-variable",
        NOTIFY_SERVER__ACK__BODY='{"id":"{request_id}","code":"fine"}',
        NOTIFY_SERVER__VERIFY__ALLOWED_NETWORKS="127.0.0.1/32,10.0.0.0/8",
        NOTIFY_SERVER__AUTH__CALLBACK_TOKEN="a-long-random-text",
    )
    async with Origin() as origin, Origin("127.0.0.2") as trap:
        config = {"server": {"port": 0, "callback_path": "/from-the-file"}}
        async with Daemon(tmp_path, config, environ=environ) as daemon:
            assert daemon.callback.endswith("/from-a-variable")
            body = batch_body("b", [origin.url("/a"), trap.url("/b")])
            assert (await daemon.post(body)).status == 401
            reply = await daemon.post(body, Authorization="Bearer a-long-random-text")
            assert (reply.status, reply.code) == (200, "fine")
            line = await daemon.verdict("b")
            assert (line["files"], line["available"]) == (2, 1)
        assert trap.connections == 0
        assert "a-long-random-text" not in daemon.text


async def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    environ = clean_environment(NOTIFY_SERVER__SERVER__PORT="0", NOTIFY_SERVER__LOG__FORMAT="json")
    daemon = Daemon(tmp_path, environ=environ, arguments=())
    (tmp_path / "config.toml").unlink()
    async with daemon:
        ready = await daemon.line(READY)
        assert ready["store"] == "data/notify.db"
        assert daemon.callback.startswith("http://127.0.0.1:")
        assert daemon.callback.endswith("/notify")
        assert (await daemon.post(batch_body("b", ["http://127.0.0.1/"]))).status == 200
        await daemon.verdict("b")
        assert await daemon.terminate() == 0
    assert (tmp_path / "data" / "notify.db").is_file()
