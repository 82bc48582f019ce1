"""`notify-server serve`, and no command at all: the daemon in the foreground."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import uvloop

from notify_server.app import serve
from notify_server.config import Config, load_config
from notify_server.errors import ConfigError, NotifyServerError
from notify_server.observe import set_up_logging

EXIT_FAILED = 1
EXIT_CONFIG = 2


def read_config(path: Path | None) -> Config:
    """The configuration, or exit 2 with a line on standard error for every wrong key."""
    try:
        return load_config(path)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        raise SystemExit(EXIT_CONFIG) from None


def run(config_path: Path | None) -> None:
    """Serve until SIGTERM or SIGINT. Exits 1 with one line when it cannot start."""
    config = read_config(config_path)
    set_up_logging(config.log)
    try:
        uvloop.run(_serve(config))
    except NotifyServerError as error:
        print(f"notify_server: {error}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None


async def _serve(config: Config) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(config, stop)
