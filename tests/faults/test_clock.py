"""The wall clock is set while the daemon runs: by an hour, forward and back. Row 79.

The daemon is here in the test's own process, so that its wall clock can be set; all else is real.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from notify_server.app import make_app
from notify_server.clock import unix_ms
from notify_server.config import load_config
from tests.support.daemon import Daemon, to_toml
from tests.support.notification import batch_body
from tests.support.origin import Answer, Origin

HOUR_MS = 3_600_000


class Wall:
    """The wall clock, which can be set."""

    def __init__(self) -> None:
        self.ahead = 0

    def __call__(self) -> int:
        return unix_ms() + self.ahead


class Running:
    """The daemon, and what it has recorded."""

    def __init__(self, database: Path, url: str, session: aiohttp.ClientSession) -> None:
        self._database = database
        self._url = url
        self._session = session

    async def deliver(self, batch: str, urls: list[str]) -> None:
        async with self._session.post(
            self._url, data=batch_body(batch, urls), headers={"Content-Type": "application/json"}
        ) as response:
            assert response.status == 200, await response.text()

    def sql(self, query: str) -> list[tuple[int, ...]]:
        with contextlib.closing(sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, timeout=5)) as connection:
            return connection.execute(query).fetchall()


@contextlib.asynccontextmanager
async def running(folder: Path, wall: Wall, schedule: list[str]) -> AsyncIterator[Running]:
    """The daemon with this wall clock and this schedule."""
    path = folder / "config.toml"
    path.write_text(
        to_toml(
            {
                "server": {"host": "127.0.0.1", "port": 0},
                "store": {"url": f"sqlite:///{folder / 'notify.db'}"},
                "verify": {
                    "allowed_networks": ["127.0.0.0/8"], "allowed_ports": [], "jitter": 0, "retry_schedule": schedule,
                    "connect_timeout": "5s",
                },
            }
        )
    )  # fmt: skip
    config = load_config(path)
    runner = web.AppRunner(make_app(config, wall=wall), access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        async with aiohttp.ClientSession() as session:
            yield Running(folder / "notify.db", f"http://{host}:{port}{config.server.callback_path}", session)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("step", [HOUR_MS, -HOUR_MS])
async def test_a_step_of_the_wall_clock_neither_hastens_nor_delays_what_waits(tmp_path: Path, step: int) -> None:
    """Row 79: no file is retried at once, nor an hour late, and every duration is unchanged."""
    wall = Wall()
    async with Origin() as origin, running(tmp_path, wall, ["800ms", "2h"]) as daemon:
        origin.default = Answer(404, close=True)
        await daemon.deliver("b", [origin.url(f"/{n}") for n in range(100)])
        await origin.reached(100)
        wall.ahead = step
        await daemon.deliver("after", [origin.url("/after")])
        await origin.reached(1, "/after")
        # The second attempt comes when it was to come, and the third one waits for its two hours.
        await origin.reached(202)
        first = {hit.path: hit.at for hit in origin.hits[:101]}
        waits = [hit.at - first[hit.path] for hit in origin.hits if hit.at > first[hit.path]]
        assert len(waits) == 101
        assert min(waits) > 0.7
        assert max(waits) < HOUR_MS / 1000 / 2
        wall.ahead = -step
        await daemon.deliver("last", [origin.url("/last")])
        await origin.reached(2, "/last")
        assert len(origin.hits) == 204
        assert daemon.sql(
            "SELECT count(*) FROM attempt WHERE total_ms < 0 OR total_ms > 20000 OR first_byte_ms < 0 OR dns_ms < 0"
        ) == [(0,)]
        for (elapsed,) in daemon.sql("SELECT elapsed_ms FROM file WHERE elapsed_ms IS NOT NULL"):
            assert 0 <= elapsed < 20_000
        # Attempts follow one another in the record, too.
        assert daemon.sql(
            "SELECT count(*) FROM attempt JOIN attempt later USING (file) "
            "WHERE attempt.id < later.id AND attempt.started_at > later.started_at"
        ) == [(0,)]


@pytest.mark.parametrize("step", [HOUR_MS, -HOUR_MS])
async def test_a_batch_across_a_step_is_completed_after_it_was_received(tmp_path: Path, step: int) -> None:
    """Row 79."""
    wall = Wall()
    async with Origin() as origin, running(tmp_path, wall, ["50ms"]) as daemon:
        origin.on("/file", Answer(404, close=True), Answer())
        await daemon.deliver("b", [origin.url("/file")])
        await origin.reached(1, "/file")
        wall.ahead = step
        await origin.reached(2, "/file")

        def complete() -> bool:
            rows = daemon.sql("SELECT completed_at - first_received_at FROM batch WHERE completed_at IS NOT NULL")
            return bool(rows) and 0 <= rows[0][0] < 20_000

        async with asyncio.timeout(10):
            while not complete():
                await asyncio.sleep(0.01)


async def test_retry_that_a_wrong_clock_put_off_for_400_days_is_made_after_the_next_start(tmp_path: Path) -> None:
    """Row 132."""
    async with Origin() as origin, Daemon(tmp_path, {"verify": {"retry_schedule": ["30m"]}}) as daemon:
        origin.on("/late", Answer(404, close=True))
        await daemon.deliver("late", [origin.url("/late")])
        await daemon.eventually("SELECT count(*) = 1 FROM file WHERE attempts = 1")
        assert await daemon.terminate() == 0
        # As a clock that was 400 days ahead had written it.
        with contextlib.closing(sqlite3.connect(daemon.database)) as connection:
            connection.execute("UPDATE file SET next_attempt_at = next_attempt_at + ?", (400 * 86_400_000,))
            connection.commit()
        origin.on("/late", Answer(200))
        await daemon.start()
        await daemon.line("files waited for longer than the schedule says, they are due now", files=1)
        assert (await daemon.verdict("late"))["verdict"] == "complete"
