"""The types of `doctor`'s checks, and the findings that both stores share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from notify_server.config import Config

ASK_SECONDS = 3.0
MEBIBYTE = 1024**2
# The share of backlog_limit that is worth a warning.
BACKLOG_SHARE = 0.8


class Level(StrEnum):
    """The severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(NamedTuple):
    """The result of a check, and the remedy if one is needed. Each is one line."""

    check: str
    level: Level
    text: str
    remedy: str | None = None


def ok(check: str, text: str) -> Finding:
    return Finding(check, Level.OK, text)


def warning(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, Level.WARNING, text, remedy)


def problem(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, Level.PROBLEM, text, remedy)


@dataclass(frozen=True)
class Subject:
    """The subject of the checks: the configuration, the file it came from, and a host whose name must resolve."""

    config: Config
    file: Path | None
    host: str | None


Check = Callable[[], Iterable[Finding]]


def schema_finding(version: int, known: int) -> Finding:
    """Return the finding about a schema version, for a program that knows `known` versions."""
    if version > known:
        return problem(
            "schema",
            f"version {version}, this program knows {known}",
            "run the newer notify_server that wrote it, or restore a backup from before the upgrade",
        )
    if version < known:
        return warning("schema", f"version {version} of {known}", "run `notify-server migrate`, or start the server")
    return ok("schema", f"version {version}, the latest")


def backlog_finding(backlog: int, limit: int) -> Finding:
    """Return the finding about the number of waiting files."""
    text = f"{backlog:,} files wait, of {limit:,} that may"
    if backlog >= limit:
        return problem(
            "backlog",
            f"{text}: callbacks are answered 503",
            "start the server, or raise [verify] concurrency or backlog_limit",
        )
    if backlog >= BACKLOG_SHARE * limit:
        return warning("backlog", text, "raise [verify] concurrency or backlog_limit")
    return ok("backlog", text)


def in_mebibytes(size: int) -> str:
    return f"{size / 1024**3:,.1f} GiB" if size >= 1024**3 else f"{size / MEBIBYTE:,.1f} MiB"
