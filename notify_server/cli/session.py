"""Runs a command on a record: opens the record, and turns errors into exit codes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from notify_server.cli.common import EXIT_FAILED, EXIT_USAGE, UsageError, read_config, until_signal
from notify_server.cli.source import Source, reading
from notify_server.config import Config
from notify_server.errors import NotifyServerError


def run(config_path: Path | None, url: str | None, work: Callable[[Config, Source], Awaitable[int]]) -> None:
    """Run `work` on the record, print on standard error which one that is, and exit with the result."""
    config = read_config(config_path)
    # Informational messages of the store are for daemons; warnings and errors are shown.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger("warning"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )

    async def do() -> int:
        async with reading(config, url) as source:
            print(f"reading {source.name}", file=sys.stderr)
            return await work(config, source)

    stopped_by: list[int] = []
    try:
        code = asyncio.run(until_signal(do(), stopped_by))
    except asyncio.CancelledError:
        code = 128 + stopped_by[0] if stopped_by else EXIT_FAILED
    except BrokenPipeError:
        # The reader has closed its end; there is nothing to flush either.
        sys.stdout = None
        code = EXIT_FAILED
    except UsageError as error:
        print(error, file=sys.stderr)
        code = EXIT_USAGE
    except (NotifyServerError, OSError) as error:
        print(f"notify_server: {error}", file=sys.stderr)
        code = EXIT_FAILED
    raise SystemExit(code)
