"""Memory that a sender could make the daemon take: bodies that are refused, pipelined, or never end."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path

from tests.support.daemon import Daemon
from tests.support.notification import batch_body

MEBIBYTE = 1024**2
LIMIT_MIB = 350


def peak_mib(daemon: Daemon) -> int:
    """Return the sum of the highest resident sizes that the daemon's processes have had, each at its own time."""
    statuses = [
        Path(f"/proc/{pid}/status").read_text() for pid in (daemon.pid, daemon.keeper_pid(), *daemon.prober_pids())
    ]
    return sum(int(size) for status in statuses for size in re.findall(r"VmHWM:\s+(\d+) kB", status)) // 1024


async def connect(daemon: Daemon) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    port = int(daemon.callback.rpartition(":")[2].partition("/")[0])
    return await asyncio.open_connection("127.0.0.1", port)


async def test_large_bodies_that_are_refused_do_not_stay_in_memory(tmp_path: Path) -> None:
    """Row 116."""
    garbage = b"[" + b" " * (8 * MEBIBYTE - 2) + b"]"
    unsigned = batch_body("b", []).ljust(8 * MEBIBYTE)
    async with Daemon(tmp_path) as daemon:
        for _ in range(20):
            assert (await daemon.post(garbage)).status == 400
        assert (await daemon.post(unsigned)).status == 200
        assert peak_mib(daemon) < LIMIT_MIB


async def test_refused_requests_that_are_pipelined_do_not_pile_up(tmp_path: Path) -> None:
    """Row 117."""
    request = b"POST /notify HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
    number = MEBIBYTE // 4 // len(request)
    async with Daemon(tmp_path, {"auth": {"callback_token": "a-token-for-the-test"}}) as daemon:

        async def flood() -> int:
            reader, writer = await connect(daemon)
            answers = 0

            async def count() -> None:
                nonlocal answers
                while answers < number:
                    answers += (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401")
                    await reader.readuntil(b"}")

            counting = asyncio.create_task(count())
            writer.write(request * number)
            await writer.drain()
            await counting
            writer.close()
            return answers

        assert await asyncio.gather(*(flood() for _ in range(2))) == [number] * 2
        assert peak_mib(daemon) < LIMIT_MIB


async def test_unfinished_bodies_have_one_budget_and_honest_callers_are_served(tmp_path: Path) -> None:
    """Row 118."""
    head = b"POST /notify HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    part = b" " * (8 * MEBIBYTE - 1)
    async with Daemon(tmp_path) as daemon:
        answers: list[bytes] = []

        async def hold() -> None:
            reader, writer = await connect(daemon)
            try:
                writer.write(head % (8 * MEBIBYTE) + part)
                answers.append(await reader.readuntil(b"\r\n\r\n"))
            finally:
                writer.transport.abort()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

        held = [asyncio.create_task(hold()) for _ in range(25)]
        # Ten of them fit into the budget; the others are refused, and can read why.
        while sum(answer.startswith(b"HTTP/1.1 503") for answer in answers) < 15:
            await asyncio.sleep(0.01)
            assert (await daemon.post(batch_body("honest", []))).status == 200
        assert all(b"Retry-After: " in answer for answer in answers)
        assert peak_mib(daemon) < LIMIT_MIB
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)


async def test_large_bodies_that_end_at_the_same_time_are_acked_or_refused_within_the_memory(tmp_path: Path) -> None:
    """Row 118: on their way to the record they are in memory several times."""
    head = b"POST /notify HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (8 * MEBIBYTE)
    good = batch_body("b", []).ljust(8 * MEBIBYTE)
    bad = b"[" + b" " * (8 * MEBIBYTE - 2) + b"]"
    async with Daemon(tmp_path) as daemon:
        connections = [await connect(daemon) for _ in range(10)]
        for number, (_, writer) in enumerate(connections):
            writer.write(head + (good if number % 2 else bad)[:-1])
            await writer.drain()
        for number, (_, writer) in enumerate(connections):
            writer.write((good if number % 2 else bad)[-1:])
        statuses = [(await reader.readline()).split()[1] for reader, _ in connections]
        assert statuses == [b"400", b"200"] * 5
        for _, writer in connections:
            writer.close()
        assert peak_mib(daemon) < LIMIT_MIB
