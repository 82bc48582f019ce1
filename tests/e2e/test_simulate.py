"""`simulate`, as a user runs it: against a daemon of its own, and against one that was there before."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import re
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from rich.console import Console

from notify_server.cli.commands.simulation import simulate
from notify_server.cli.own_daemon import Daemon as Target
from notify_server.cli.simulate import Options, play
from notify_server.errors import StoreRefusedError
from notify_server.simulator.answers import load_answers
from notify_server.simulator.plan import Kind, Plan
from notify_server.simulator.platform import SimulationError
from notify_server.store.sqlite.database import connect
from notify_server.store.sqlite.lock import FileLock
from tests.support.cli import running
from tests.support.daemon import Daemon, Finished, clean_environment, process_gone, run_command, to_toml
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

SMALL = ("--batches", "3", "--files", "20")
# Whatever waits for a retry takes seconds; these settle with the first answer.
AT_ONCE = ("--missing", "0", "--fail-first", "0", "--slow-seconds", "0.1", "--receivers", "steady,gone")
KINDS = ("present", "slow", "refuses HEAD", "fails at first", "missing", "reported FAILED", "batches' verdicts")
TOKEN = "sesame-open"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def daemon(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """One that was there before: with a token, and the default schedule."""
    config = {"auth": {"callback_token": TOKEN}, "log": {"level": "debug"}}
    async with Daemon(tmp_path_factory.mktemp("daemon"), config) as daemon:
        yield daemon
        assert await daemon.terminate() == 0


async def run(folder: Path, *arguments: str) -> Finished:
    """Run the command to its end. `folder` is the working directory, and has temporary ones."""
    return await run_command("simulate", *arguments, cwd=folder, environ=clean_environment(TMPDIR=str(folder)))


def against(daemon: Daemon, folder: Path) -> list[str]:
    """The options to play against a daemon that was there before."""
    config = {"auth": {"callback_token": TOKEN}, "store": {"url": f"sqlite:///{daemon.database}"}}
    (folder / "simulate.toml").write_text(to_toml(config))
    return ["--config", str(folder / "simulate.toml"), "--url", daemon.callback]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of every row of the tables printed, by the row's first cell; the first such row counts."""
    lines = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in reversed(lines)}


def ask(record: str | Path, query: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(f"file:{record}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


async def test_with_a_daemon_of_its_own_every_kind_comes_out_as_planted(tmp_path: Path) -> None:
    # Enough files for every kind's share to be at least one.
    end = await run(
        tmp_path, "--own-daemon", "--batches", "4", "--files", "10", "--slow-seconds", "0.2", "--answers", "all"
    )
    assert (end.code, end.stderr) == (0, ""), end
    assert re.match(r"seed [0-9]+\n", end.stdout)
    assert f"{40 + len(load_answers())} files in 5 batches" in end.stdout
    table = rows(end.stdout)
    for kind in KINDS:
        number, as_expected, different = table[kind]
        assert number == as_expected != "0"
        assert different == "0"
    for receiver in ("steady", "down at first", "slow", "500 at first", "200 with an error at first", "gone"):
        assert rows(end.stdout.partition("Forwarded verdicts")[2])[receiver][-1] in (
            "as planted", "stopped after its 410",
        )  # fmt: skip
    assert re.search(r"acked +6 of 6 posts, 1 of them redeliveries", end.stdout)
    assert re.search(r"ack latency +p50 [0-9.]+ ms, p99 [0-9.]+ ms, max [0-9.]+ ms", end.stdout)
    assert "Everything is as planted." in end.stdout


async def test_a_seed_plants_the_same_again_and_the_queries_shown_can_be_typed(tmp_path: Path) -> None:
    kept = tmp_path / "kept here"
    for _ in range(2):
        end = await run(tmp_path, "--own-daemon", *SMALL, *AT_ONCE, "--seed", "7", "--keep", str(kept))
        assert end.code == 0, end
        assert end.stdout.startswith("seed 7\n")
    # Twice the same, so the second time added nothing.
    assert ask(kept / "notify.db", "SELECT count(*) FROM file_result") == [(60,)]
    assert ask(kept / "notify.db", "SELECT count(*) FROM notification") == [(8,)]

    assert f"The record is {kept}/notify.db, the log {kept}/daemon.log." in end.stdout
    assert (kept / "daemon.log").read_text().count('"verdict"') >= 3
    queries = re.findall(r"^sqlite3 '(.+)' \"(.+)\"$", end.stdout, re.MULTILINE)
    assert len(queries) == 2
    for path, query in queries:
        assert (found := ask(path, query))
        assert all(str(row[0]) in rows(end.stdout) for row in found)


async def test_a_planted_difference_is_listed_and_exits_1(tmp_path: Path) -> None:
    # A record that falsifies one answer, as a daemon with a fault would.
    with contextlib.closing(connect(tmp_path / "notify.db")) as connection:
        connection.execute(
            "CREATE TRIGGER falsify AFTER UPDATE OF state ON file WHEN new.state = 'available' AND new.id = 5 "
            "BEGIN UPDATE file SET state = 'unavailable', reason = 'tls_error' WHERE id = new.id; END"
        )
    end = await run(tmp_path, "--own-daemon", *SMALL, "--keep", str(tmp_path), *AT_ONCE, "--failed", "0")
    assert end.code == 1, end
    (difference,) = [cells for cells in rows(end.stdout).values() if "tls_error" in cells]
    assert difference[1:] == ["available", "unavailable", "tls_error"]
    assert "1 of 60 files and 1 of 3 batches differ." in end.stdout


async def test_a_daemon_that_refuses_loopback_exits_1_with_what_to_set(tmp_path: Path) -> None:
    closed = {"verify": {"allowed_networks": [], "allowed_ports": [80, 443]}}
    async with Daemon(tmp_path / "daemon", closed) as daemon:
        end = await run(tmp_path, *against(daemon, tmp_path), *SMALL)
    assert (end.code, end.stderr) == (1, ""), end
    assert "blocked" in end.stdout
    (hint,) = [line for line in end.stdout.splitlines() if "[verify]" in line]
    assert hint.endswith('[verify] allowed_networks = ["127.0.0.0/8"] and allowed_ports = []')


# What follows needs no process of its own for the simulator: what it raises, the command prints in one line.


async def played(daemon: Daemon | None, *, token: str = TOKEN, **given: Any) -> tuple[int, str]:
    """Play three batches of twenty against the daemon; return the exit code and the output."""
    shares = {Kind(name): given.pop(name) for name in list(given) if name in set(Kind)}
    settings = {"store": None, "own_daemon": False, "keep": None, "slow_seconds": 0.1, "timeout": 20.0, "settle": 20.0}
    options = Options(config=None, url=None, rate=0.0, **(settings | given))
    text = io.StringIO()
    target = None if daemon is None else Target(daemon.callback, given.get("store") or daemon.database, token)
    plan = Plan(seed=1, batches=3, files=20, shares=shares)
    return await play(plan, options, target, Console(file=text, width=200)), text.getvalue()


async def test_with_the_default_schedule_missing_files_may_still_be_retried(daemon: Daemon) -> None:
    code, text = await played(daemon, missing=0.1, slow=0.1, settle=0.2)
    assert code == 0, text
    assert "still being retried" in text
    assert rows(text)["missing"] == ["6", "0", "6", "0"]


async def test_files_not_settled_in_time_are_differences(daemon: Daemon) -> None:
    code, text = await played(daemon, slow=0.05, slow_seconds=9.0, timeout=0.3)
    assert code == 1, text
    assert rows(text)["slow"] == ["3", "0", "3"]
    assert "--timeout" in text


async def test_another_daemons_record_is_reported(tmp_path: Path, daemon: Daemon) -> None:
    other = tmp_path / "other.db"
    connect(other).close()
    told = r"^http://\S+ has acked 3 deliveries, \S+/other\.db has 0 of them: name that daemon's database with --store$"
    with pytest.raises(SimulationError, match=told):
        await played(daemon, store=other)


async def test_a_refused_token_is_reported(daemon: Daemon) -> None:
    with pytest.raises(SimulationError, match=r"^http://\S+ answers 401: .*401001"):
        await played(daemon, token="another-token")


async def test_a_daemon_that_does_not_start_is_reported_with_its_own_error(tmp_path: Path) -> None:
    connect(tmp_path / "notify.db").close()
    lock = FileLock(tmp_path / "notify.db")
    try:
        with pytest.raises(SimulationError, match=r"^the daemon does not start: .*in use by another notify_server"):
            await played(None, own_daemon=True, keep=tmp_path)
    finally:
        lock.close()


async def test_help_names_every_option(tmp_path: Path) -> None:
    end = await run(tmp_path, "--help")
    assert end.code == 0
    parameters = set(inspect.signature(simulate).parameters)
    assert len(parameters) == 20
    for name in parameters:
        assert f"--{name.replace('_', '-')} " in end.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_signal_stops_it_cleanly_in_the_middle_of_a_run(
    tmp_path: Path, daemon: Daemon, number: signal.Signals, code: int
) -> None:
    process = await start(tmp_path, *against(daemon, tmp_path), *SMALL, "--slow-seconds", "15", "--slow", "0.5")
    await daemon.line("accepted", number=daemon.count("accepted") + 4)
    assert await stop(process, number) == (code, "stopped\n")


async def test_a_signal_stops_its_own_daemon_too(tmp_path: Path) -> None:
    process = await start(tmp_path, "--own-daemon", "--keep", str(tmp_path))
    assert process.stdout is not None
    await process.stdout.readline()
    assert await stop(process, signal.SIGTERM) == (143, "stopped\n")
    # Nobody holds the database any more.
    FileLock(tmp_path / "notify.db").close()


async def test_its_own_daemon_ends_when_it_is_killed(tmp_path: Path) -> None:
    process = await start(tmp_path, "--own-daemon", "--keep", str(tmp_path))
    log = tmp_path / "daemon.log"
    await eventually(lambda: log.exists() and '"ready for notifications"' in log.read_text())
    process.kill()
    await process.wait()
    # The daemon stops in order: it has the database until then, and this is its last line.
    await eventually(lambda: '"stopped"' in log.read_text())
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(StoreRefusedError):
                FileLock(tmp_path / "notify.db").close()
                break
            await asyncio.sleep(0.01)


async def start(folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "notify_server", "simulate", *arguments),
        cwd=folder,
        env=clean_environment(TMPDIR=str(folder)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )


async def stop(process: asyncio.subprocess.Process, number: signal.Signals) -> tuple[int | None, str]:
    """Signal the process and wait for its end: its exit code, and what it wrote to standard error."""
    process.send_signal(number)
    async with asyncio.timeout(20):
        _, errors = await process.communicate()
    await process_gone(process.pid)
    return process.returncode, errors.decode()


async def test_the_demo_shows_a_dashboard_that_one_click_opens_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    # Cookies of an address, not of a name.
    jar = aiohttp.CookieJar(unsafe=True)
    async with (
        running("demo", "--keep", str(tmp_path / "demo"), cwd=tmp_path) as process,
        aiohttp.ClientSession(cookie_jar=jar) as web,
    ):
        assert process.stdout is not None
        shown = (await process.stdout.readuntil(b"Ctrl-C stops.")).decode()
        (address,) = re.findall(r"http://127\.0\.0\.1:\d+/ui/login/\S+", shown)
        async with web.get(address) as page:
            assert page.status == 200
            assert page.url.path == "/"
        record = tmp_path / "demo" / "notify.db"
        with contextlib.closing(sqlite3.connect(f"file:{record}?mode=ro", uri=True)) as reader:
            first = reader.execute("SELECT count(*) FROM notification").fetchone()[0]
            assert first >= 40
            # One more every few seconds.
            await eventually(lambda: reader.execute("SELECT count(*) FROM notification").fetchone()[0] > first)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
