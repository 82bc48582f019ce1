"""Hosts that bear 50, 200 and 1,000 requests a second and refuse the others, beside a healthy one (row 96)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from tests.support.daemon import Daemon
from tests.support.origin import Answer, Limited, Origin
from tests.torture.figures import Figure, Setting

RATES = (50, 200, 1000)
FILES = 2000
HEALTHY_FILES = 12_000
# Answers take so long that the healthy host's slots are scarce, and not this machine's processors.
ANSWER_SECONDS = 0.05
REFUSALS = (Answer(429), Answer(429, {"Retry-After": "1"}), Answer(503, {"Retry-After": "1"}))
# Beyond twice what a host bears: the start of the daemon's claims and the last rest.
SLACK_SECONDS = 3.0
# One attempt that counts and no retry within the run: a refusal that is charged shows.
CONFIG = {"verify": {"retry_schedule": ["1h"]}}


async def seconds_of(daemon: Daemon, origin: Origin, name: str, files: int) -> float:
    """Deliver files of an origin, and return the seconds until all of them are found."""
    began = time.monotonic()
    batches = [f"{name}-{first}" for first in range(0, files, 5000)]
    for number, batch in enumerate(batches):
        first = number * 5000
        await daemon.deliver(batch, [origin.url(f"/{name}/{each}") for each in range(first, min(first + 5000, files))])
    for batch in batches:
        verdict = await daemon.verdict(batch, seconds=600)
        assert verdict["verdict"] == "complete", verdict
    return time.monotonic() - began


async def healthy_alone(work: Path, files: int) -> float:
    """Return the healthy host's files a second without others beside it."""
    async with Origin("127.0.0.9") as healthy, Daemon(work, CONFIG) as daemon:
        healthy.default = Answer(delay=ANSWER_SECONDS)
        return files / await seconds_of(daemon, healthy, "alone", files)


async def run(setting: Setting) -> list[Figure]:
    """Deliver everything at the same time, and time each host."""
    files, healthy_files = setting.times(FILES), setting.times(HEALTHY_FILES)
    alone = await healthy_alone(setting.work / "alone", healthy_files)
    async with contextlib.AsyncExitStack() as stack:
        healthy = await stack.enter_async_context(Origin("127.0.0.9"))
        healthy.default = Answer(delay=ANSWER_SECONDS)
        origins: dict[int, Origin] = {}
        for number, rate in enumerate(RATES):
            origin = origins[rate] = await stack.enter_async_context(Origin(f"127.0.0.{number + 2}"))
            origin.default = Limited(rate, REFUSALS[number])
        daemon = await stack.enter_async_context(Daemon(setting.work / "paced", CONFIG))
        healthy_seconds, *seconds = await asyncio.gather(
            seconds_of(daemon, healthy, "healthy", healthy_files),
            *(seconds_of(daemon, origin, f"paced-{rate}", files) for rate, origin in origins.items()),
        )
        spent = daemon.value("SELECT count(*) FROM file WHERE attempts > 1 OR state <> 'available'")
    figures = [
        Figure(
            f"seconds for {files:,} files of a host that bears {rate} a second",
            f"all found, within twice what it bears and {SLACK_SECONDS:.0f} s",
            f"{took:.1f} of {files / rate:.1f}",
            took <= 2 * files / rate + SLACK_SECONDS,
            {"files": files, "rate": rate, "seconds": took},
        )
        for rate, took in zip(RATES, seconds, strict=True)
    ]
    beside = healthy_files / healthy_seconds
    return [
        *figures,
        Figure("files that a refusal was charged to", "0", f"{spent}", spent == 0, {"charged": spent}),
        Figure(
            "files/s of the healthy host beside them",
            "0.8 of its speed alone",
            f"{beside:,.0f} of {alone:,.0f} ({beside / alone:.0%})",
            beside >= 0.8 * alone,
            {"alone": alone, "beside": beside},
        ),
    ]
