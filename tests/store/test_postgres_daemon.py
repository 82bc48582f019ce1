"""The whole daemon on PostgreSQL: one, two, and what becomes of their work when one or the server goes away."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from notify_server.store.postgres.pool import POOL_SIZE
from notify_server.store.sql import load_migrations
from tests.support.daemon import Daemon
from tests.support.notification import batch_body, failed, finished
from tests.support.origin import SILENCE, Answer, Origin
from tests.support.postgres import PostgresServer, fetch, new_schema
from tests.support.postgres_faults import cut, locked, until_waiting
from tests.support.waiting import eventually, free_port


@pytest.fixture
async def url() -> str:
    return await new_schema()


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server of the case's own."""
    with PostgresServer() as server:
        yield server


def config(url: str, **verify: Any) -> dict[str, dict[str, Any]]:
    auth = {"admin_token": "token-of-these-nodes"}
    return {"auth": auth, "store": {"url": url, "lease": "5s"}, "verify": verify}


async def test_a_daemon_acks_probes_and_tells_on_postgresql(tmp_path: Path, url: str) -> None:
    async with Origin() as origin, Daemon(tmp_path, config(url)) as daemon:
        origin.on("/missing", Answer(410))
        entries = [finished(origin.url(f"/{n}"), f"{n}") for n in range(50)]
        await daemon.deliver("b1", [*entries, finished(origin.url("/missing"), "missing")])
        verdict = await daemon.verdict("b1")
        assert (verdict["verdict"], verdict["files"], verdict["available"]) == ("incomplete", 51, 50)
        assert await fetch(url, "SELECT verdict, files, available, unavailable, pending FROM batch_summary") == [
            ("incomplete", 51, 50, 1, 0)
        ]
        assert await fetch(url, "SELECT count(*) FROM attempt") == [(51,)]
        assert await daemon.terminate() == 0
    assert "search_path" not in daemon.text
    assert await fetch(url, "SELECT count(*) FROM node") == [(0,)]
    assert await fetch(url, "SELECT count(*) FROM lease") == [(0,)]


async def test_daemons_share_the_work_and_each_file_is_requested_once(tmp_path: Path, url: str) -> None:
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(Origin())
        daemons = [
            await stack.enter_async_context(Daemon(tmp_path / name, config(url, concurrency=8))) for name in "ab"
        ]
        # Slow enough for neither to do it all alone.
        slow = [origin.url(f"/{n}") for n in range(200)]
        for n in range(200):
            origin.on(f"/{n}", Answer(200, delay=0.05))
        for start in range(0, 200, 20):
            entries = [finished(address, address) for address in slow[start : start + 20]]
            await daemons[start // 20 % 2].deliver(f"b{start}", entries)

        async def settled() -> bool:
            return await fetch(url, "SELECT count(*) FROM batch WHERE verdict = 'complete'") == [(10,)]

        await eventually(settled)
        assert all(len(origin.of(f"/{n}")) == 1 for n in range(200))
        # A verdict is logged by one of them.
        await eventually(lambda: told(daemons, 10))
        assert await fetch(url, "SELECT count(*), count(DISTINCT file) FROM attempt") == [(200, 200)]


async def told(daemons: list[Daemon], number: int) -> bool:
    return sum(daemon.count("verdict") for daemon in daemons) == number


async def test_daemons_keep_to_the_limit_of_a_host_together(tmp_path: Path, url: str) -> None:
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(Origin())
        settings = config(url, per_host_concurrency=4)
        daemons = [await stack.enter_async_context(Daemon(tmp_path / name, settings)) for name in "abc"]
        await asyncio.gather(*(daemon.line("sharing the work", nodes=3) for daemon in daemons))
        seconds = 0.1
        for n in range(60):
            origin.on(f"/{n}", Answer(200, delay=seconds))
        await daemons[0].deliver("b", [finished(origin.url(f"/{n}"), f"{n}") for n in range(60)])
        await eventually(lambda: told(daemons, 1))
        hits = sorted(hit.at for n in range(60) for hit in origin.of(f"/{n}"))
        assert len(hits) == 60
        # Of five requests in a row, the last came when the first had been answered.
        assert all(later - earlier > 0.9 * seconds for earlier, later in zip(hits, hits[4:], strict=False))


async def test_a_host_with_an_interval_is_one_daemons_and_anothers_when_that_is_gone(tmp_path: Path, url: str) -> None:
    seconds = 0.2
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(Origin())
        settings = config(url, per_host_interval=f"{seconds}s")
        daemons = [await stack.enter_async_context(Daemon(tmp_path / name, settings)) for name in "abc"]
        await asyncio.gather(*(daemon.line("sharing the work", nodes=3) for daemon in daemons))
        for batch_id, number in (("first", 3), ("second", 2), ("third", 1)):
            seen = len(origin.hits)
            entries = [finished(origin.url(f"/{batch_id}/{n}"), f"{n}") for n in range(6)]
            await daemons[0].deliver(batch_id, entries)

            async def settled(wanted: str = batch_id) -> bool:
                return any(daemon.count("verdict", batch_id=wanted) for daemon in daemons)

            await eventually(settled)
            hits = sorted(hit.at for hit in origin.hits[seen:])
            assert len(hits) == 6
            # Requests may be late on their way, each by itself.
            assert hits[-1] - hits[0] > 0.8 * 5 * seconds
            assert all(later - earlier > 0.2 * seconds for earlier, later in pairwise(hits))
            (owner,) = [daemon for daemon in daemons if daemon.count("verdict", batch_id=batch_id)]
            if number > 1:
                daemons.remove(owner)
                await owner.terminate()
                await asyncio.gather(*(daemon.line("sharing the work", nodes=number - 1) for daemon in daemons))


async def test_files_of_a_daemon_that_was_killed_are_probed_by_another_within_the_lease(
    tmp_path: Path, url: str
) -> None:
    """Row 83."""
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(Origin())
        one = await stack.enter_async_context(Daemon(tmp_path / "a", config(url)))
        origin.on("/1", SILENCE, Answer(200))
        origin.on("/2", SILENCE, Answer(200))
        await one.deliver("b", [finished(origin.url("/1"), "1"), finished(origin.url("/2"), "2")])
        await origin.reached(2)
        await one.kill()
        two = await stack.enter_async_context(Daemon(tmp_path / "b", config(url)))
        verdict = await two.verdict("b")
        assert (verdict["verdict"], verdict["available"]) == ("complete", 2)
        assert len(origin.of("/1")) == len(origin.of("/2")) == 2
        assert await fetch(url, "SELECT attempts FROM file") == [(1,), (1,)]


async def test_a_daemon_that_was_stopped_for_longer_than_its_lease_changes_nothing_that_another_has_done(
    tmp_path: Path, url: str
) -> None:
    """Row 84."""
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(Origin())
        one = await stack.enter_async_context(Daemon(tmp_path / "a", config(url)))
        origin.on("/1", Answer(410, delay=0.5), Answer(200))
        await one.deliver("b", [finished(origin.url("/1"), "1")])
        await origin.reached(1)
        one.send(signal.SIGSTOP)
        two = await stack.enter_async_context(Daemon(tmp_path / "b", config(url)))
        await two.verdict("b")
        before = await fetch(url, "SELECT * FROM file"), await fetch(url, "SELECT * FROM attempt")
        one.send(signal.SIGCONT)
        await one.line("registered", number=2)
        # What it does next is done after what it had in hand.
        await one.deliver("c", [finished(origin.url("/2"), "2")])
        await eventually(lambda: told([one, two], 2))
        batch = "(SELECT id FROM batch WHERE batch_id = 'b')"
        assert await fetch(url, f"SELECT * FROM file WHERE batch = {batch}") == before[0]
        assert await fetch(url, "SELECT * FROM attempt WHERE file = $1", before[0][0][0]) == before[1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["in order", "by a crash"])
async def test_while_the_database_is_away_callbacks_get_503_and_afterwards_all_goes_on(
    tmp_path: Path, server: PostgresServer, how: signal.Signals
) -> None:
    """Row 82."""
    async with Origin() as origin, Daemon(tmp_path, config(server.url)) as daemon:
        origin.on("/held", Answer(200, delay=0.3))
        await daemon.deliver("before", [finished(origin.url("/held"), "1")])
        await origin.reached(1)
        server.stop(how)
        for _ in range(5):
            reply = await daemon.post(batch_body("meanwhile", []))
            assert (reply.status, reply.code) == (503, "503")
            assert "Retry-After" in reply.headers
        server.start()

        async def acked() -> bool:
            return (await daemon.post(batch_body("after", [finished(origin.url("/2"), "2")]))).status == 200

        await eventually(acked)
        await asyncio.gather(daemon.verdict("before"), daemon.verdict("after"))
        assert await fetch(server.url, "SELECT batch_id FROM batch ORDER BY batch_id") == [("after",), ("before",)]
        assert await daemon.terminate() == 0


async def test_a_daemon_waits_for_a_database_that_refuses_connections_and_answers_meanwhile(
    tmp_path: Path, server: PostgresServer
) -> None:
    """Row 127."""
    server.stop()
    url = server.url + "&password=hunter2"
    port = free_port()
    async with AsyncExitStack() as stack:
        daemon = Daemon(tmp_path, config(url) | {"server": {"host": "127.0.0.1", "port": port}})
        starting = asyncio.create_task(stack.enter_async_context(daemon))
        await eventually(lambda: daemon.count("waiting for the database") == 1)
        session = await stack.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{port}"))

        async def ask(method: str, path: str) -> tuple[int, str, str | None]:
            body = batch_body("b", []) if method == "POST" else None
            headers = {"Content-Type": "application/json"}
            async with session.request(method, path, data=body, headers=headers) as answer:
                return answer.status, await answer.text(), answer.headers.get("Retry-After")

        assert (await ask("GET", "/healthz"))[0] == 200
        status, text, _ = await ask("GET", "/readyz")
        assert (status, json.loads(text)["ready"]) == (503, False)
        assert "cannot be reached" in json.loads(text)["store"]
        status, text, retry_after = await ask("POST", "/notify")
        assert (status, json.loads(text)["code"], retry_after) == (503, "503", "5")
        assert (await ask("GET", "/"))[0] == 503
        server.start()
        await starting
        assert (await ask("GET", "/readyz"))[0] == 200
        assert (await ask("POST", "/notify"))[0] == 200
        await daemon.verdict("b")
        # A database that is away later is the business of the store.
        assert daemon.count("waiting for the database") == 1
        assert await daemon.terminate() == 0
    assert "hunter2" not in daemon.text
    assert "Traceback" not in daemon.text


async def test_a_daemon_that_waits_for_its_database_stops_at_once(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, config("postgresql://u:hunter2@127.0.0.1:1/d"))
    async with AsyncExitStack() as stack:
        starting = asyncio.create_task(stack.enter_async_context(daemon))
        await eventually(lambda: daemon.count("waiting for the database") == 1)
        assert await daemon.terminate() == 0
        with pytest.raises(AssertionError, match="ended"):
            await starting
    assert "postgresql://127.0.0.1:1/d: cannot be reached" in daemon.text
    assert "hunter2" not in daemon.text


async def test_a_daemon_whose_database_does_not_exist_ends_with_one_line_without_the_password(
    tmp_path: Path, url: str
) -> None:
    daemon = Daemon(tmp_path, config(url.replace("/postgres?", "/missing?") + "&password=hunter2"))
    with pytest.raises(AssertionError, match="ended"):
        async with daemon:
            pass
    assert 'does not exist (database "missing" does not exist): create the database' in daemon.text
    assert "hunter2" not in daemon.text
    assert "Traceback" not in daemon.text


async def test_daemons_that_start_at_once_on_an_empty_database_all_come_up_and_one_makes_the_schema(
    tmp_path: Path, url: str
) -> None:
    daemons = [Daemon(tmp_path / name, config(url)) for name in "abcd"]
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(daemon) for daemon in daemons))
        known = len(load_migrations("postgres"))
        assert sum(daemon.count("schema migrated") for daemon in daemons) == known
        assert await fetch(url, "SELECT version FROM schema_version") == [(known,)]
        replies = await asyncio.gather(*(daemon.post(batch_body("b", [failed("1")])) for daemon in daemons))
        assert [reply.status for reply in replies] == [200] * 4


async def test_callbacks_whose_commit_is_cut_off_are_to_be_sent_again_and_the_daemon_goes_on(
    tmp_path: Path, url: str
) -> None:
    async with Daemon(tmp_path, config(url)) as daemon, aiohttp.ClientSession() as session:

        async def pruned() -> bool:
            async with session.get(f"{daemon.url}/metrics", headers=daemon.admin) as answer:
                lines = (await answer.text()).splitlines()
            # The help of a metric is there before its first sample.
            return any(line.startswith("notify_server_prune_last_run_timestamp_seconds ") for line in lines)

        await eventually(pruned)
        async with locked(url, "notification") as holder:
            posts = [asyncio.create_task(daemon.post(batch_body(f"b{n}", [failed("1")]))) for n in range(20)]
            await cut(holder)
        replies = await asyncio.gather(*posts)
        # Those that came later than the one that was cut have been committed.
        refused = {n for n, reply in enumerate(replies) if reply.status != 200}
        assert refused
        assert {(replies[n].status, replies[n].code, "Retry-After" in replies[n].headers) for n in refused} == {
            (503, "503", True)
        }
        kept = {batch for (batch,) in await fetch(url, "SELECT batch_id FROM notification")}
        assert kept == {f"b{n}" for n in range(20) if n not in refused}
        for n in refused:
            await daemon.deliver(f"b{n}", [failed("1")])
        for n in range(20):
            await daemon.verdict(f"b{n}")
        assert await fetch(url, "SELECT DISTINCT deliveries FROM batch") == [(1,)]
        assert await daemon.terminate() == 0


async def test_results_whose_commit_is_cut_off_are_recorded_later_and_once(tmp_path: Path, url: str) -> None:
    async with Origin() as origin, Daemon(tmp_path, config(url)) as daemon:
        async with locked(url, "attempt", readable=True) as holder:
            await daemon.deliver("b", [finished(origin.url(f"/{n}"), f"{n}") for n in range(50)])
            await cut(holder)
            await daemon.line("cannot record results, trying again")
        verdict = await daemon.verdict("b")
        assert (verdict["verdict"], verdict["available"]) == ("complete", 50)
        assert await fetch(url, "SELECT count(*), count(DISTINCT file) FROM attempt") == [(50, 50)]
        assert await fetch(url, "SELECT DISTINCT attempts FROM file") == [(1,)]
        # Nobody was asked twice.
        assert len(origin.hits) == 50


@pytest.mark.parametrize("table", ["notification", "nonce"])
async def test_a_locked_table_of_callbacks_makes_the_daemon_not_ready(tmp_path: Path, url: str, table: str) -> None:
    """Row 131."""
    async with Daemon(tmp_path, config(url)) as daemon, aiohttp.ClientSession() as session:
        base = daemon.callback.removesuffix("/notify")

        async def readiness() -> tuple[int, str]:
            async with session.get(f"{base}/readyz") as answer:
                return answer.status, (await answer.json())["store"]

        await eventually(lambda: _is(readiness, 200))
        async with locked(url, table, readable=True):
            await eventually(lambda: _is(readiness, 503))
            assert "cannot commit" in (await readiness())[1]
            if table == "notification":
                assert (await daemon.post(batch_body("b", [failed("1")]))).status == 503
        await eventually(lambda: _is(readiness, 200))
        await daemon.deliver("b", [failed("1")])


async def _is(readiness: Callable[[], Awaitable[tuple[int, str]]], status: int) -> bool:
    return (await readiness())[0] == status


async def test_while_all_connections_but_those_of_acks_are_held_up_callbacks_are_taken_and_then_all_goes_on(
    tmp_path: Path, url: str
) -> None:
    async with Origin() as origin, Daemon(tmp_path, config(url)) as daemon, aiohttp.ClientSession() as session:
        for n in range(POOL_SIZE):
            await daemon.deliver(f"b{n}", [finished(origin.url(f"/{n}"), "1")])
            await daemon.verdict(f"b{n}")
        files = [id for (id,) in await fetch(url, "SELECT id FROM file")]
        base = daemon.callback.removesuffix("/notify")

        async def recheck(file: int) -> int:
            async with session.post(f"{base}/api/v1/recheck", json={"file": file}, headers=daemon.admin) as answer:
                return answer.status

        async with locked(url, "lease") as holder:
            asked = [asyncio.create_task(recheck(file)) for file in files]
            await until_waiting(holder, POOL_SIZE)
            await daemon.deliver("meanwhile", [finished(origin.url("/meanwhile"), "2")])
            assert not any(task.done() for task in asked)
        assert await asyncio.gather(*asked) == [200] * POOL_SIZE
        assert (await daemon.verdict("meanwhile"))["verdict"] == "complete"
        for n in range(POOL_SIZE):
            await daemon.verdict(f"b{n}", number=2)
        assert await daemon.terminate() == 0
