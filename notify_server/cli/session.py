"""Runs a command on a record: opens the record, and turns errors into exit codes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from notify_server.cli.common import (
    EXIT_FAILED,
    EXIT_USAGE,
    VERBOSE,
    UsageError,
    config_file,
    read_config,
    until_signal,
)
from notify_server.cli.servers import running_servers
from notify_server.cli.source import NoRecordError, Source, reading
from notify_server.config import Config
from notify_server.errors import NotifyServerError

MAX_SERVERS = 3


def run(config_path: Path | None, url: str | None, work: Callable[[Config, Source], Awaitable[int]]) -> None:
    """Run `work` on the record and exit with the result. With --verbose, print which record it is."""
    config = read_config(config_path)
    # Informational messages of the store are for daemons; warnings and errors are shown.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger("warning"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )

    async def do() -> int:
        async with reading(config, url) as source:
            if VERBOSE.get():
                print(f"using {source.name}", file=sys.stderr)
            if not source.served:
                _name_other_servers(config, config_path, url)
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
        if isinstance(error, NoRecordError):
            _name_other_servers(config, config_path, url)
        code = EXIT_FAILED
    raise SystemExit(code)


def _name_other_servers(config: Config, config_path: Path | None, url: str | None) -> None:
    """Without a configuration that was named or is here, the record is perhaps not the one that was meant."""
    if config_file(config_path) is None and url is None and config.store == Config().store:
        for server in running_servers()[:MAX_SERVERS]:
            print(f"note: {server.advice}", file=sys.stderr)
