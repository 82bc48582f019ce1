"""What processes take: CPU time and memory of a process and all its descendants, from /proc."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

TICKS = os.sysconf("SC_CLK_TCK")
SAMPLE_SECONDS = 0.05


def _stat(path: Path) -> list[str]:
    # The command's name, in parentheses, may hold anything; the state and the parent follow it.
    return path.read_text().rpartition(")")[2].split()


def _seconds(fields: list[str]) -> float:
    return (int(fields[11]) + int(fields[12])) / TICKS


def tree(pid: int) -> Iterator[int]:
    """The process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(_stat(stat)[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += parents.get(parent, [])
    return iter(found)


def cpu_seconds(pid: int) -> float:
    """User and system time of the process and its descendants, those included that have ended and were waited for."""
    total = 0.0
    for member in tree(pid):
        with contextlib.suppress(OSError):
            fields = _stat(Path(f"/proc/{member}/stat"))
            total += _seconds(fields) + (int(fields[13]) + int(fields[14])) / TICKS
    return total


def threads(pid: int) -> dict[int, float]:
    """User and system time of each thread of the process, in seconds, by its id; the main thread has the process's."""
    found: dict[int, float] = {}
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            found[int(stat.parent.name)] = _seconds(_stat(stat))
    return found


def memory_mib(pid: int, field: str = "VmRSS") -> float:
    """Resident memory of the process and its descendants in MiB: now, or at its highest (`VmHWM`)."""
    total = 0
    for member in tree(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{member}/status").read_text().splitlines():
                if line.startswith(f"{field}:"):
                    total += int(line.split()[1])
    return total / 1024


class PeakMemory:
    """Watches a process that may end at any time: `mib` is the highest that it and its descendants came to.

    Not by the kernel's accounts of ended children: those begin with the memory of the process that started them.
    """

    def __init__(self, pid: int) -> None:
        self.mib = 0.0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.mib = max(self.mib, memory_mib(self._pid, "VmHWM"))
