"""The process that keeps the record dies, or outlives its daemon: nothing acked is lost, nothing is recorded twice."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path

from tests.support.daemon import Daemon, process_gone
from tests.support.notification import batch_body
from tests.support.origin import Origin

SENDERS = 8
FILES = 3


class Senders:
    """Post batch after batch until `stop` is set; repeat those answered 503."""

    def __init__(self, daemon: Daemon, origin: Origin) -> None:
        self.acked: list[str] = []
        self.answers: Counter[int] = Counter()
        self._daemon = daemon
        self._origin = origin
        self._stop = False
        self._news = asyncio.Event()
        self._tasks = [asyncio.create_task(self._send(sender)) for sender in range(SENDERS)]

    async def _send(self, sender: int) -> None:
        number = 0
        while not self._stop:
            batch = f"{sender}-{number}"
            body = batch_body(batch, [self._origin.url(f"/{batch}/{file}") for file in range(FILES)])
            reply = await self._daemon.post(body)
            self.answers[reply.status] += 1
            if reply.status == 200:
                self.acked.append(batch)
                number += 1
                self._news.set()
            else:
                assert (reply.status, reply.code) == (503, "503") and "Retry-After" in reply.headers, reply

    async def more(self, number: int) -> None:
        """Wait until so many more have been acked."""
        wanted = len(self.acked) + number
        async with asyncio.timeout(30):
            while len(self.acked) < wanted:
                self._news.clear()
                await self._news.wait()

    async def stop(self) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)


async def test_a_keeper_killed_under_load_is_replaced_and_nothing_acked_is_lost_or_recorded_twice(
    tmp_path: Path,
) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        senders = Senders(daemon, origin)
        keepers = set()
        for _ in range(6):
            await senders.more(60)
            keeper = daemon.keeper_pid()
            os.kill(keeper, signal.SIGKILL)
            keepers.add(keeper)
            await daemon.line("keeper ended, starting another", pid=keeper)
        await senders.more(60)
        await senders.stop()

        assert len(keepers) == 6
        assert set(senders.answers) <= {200, 503}
        await daemon.eventually(
            "SELECT NOT EXISTS (SELECT 1 FROM notification WHERE expanded_at IS NULL)"
            " AND NOT EXISTS (SELECT 1 FROM batch WHERE verdict = 'pending')"
        )
        assert daemon.value("SELECT count(*) FROM batch WHERE verdict = 'complete'") == len(set(senders.acked))
        assert {row["batch_id"] for row in daemon.sql("SELECT batch_id FROM notification")} == set(senders.acked)
        files = FILES * len(senders.acked)
        assert daemon.value("SELECT count(*) FROM file WHERE attempts = 1 AND state = 'available'") == files
        assert daemon.value("SELECT count(*) FROM attempt") == files
        assert daemon.value("PRAGMA integrity_check") == "ok"
        assert daemon.count("a part of the daemon has stopped, restart it") == 0
        assert await daemon.terminate() == 0


async def test_while_there_is_no_keeper_the_daemon_says_so_and_goes_on_by_itself_afterwards(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        keeper = daemon.keeper_pid()
        # A stopped keeper answers no call; a dead one is replaced.
        os.kill(keeper, signal.SIGSTOP)
        waiting = asyncio.create_task(daemon.post(batch_body("during", [origin.url("/during")])))
        await daemon.get("/healthz")
        os.kill(keeper, signal.SIGKILL)
        reply = await waiting
        assert (reply.status, reply.code) == (503, "503")
        async with asyncio.timeout(30):
            while (await daemon.get("/readyz")).status != 200:
                pass
        await daemon.settle("after", [origin.url("/after")])
        assert daemon.value("SELECT count(*) FROM notification WHERE batch_id = 'during'") == 0


async def test_a_daemon_that_was_killed_alone_can_be_started_again_at_once(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        for life in range(5):
            senders = [
                asyncio.create_task(daemon.post(batch_body(f"{life}-{number}", [origin.url("/")])))
                for number in range(40)
            ]
            await asyncio.wait(senders, return_when=asyncio.FIRST_COMPLETED)
            # The keeper finishes the calls that it has received, and ends by itself soon.
            await daemon.kill(alone=True)
            done = await asyncio.gather(*senders, return_exceptions=True)
            acked = {f"{life}-{number}" for number, reply in enumerate(done) if not isinstance(reply, BaseException)}
            await daemon.start()
            stored = {row["batch_id"] for row in daemon.sql("SELECT batch_id FROM notification")}
            assert acked <= stored
            await daemon.eventually("SELECT NOT EXISTS (SELECT 1 FROM batch WHERE verdict = 'pending')")
        assert daemon.value("PRAGMA integrity_check") == "ok"


async def test_signals_that_reach_every_process_stop_the_daemon_in_its_order(tmp_path: Path) -> None:
    # As a terminal's Ctrl-C does, and a service manager that stops a service.
    for number in (signal.SIGINT, signal.SIGTERM):
        async with Origin() as origin, Daemon(tmp_path / number.name) as daemon:
            keeper = daemon.keeper_pid()
            os.kill(keeper, number)
            await daemon.settle("b", [origin.url("/b")])
            for pid in (keeper, *daemon.prober_pids()):
                os.kill(pid, number)
            assert await daemon.terminate(number) == 0
            await process_gone(keeper)
            assert daemon.count("keeper ended, starting another") == 0
            # What it had was written back, and its lock is free.
            assert not daemon.database.with_name("notify.db-wal").exists()
