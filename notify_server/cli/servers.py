"""Finds the servers that run on this machine: a command that finds another configuration looks at another record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class RunningServer(NamedTuple):
    """A server process: its configuration file as it was named, and its working directory, None where unknown."""

    pid: int
    config: str | None
    directory: str | None

    @property
    def advice(self) -> str:
        """One line: that it runs, and how to look at its record."""
        start = f"`cd {self.directory}`" if self.directory else "change to its working directory"
        with_config = f" with --config {self.config}" if self.config else ""
        return f"process {self.pid} is a server: to see its record, {start} and run this again{with_config}"


def running_servers() -> list[RunningServer]:
    """Return the servers on this machine but those that another Python program runs for itself, such as `demo`."""
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdecimal() and (config := _serves(_arguments(entry))) is not None:
            parent = _arguments(PROC / _parent(entry))
            if not _is_python(parent) and not _is_program(parent):
                found.append(RunningServer(int(entry.name), config or None, _directory(entry)))
    return sorted(found)


def _arguments(process: Path) -> list[str]:
    try:
        return (process / "cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _parent(process: Path) -> str:
    try:
        lines = (process / "status").read_text("utf-8", "replace").splitlines()
    except OSError:
        return "0"
    return next((line.split()[1] for line in lines if line.startswith("PPid:")), "0")


def _directory(process: Path) -> str | None:
    try:
        return str((process / "cwd").readlink())
    except OSError:
        return None  # The process of another user.


def _is_python(arguments: list[str]) -> bool:
    return bool(arguments) and Path(arguments[0]).name.startswith("python")


def _is_program(arguments: list[str]) -> bool:
    return bool(arguments) and Path(arguments[0]).name == "notify-server"


def _serves(arguments: list[str]) -> str | None:
    """Return the `--config` of a command line that serves, "" without one; None when it does something else."""
    if _is_python(arguments):
        rest = _after_interpreter(arguments[1:])
    else:
        rest = arguments[1:] if _is_program(arguments) else None
    if rest is None:
        return None
    config, words = "", iter(rest)
    for word in words:
        if word == "--config":
            config = next(words, "")
        elif word.startswith("--config="):
            config = word.removeprefix("--config=")
        elif word != "serve":
            return None
    return config


def _after_interpreter(words: list[str]) -> list[str] | None:
    """Return what follows `-m notify_server` or the script `notify-server`, None for another program."""
    rest: Iterator[str] = iter(words)
    for word in rest:
        if word == "-m":
            return list(rest) if next(rest, "") == "notify_server" else None
        if not word.startswith("-"):
            return list(rest) if Path(word).name == "notify-server" else None
    return None
