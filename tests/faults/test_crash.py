"""kill -9 of the daemon at chosen moments. tests/torture/crash.py has those at random ones, under load."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.daemon import Daemon
from tests.support.notification import batch_body
from tests.support.origin import Answer, Origin
from tests.torture.crash import SETTLED


async def test_a_batch_resent_after_a_crash_is_merged_with_what_was_committed(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        body = batch_body("b", [origin.url("/a"), origin.url("/b")])
        for _ in range(3):
            assert (await daemon.post(body)).status == 200
            await daemon.kill()
            await daemon.start()
        assert (await daemon.post(body)).status == 200
        await daemon.eventually("SELECT sum(deliveries) = 4 FROM batch")
        await daemon.eventually(SETTLED)
        (row,) = daemon.sql("SELECT verdict, files FROM batch")
        assert tuple(row) == ("complete", 2)
        assert daemon.value("SELECT count(*) FROM file WHERE attempts = 1") == 2


async def test_a_kill_half_way_through_expanding_leaves_no_file_out_and_none_twice(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        body = batch_body("b", [origin.url(f"/{number}") for number in range(10_000)])
        assert (await daemon.post(body)).status == 200
        await daemon.eventually("SELECT EXISTS (SELECT 1 FROM batch WHERE files >= 1000)")
        await daemon.kill()
        size = daemon.value("SELECT files FROM batch")
        assert 1000 <= size < 10_000, "it was killed too late to show anything"
        assert daemon.value("SELECT count(*) FROM file") == size
        assert daemon.count("verdict") == 0

        await daemon.start()
        line = await daemon.verdict("b", seconds=60)
        assert (line["verdict"], line["files"], line["available"]) == ("complete", 10_000, 10_000)
        assert daemon.value("SELECT count(DISTINCT oss_object_name) FROM file WHERE attempts = 1") == 10_000
        assert daemon.value("SELECT count(*) FROM file") == 10_000
        assert daemon.value("SELECT deliveries FROM batch") == 1
        assert daemon.value("PRAGMA integrity_check") == "ok"


async def test_after_a_kill_probing_goes_on_and_no_attempt_has_been_spent(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        gate = asyncio.Event()
        origin.default = Answer(gate=gate)
        await daemon.deliver("b", [origin.url(f"/{number}") for number in range(100)])
        await origin.reached(32)
        await daemon.kill()
        assert daemon.value("SELECT count(*) FROM file WHERE state = 'pending' AND attempts = 0") == 100

        before = len(origin.hits)
        gate.set()
        await daemon.start()
        await origin.reached(before + 1)
        await daemon.verdict("b")
        assert daemon.value("SELECT count(*) FROM file WHERE state = 'available' AND attempts = 1") == 100


async def test_probers_do_not_outlive_a_killed_daemon(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path, {"verify": {"processes": 3}}) as daemon:
        origin.default = Answer(gate=asyncio.Event())
        await daemon.deliver("b", [origin.url(f"/{number}") for number in range(100)])
        await origin.reached(32)
        assert len(daemon.prober_pids()) == 3
        # Returns when they are gone.
        await daemon.kill()
        assert not daemon.running
