"""Kills the daemon with SIGKILL, again and again under load, and looks for what was acked and is not there.

One database lives through all the kills. A quarter of them each comes

- while the daemon starts: recovers its log, opens its probers, listens;
- after a few acks of a life: so the log's end is torn where it is written most;
- after the first files of a large batch have been expanded, which takes several transactions;
- after so many requests have reached the origin, while answers wait to be recorded.

What had no answer is sent again in the next life, as the platform would. The origin knows what every file must be
recorded as. What the kills hit is counted: requests without an answer, notifications not or half expanded, files that
had been asked for and not recorded. A kill leaves the kernel's memory as it is: that the disk has it too is what the
part `fsync` shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator

import aiohttp

from tests.support.daemon import Daemon
from tests.support.notification import batch_body
from tests.support.origin import Answer, Hit, Origin
from tests.support.waiting import Bell
from tests.torture.figures import Figure, Setting

ROUNDS = 200
SENDERS = 8
# Batches in a round: files enough for what the origin waits for, and no hours of checking in the end.
MAX_ROUND = 1000
MOMENTS = ("starting", "acking", "expanding", "recording")
LARGE = (6000, 9000)
# Kills of the daemon alone: its keeper finishes the calls it has received, and the next daemon waits meanwhile.
ALONE = 0.2
SETTLED = (
    "SELECT NOT EXISTS (SELECT 1 FROM notification WHERE expanded_at IS NULL)"
    " AND NOT EXISTS (SELECT 1 FROM batch WHERE verdict = 'pending')"
)
SETTLE_SECONDS = 300.0


def truth(path: str) -> tuple[str, int]:
    """What the origin says of a path, and what therefore must be stored."""
    return ("unavailable", 410) if path.startswith("/gone") else ("available", 200)


class Platform:
    """Sends batches as fast as they are acked, those without an answer again, and remembers which were acked."""

    def __init__(self, origin: Origin, dice: random.Random) -> None:
        self.paths: dict[str, list[str]] = {}
        self.sends: Counter[str] = Counter()
        self.acked: set[str] = set()
        self.unanswered: list[str] = []
        self.waiting = 0
        self.bell = Bell()
        self._origin = origin
        self._dice = dice
        self._ids = (f"batch-{number}" for number in itertools.count(1))

    def compose(self, size: int) -> str:
        """A batch of so many files, some of them gone."""
        batch = next(self._ids)
        kinds = self._dice.choices(("ok", "gone"), (4, 1), k=size)
        self.paths[batch] = [f"/{kind}/{batch}/{number}" for number, kind in enumerate(kinds)]
        return batch

    async def send(self, daemon: Daemon, batch: str) -> bool:
        """Post a batch; whether it was acked."""
        body = batch_body(batch, [self._origin.url(path) for path in self.paths[batch]])
        self.sends[batch] += 1
        self.waiting += 1
        try:
            reply = await daemon.post(body)
        except (aiohttp.ClientError, OSError):
            self.unanswered.append(batch)
            return False
        finally:
            self.waiting -= 1
        if reply.status == 503:  # Its keeper was killed a moment before the daemon.
            self.unanswered.append(batch)
            return False
        assert reply.status == 200, reply
        self.acked.add(batch)
        self.bell.ring()
        return True

    async def send_until_it_fails(self, daemon: Daemon, most: int) -> None:
        """Post batch after batch, those that had no answer first, until so many have been acked in all."""
        while len(self.acked) < most and await self.send(
            daemon, self.unanswered.pop() if self.unanswered else self.compose(self._dice.randint(1, 6))
        ):
            pass

    def files(self) -> Iterator[tuple[str, str]]:
        """Batch and path of every file that was sent."""
        return ((batch, path) for batch, paths in self.paths.items() for path in paths)


class Torture:
    """Lives and deaths of one daemon."""

    def __init__(self, daemon: Daemon, origin: Origin, dice: random.Random) -> None:
        self.daemon = daemon
        self.origin = origin
        self.platform = Platform(origin, dice)
        self.hits: Counter[str] = Counter()
        self._dice = dice
        self._start_seconds = 1.0
        origin.default = self._tell_truth

    def _tell_truth(self, hit: Hit) -> Answer:
        return Answer(truth(hit.path)[1], {"ETag": f'"{hit.path}"'})

    async def round(self, moment: str) -> None:
        """Start the daemon, load it, kill it at such a moment, and count what that hit."""
        daemon, origin, platform, dice = self.daemon, self.origin, self.platform, self._dice
        daemon.text = ""
        origin.hits.clear()
        if moment == "starting":
            await self._kill_starting()
            return
        began = time.monotonic()
        await daemon.start()
        self._start_seconds = time.monotonic() - began
        if moment == "expanding":
            batch = platform.compose(dice.randint(*LARGE))
            await platform.send(daemon, batch)
            # Before the others send: it comes after all that has been acked, and acks come before it.
            await daemon.eventually("SELECT EXISTS (SELECT 1 FROM batch WHERE batch_id = ?)", batch)
        most = len(platform.acked) + MAX_ROUND
        senders = [asyncio.create_task(platform.send_until_it_fails(daemon, most)) for _ in range(SENDERS)]
        if moment == "acking":
            enough = len(platform.acked) + dice.randint(1, 120)
            await platform.bell.until(lambda: len(platform.acked) >= enough)
        elif moment == "expanding":
            await asyncio.sleep(dice.uniform(0, 0.015))
        else:
            await origin.reached(dice.randint(1, 3000))
        self.hits["acks in flight"] += platform.waiting
        self.hits["kills with acks in flight"] += platform.waiting > 0
        # Mostly all of its processes, so that what writes the record is stopped in the middle of it.
        await daemon.kill(alone=dice.random() < ALONE)
        await asyncio.gather(*senders)
        self._count_what_was_hit()

    async def _kill_starting(self) -> None:
        """Kill it at any moment of its start, which may be too late: then it has only just begun to listen."""
        began = asyncio.create_task(self.daemon.start())
        while not (self.daemon.running or began.done()):
            await asyncio.sleep(0)
        await asyncio.sleep(self._dice.uniform(0, self._start_seconds))
        self.hits["kills before it was ready"] += not began.done()
        await self.daemon.kill()
        with contextlib.suppress(AssertionError):  # It ended without being ready.
            await began

    def _count_what_was_hit(self) -> None:
        daemon = self.daemon
        waiting, half = daemon.sql(
            "SELECT count(*) FROM notification WHERE expanded_at IS NULL"
            " UNION ALL SELECT count(*) FROM batch WHERE expanding IS NOT NULL"
        )
        asked = json.dumps([self.origin.url(path) for path in {hit.path for hit in self.origin.hits}])
        unrecorded = daemon.value(
            "SELECT count(*) FROM file WHERE state = 'pending' AND target_url IN (SELECT value FROM json_each(?))",
            asked,
        )
        for name, number in (
            ("notifications not expanded", waiting[0]),
            ("half expanded", half[0]),
            ("files asked for and not recorded", unrecorded),
        ):
            self.hits[name] += number
            self.hits[f"kills with {name}"] += number > 0

    async def settle(self) -> None:
        """Start it a last time, send what has had no answer, and wait until every file has settled."""
        await self.daemon.start()
        again, self.platform.unanswered = self.platform.unanswered, []
        assert all(await asyncio.gather(*(self.platform.send(self.daemon, batch) for batch in again)))
        await self.daemon.eventually(SETTLED, seconds=SETTLE_SECONDS)

    def figures(self, rounds: int) -> list[Figure]:
        """Compare the record with the requests and their answers."""
        daemon, platform = self.daemon, self.platform
        batches = {row["batch_id"]: row for row in daemon.sql("SELECT * FROM batch")}
        deliveries: Counter[str] = Counter()
        for row in daemon.sql("SELECT batch_id, count(*) AS number FROM notification GROUP BY batch_id"):
            deliveries[row["batch_id"]] = row["number"]
        lost = {batch for batch in platform.acked if batch not in batches or not deliveries[batch]}
        resent = sum(platform.sends.values()) - len(platform.sends)

        def judged(batch: str) -> bool:
            if batch not in batches:
                return False
            row = batches[batch]
            whole = all(truth(path)[0] == "available" for path in platform.paths[batch])
            return (
                str(row["verdict"]) == ("complete" if whole else "incomplete")
                and int(row["files"]) == len(platform.paths[batch])
                # No delivery merged twice, none that was not sent.
                and int(row["deliveries"]) == deliveries[batch] <= platform.sends[batch]
            )

        right = sum(judged(batch) for batch in platform.acked)
        rows = daemon.sql(
            "SELECT batch.batch_id, file.*, (SELECT count(*) FROM attempt WHERE file = file.id) AS requests"
            " FROM file JOIN batch ON batch.id = file.batch"
        )
        recorded = {
            (row["batch_id"], row["target_url"]): (
                row["state"], row["http_status"], row["etag"], row["attempts"], row["requests"]
            )
            for row in rows
        }  # fmt: skip
        files = list(platform.files())
        same = sum(
            recorded.get((batch, self.origin.url(path))) == (*truth(path), f'"{path}"', 1, 1) for batch, path in files
        )
        integrity = str(daemon.value("PRAGMA integrity_check"))
        dangling = len(daemon.sql("PRAGMA foreign_key_check"))
        proof = ("kills before it was ready", "kills with acks in flight", "kills with notifications not expanded",
                 "kills with half expanded", "kills with files asked for and not recorded")  # fmt: skip
        return [
            Figure(
                "acked batches lost in kill -9",
                "0",
                f"{len(lost)} of {len(platform.acked):,} acked, {rounds} kills",
                not lost and len(platform.acked) == len(platform.sends),
                {
                    "kills": rounds,
                    "batches": len(platform.sends),
                    "sent": sum(platform.sends.values()),
                    "acked": len(platform.acked),
                    "resent": resent,
                    "lost": len(lost),
                },
            ),
            Figure(
                "acked batches with the right verdict",
                "all",
                f"{right:,} of {len(platform.acked):,}",
                right == len(platform.acked) == len(batches),
                {"right": right, "batches": len(batches)},
            ),
            Figure(
                "files as the origin said, recorded once",
                "all",
                f"{same:,} of {len(files):,}",
                same == len(files) == len(rows),
                {"files": len(files), "same": same, "rows": len(rows)},
            ),
            Figure(
                "PRAGMA integrity_check",
                "ok",
                integrity if not dangling else f"{integrity}, {dangling} rows refer to nothing",
                integrity == "ok" and not dangling,
            ),
            Figure(
                "kills that hit a start, acks, the inbox, an expansion, probes",
                "some each",
                ", ".join(f"{self.hits[name]}" for name in proof),
                all(self.hits[name] for name in proof),
                dict(self.hits),
            ),
        ]


async def run(setting: Setting) -> list[Figure]:
    """Kill it 200 times at scale 1."""
    dice = random.Random(setting.seed)
    rounds = setting.times(ROUNDS)
    moments = list(itertools.islice(itertools.cycle(MOMENTS), rounds))
    dice.shuffle(moments)
    async with Origin() as origin:
        # Not entered: the rounds start it themselves, and the first of them may kill it while it starts.
        daemon = Daemon(setting.work, {"verify": {"retry_schedule": ["100ms"] * 5}})
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_exit(daemon.__aexit__)
            torture = Torture(daemon, origin, dice)
            for moment in moments:
                await torture.round(moment)
            began = time.monotonic()
            await torture.settle()
            torture.hits["seconds to settle"] = round(time.monotonic() - began)
            return torture.figures(rounds)
