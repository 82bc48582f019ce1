"""What the dead host's measure stands on, without the measuring."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from tests.support.daemon import Daemon
from tests.support.netns import Network
from tests.support.origin import Answer, Origin
from tests.support.waiting import Bell
from tests.torture.dead_host import CONFIG, LIVING, PORT, dead_urls, living_urls

CONCURRENCY = 128
A_HOST = 32


async def test_a_dead_host_takes_the_slots_of_one_host_and_no_more(tmp_path: Path) -> None:
    """Row 54."""
    gate = asyncio.Event()
    patient = {"connect_timeout": "20s", "concurrency": CONCURRENCY, "per_host_concurrency": A_HOST}
    async with Network(*LIVING) as network, contextlib.AsyncExitStack() as stack:
        origins = [await stack.enter_async_context(Origin(host, PORT)) for host in LIVING]
        bell = Bell()
        for origin in origins:
            origin.default = Answer(gate=gate)
            origin.bell = bell
        async with Daemon(tmp_path, {"verify": CONFIG["verify"] | patient}, prefix=network.prefix) as daemon:
            await daemon.deliver("dead", dead_urls(5000))
            await daemon.deliver("living", living_urls("living", 1000))
            # No host has answered yet, so all of them together have half of the slots, the dead one among them.
            await bell.until(lambda: sum(origin.busy for origin in origins) >= CONCURRENCY // 2 - A_HOST)
            gate.set()
            assert (await daemon.verdict("living"))["verdict"] == "complete"
            assert daemon.value("SELECT count(*) FROM file WHERE state = 'pending' AND attempts = 0") == 5000


async def test_a_host_that_refuses_is_asked_seldom_and_the_others_go_on(tmp_path: Path) -> None:
    """Row 54."""
    async with Network(*LIVING, "93.184.216.200") as network, contextlib.AsyncExitStack() as stack:
        for host in LIVING:
            await stack.enter_async_context(Origin(host, PORT))
        async with Daemon(tmp_path, CONFIG, prefix=network.prefix) as daemon:
            await daemon.deliver("dead", dead_urls(5000))
            await daemon.line("host does not answer, its files wait")
            await daemon.deliver("living", living_urls("living", 1000))
            assert (await daemon.verdict("living"))["verdict"] == "complete"
            # What an open circuit delays spends no attempt.
            assert daemon.value("SELECT count(*) FROM file WHERE state = 'pending' AND attempts = 0") > 2500
