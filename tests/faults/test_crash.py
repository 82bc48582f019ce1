"""kill -9 of the daemon, at any moment: what was acked is there afterwards, once, and gets its verdict."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp

from tests.harness import Answer, Bell, Daemon, Hit, Origin, notification

ROUNDS = 10
SETTLED = (
    "SELECT NOT EXISTS (SELECT 1 FROM notification WHERE expanded_at IS NULL)"
    " AND NOT EXISTS (SELECT 1 FROM batch WHERE verdict = 'pending')"
)


def truth(path: str) -> tuple[str, int]:
    """What the origin says of a path, and what therefore must be stored."""
    return ("unavailable", 410) if path.startswith("/gone") else ("available", 200)


def tell_truth(hit: Hit) -> Answer:
    return Answer(truth(hit.path)[1], {"ETag": f'"{hit.path}"'})


class Platform:
    """Sends batches as fast as they are acked, and remembers which were."""

    def __init__(self, origin: Origin, dice: random.Random) -> None:
        self.sent: dict[str, bytes] = {}
        self.paths: dict[str, list[str]] = {}
        self.acked: list[str] = []
        self.bell = Bell()
        self._origin = origin
        self._dice = dice
        self._ids = (f"batch-{number}" for number in itertools.count(1))

    def compose(self) -> str:
        """A batch of a few files, or of so many that it is expanded in several transactions."""
        batch = next(self._ids)
        size = 700 if self._dice.random() < 0.02 else self._dice.randint(1, 6)
        kinds = self._dice.choices(("ok", "gone"), (4, 1), k=size)
        self.paths[batch] = [f"/{kind}/{batch}/{number}" for number, kind in enumerate(kinds)]
        self.sent[batch] = notification(batch, [self._origin.url(path) for path in self.paths[batch]])
        return batch

    async def send_until_it_fails(self, daemon: Daemon) -> None:
        while True:
            batch = self.compose()
            try:
                reply = await daemon.post(self.sent[batch])
            except (aiohttp.ClientError, OSError):
                return
            assert reply.status == 200
            self.acked.append(batch)
            self.bell.ring()

    def files(self) -> Iterator[tuple[str, str]]:
        """Batch and path of every file that was sent."""
        return ((batch, path) for batch, paths in self.paths.items() for path in paths)


async def test_ten_kills_under_load_lose_no_acked_batch_and_record_nothing_wrong(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}")
    dice = random.Random(seed)
    async with Origin() as origin, Daemon(tmp_path, {"verify": {"retry_schedule": ["100ms"] * 5}}) as daemon:
        origin.default = tell_truth
        platform = Platform(origin, dice)
        for number in range(ROUNDS):
            senders = [asyncio.create_task(platform.send_until_it_fails(daemon)) for _ in range(8)]
            enough = len(platform.acked) + dice.randint(1, 120)
            await platform.bell.until(lambda enough=enough: len(platform.acked) >= enough)  # type: ignore[misc]
            await daemon.kill()
            await asyncio.gather(*senders)
            await daemon.start()
            print(f"round {number}: {len(platform.acked)} of {len(platform.sent)} acked")
        await daemon.eventually(SETTLED, seconds=60)

        assert daemon.value("PRAGMA integrity_check") == "ok"
        assert daemon.sql("PRAGMA foreign_key_check") == []
        known = {row["batch_id"]: row for row in daemon.sql("SELECT * FROM batch")}
        assert set(platform.acked) <= known.keys() <= platform.sent.keys()
        assert {row["deliveries"] for row in known.values()} == {1}

        # What had no answer is sent again, as the platform would, whether it had been committed or not.
        unanswered = platform.sent.keys() - set(platform.acked)
        again = await asyncio.gather(*(daemon.post(platform.sent[batch]) for batch in unanswered))
        assert {reply.status for reply in again} <= {200}
        await daemon.eventually(SETTLED, seconds=60)

        rows = daemon.sql("SELECT batch.batch_id, file.* FROM file JOIN batch ON batch.id = file.batch")
        found = {(row["batch_id"], row["target_url"]): row for row in rows}
        assert len(found) == len(rows) == sum(len(paths) for paths in platform.paths.values())
        for batch, path in platform.files():
            row = found[batch, origin.url(path)]
            assert (row["state"], row["http_status"]) == truth(path)
            assert row["etag"] == f'"{path}"'
            assert row["attempts"] == 1
        batches = daemon.sql("SELECT batch_id, verdict, files FROM batch")
        assert {row["batch_id"]: row["files"] for row in batches} == {
            batch: len(paths) for batch, paths in platform.paths.items()
        }
        assert len(batches) == len(platform.sent)
        for row in batches:
            whole = all(truth(path)[0] == "available" for path in platform.paths[row["batch_id"]])
            assert row["verdict"] == ("complete" if whole else "incomplete")


async def test_a_batch_resent_after_a_crash_is_merged_with_what_was_committed(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        body = notification("b", [origin.url("/a"), origin.url("/b")])
        for _ in range(3):
            assert (await daemon.post(body)).status == 200
            await daemon.kill()
            await daemon.start()
        assert (await daemon.post(body)).status == 200
        await daemon.eventually("SELECT deliveries = 4 FROM batch")
        await daemon.eventually(SETTLED)
        (row,) = daemon.sql("SELECT verdict, files FROM batch")
        assert tuple(row) == ("complete", 2)
        assert daemon.value("SELECT count(*) FROM file WHERE attempts = 1") == 2


async def test_a_kill_half_way_through_expanding_leaves_no_file_out_and_none_twice(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        body = notification("b", [origin.url(f"/{number}") for number in range(10_000)])
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


async def test_after_a_kill_probing_goes_on_within_seconds_and_nothing_has_been_spent(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        gate = asyncio.Event()
        origin.default = Answer(gate=gate)
        await daemon.deliver("b", [origin.url(f"/{number}") for number in range(100)])
        await origin.reached(32)
        await daemon.kill()
        assert daemon.value("SELECT count(*) FROM file WHERE state = 'pending' AND attempts = 0") == 100

        before = len(origin.hits)
        gate.set()
        started = time.monotonic()
        await daemon.start()
        await origin.reached(before + 1)
        assert origin.hits[before].at - started < 5
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
