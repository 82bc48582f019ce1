"""Stops the daemon with SIGTERM, again and again under load, and looks for what was cut off, lost or charged to a file.

A callback must be answered completely when its last byte had been handed to the kernel before the daemon closed its
listener (the moment of its line `stopping`; both clocks are the machine's), on a connection that the daemon had
accepted, which it has for sure when it had answered on it before. A callback whose handler waits for the rest of the
body is answered as well, when the rest comes soon. Connections that are new at that moment may still be in the kernel's
queue, which nobody can empty and close at once: what was sent by them and reset is counted on its own, and none of it
was acked.

Every other round, probes are in flight that will never be answered, of files that have been asked for once and of
files that have not: they hold up the stop for half of shutdown_grace, and no attempt may be charged for them. In every
fourth round there are connections whose body never ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime

from tests.support.daemon import Config, Daemon
from tests.support.notification import batch_body
from tests.support.origin import SILENCE, Answer, Hit, Origin
from tests.support.waiting import Bell
from tests.torture.client import Connection, Posted
from tests.torture.crash import SETTLE_SECONDS, SETTLED
from tests.torture.figures import Figure, Setting

ROUNDS = 50
GRACE = 4.0
KEPT_ALIVE = 12
NEW = 4
HALF_SENT = 6
ENDLESS = 4
HELD = 20
HTTP_200, HTTP_503 = 200, 503


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Torture:
    """Lives of one daemon, each ended by SIGTERM."""

    def __init__(self, daemon: Daemon, origin: Origin, dice: random.Random) -> None:
        self.daemon = daemon
        self.origin = origin
        self.acked: set[str] = set()
        self.count: Counter[str] = Counter()
        self.exits: dict[str, list[float]] = {}
        self._dice = dice
        self._silent = False
        self._answers: Counter[str] = Counter()
        self._connections: set[int] = set()
        self._batches = 0
        self._stopped = False
        self._life: list[Posted] = []
        self._bell = Bell()
        origin.default = self._answer

    def _answer(self, hit: Hit) -> Answer:
        """Files of the kind `again` fail once and are tried again at once; silence meets what is held."""
        kind = hit.path.split("/")[1]
        fresh = hit.connection not in self._connections
        self._connections.add(hit.connection)
        if kind == "again" and not self._answers[hit.path]:
            # On a reused connection it does not count, and is requested once more.
            self._answers[hit.path] += fresh
            return Answer(503, close=True)
        if self._silent and kind in ("again", "held"):
            return SILENCE
        self._answers[hit.path] += 1
        return Answer()

    def _compose(self, kind: str = "load", size: int | None = None) -> tuple[str, bytes]:
        self._batches += 1
        batch = f"batch-{self._batches}"
        size = self._dice.randint(1, 6) if size is None else size
        return batch, batch_body(batch, [self.origin.url(f"/{kind}/{batch}/{number}") for number in range(size)])

    def _note(self, posted: Posted) -> Posted:
        self._life.append(posted)
        self._bell.ring()
        if posted.status == HTTP_200:
            self.acked.add(posted.batch)
        return posted

    async def round(self, *, hang: bool, endless: bool) -> None:
        """One life: load, SIGTERM at a random moment, and what came of every request."""
        daemon, count = self.daemon, self.count
        daemon.text = ""
        self.origin.hits.clear()
        self._life = []
        self._stopped = False
        self._silent = hang
        await daemon.start()
        if hang:
            for kind in ("held", "again"):
                batch, body = self._compose(kind, HELD)
                assert (await daemon.post(body)).status == HTTP_200
                self.acked.add(batch)
                hung = "SELECT sum(attempts) = ? FROM file JOIN batch ON batch.id = batch WHERE batch_id = ?"
                await daemon.eventually(hung, HELD if kind == "again" else 0, batch)
            await self.origin.bell.until(lambda: self.origin.busy >= 2 * HELD)
        async with contextlib.AsyncExitStack() as stack:
            kept = [await stack.enter_async_context(Connection(daemon.callback)) for _ in range(KEPT_ALIVE)]
            uploads = [await stack.enter_async_context(Connection(daemon.callback)) for _ in range(HALF_SENT)]
            never = [await stack.enter_async_context(Connection(daemon.callback)) for _ in range(ENDLESS * endless)]
            for connection in kept:
                assert self._note(await connection.post(*self._compose())).status == HTTP_200
            halves = [self._compose() for _ in uploads]
            for connection, (_, body) in zip(
                [*uploads, *never], [*halves, *[self._compose() for _ in never]], strict=True
            ):
                await connection.begin(body, 10)

            senders = [asyncio.create_task(self._send(connection)) for connection in kept]
            new: list[Posted] = []
            senders += [asyncio.create_task(self._send_new(new)) for _ in range(NEW)]
            enough = len(self._life) + self._dice.randint(1, 400)
            await self._bell.until(lambda: len(self._life) >= enough)
            began = time.monotonic()
            daemon.send(signal.SIGTERM)
            line = await daemon.line("stopping")
            self._stopped = True
            finished = [
                self._note(await connection.finish(batch, body[10:]))
                for connection, (batch, body) in zip(uploads, halves, strict=True)
            ]
            code = await daemon.exit_code(GRACE * 3)
            held_up_by = "probes that hang" if hang else "bodies that never end" if endless else "nothing"
            self.exits.setdefault(held_up_by, []).append(time.monotonic() - began)
            await asyncio.gather(*senders)

        closed = datetime.fromisoformat(str(line["timestamp"])).timestamp() * 1e9
        before = [posted for posted in self._life if 0 < posted.sent_at < closed]
        open_then = [posted for posted in before if posted.answered_at >= closed]
        count["exits with status 0"] += code == 0
        count["sent on connections accepted"] += len(before)
        count["of them in flight at the stop"] += len(open_then)
        count["cut off"] += sum(posted.status is None for posted in before)
        count["answered 503"] += sum(posted.status == HTTP_503 for posted in self._life)
        count["other statuses"] += sum(posted.status not in (HTTP_200, HTTP_503, None) for posted in self._life)
        count["half sent"] += len(finished)
        count["half sent and answered"] += sum(posted.status == HTTP_200 for posted in finished)
        new_before = [posted for posted in new if 0 < posted.sent_at < closed]
        count["sent by a new connection"] += len(new_before)
        count["new connections reset"] += sum(posted.status is None for posted in new_before)
        self._check_files()

    async def _send(self, connection: Connection) -> None:
        while self._note(await connection.post(*self._compose())).status is not None:
            pass

    async def _send_new(self, new: list[Posted]) -> None:
        while not self._stopped:
            batch, body = self._compose()
            with contextlib.suppress(OSError):
                async with Connection(self.daemon.callback) as connection:
                    posted = await connection.post(batch, body)
                new.append(posted)
                if posted.status == HTTP_200:
                    self.acked.add(batch)

    def _check_files(self) -> None:
        """No file has been charged more attempts than it has had answers."""
        for row in self.daemon.sql("SELECT target_url, attempts FROM file WHERE state = 'pending'"):
            path = row["target_url"].removeprefix(self.origin.url(""))
            self.count["files pending at a stop"] += 1
            self.count["of them asked for before"] += row["attempts"] > 0
            self.count["attempts burned"] += row["attempts"] > self._answers[path]
        (burned,) = self.daemon.sql("SELECT count(*) FROM attempt WHERE reason IS NOT NULL AND reason <> 'http_503'")[0]
        self.count["attempts failed by a stop"] = burned

    async def settle(self) -> None:
        """Start it a last time, and wait until every file has settled."""
        self._silent = False
        await self.daemon.start()
        await self.daemon.eventually(SETTLED, seconds=SETTLE_SECONDS)

    def figures(self, rounds: int) -> list[Figure]:
        """What came of all the rounds, once everything has settled."""
        daemon, count = self.daemon, self.count
        stored = {row["batch_id"] for row in daemon.sql("SELECT batch_id FROM notification")}
        verdicts = {row["batch_id"]: row["verdict"] for row in daemon.sql("SELECT batch_id, verdict FROM batch")}
        lost = self.acked - stored
        right = sum(verdicts.get(batch) == "complete" for batch in self.acked)
        burned = count["attempts burned"] + count["attempts failed by a stop"]
        figures = [
            Figure(
                "acked batches lost in SIGTERM",
                "0",
                f"{len(lost)} of {len(self.acked):,} acked, {rounds} stops",
                not lost and right == len(self.acked),
                {"stops": rounds, "acked": len(self.acked), "lost": len(lost), "complete": right},
            ),
            Figure(
                "requests cut off that were sent before the listener closed",
                "0",
                f"{count['cut off']} of {count['of them in flight at the stop']:,} then in flight, "
                f"{count['sent on connections accepted']:,} in all; "
                f"{count['new connections reset']} of {count['sent by a new connection']:,} new ones reset",
                not count["cut off"] and not count["other statuses"] and count["of them in flight at the stop"] > 0,
                dict(count),
            ),
            Figure(
                "requests half sent, finished after the stop began",
                "all answered",
                f"{count['half sent and answered']} of {count['half sent']}",
                count["half sent and answered"] == count["half sent"],
            ),
            Figure(
                "attempts burned",
                "0",
                f"{burned} of {count['files pending at a stop']:,} files pending at a stop",
                not burned and count["of them asked for before"] > 0,
            ),
            Figure(
                "exit status",
                "always 0",
                f"0 in {count['exits with status 0']} of {rounds}",
                count["exits with status 0"] == rounds,
            ),
        ]
        for held_up_by, seconds in self.exits.items():
            p50, p99 = percentile(seconds, 0.5), percentile(seconds, 0.99)
            figures.append(
                Figure(
                    f"seconds to exit, held up by {held_up_by}",
                    f"at most {GRACE} (shutdown_grace)",
                    f"p50 {p50:.2f}, p99 {p99:.2f}, max {max(seconds):.2f}",
                    max(seconds) <= GRACE,
                    {"p50": p50, "p99": p99, "max": max(seconds), "stops": len(seconds)},
                )
            )
        return figures


async def run(setting: Setting) -> list[Figure]:
    """Stop it 50 times at scale 1."""
    dice = random.Random(setting.seed)
    rounds = setting.times(ROUNDS)
    config: Config = {
        "server": {"shutdown_grace": GRACE},
        # A machine that is slow for a moment must not look like a host that is down.
        "verify": {"retry_schedule": ["50ms"] * 5, "per_host_concurrency": 128, "circuit_failures": 1_000_000},
    }
    async with Origin() as origin:
        daemon = Daemon(setting.work, config)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_exit(daemon.__aexit__)
            torture = Torture(daemon, origin, dice)
            for number in range(rounds):
                await torture.round(hang=number % 2 == 0, endless=number % 4 == 1)
            await torture.settle()
            return torture.figures(rounds)
