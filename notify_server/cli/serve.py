"""`notify-server serve`, also the default without a command: runs the daemon in the foreground."""

from __future__ import annotations

import notify_server.lean.structlog  # noqa: F401

# isort: split
import asyncio
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import uvloop

from notify_server.cli.common import EXIT_FAILED, read_config
from notify_server.config import Config, load_config
from notify_server.errors import NotifyServerError
from notify_server.serve import Reload, serve
from notify_server.supervise import freeze_gc
from notify_server.telemetry.logging import set_up_logging


def run(config_path: Path | None) -> None:
    """Serve until SIGTERM or SIGINT. Exits 1 with one line when it cannot start."""
    config = read_config(config_path)
    set_up_logging(config.log, background=True)
    freeze_gc()
    try:
        uvloop.run(_serve(config, partial(load_config, config_path)))
    except NotifyServerError as error:
        print(f"notify_server: {error}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None


async def _serve(config: Config, load: Callable[[], Config]) -> None:
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    await serve(config, stop, Reload(reload, load))
