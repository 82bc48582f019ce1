"""Kills one of two nodes on one PostgreSQL with SIGKILL, half-way through 200,000 files, and looks what comes of it.

Batches are posted to both, so many at a time that the backlog stays the same: when the kill comes, acks are in flight,
the inbox is being expanded, and the node has files under way. What had no answer is posted again, to the other, as a
balancer or the platform would. Which node is killed is drawn; the one that was started first expands the inbox.

A file that is recorded by two nodes has two rows in `attempt` for its one attempt. How long the takeover took is told
by the record: from the kill to when the last of the files that the dead node had claimed was verified.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator

import aiohttp
import asyncpg

from tests.bench.servers import MANY_HOSTS, nginx
from tests.support.daemon import Daemon
from tests.support.notification import batch_body, failed, finished
from tests.support.postgres import VARIABLE, PostgresServer, new_schema
from tests.torture.figures import Figure, Setting

FILES = 200_000
A_BATCH = 100
# Of so many batches one has a file that the platform reports as FAILED.
FAILED_IN = 5
SENDERS = 4
BACKLOG_SHARE = 0.25
LEASE_SECONDS = 5.0
TAKEOVER_SECONDS = 5.0
SETTLE_SECONDS = 600.0
LOOK_SECONDS = 0.05

SETTLED = "SELECT coalesce(sum(files - pending), 0)::bigint FROM batch"
UNSETTLED = (
    "SELECT EXISTS (SELECT FROM notification WHERE expanded_at IS NULL)"
    " OR EXISTS (SELECT FROM batch WHERE verdict = 'pending')"
)
CLAIMED = "SELECT lease.file FROM lease JOIN node ON node.id = lease.node WHERE node.name LIKE '%:' || $1"
RECORDED = """
SELECT
    count(*),
    count(*) FILTER (WHERE state = 'available' AND attempts = 1 AND made = 1),
    count(*) FILTER (WHERE state = 'upload_failed' AND attempts = 0 AND made = 0),
    count(*) FILTER (WHERE made > attempts)
FROM file
LEFT JOIN LATERAL (SELECT count(*) AS made FROM attempt WHERE attempt.file = file.id) AS attempts_made ON true
"""


class Platform:
    """Posts batches to the nodes that live, those without an answer again, and remembers which were acked."""

    def __init__(self, nodes: list[Daemon], origin_port: int, batches: int) -> None:
        self.backlog = batches * A_BATCH * BACKLOG_SHARE
        self.nodes = nodes
        self.sends: Counter[str] = Counter()
        self.acked: set[str] = set()
        self.waiting: Counter[Daemon] = Counter()
        self.settled = 0
        self._origins = itertools.cycle(f"http://{host}:{origin_port}" for host in MANY_HOSTS)
        self.left = [f"batch-{number}" for number in range(batches, 0, -1)]
        self._bodies: dict[str, bytes] = {}

    @staticmethod
    def has_failed(batch: str) -> bool:
        """Whether the platform reports a file of this batch as FAILED."""
        return int(batch.partition("-")[2]) % FAILED_IN == 0

    def _body(self, batch: str) -> bytes:
        if batch not in self._bodies:
            entries = [finished(f"{next(self._origins)}/{batch}/{number}", f"{number}") for number in range(A_BATCH)]
            if self.has_failed(batch):
                entries[0] = failed("0")
            self._bodies[batch] = batch_body(batch, entries)
        return self._bodies[batch]

    async def send(self, node: Daemon) -> None:
        """Post one batch after the other to a node, as long as it lives and there are any."""
        while self.left and node in self.nodes:
            if len(self.sends) * A_BATCH - self.settled >= self.backlog:
                await asyncio.sleep(LOOK_SECONDS)
                continue
            batch = self.left.pop()
            self.sends[batch] += 1
            self.waiting[node] += 1
            try:
                reply = await node.post(self._body(batch))
            except (aiohttp.ClientError, OSError):
                self.left.append(batch)
                return
            finally:
                self.waiting[node] -= 1
            assert reply.status == 200, reply
            self.acked.add(batch)
            del self._bodies[batch]


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The address of a server: the one that a variable names, or one of the part's own."""
    if named := os.environ.get(VARIABLE):
        yield named
        return
    with PostgresServer() as server:
        yield server.url


async def run(setting: Setting) -> list[Figure]:
    """Two nodes and 200,000 files at scale 1; one node dies."""
    dice = random.Random(setting.seed)
    batches = max(20, setting.times(FILES // A_BATCH))
    async with contextlib.AsyncExitStack() as stack:
        origin = stack.enter_context(nginx(setting.work))
        url = await new_schema(stack.enter_context(postgres()))
        look = await asyncpg.connect(url)
        stack.push_async_callback(look.close)
        config = {"store": {"url": url, "lease": f"{LEASE_SECONDS}s"}}
        nodes = [await stack.enter_async_context(Daemon(setting.work / name, config)) for name in "ab"]
        await asyncio.gather(*(node.line("sharing the work", nodes=2) for node in nodes))
        platform = Platform(list(nodes), origin.port, batches)
        doomed = dice.choice(nodes)
        (survivor,) = [node for node in nodes if node is not doomed]

        began = time.monotonic()
        senders = [asyncio.create_task(platform.send(node)) for node in nodes for _ in range(SENDERS)]
        while (settled := await look.fetchval(SETTLED)) < batches * A_BATCH // 2:
            platform.settled = settled
            await asyncio.sleep(LOOK_SECONDS)
        together = settled / (time.monotonic() - began)
        pid = str(doomed.pid)
        while True:
            # Stopped for a moment, to be seen with files under way and answers owed; else there is another moment.
            killed_at = time.time()
            doomed.send(signal.SIGSTOP)
            acking = platform.waiting[doomed]
            if await look.fetch(CLAIMED, pid) and (acking or not platform.left):
                break
            platform.settled = await look.fetchval(SETTLED)
            if platform.settled >= batches * A_BATCH:
                break
            doomed.send(signal.SIGCONT)
            await asyncio.sleep(0)
        platform.nodes.remove(doomed)
        await doomed.kill()
        hit = {
            "acks in flight": acking,
            "notifications in the inbox": await look.fetchval(
                "SELECT count(*) FROM notification WHERE expanded_at IS NULL"
            ),
            "the one that was killed expanded the inbox": int(doomed is nodes[0]),
        }
        claimed = [file for (file,) in await look.fetch(CLAIMED, pid)]
        # Those that posted to it go on at the other.
        senders += [asyncio.create_task(platform.send(survivor)) for _ in range(SENDERS)]
        alone_since, alone_from = time.monotonic(), settled
        async with asyncio.timeout(SETTLE_SECONDS):
            while len(platform.acked) < batches or await look.fetchval(UNSETTLED):
                platform.settled = await look.fetchval(SETTLED)
                await asyncio.sleep(LOOK_SECONDS)
        alone = (batches * A_BATCH - alone_from) / (time.monotonic() - alone_since)
        await asyncio.gather(*senders)

        verdicts = {batch: (verdict, files) for batch, verdict, files in await look.fetch(
            "SELECT batch_id, verdict, files FROM batch"
        )}  # fmt: skip
        right = sum(
            verdicts.get(batch) == ("incomplete" if platform.has_failed(batch) else "complete", A_BATCH)
            for batch in platform.acked
        )
        lost = platform.acked - verdicts.keys()
        # Every file is looked up once.
        await look.execute("SET enable_hashjoin = on")
        rows, once, reported, twice = tuple(await look.fetchrow(RECORDED) or ())
        expected = batches * A_BATCH
        with_failed = sum(platform.has_failed(batch) for batch in platform.acked)
        last = await look.fetchval("SELECT max(verified_at) FROM file WHERE id = ANY($1::bigint[])", claimed)
        takeover = last / 1000 - killed_at if claimed else 0.0
        left = await look.fetchval("SELECT count(*) FROM lease")
        codes = [await survivor.terminate()]
    counts = {"files": expected, "batches": batches, "resent": sum(platform.sends.values()) - batches, **hit}
    return [
        Figure(
            "acked batches lost when one of two nodes is killed",
            "0",
            f"{len(lost)} of {len(platform.acked):,} acked",
            not lost and len(platform.acked) == batches,
            counts,
        ),
        Figure(
            "acked batches with the right verdict",
            "all",
            f"{right:,} of {batches:,}",
            right == batches == len(verdicts),
            {"right": right},
        ),
        Figure(
            "files recorded once for their one attempt",
            "all",
            f"{once + reported:,} of {expected:,}, {twice} twice",
            (once, reported, twice) == (expected - with_failed, with_failed, 0) and rows == expected,
            {"rows": rows, "once": once, "reported FAILED": reported, "twice": twice},
        ),
        Figure(
            "seconds until its files were verified by the other",
            f"within the lease of {LEASE_SECONDS:g} and {TAKEOVER_SECONDS:g}",
            f"{takeover:.1f}, {len(claimed):,} files claimed by it, {acking} acks in flight",
            0 < takeover <= LEASE_SECONDS + TAKEOVER_SECONDS and not left and acking > 0,
            {"seconds": takeover, "claimed": len(claimed), "claims left": left},
        ),
        Figure(
            "the other goes on, and stops in order",
            "exit status 0",
            f"{codes[0]}; {together:,.0f} files/s by two, {alone:,.0f} by one, the takeover included",
            codes == [0],
            {"files/s by two": together, "files/s by one": alone},
        ),
    ]
