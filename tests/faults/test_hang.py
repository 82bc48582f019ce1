"""Child processes that hang instead of dying: they are noticed, replaced, and never hold up an answer or a stop."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, process_gone
from tests.support.notification import batch_body
from tests.support.origin import Answer, Origin

GRACE = 4
# What a stop may take beyond its grace on a busy machine, and far less than a stop that waits for a hung child.
SLACK = 6


async def test_stopped_keeper_refuses_callbacks_and_readiness_at_once_and_is_replaced(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        await daemon.settle("before", [origin.url("/before")])
        keeper = daemon.keeper_pid()
        os.kill(keeper, signal.SIGSTOP)
        posts = [daemon.post(batch_body(f"during-{n}", [origin.url(f"/{n}")])) for n in range(20)]
        *replies, ready = await asyncio.gather(*posts, daemon.get("/readyz"))
        # All of them were answered while the keeper was still there and stopped: no caller waited for its end.
        assert daemon.keeper_pid() == keeper
        assert daemon.count("keeper hangs, killing it") == 0
        assert {(reply.status, reply.code) for reply in replies} == {(503, "503")}
        assert all("Retry-After" in reply.headers for reply in replies)
        assert ready.status == 503
        assert b"cannot commit" in ready.body
        await daemon.line("keeper hangs, killing it", pid=keeper)
        await process_gone(keeper)
        await daemon.line("keeper ended, starting another", pid=keeper)
        async with asyncio.timeout(30):
            while (await daemon.get("/readyz")).status != 200:
                await asyncio.sleep(0.02)
        await daemon.settle("after", [origin.url("/after")])
        assert daemon.value("PRAGMA integrity_check") == "ok"
        assert await daemon.terminate() == 0


async def test_keeper_that_is_stopped_for_a_moment_goes_on_and_is_not_replaced(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        keeper = daemon.keeper_pid()
        os.kill(keeper, signal.SIGSTOP)
        reply = await daemon.post(batch_body("b", [origin.url("/b")]))
        os.kill(keeper, signal.SIGCONT)
        # Refused, and committed after all: when it is sent again it is merged.
        assert reply.status == 503
        async with asyncio.timeout(30):
            while (await daemon.post(batch_body("b", [origin.url("/b")]))).status != 200:
                await asyncio.sleep(0.02)
        assert (await daemon.verdict("b"))["verdict"] == "complete"
        assert daemon.keeper_pid() == keeper
        assert daemon.value("SELECT count(*) FROM file WHERE attempts = 1") == 1


async def test_stopped_prober_is_replaced_and_its_files_are_probed_again_with_no_attempt_spent(
    tmp_path: Path,
) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        gate = asyncio.Event()
        origin.default = Answer(gate=gate)
        await daemon.deliver("b", [origin.url(f"/{number}") for number in range(50)])
        await origin.reached(32)
        (prober,) = daemon.prober_pids()
        os.kill(prober, signal.SIGSTOP)
        replies = await asyncio.gather(*(daemon.post(batch_body(f"c{n}", [])) for n in range(20)))
        assert {reply.status for reply in replies} == {200}
        await daemon.line("prober hangs, killing it", pid=prober)
        await process_gone(prober)
        gate.set()
        assert (await daemon.verdict("b"))["verdict"] == "complete"
        assert daemon.value("SELECT count(*) FROM file WHERE attempts = 1 AND state = 'available'") == 50
        assert daemon.value("SELECT count(*) FROM attempt") == 50
        assert await daemon.terminate() == 0


async def test_readiness_names_a_stopped_prober_before_it_is_replaced(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        (prober,) = daemon.prober_pids()
        os.kill(prober, signal.SIGSTOP)
        async with asyncio.timeout(30):
            while (ready := await daemon.get("/readyz")).status == 200:
                await asyncio.sleep(0.02)
        assert b'"probers":"down, restarting"' in ready.body


@pytest.mark.parametrize("stopped", ["keeper", "prober", "both"])
async def test_stop_ends_within_its_grace_and_leaves_nothing_running_when_children_are_stopped(
    tmp_path: Path, stopped: str
) -> None:
    async with Origin() as origin, Daemon(tmp_path, {"server": {"shutdown_grace": GRACE}}) as daemon:
        origin.default = Answer(gate=asyncio.Event())
        await daemon.deliver("b", [origin.url(f"/{number}") for number in range(10)])
        await origin.reached(10)
        keeper, probers = daemon.keeper_pid(), daemon.prober_pids()
        for pid in [keeper] * (stopped != "prober") + probers * (stopped != "keeper"):
            os.kill(pid, signal.SIGSTOP)
        assert await daemon.terminate(seconds=GRACE + SLACK) == 0
        for pid in (keeper, *probers):
            await process_gone(pid)
        # Nothing acked is lost, and no attempt was spent.
        await daemon.start()
        assert daemon.value("SELECT count(*) FROM notification WHERE batch_id = 'b'") == 1
        assert daemon.value("SELECT count(*) FROM file WHERE attempts > 0") == 0


async def test_killed_daemon_leaves_no_stopped_child_behind(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        children = [daemon.keeper_pid(), *daemon.prober_pids()]
        for pid in children:
            os.kill(pid, signal.SIGSTOP)
        await daemon.kill(alone=True)
        for pid in children:
            await process_gone(pid)
        await daemon.start()
        await daemon.settle("b", [])
