"""Stops the keeper, the probers and a node on PostgreSQL with SIGSTOP, in turn under load.

Senders post without pause. While a keeper stands still every callback must be answered 503 within a second, while
probers do it must be acked; the hung process is killed and replaced, and its files are probed by its successor with no
attempt spent. A node on PostgreSQL that stands still for longer than its lease loses its files to the other node, and
goes on when it runs again. Every life of the daemon on SQLite ends by SIGTERM with a child that stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import asyncpg

from tests.support.daemon import Config, Daemon, process_gone
from tests.support.notification import batch_body
from tests.support.origin import Origin
from tests.support.postgres import new_schema
from tests.torture.crash import SETTLE_SECONDS, SETTLED
from tests.torture.figures import Figure, Setting
from tests.torture.nodes import UNSETTLED, postgres

ROUNDS = 30
SENDERS = 8
FILES = 5
GRACE = 4.0
# What ends beside the grace: the kill of a child, and the exit itself.
EXIT_SLACK = 2.0
ANSWER_SECONDS = 1.0
LEASE_SECONDS = 5.0
ACKS_A_ROUND = 50
ROUND_SECONDS = 60.0
HTTP_200, HTTP_503 = 200, 503


class Senders:
    """Post batch after batch to the daemons in turn, repeat those not acked, and time every answer."""

    def __init__(self, daemons: Sequence[Daemon], origin: Origin, name: str) -> None:
        self.acked: set[str] = set()
        self.answers: Counter[int] = Counter()
        self.slowest = 0.0
        # Daemons that stand still themselves, and so cannot answer.
        self.paused: set[Daemon] = set()
        self._daemons = daemons
        self._origin = origin
        self._name = name
        self._running = True
        self._acks = asyncio.Event()
        self._tasks = [asyncio.create_task(self._send(number)) for number in range(SENDERS)]

    async def _send(self, sender: int) -> None:
        number = 0
        while self._running:
            daemon = self._daemons[(sender + number) % len(self._daemons)]
            if daemon in self.paused:
                daemon = next(each for each in self._daemons if each not in self.paused)
            batch = f"{self._name}-{sender}-{number}"
            body = batch_body(batch, [self._origin.url(f"/{batch}/{file}") for file in range(FILES)])
            began = time.monotonic()
            reply = await daemon.post(body)
            if daemon not in self.paused:
                self.slowest = max(self.slowest, time.monotonic() - began)
            self.answers[reply.status] += 1
            if reply.status == HTTP_200:
                self.acked.add(batch)
                number += 1
                self._acks.set()
            else:
                await asyncio.sleep(0.01)

    async def more(self, number: int = ACKS_A_ROUND) -> None:
        """Wait for so many more acks."""
        wanted = len(self.acked) + number
        async with asyncio.timeout(ROUND_SECONDS):
            while len(self.acked) < wanted:
                self._acks.clear()
                await self._acks.wait()

    async def stop(self) -> None:
        """Stop once the requests under way are answered."""
        self._running = False
        await asyncio.gather(*self._tasks)


@contextlib.asynccontextmanager
async def sending(daemons: Sequence[Daemon], origin: Origin, name: str) -> AsyncIterator[Senders]:
    senders = Senders(daemons, origin, name)
    try:
        yield senders
    finally:
        await senders.stop()


class Exits:
    """How the daemons ended."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.slowest = 0.0
        self.left = 0

    async def terminate(self, daemon: Daemon, children: Sequence[int]) -> None:
        """Stop the daemon with SIGTERM; look how it ends and what it leaves."""
        began = time.monotonic()
        self.codes.append(await daemon.terminate(seconds=ROUND_SECONDS))
        self.slowest = max(self.slowest, time.monotonic() - began)
        for pid in children:
            try:
                await process_gone(pid, 1.0)
            except TimeoutError:
                self.left += 1


async def stop_children(work: Path, origin: Origin, rounds: Sequence[str], exits: Exits) -> list[Figure]:
    """Stop the keeper or the probers of a daemon on SQLite, one kind a round."""
    async with Daemon(work, {"server": {"shutdown_grace": GRACE}, "verify": {"processes": 2}}) as daemon:
        acked: set[str] = set()
        slowest: dict[str, float] = {"keeper": 0.0, "probers": 0.0}
        answers: Counter[int] = Counter()
        during_probers: Counter[int] = Counter()
        replaced = 0
        for number, victim in enumerate(rounds):
            async with sending([daemon], origin, f"b{number}") as senders:
                await senders.more()
                pids = [daemon.keeper_pid()] if victim == "keeper" else daemon.prober_pids()
                before = Counter(senders.answers)
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                for pid in pids:
                    await process_gone(pid, ROUND_SECONDS)
                    replaced += 1
                if victim == "probers":
                    during_probers += senders.answers - before
                await senders.more()
            acked |= senders.acked
            answers += senders.answers
            slowest[victim] = max(slowest[victim], senders.slowest)
        await daemon.eventually(SETTLED, seconds=SETTLE_SECONDS)
        stored = {row["batch_id"] for row in daemon.sql("SELECT batch_id FROM batch WHERE verdict = 'complete'")}
        lost = acked - stored
        charged = daemon.value("SELECT count(*) FROM file WHERE attempts <> 1 OR state <> 'available'")
        files = daemon.value("SELECT count(*) FROM file")
        children = [daemon.keeper_pid(), *daemon.prober_pids()]
        for pid in children:
            os.kill(pid, signal.SIGSTOP)
        await exits.terminate(daemon, children)
    refused = answers[HTTP_503]
    odd = sum(answers.values()) - answers[HTTP_200] - refused
    return [
        Figure(
            "acked batches lost when children hang",
            "0",
            f"{len(lost)} of {len(acked):,} acked, {len(rounds)} stops",
            not lost and len(acked) > 0,
            {"acked": len(acked), "lost": len(lost), "stops": len(rounds)},
        ),
        Figure(
            "callbacks while a child hangs",
            "200, or 503 while it is the keeper",
            f"{refused:,} of {sum(answers.values()):,} 503, {odd} others, "
            f"{during_probers[HTTP_503]} while the probers hung",
            not odd and not during_probers[HTTP_503],
            {"503": refused, "others": odd},
        ),
        Figure(
            "slowest answer",
            f"at most {ANSWER_SECONDS:g} s",
            ", ".join(f"{seconds:.2f} s ({victim})" for victim, seconds in slowest.items()),
            max(slowest.values()) <= ANSWER_SECONDS,
            {f"seconds, {victim}": seconds for victim, seconds in slowest.items()},
        ),
        Figure(
            "files settled by their first attempt",
            "all",
            f"{files - charged:,} of {files:,}, {replaced} processes replaced",
            not charged and files == FILES * len(stored),
            {"files": files, "others": charged, "replaced": replaced},
        ),
    ]


async def stop_nodes(work: Path, origin: Origin, rounds: int, dice: random.Random, exits: Exits) -> list[Figure]:
    """Stop one of two nodes on PostgreSQL for longer than its lease."""
    async with contextlib.AsyncExitStack() as stack:
        url = await new_schema(stack.enter_context(postgres()))
        look = await asyncpg.connect(url)
        stack.push_async_callback(look.close)
        config: Config = {"server": {"shutdown_grace": GRACE}, "store": {"url": url, "lease": f"{LEASE_SECONDS:g}s"}}
        nodes = [await stack.enter_async_context(Daemon(work / name, config)) for name in "ab"]
        await asyncio.gather(*(node.line("sharing the work", nodes=2) for node in nodes))
        acked: set[str] = set()
        for number in range(rounds):
            async with sending(nodes, origin, f"n{number}") as senders:
                await senders.more()
                victim = dice.choice(nodes)
                senders.paused.add(victim)
                victim.send(signal.SIGSTOP)
                # Longer than the lease: the other takes its files over.
                await asyncio.sleep(LEASE_SECONDS + 1)
                await senders.more()
                victim.send(signal.SIGCONT)
                senders.paused.discard(victim)
                await senders.more()
            acked |= senders.acked
        async with asyncio.timeout(SETTLE_SECONDS):
            while await look.fetchval(UNSETTLED):
                await asyncio.sleep(0.1)
        complete = {batch for (batch,) in await look.fetch("SELECT batch_id FROM batch WHERE verdict = 'complete'")}
        for node in nodes:
            probers = node.prober_pids()
            for pid in probers:
                os.kill(pid, signal.SIGSTOP)
            await exits.terminate(node, probers)
    lost = acked - complete
    return [
        Figure(
            "acked batches lost when a node hangs for longer than its lease",
            "0",
            f"{len(lost)} of {len(acked):,} acked, {rounds} stops",
            not lost and len(acked) > 0,
            {"acked": len(acked), "lost": len(lost), "stops": rounds},
        )
    ]


async def run(setting: Setting) -> list[Figure]:
    """Thirty stops at scale 1: a third each of the keeper, of the probers, and of a node."""
    dice = random.Random(setting.seed)
    rounds = max(3, setting.times(ROUNDS))
    of_nodes = rounds // 3
    kinds = [("keeper", "probers")[number % 2] for number in range(rounds - of_nodes)]
    dice.shuffle(kinds)
    exits = Exits()
    async with Origin() as origin:
        figures = await stop_children(setting.work / "sqlite", origin, kinds, exits)
        figures += await stop_nodes(setting.work, origin, of_nodes, dice, exits)
    limit = GRACE + EXIT_SLACK
    figures.append(
        Figure(
            "SIGTERM while children stand still",
            f"exit status 0 within {limit:g} s, nothing left running",
            f"{exits.codes}, slowest {exits.slowest:.2f} s, {exits.left} processes left",
            set(exits.codes) == {0} and not exits.left and exits.slowest <= limit,
            {"exits": len(exits.codes), "left": exits.left, "seconds": exits.slowest},
        )
    )
    return figures
