"""What the benchmarks measure with must itself be right: the client at a fixed rate, statistics, stores and tables."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from notify_server.clock import unix_ms
from notify_server.contract.wire import parse_notification
from tests.bench import __main__ as bench
from tests.bench import forward, postgres, postgres_steps, usage
from tests.bench.figures import Column, MissingToolError, Outcome, Setting, Sheet, in_turn, quantile, row_name, show
from tests.bench.openloop import Load, measure, requests
from tests.bench.record import (
    FILES_A_BATCH,
    MISSING_BATCHES,
    MISSING_FILES,
    add_pending,
    add_settled,
    forget_pending,
    reading,
    until_expanded,
    until_settled,
)
from tests.bench.servers import daemon, packages, tool
from tests.support.postgres import PostgresServer, new_schema
from tests.support.waiting import Bell, free_port

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Answers:
    """A server that answers each request when it may: at once, or when `open` is called."""

    def __init__(self, answer: bytes = ANSWER) -> None:
        self.answer = answer
        self.port = 0
        self.taken = 0
        self.bell = Bell()
        self._shut = False
        self._held: list[asyncio.Transport] = []

    def shut(self) -> None:
        """Answer nothing more."""
        self._shut = True

    def open(self) -> None:
        """Answer what has come meanwhile, and from now on at once."""
        self._shut = False
        held, self._held = self._held, []
        for transport in held:
            transport.write(self.answer)

    def hang_up(self) -> None:
        """Close the connections of those who wait."""
        for transport in self._held:
            transport.abort()

    def take(self, transport: asyncio.Transport) -> None:
        self.taken += 1
        self.bell.ring()
        if self._shut:
            self._held.append(transport)
        else:
            transport.write(self.answer)


class _Connection(asyncio.Protocol):
    def __init__(self, server: Answers) -> None:
        self._server = server
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._left:
            head, _, data = data.partition(b"\r\n\r\n")
            self._left = int(head.rpartition(b"Content-Length: ")[2])
        self._left -= len(data)
        if not self._left:
            self._server.take(self._transport)


@asynccontextmanager
async def answering(answer: bytes = ANSWER) -> AsyncIterator[Answers]:
    answers = Answers(answer)
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(answers), "127.0.0.1", 0)
    answers.port = server.sockets[0].getsockname()[1]
    async with server:
        yield answers


async def stalled(seconds: float, rate: float, connections: int) -> tuple[Load, float]:
    """A load on a server that answers nothing for so long, from its 20th request on; and how long that was."""
    async with answering() as server:
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(measure(server.port, requests(100, 1, 0), rate, connections))
        await server.bell.until(lambda: server.taken >= 20)
        server.shut()
        began = loop.time()
        opened: asyncio.Future[float] = loop.create_future()

        def end() -> None:
            server.open()
            opened.set_result(loop.time() - began)

        loop.call_later(seconds, end)
        return await task, await opened


# --- The client at a fixed rate ---


@pytest.mark.parametrize("connections", [1, 64])
async def test_a_stall_is_seen_by_every_request_that_was_due_meanwhile(connections: int) -> None:
    load, stall = await stalled(0.4, 100.0, connections)
    assert (load.sent, load.answered, load.errors, load.unanswered) == (100, 100, 0, 0)
    # At 100 a second 40 of the 100 were due while the server said nothing. The first of them waited for all of it, the
    # others for what was left, and so 20 for more than half; a client that waits with the server would have seen it
    # once a connection.
    kept_waiting = 1 - next(share for share, ms in load.curve if ms > stall * 1000 / 2)
    assert kept_waiting > 0.12
    assert stall * 1000 - 60 <= load.max_ms <= stall * 1000 + 200
    assert load.p50_ms < stall * 1000 / 2


async def test_what_a_server_never_answers_counts_with_the_time_it_has_waited() -> None:
    async with answering() as server:
        server.shut()
        load = await measure(server.port, requests(20, 1, 0), 1000.0, 4, patience=0.2)
    assert (load.sent, load.answered, load.unanswered) == (20, 0, 20)
    assert 200 <= load.p50_ms <= load.max_ms


async def test_other_answers_than_200_are_errors() -> None:
    async with answering(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n") as server:
        load = await measure(server.port, requests(20, 1, 0), 1000.0, 4)
    assert (load.answered, load.errors) == (20, 20)


async def test_a_server_that_hangs_up_has_failed_those_it_left() -> None:
    async with answering() as server:
        server.shut()
        task = asyncio.create_task(measure(server.port, requests(3, 1, 0), 1000.0, 3, patience=0.5))
        await server.bell.until(lambda: server.taken == 3)
        server.hang_up()
        load = await task
    assert (load.answered, load.errors, load.unanswered) == (3, 3, 0)


def test_its_requests_are_notifications_that_the_contract_takes_and_that_all_differ() -> None:
    bodies = [request.partition(b"\r\n\r\n")[2] for request in requests(3, 7, 5) + requests(3, 7, 6)]
    notifications = [parse_notification(body, max_files=10) for body in bodies]
    assert {len(notification.file_list) for notification in notifications} == {7}
    assert len({notification.batch_id for notification in notifications}) == 6


# --- Statistics and tables ---


def test_quantiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [quantile(values, share) for share in (0.0, 0.5, 0.99, 0.999, 1.0)] == [1, 50, 99, 100, 100]
    assert math.isnan(quantile([], 0.5))


def test_peers_take_turns_and_one_that_is_not_there_says_so_in_its_row() -> None:
    order: list[tuple[str, int]] = []

    def peer(name: str, turn: int) -> int:
        order.append((name, turn))
        if name == "b":
            tool("no-such-program")
        return turn

    setting = Setting(Path())
    runs, missing = in_turn(setting, {name: partial(peer, name) for name in "abc"})
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2), ("c", 2)]
    assert runs == {"a": [0, 1, 2], "b": [], "c": [0, 1, 2]}
    assert row_name("b", missing) == "b (no-such-program is not installed)"


def test_a_package_that_is_not_there_is_named() -> None:
    packages("json", "asyncio")
    with pytest.raises(MissingToolError, match="no_such_package is not installed"):
        packages("json", "no_such_package")


def test_tables_show_figures_as_their_column_says_and_nothing_where_there_is_none() -> None:
    sheet = Sheet("a title", [Column("name"), Column("files/s", ",.0f"), Column("ratio", ".2f")],
                  [["[bold]us", 12345.6, 0.5], ["others", float("nan"), None]], "a note")  # fmt: skip
    text = StringIO()
    show(Console(file=text, width=100), Outcome([sheet]))
    lines = [[part.strip() for part in line.split("│")[1:-1]] for line in text.getvalue().splitlines() if "│" in line]
    assert lines == [["[bold]us", "12,346", "0.50"], ["others", "–", "–"]]
    assert "a title" in text.getvalue()
    assert "a note" in text.getvalue()


def test_a_run_writes_what_it_measured_and_how_to_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Part:
        @staticmethod
        def run(setting: Setting) -> Outcome:
            (setting.work / "store.db").touch()
            left.append(setting.work)
            return Outcome([Sheet("t", [Column("name")], [["x"]])], {"quick": setting.quick})

    left: list[Path] = []
    monkeypatch.setattr(bench, "load", lambda name: Part)
    path = tmp_path / "figures.json"
    assert bench.main(["acks", "--quick", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["parts"] == {"acks": {"quick": True}}
    assert written["about"]["command"] == f"python -m tests.bench acks --quick --json {path}"
    assert {"commit", "cores", "model", "kernel", "Python", "SQLite", "libcurl", "aiohttp"} <= written["about"].keys()
    assert not left[0].exists()


def test_a_part_that_fails_does_not_take_the_others_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, setting: Setting) -> Outcome:
            if self.name == "probes":
                tool("no-such-program")
            if self.name == "acks":
                raise RuntimeError("did not start")
            return Outcome([], {"name": self.name})

    monkeypatch.setattr(bench, "load", Part)
    path = tmp_path / "figures.json"
    assert bench.main(["acks", "probes", "latency", "--json", str(path)]) == 1
    assert json.loads(path.read_text())["parts"] == {"latency": {"name": "latency"}}
    told = capsys.readouterr().out
    assert "acks: FAILED: did not start" in told
    assert "probes: FAILED: no-such-program is not installed" in told


def test_every_part_can_be_loaded_without_the_packages_of_the_others() -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(['fastapi', 'matplotlib', 'aiosqlite', 'uvicorn']))"
    code = f"{block}; from tests.bench.__main__ import PARTS, load; print([load(name).run for name in PARTS] and 'ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ok\n"


@pytest.mark.parametrize("given", [["acks", "nonsense"], ["--from", "figures.json"]])
def test_an_unknown_argument_exits_2(given: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.arguments(given)
    assert ended.value.code == 2


# --- Processes ---


def test_cpu_and_memory_are_counted_for_a_process_with_its_children() -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}]); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 0.25 <= usage.cpu_seconds(child.pid) < 3
        assert 4 < usage.memory_mib(child.pid) < 100
        assert list(usage.tree(child.pid)) == [child.pid]
        assert child.pid in usage.tree(os.getpid())
        child.communicate(b"\n")


# --- Stores made by SQL ---


def test_a_record_made_by_sql_is_what_the_daemon_itself_would_have_counted(tmp_path: Path) -> None:
    store = tmp_path / "notify.db"
    files = 2 * MISSING_BATCHES * FILES_A_BATCH
    add_settled(store, files)
    with reading(store) as connection:
        counted = (
            "SELECT batch, count(*), sum(state = 'available'), sum(state = 'unavailable') FROM file GROUP BY batch"
        )
        kept = "SELECT id, files, available, unavailable FROM batch ORDER BY id"
        assert connection.execute(counted).fetchall() == connection.execute(kept).fetchall()
        ((rows, missing),) = connection.execute("SELECT count(*), sum(state = 'unavailable') FROM file").fetchall()
        assert (rows, missing) == (files, files // (MISSING_BATCHES * MISSING_FILES))
        assert connection.execute("SELECT count(*) FROM batch WHERE verdict = 'incomplete'").fetchone() == (2,)
        assert connection.execute("SELECT count(*) FROM attempt").fetchone() == (files,)
        bodies = connection.execute("SELECT id, body FROM notification").fetchall()
        names = dict(connection.execute("SELECT batch, group_concat(oss_object_name) FROM file GROUP BY batch"))
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for id, body in bodies:
        parsed = parse_notification(body.encode(), max_files=FILES_A_BATCH)
        assert ",".join(entry.oss_object_name for entry in parsed.file_list) == names[id]


def test_the_daemon_serves_and_drains_a_store_made_by_sql(tmp_path: Path) -> None:
    store = tmp_path / "notify.db"
    add_settled(store, FILES_A_BATCH)
    # Port 1: refused at once, and refused files are settled after the first attempt.
    addresses = [f"http://127.0.0.1:1/{number}" for number in range(FILES_A_BATCH + 1)]
    add_pending(store, addresses, unix_ms())
    with daemon(store, verify__retry_schedule="[]", verify__allowed_ports="[80]") as server:
        until_settled(store)
        until_expanded(store)
        assert usage.threads(server.pid).keys() >= {server.pid}
    with closing(sqlite3.connect(store)) as connection:
        states = dict(connection.execute("SELECT state, count(*) FROM file GROUP BY state"))
    assert states == {"available": FILES_A_BATCH, "blocked": FILES_A_BATCH + 1}


def test_the_daemon_drains_a_record_on_postgresql_and_what_it_took_is_seen(tmp_path: Path) -> None:
    addresses = [f"http://127.0.0.1:1/{number}" for number in range(FILES_A_BATCH + 1)]
    settings = postgres.SETTINGS | {"port": str(free_port())}
    with PostgresServer(settings) as server, asyncio.Runner() as loop:
        stores = postgres.Stores(tmp_path, server, loop)
        with stores.postgres() as record:
            record.add(addresses, unix_ms())
            cpu, stored, logged = record.taken()
            assert record.row("SELECT sum(files), sum(pending) FROM batch") == (FILES_A_BATCH + 1,) * 2
            with daemon(tmp_path / "unused.db", store__url=record.url, verify__allowed_ports="[80]"):
                postgres.until(record, postgres.SETTLED)
                postgres.until(record, postgres.EXPANDED)
            after = record.taken()
            assert record.row("SELECT count(*) FROM file WHERE state = 'blocked'") == (FILES_A_BATCH + 1,)
    assert after[0] > cpu
    assert after[1] >= stored > 0
    assert after[2] > logged > 0


def test_each_step_on_postgresql_is_measured_with_the_bytes_it_stores() -> None:
    async def steps() -> Outcome:
        return await postgres_steps.steps(server, await new_schema(server.url), 70)

    with PostgresServer() as server:
        outcome = asyncio.run(steps())
    costs, kept = outcome.sheets
    assert [row[0] for row in costs.rows] == [
        "accept, a notification",
        "expand, a file",
        "claim",
        "record",
        "prune, a row",
    ]
    assert all(isinstance(figure, float) and figure >= 0 for row in costs.rows for figure in row[1:])
    assert [row[0] for row in kept.rows] == ["notification", "batch", "file", "attempt"]


def test_forgetting_what_waits_leaves_nothing_to_wait_for(tmp_path: Path) -> None:
    store = tmp_path / "notify.db"
    add_pending(store, [f"http://127.0.0.1:1/{number}" for number in range(3)], unix_ms())
    forget_pending(store)
    until_settled(store)
    with reading(store) as connection:
        assert connection.execute("SELECT files, pending, available FROM batch").fetchall() == [(3, 0, 3)]


async def test_each_delivery_is_timed_from_its_event(tmp_path: Path) -> None:
    run = await forward.deliver(tmp_path / "notify.db", 30, 0, dead=False)
    assert (run.sent, len(run.milliseconds)) == (30, 30)
    assert run.rate > 0
    assert all(0 <= each < 30_000 for each in run.milliseconds)
