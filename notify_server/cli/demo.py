"""`notify-server demo`: a server of its own with a record full of life, until it is stopped."""

from __future__ import annotations

import asyncio
import secrets
import sys
import tempfile
from pathlib import Path

import uvloop
from rich.console import Console
from rich.text import Text

from notify_server.cli.common import EXIT_FAILED, output, until_signal
from notify_server.cli.own_daemon import LOG_IN, Daemon, logged_url, own_daemon, while_alive
from notify_server.errors import NotifyServerError
from notify_server.simulator.object_store import ObjectStore
from notify_server.simulator.plan import Kind, Plan
from notify_server.simulator.platform import Platform
from notify_server.simulator.receiver import Behaviour, Receivers

SHARES = {Kind.MISSING: 0.02, Kind.SLOW: 0.05, Kind.REFUSES_HEAD: 0.1, Kind.FAILS_FIRST: 0.05, Kind.FAILED: 0.02}
SLOW_SECONDS = 1.0
# Batches that are posted before the address is shown, and files per batch.
FIRST_BATCHES, FILES = 40, 25
PAUSE_SECONDS = 4.0


def run(keep: Path | None) -> None:
    """Run until stopped. Exits 1 with one line when the server does not start or ends by itself."""
    stopped_by: list[int] = []
    code = 0
    try:
        uvloop.run(until_signal(play(keep or Path(tempfile.mkdtemp(prefix="notify-server-")), output()), stopped_by))
    except NotifyServerError as error:
        print(f"notify_server: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except asyncio.CancelledError:
        print("stopped", file=sys.stderr)
    raise SystemExit(code)


async def play(directory: Path, console: Console) -> None:
    """Post batches to a server in the directory until cancelled. Raises NotifyServerError."""
    async with (
        ObjectStore(slow_seconds=SLOW_SECONDS) as objects,
        Receivers([Behaviour.STEADY]) as receivers,
        own_daemon(directory, SLOW_SECONDS, receivers.tables()) as (daemon, process),
    ):
        await while_alive(process, _post(daemon, process, objects, directory, console), directory)


async def _post(
    daemon: Daemon, process: asyncio.subprocess.Process, objects: ObjectStore, directory: Path, console: Console
) -> None:
    await _deliver(daemon, objects, FIRST_BATCHES)
    address = await logged_url(process, directory / "daemon.log", LOG_IN)
    console.print("Open the dashboard; a new batch arrives every few seconds:\n")
    console.print(Text(f"    {address}\n", "bold cyan"), soft_wrap=True)
    console.print(Text(f"The database is {daemon.record}. Ctrl-C stops."), soft_wrap=True)
    sys.stdout.flush()
    while True:
        await asyncio.sleep(PAUSE_SECONDS)
        await _deliver(daemon, objects, 1)


async def _deliver(daemon: Daemon, objects: ObjectStore, batches: int) -> None:
    plan = Plan(seed=secrets.randbelow(2**31), batches=batches, files=FILES, shares=SHARES, redelivered=0.1)
    platform = Platform(plan)
    objects.plant(platform.files)
    await platform.deliver(daemon.url, objects.address, token=daemon.token, tls=daemon.tls)
