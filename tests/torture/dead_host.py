"""A dead host with 10,000 files beside living ones: how fast these go on (row 54)."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.netns import Network
from tests.support.origin import Answer, Origin
from tests.torture.figures import Figure, Setting

PORT = 8000
DEAD = "93.184.216.200"
LIVING = [f"93.184.216.{last}" for last in range(1, 9)]
DEAD_FILES = 10_000
LIVING_FILES = 12_000
# Answers take so long that slots are scarce, and not this machine's processors.
ANSWER_SECONDS = 0.05
# A machine's own addresses are private, and those of this network are; these stand for other machines'.
CONFIG = {"verify": {"allowed_networks": ["93.184.216.0/24"], "allowed_ports": [PORT]}}


def living_urls(batch: str, files: int) -> list[str]:
    """Addresses at the living hosts in turn."""
    return [f"http://{LIVING[number % len(LIVING)]}:{PORT}/{batch}/{number}" for number in range(files)]


def dead_urls(files: int) -> list[str]:
    """Addresses at the dead host."""
    return [f"http://{DEAD}:{PORT}/{number}" for number in range(files)]


async def files_a_second(work: Path, network: Network, files: int, dead_files: int) -> float:
    """How fast the living hosts' files are verified, delivered right after the dead host's."""
    async with Daemon(work, CONFIG, prefix=network.prefix) as daemon:
        if dead_files:
            await daemon.deliver("dead", dead_urls(dead_files))
        began = time.monotonic()
        batches = range(0, files, 5000)
        for first in batches:
            await daemon.deliver(f"living-{first}", living_urls(f"{first}", min(5000, files - first)))
        for first in batches:
            verdict = await daemon.verdict(f"living-{first}", seconds=300)
            assert verdict["verdict"] == "complete", verdict
        return files / (time.monotonic() - began)


async def run(setting: Setting) -> list[Figure]:
    """The living alone, then beside a host that keeps silent, then beside one that refuses."""
    files = setting.times(LIVING_FILES)
    async with contextlib.AsyncExitStack() as stack:
        try:
            network = await stack.enter_async_context(Network(*LIVING))
        except pytest.skip.Exception as error:
            raise PermissionError(str(error)) from None
        for host in LIVING:
            origin = await stack.enter_async_context(Origin(host, PORT))
            origin.default = Answer(delay=ANSWER_SECONDS)
        alone = await files_a_second(setting.work / "alone", network, files, 0)
        silent = await files_a_second(setting.work / "silent", network, files, DEAD_FILES)
        # The address exists now, without a listener.
        network.add(DEAD)
        refusing = await files_a_second(setting.work / "refusing", network, files, DEAD_FILES)
    return [
        Figure(
            f"files/s of living hosts beside {DEAD_FILES:,} files of one that {how}",
            "more than half of what they have alone",
            f"{rate:,.0f} of {alone:,.0f} ({rate / alone:.0%})",
            rate > alone / 2,
            {"files": files, "dead_files": DEAD_FILES, "alone": alone, "beside": rate},
        )
        for how, rate in (("keeps silent", silent), ("refuses", refusing))
    ]
