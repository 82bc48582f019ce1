"""`make torture`: what the daemon promises, put to the test for minutes, and a table of what was seen.

Every figure says what was wanted of it. The exit status is 1 when one of them is not met.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import platform
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp
import pycurl
import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.torture.figures import Figure, Setting

Run = Callable[[Setting], Awaitable[list[Figure]]]

PARTS = {
    name: f"tests.torture.{name}"
    for name in (
        "crash",
        "fsync",
        "stop",
        "hang",
        "nodes",
        "soak",
        "fuzz",
        "flood",
        "addresses",
        "slow",
        "origins",
        "dead_host",
        "forward",
        "paced",
        "expect",
    )
}
# What a part may take at most: so much whatever its scale, and three times what the longest is meant to take.
LEAST_SECONDS = 120.0
SCALED_SECONDS = 900.0


@dataclass(frozen=True)
class Part:
    """A part that was run, for how many seconds, and what it gave."""

    name: str
    seconds: float
    figures: Sequence[Figure] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether it showed something, and all of that was as wanted."""
        return bool(self.figures) and all(figure.met for figure in self.figures)


def load(name: str) -> Run:
    """The part's function, imported only now: what one part needs, others do without."""
    run: Run = importlib.import_module(PARTS[name]).run
    return run


async def run_part(name: str, run: Run, seed: int, scale: float) -> Part:
    """Run a part in a directory of its own. What it raises, and that it did not end in time, is its figure."""
    began = time.monotonic()
    seconds = LEAST_SECONDS + SCALED_SECONDS * scale
    try:
        with tempfile.TemporaryDirectory(prefix=f"notify-torture-{name}-") as directory:
            async with asyncio.timeout(seconds) as deadline:
                figures = await run(Setting(seed, scale, Path(directory)))
    # A part that needs root skips itself, as a test; here that is a figure that was not had.
    except (Exception, pytest.skip.Exception) as error:
        traceback.print_exc()
        text = f"not within {seconds:,.0f} s" if deadline.expired() else f"{type(error).__name__}: {error}"
        figures = [Figure("the part itself", "runs to its end", text, met=False)]
    return Part(name, time.monotonic() - began, figures)


def about(seed: int, scale: float) -> dict[str, str | int | float]:
    """What was run, and on what."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return {
        "commit": commit + ("+changes" if git("status", "--porcelain") else ""),
        "seed": seed,
        "scale": scale,
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        "libcurl": str(pycurl.version_info()[1]),
        "aiohttp": aiohttp.__version__,
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
    }


def table(parts: Sequence[Part]) -> Table:
    """Every figure of every part."""
    rendered = Table()
    for column in ("part", "figure", "wanted", "seen", "met"):
        rendered.add_column(column, overflow="fold")
    for part in parts:
        for place, figure in enumerate(part.figures):
            cells = (part.name if not place else "", figure.name, figure.wanted, figure.seen)
            rendered.add_row(
                *(escape(cell) for cell in cells),
                "yes" if figure.met else "[bold red]NO",
                end_section=place == len(part.figures) - 1,
            )
    return rendered


def report(
    console: Console, parts: Sequence[Part], setting: Mapping[str, str | int | float], path: Path | None = None
) -> int:
    """Print the line and the table, write them as JSON when there is a path; the exit status."""
    console.print(", ".join(f"{name} {value}" for name, value in setting.items()), highlight=False, soft_wrap=True)
    console.print(table(parts))
    if path is not None:
        path.write_text(json.dumps({**setting, "parts": [asdict(part) for part in parts]}, indent=2), encoding="utf-8")
    return 0 if all(part.met for part in parts) else 1


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments. Exits 2 when they are invalid."""
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all when none is named")
    parser.add_argument("--seed", type=int, help="to draw the same again; it decides no race")
    parser.add_argument("--scale", type=float, default=1.0, help="of rounds, bodies and seconds; 1 takes 20 minutes")
    parser.add_argument("--json", type=Path, help="write the figures there, with the raw counts")
    options = parser.parse_args(given)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)} (there are {', '.join(PARTS)})")
    if not options.scale > 0:
        parser.error("--scale: must be above 0")
    return options


def main(given: Sequence[str]) -> int:
    options = arguments(given)
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    # In a file or a pipe, lines are as long as they need to be read.
    console = Console(width=None if sys.stdout.isatty() else 140)
    parts: list[Part] = []
    for name in options.parts or PARTS:
        console.print(f"{name} …", highlight=False)

        async def run(setting: Setting, name: str = name) -> list[Figure]:
            return await load(name)(setting)

        part = asyncio.run(run_part(name, run, seed, options.scale))
        parts.append(part)
        console.print(f"{name}: {part.seconds:.0f} s{'' if part.met else ', NOT MET'}", highlight=False)
    return report(console, parts, about(seed, options.scale), options.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
