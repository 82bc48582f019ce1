"""Sends bodies of 8 MB, refusals in a pipeline and bodies without an end, and weighs all processes of the daemon.

Each wave is sent by many connections at the same time. Between the waves, and in them, honest callers are served.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.support.daemon import Daemon
from tests.support.notification import batch_body
from tests.torture.figures import Figure, Setting

MEBIBYTE = 1024**2
BODY = 8 * MEBIBYTE
CONNECTIONS = 40
ROUNDS = 5
PIPELINED = 20_000
SECONDS = 60.0
LIMIT_MIB = 350
HEAD = b"POST /notify HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n"

Send = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bytes]]


def peak_mib(daemon: Daemon) -> int:
    """Return the sum of the highest resident sizes that the daemon's processes have had, each at its own time."""
    statuses = [
        Path(f"/proc/{pid}/status").read_text() for pid in (daemon.pid, daemon.keeper_pid(), *daemon.prober_pids())
    ]
    return sum(int(size) for status in statuses for size in re.findall(r"VmHWM:\s+(\d+) kB", status)) // 1024


def whole(body: bytes) -> Send:
    """Send a body at once, and read the status line."""

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(HEAD % len(body) + body)
        return await reader.readline()

    return send


def unfinished(seconds: float) -> Send:
    """Send all of a body but its end, and read the status line if there is one within so many seconds."""

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(HEAD % BODY + b" " * (BODY - 1))
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(reader.readline(), seconds)
        return b""

    return send


async def pipelined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Send thousands of requests that are refused and read no answer but the first line."""
    writer.write((HEAD % 1 + b"{") * PIPELINED)
    return await reader.readline()


async def wave(daemon: Daemon, send: Send) -> list[bytes]:
    """Send by many connections at the same time; return the status lines, empty where the connection broke."""
    port = int(daemon.callback.rpartition(":")[2].partition("/")[0])

    async def one() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MEBIBYTE)
        try:
            return await asyncio.wait_for(send(reader, writer), SECONDS)
        except (ConnectionError, TimeoutError):
            return b""
        finally:
            writer.transport.abort()

    return await asyncio.gather(*(one() for _ in range(CONNECTIONS)))


async def run(setting: Setting) -> list[Figure]:
    """Send the waves in an order that is drawn, round after round."""
    chance = random.Random(setting.seed)
    good = batch_body("large", []).ljust(BODY)
    waves: list[Send] = [whole(good), whole(b"[" + b" " * (BODY - 2) + b"]"), unfinished(2.0), pipelined]
    answers: list[bytes] = []
    honest = refused = 0
    async with Daemon(setting.work, {"log": {"format": "json"}}) as daemon:
        for _ in range(setting.times(ROUNDS)):
            for send in chance.sample(waves, len(waves)):
                sending = asyncio.create_task(wave(daemon, send))
                while not sending.done():
                    honest += 1
                    refused += (await daemon.post(batch_body(f"honest-{honest}", []))).status != 200
                    await asyncio.sleep(0.05)
                answers += await sending
        peak = peak_mib(daemon)
    statuses = [line.split()[1] for line in answers if line]
    odd = [status for status in statuses if status not in (b"200", b"400", b"408", b"503")]
    return [
        Figure(
            "memory of all processes together, at their peaks",
            f"less than {LIMIT_MIB} MiB",
            f"{peak} MiB after {len(answers)} connections",
            peak < LIMIT_MIB,
            {"peak_mib": peak, "connections": len(answers)},
        ),
        Figure("answers other than an ack, a refusal or a 503", "0", f"{len(odd)}", not odd, {"odd": len(odd)}),
        Figure(
            "honest callers meanwhile",
            "all acked",
            f"{honest - refused:,} of {honest:,}",
            honest > 0 and refused == 0,
            {"honest": honest, "refused": refused},
        ),
    ]
