"""Several probers: which of them asks what."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from tests.support.daemon import Daemon
from tests.support.origin import Answer, Origin

HOSTS = 6
FILES = 30


def sockets(pid: int) -> int:
    """How many sockets a process has open."""
    return sum(str(entry.readlink()).startswith("socket:") for entry in Path(f"/proc/{pid}/fd").iterdir())


async def test_a_host_stays_with_the_prober_that_has_its_connection(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        origins = [await stack.enter_async_context(Origin()) for _ in range(HOSTS)]
        daemon = await stack.enter_async_context(
            Daemon(tmp_path, {"verify": {"processes": 2, "per_host_concurrency": 1}})
        )
        await daemon.deliver("b", [origin.url(f"/{number}") for number in range(FILES) for origin in origins])
        await daemon.verdict("b")
        assert [(len(origin.hits), origin.connections) for origin in origins] == [(FILES, 1)] * HOSTS


async def test_one_host_keeps_both_probers_busy(tmp_path: Path) -> None:
    async with (
        Origin() as origin,
        Daemon(tmp_path, {"verify": {"processes": 2, "per_host_concurrency": 64}}) as daemon,
    ):
        gate = asyncio.Event()
        origin.default = Answer(gate=gate)
        await daemon.deliver("b", [origin.url(f"/{number}") for number in range(200)])
        await origin.reached(64)
        # Each has a few of its own, too.
        assert min(sockets(pid) for pid in daemon.prober_pids()) >= 20
        gate.set()
        await daemon.verdict("b")
