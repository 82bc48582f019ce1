"""Shows by the order of system calls that every ack is sent after the disk was told to keep its notification.

The daemon runs under strace. For every ack the trace must have, one after the other: a write to the write-ahead log of
a page that holds the notification, a fdatasync of that log which begins after that write has ended, and the write of
the ack to its connection, which begins after the fdatasync has ended with 0. Files are expanded, asked for and
recorded meanwhile, so that the log has other transactions too.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.daemon import Daemon
from tests.support.notification import batch_body
from tests.support.origin import Origin
from tests.torture.client import Connection
from tests.torture.figures import Figure, Setting

ACKS = 10_000
CONNECTIONS = 16
READS = ("read", "readv", "recvfrom", "recvmsg")
WRITES = ("write", "writev", "sendto", "sendmsg")
PAGE_WRITES = ("pwrite64", "pwritev")
SYNCS = ("fsync", "fdatasync")
# A page of the database, and what SQLite puts before it.
TEXT_BYTES = 4096 + 24
BATCH = re.compile(r"torture-[0-9]+")


class Call(NamedTuple):
    """A system call as strace saw it: where in the trace it began and ended, and its text."""

    name: str
    target: str
    began: int
    ended: int
    text: str


def strace(trace: Path) -> list[str]:
    """The command that runs the daemon and writes the trace."""
    calls = ",".join(READS + WRITES + PAGE_WRITES + SYNCS)
    return ["strace", "-f", "--seccomp-bpf", "-y", "-s", str(TEXT_BYTES), "-o", str(trace), "-e", f"trace={calls}"]


def read_trace(path: Path) -> Iterator[Call]:
    """The calls of a trace of `strace -f -y` in the order of their ends, those that another one interrupted put
    together again."""
    open_calls: dict[str, tuple[int, str]] = {}
    with path.open(errors="replace") as lines:
        for number, line in enumerate(lines):
            pid, _, text = line.partition(" ")
            text = text.strip()
            began = number
            if text.endswith("<unfinished ...>"):
                open_calls[pid] = number, text.removesuffix("<unfinished ...>")
                continue
            if resumed := re.match(r"<\.\.\. \w+ resumed>", text):
                began, beginning = open_calls.pop(pid)
                text = beginning + text[resumed.end() :]
            if found := re.match(r"(\w+)\([0-9]+<([^>]*)>", text):
                yield Call(found[1], found[2], began, number, text)


class Proof(NamedTuple):
    """What a trace shows: acks sent, those of them that a sync came before, syncs, and acks that shared theirs."""

    acks: int
    proven: int
    syncs: int
    shared: int


def prove(calls: Iterable[Call]) -> Proof:
    """Look for the write and the sync before every ack. Notifications are told by their batch, BATCH."""
    # Where syncs of the log began and ended. One thread makes them, so they do not overlap.
    began: list[int] = []
    ended: list[int] = []
    written: dict[str, int] = {}
    asked: dict[str, str] = {}
    acks = proven = 0
    used: set[int] = set()
    for call in calls:
        if call.name in SYNCS and call.target.endswith("-wal") and call.text.endswith(" = 0"):
            assert not ended or ended[-1] < call.began
            began.append(call.began)
            ended.append(call.ended)
        elif call.name in PAGE_WRITES and call.target.endswith("-wal"):
            for name in BATCH.findall(call.text):
                written.setdefault(name, call.ended)
        elif call.name in READS and call.target.startswith("socket:") and (batch := BATCH.search(call.text)):
            asked[call.target] = batch[0]
        elif call.name in WRITES and "HTTP/1.1 200" in call.text:
            acks += 1
            write = written.get(asked.pop(call.target, ""))
            if write is None:
                continue
            place = bisect_right(began, write)
            if place < len(began) and ended[place] < call.began:
                proven += 1
                used.add(place)
    return Proof(acks, proven, len(began), proven - len(used))


async def run(setting: Setting) -> list[Figure]:
    """Take 10,000 acks at scale 1, over 16 connections at once."""
    number = setting.times(ACKS)
    trace = setting.work / "trace"
    async with Origin() as origin, Daemon(setting.work / "daemon", prefix=strace(trace)) as daemon:
        # The prefix's process is strace's.
        pid = int(daemon.database.with_name("notify.db.lock").read_text())
        left = iter(range(number))
        acked = 0

        async def send() -> None:
            nonlocal acked
            async with Connection(daemon.callback) as connection:
                for n in left:
                    batch = f"torture-{n}"
                    files = [origin.url(f"/{n}/{file}") for file in range(n % 4)]
                    posted = await connection.post(batch, batch_body(batch, files))
                    acked += posted.status == 200

        await asyncio.gather(*(send() for _ in range(CONNECTIONS)))
        await daemon.eventually("SELECT count(*) = ? AND sum(verdict = 'pending') = 0 FROM batch", number, seconds=60)
        os.kill(pid, signal.SIGTERM)
        code = await daemon.exit_code()
    proof = prove(read_trace(trace))
    return [
        Figure(
            "acks sent after a fdatasync of their notification",
            "all",
            f"{proof.proven:,} of {acked:,} acked",
            proof.proven == proof.acks == acked == number,
            {"sent": number, "acked": acked, "in the trace": proof.acks, "proven": proof.proven},
        ),
        Figure(
            "acks that shared their fdatasync with another",
            "some",
            f"{proof.shared:,} of {proof.acks:,}; {proof.syncs:,} fdatasyncs",
            proof.shared > 0 and code == 0,
            {"shared": proof.shared, "fdatasyncs": proof.syncs, "exit status": code},
        ),
    ]
