"""`make bench`: what the daemon does, side by side with what could be had at best and with what others do, in one run.

Peers take turns (A B A B …) and the median counts: ratios hold on a busy machine where absolute figures do not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, Protocol, cast

import aiohttp
import pycurl
from rich.console import Console

from notify_server.config import LogConfig
from notify_server.telemetry.logging import set_up_logging
from tests.bench.figures import MissingToolError, Outcome, Setting, show

PARTS = ("acks", "latency", "verdict", "probes", "together", "growth", "backlog", "dashboard", "postgres", "forward")


class Part(Protocol):
    """A module of this package that measures something."""

    def run(self, setting: Setting) -> Outcome:
        """Measure it."""


def load(name: str) -> Part:
    """The part's module, imported only now: what one part needs, others do without."""
    return cast("Part", importlib.import_module(f"tests.bench.{name}"))


def about(given: Sequence[str], work: Path) -> dict[str, str]:
    """What was run, on what, and how to do it again."""
    root = Path(__file__).parent

    def told(*command: str) -> str:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = told("git", "rev-parse", "--short", "HEAD") or "unknown"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": str(len(os.sched_getaffinity(0))),
        "model": " ".join(model.split()),
        "kernel": platform.release(),
        "files on": told("stat", "-f", "-c", "%T", str(work)),
        "commit": commit + ("+changes" if told("git", "status", "--porcelain") else ""),
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        "libcurl": str(pycurl.version_info()[1]),
        "aiohttp": aiohttp.__version__,
        "command": " ".join(["python -m tests.bench", *given]),
    }


def header(facts: Mapping[str, str]) -> str:
    """Return the facts about the run as one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def run_parts(console: Console, names: Sequence[str], *, quick: bool) -> tuple[dict[str, Outcome], bool]:
    """The parts, each in a directory of its own that is gone afterwards; and whether all of them came to their end."""
    outcomes = {}
    well = True
    for name in names:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"notify-bench-{name}-") as directory:

            def say(text: str, name: str = name) -> None:
                console.print(f"{name}: {text}", style="dim", highlight=False)

            try:
                outcomes[name] = load(name).run(Setting(Path(directory), quick, say))
            except Exception as error:
                # What the others measured in half an hour is not lost with it.
                say(f"FAILED: {error}")
                if not isinstance(error, MissingToolError):
                    traceback.print_exc()
                well = False
                continue
        show(console, outcomes[name])
        console.print(f"{name}: {time.monotonic() - began:.0f} s", style="dim", highlight=False)
    return outcomes, well


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments. Exits 2 when they are invalid."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all when none is named")
    parser.add_argument("--quick", action="store_true", help="one short round of everything, to see whether it runs")
    parser.add_argument("--json", type=Path, help="write the raw figures there")
    parser.add_argument("--plots", type=Path, help="draw them into this directory")
    parser.add_argument("--from", dest="source", type=Path, help="draw the figures of an earlier --json, run nothing")
    options = parser.parse_args(given)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)} (there are {', '.join(PARTS)})")
    if options.source and not options.plots:
        parser.error("--from: needs --plots")
    return options


def main(given: Sequence[str]) -> int:
    """Run the chosen parts; return the exit status."""
    options = arguments(given)
    # In a file or a pipe, lines are as long as they need to be read.
    console = Console(width=None if sys.stdout.isatty() else 140)
    well = True
    if options.source:
        results = json.loads(options.source.read_text(encoding="utf-8"))
    else:
        facts = about(given, Path(tempfile.gettempdir()))
        console.print(header(facts), highlight=False, soft_wrap=True)
        outcomes, well = run_parts(console, options.parts or PARTS, quick=options.quick)
        results = {"about": facts, "parts": {name: outcome.raw for name, outcome in outcomes.items()}}
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if options.plots:
        try:
            from tests.bench.plots import draw
        except ImportError as error:
            print(f"make bench: no plots: {error}", file=sys.stderr)
            return 1
        for path in draw(results, options.plots):
            console.print(f"drawn: {path}", highlight=False)
    return 0 if well else 1


def _stop(number: int, frame: object) -> NoReturn:
    # As an exception, so that every server is stopped and every directory removed.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    set_up_logging(LogConfig(level="error"))
    sys.exit(main(sys.argv[1:]))
