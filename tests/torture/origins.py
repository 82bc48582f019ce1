"""Has many files at once asked for at origins of every hostile kind, with healthy files among them on the same hosts.

What an origin of `tests.e2e.test_prober` does to one prober request, it does here to a batch of them through the whole
daemon: in bounded time, with the reason that belongs to it, and without a trace in any other file.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import ssl
import sys
import time
import unicodedata
from asyncio import StreamReader, StreamWriter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.test_prober import ATTACKS, CERTIFICATES, HEADERS_ONLY, Authority, tls
from tests.support.daemon import Daemon
from tests.support.notification import finished
from tests.support.prober import (
    EMPTY,
    OK,
    Behaviour,
    mute,
    path_of,
    read_head,
    serving,
    then_forever,
    then_hold,
    well_behaved,
)
from tests.torture.figures import Figure, Setting

# Of each kind, hostile and healthy files alike.
FILES = 20
# Where connections are kept and used again, file after file, by few at a time: so many files for each of the others'.
STRAY_HOST = "127.0.0.2"
STRAY_FILES = 10
STRAY_CONNECTIONS = 4
# Kinds at once. All of them together would be a test of this process, which plays every origin.
KINDS = 12
TIMEOUT = 3.0
CONNECT_TIMEOUT = 1.0
SLACK = 0.5
PATIENCE = 120.0
HOUR = 3600

# A file's state and reason.
End = tuple[str, str | None]
AVAILABLE: End = ("available", None)
GONE: End = ("unavailable", "http_410")


@dataclass
class Kind:
    """A hostile behaviour, and what becomes of a file that meets it.

    `whole` behaviours serve a connection from its first request to its last, healthy files' requests among them.
    """

    name: str
    behave: Behaviour
    end: End
    whole: bool = False
    tls: ssl.SSLContext | None = None
    scheme: str = "http"
    met: int = 0
    held: list[float] = field(default_factory=list)

    @property
    def share(self) -> int:
        """How many files of it there are for each of another kind."""
        return STRAY_FILES if self.whole else 1

    @property
    def mixed(self) -> bool:
        """Whether healthy files can live on the same host."""
        return self.scheme == "http"

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Answer what does not ask for .../bad as it should be, until something does."""
        if self.scheme == "https":
            self.met += 1
        if self.whole or self.scheme == "https":
            await self._timed(self.behave(reader, writer))
            return
        while True:
            head = await read_head(reader)
            if path_of(head).endswith(b"/bad"):
                break
            writer.write(OK + b"ETag: " + path_of(head) + b"\r\nContent-Length: 1234\r\n\r\n")
        self.met += 1
        # The behaviour reads the request for itself; what comes after it is the end, or the next file's turn: that one
        # is to meet a connection that dies, not silence that was meant for another.
        inner = StreamReader()
        inner.feed_data(head)
        await self._timed(self.behave(inner, writer), reader)

    async def _timed(self, behaviour: Any, reader: StreamReader | None = None) -> None:
        began = time.monotonic()
        waiting = [asyncio.ensure_future(behaviour)]
        if reader is not None:
            waiting.append(asyncio.ensure_future(reader.read(1)))
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            self.held.append(time.monotonic() - began)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


LIE = b"HTTP/1.1 404 Not Found\r\nETag: a-lie\r\nContent-Length: 0\r\n\r\n"


def stray(data: bytes, pause: float | None) -> Behaviour:
    """Answers HEAD with a body, at once or so many seconds later. What asks for .../bad is gone."""

    async def behave(reader: StreamReader, writer: StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                path = path_of(await read_head(reader))
                status = b"HTTP/1.1 410 Gone\r\n" if path.endswith(b"/bad") else OK
                head = status + b"ETag: %b\r\nContent-Length: %d\r\n\r\n" % (path, len(data))
                if pause is None:
                    writer.write(head + data)
                    continue
                writer.write(head)
                await asyncio.sleep(pause)
                writer.write(data)

    return behave


def head_refused(status: bytes, rest: Behaviour) -> Behaviour:
    """Refuses HEAD; GET meets the rest."""

    async def behave(reader: StreamReader, writer: StreamWriter) -> None:
        head = await read_head(reader)
        if head.startswith(b"HEAD"):
            writer.write(b"HTTP/1.1 " + status + b"\r\nConnection: close\r\n" + EMPTY)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            return
        inner = StreamReader()
        inner.feed_data(head)
        await rest(inner, writer)

    return behave


DIRTY = (
    b"HTTP/1.1 200 \x1b[2J\xff\r\nContent-Type: a\x1b[31m\xffb\r\nETag: \x07\x08\x9b\r\nLast-Modified: a\tb\x7f\r\n"
    b"X: \x1b]0;x\x07\r\n" + EMPTY
)


def kinds(authority: Authority) -> list[Kind]:
    """Every kind that section E of the threat table lists."""
    found = [Kind(name, behave, ("unavailable", str(reason))) for name, (behave, reason) in ATTACKS.items()]
    for name, (behave, status) in HEADERS_ONLY.items():
        found.append(Kind(name, behave, AVAILABLE if status < 300 else ("unavailable", f"http_{status}")))
    for name, make in CERTIFICATES.items():
        context = tls(make(authority))
        found.append(Kind(f"65 {name}", well_behaved, ("unavailable", "tls_error"), tls=context, scheme="https"))
    found += [
        Kind("57 a handshake that never ends", mute, ("unavailable", "timeout"), scheme="https"),
        Kind("65 no TLS at all", _plain, ("unavailable", "tls_error"), scheme="https"),
        Kind("61 an answer as the body, at once", stray(LIE, None), GONE, whole=True),
        Kind("61 an answer as the body, late", stray(LIE, 0.001), GONE, whole=True),
        Kind("61 an answer as the body, later", stray(LIE, 0.005), GONE, whole=True),
        Kind("61 bytes as the body, late", stray(b"\xff\xd8\xff\xe0 JFIF" * 100, 0.001), GONE, whole=True),
        Kind("63 control characters", then_hold(DIRTY), AVAILABLE),
        # Unprintable characters are replaced before the redirect is followed: it leads to a path here.
        Kind(
            "63 in a Location",
            then_hold(b"HTTP/1.1 302 F\r\nLocation: /\x1b]0;x\x07\r\n", EMPTY),
            AVAILABLE,
        ),
        *(
            Kind(
                f"67 HEAD {status}, and a GET without end",
                head_refused(status.encode(), then_forever(OK + b"Content-Length: 9999999999\r\n\r\n", b"x" * 65536)),
                AVAILABLE,
            )
            for status in ("400 Bad", "403 Forbidden", "405 Not Allowed", "501 Not Implemented")
        ),
        Kind("67 HEAD 405, and a silent GET", head_refused(b"405 Not Allowed", mute), ("unavailable", "timeout")),
    ]
    return found


async def _plain(reader: StreamReader, writer: StreamWriter) -> None:
    await reader.read(1)
    writer.write(OK + EMPTY)
    await mute(reader, writer)


@dataclass
class Seen:
    """What became of the files of a kind. `late_ms` is from the start of each one's attempt to its verdict."""

    kind: Kind
    wrong: list[str] = field(default_factory=list)
    as_expected: int = 0
    healthy: int = 0
    total_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)


async def _meet(daemon: Daemon, kind: Kind, number: int, files: int, quiet: str, room: asyncio.Semaphore) -> Seen:
    """When there is room, post the kind's batch, wait for its verdict, and look at each file."""
    async with room, contextlib.AsyncExitStack() as stack:
        host = STRAY_HOST if kind.whole else "127.0.0.1"
        listener = socket.create_server((host, 0), backlog=1024)
        port = (await stack.enter_async_context(serving(kind.serve, listener=listener, tls=kind.tls))).port
        here, batch = f"{kind.scheme}://{host}:{port}", f"kind-{number}"
        entries = []
        for n in range(files * kind.share):
            path = f"/{number}/{n}"
            entries += [finished(f"{here}{path}/bad"), finished(f"{quiet}{path}/quiet")]
            entries += [finished(f"{here}{path}/good")] * kind.mixed
        await daemon.deliver(batch, entries)
        await daemon.verdict(batch, seconds=PATIENCE)
    rows = daemon.files(batch)
    seen = Seen(kind)
    for url, row in rows.items():
        path = "/" + url.split("/", 3)[3]
        end = row["state"], row["reason"]
        if path.endswith("/bad"):
            _look_at_bad(daemon, seen, path, row, end)
        elif end == AVAILABLE and (row["http_status"], row["etag"]) == (200, path):
            seen.healthy += 1
        else:
            seen.wrong.append(f"{kind.name}: {path}: {end}, {row['http_status']}, {row['etag']}")
    return seen


def _look_at_bad(daemon: Daemon, seen: Seen, path: str, row: sqlite3.Row, end: End) -> None:
    attempts = daemon.attempts(row)
    foreign = row["etag"] not in (None, path) and seen.kind.whole
    if end == seen.kind.end and not foreign and attempts:
        seen.as_expected += 1
    else:
        seen.wrong.append(
            f"{seen.kind.name}: {path}: {end}, {row['http_status']}, {row['etag']}, {len(attempts)} asked"
        )
    if attempts:
        seen.total_ms.append(sum(attempt["total_ms"] for attempt in attempts))
        seen.late_ms.append(row["verified_at"] - attempts[0]["started_at"])


def stored_texts(daemon: Daemon) -> list[str]:
    """Every text in the tables that the daemon fills with what it found, and in its log."""
    texts = [str(value) for line in daemon.lines for value in line.values()]
    for table in ("file", "attempt", "batch"):
        texts += [value for row in daemon.sql(f"SELECT * FROM {table}") for value in row if isinstance(value, str)]
    return texts


def _has_controls(text: str) -> bool:
    return any(unicodedata.category(char) == "Cc" for char in text)


async def run(setting: Setting) -> list[Figure]:
    """Have 20 files of each kind asked for at scale 1, and twice as many healthy ones."""
    files = setting.times(FILES)
    authority = Authority(setting.work)
    hostile = kinds(authority)
    settings: dict[str, Any] = {
        "timeout": f"{TIMEOUT}s",
        "connect_timeout": f"{CONNECT_TIMEOUT}s",
        "retry_schedule": [],
        "concurrency": 400,
        "allowed_networks": ["127.0.0.0/8"],
        "ca_file": str(authority.ca_file),
        "hosts": {STRAY_HOST: {"per_host_concurrency": STRAY_CONNECTIONS}},
    }
    async with (
        serving(well_behaved) as quiet,
        Daemon(setting.work / "daemon", {"verify": settings}) as daemon,
    ):
        probers = daemon.prober_pids()
        began = time.monotonic()
        room = asyncio.Semaphore(KINDS)
        seen = await asyncio.gather(
            *(_meet(daemon, kind, number, files, quiet.url, room) for number, kind in enumerate(hostile))
        )
        seconds = time.monotonic() - began
        texts = stored_texts(daemon)
        strays = daemon.count("host mixes up answers on one connection: each is used for one request")
        survived = daemon.prober_pids() == probers and await daemon.terminate() == 0
    for line in [line for each in seen for line in each.wrong][:20]:
        print(ascii(line), file=sys.stderr)
    return _figures(seen, files, seconds, texts, strays, survived)


def _figures(
    seen: Sequence[Seen], files: int, seconds: float, texts: Sequence[str], strays: int, survived: bool
) -> list[Figure]:
    bad = sum(files * each.kind.share for each in seen)
    healthy = sum(files * each.kind.share * (1 + each.kind.mixed) for each in seen)
    found = sum(each.healthy for each in seen)
    ended = sum(each.as_expected for each in seen)
    # A request that has met its origin is counted there, the healthy ones of whole connections aside.
    unmet = sum(not each.kind.whole and each.kind.met < files for each in seen if each.kind.tls is None)
    # By the requests' own times, by the daemon's clock from the first request to the verdict, and by the origin's.
    total = max((ms for each in seen for ms in each.total_ms), default=0.0) / 1000
    late = max((ms for each in seen for ms in each.late_ms), default=0.0) / 1000
    held = max((hold for each in seen for hold in each.kind.held if not each.kind.whole), default=0.0)
    slow = sum(ms > TIMEOUT * 1000 * 0.95 for each in seen for ms in each.total_ms)
    dirty = sum(map(_has_controls, texts))
    cleaned = sum("\ufffd" in text for text in texts)
    return [
        Figure(
            "hostile files ended with their kind's reason and a record of each attempt",
            f"all of {bad:,}, of {len(seen)} kinds",
            f"{ended:,} in {seconds:.0f} s",
            ended == bad and unmet == 0 and survived,
            {
                "kinds": len(seen),
                "files": bad,
                "as_expected": ended,
                "kinds_not_met": unmet,
                "prober_survived": survived,
            },
        ),
        Figure(
            "longest that a slot was held",
            f"at most {2 * TIMEOUT + SLACK:.1f} s",
            f"{late:.2f} s by the record, {held:.2f} s at the origin",
            # HEAD takes one time-out, and the GET at the end of the last attempt another.
            max(total, held, late) <= 2 * TIMEOUT + SLACK and slow > 0,
            {"attempt_seconds": total, "to_record_seconds": late, "origin_seconds": held, "timed_out": slow},
        ),
        Figure(
            "healthy files among them available, each with its own ETag",
            f"all of {healthy:,}",
            f"{found:,}",
            # The stray answers were there to be taken for theirs.
            found == healthy and strays > 0,
            {"files": healthy, "available": found, "hosts_caught_with_stray_answers": strays},
        ),
        Figure(
            "texts stored or logged with control characters",
            "0",
            f"{dirty} of {len(texts):,}, {cleaned} cleaned",
            dirty == 0 and cleaned >= files,
            {"texts": len(texts), "with_controls": dirty, "cleaned": cleaned},
        ),
    ]
