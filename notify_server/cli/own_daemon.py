"""Runs a daemon for one simulation, in a directory of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from notify_server.config import ENV_PREFIX
from notify_server.processes.worker import end_with_parent
from notify_server.simulator.platform import SimulationError

T = TypeVar("T")

START_SECONDS = 30.0
# What the daemon logs with an address: for callbacks, and to open the dashboard at (notify_server/serve.py).
READY = '"ready for notifications"'
LOG_IN = "open the dashboard with this address"
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Daemon:
    """A daemon to play against. `tls` is aiohttp's `ssl`."""

    url: str
    record: Path
    token: str | None = None
    tls: ssl.SSLContext | bool = True


@contextlib.asynccontextmanager
async def own_daemon(
    directory: Path, slow_seconds: float, forward: Sequence[Mapping[str, Any]] = ()
) -> AsyncIterator[tuple[Daemon, asyncio.subprocess.Process]]:
    """Run a daemon on a free port, with configuration, record and log in `directory`; stop it by SIGTERM at the end.
    `forward` has its `[[forward]]` tables.

    Raises SimulationError when it does not start or does not stop properly.
    """
    config, record, log_path = _prepare(directory, slow_seconds, forward)
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "notify_server", "--config", str(config)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Killed, this program cannot stop the daemon.
            preexec_fn=partial(end_with_parent, signal.SIGTERM),
            env={name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)},
        )
    try:
        yield Daemon(await logged_url(process, log_path, READY), record), process
    except BaseException:
        await _stop(process)
        raise
    if (code := await _stop(process)) != 0:
        raise SimulationError(f"the daemon ended with exit code {code}: see {log_path}")


def _prepare(directory: Path, slow_seconds: float, forward: Sequence[Mapping[str, Any]]) -> tuple[Path, Path, Path]:
    """Prepare the directory; return the paths of configuration, record and log, the latter empty."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory = directory.resolve()
        config, record, log = (directory / name for name in ("config.toml", "notify.db", "daemon.log"))
        config.write_text(_own_config(record, slow_seconds, forward), encoding="utf-8")
        log.write_bytes(b"")
    except OSError as error:
        raise SimulationError(f"{directory}: cannot be used ({error.strerror}): name another with --keep") from error
    return config, record, log


def _own_config(record: Path, slow_seconds: float, forward: Sequence[Mapping[str, Any]]) -> str:
    # JSON's strings are valid TOML, except for characters that no terminal lets one type.
    return f"""\
[server]
port = 0
shutdown_grace = "{GRACE_SECONDS}s"
[store]
url = {json.dumps(f"sqlite:///{record}", ensure_ascii=False)}
[verify]
allowed_networks = ["127.0.0.0/8"]
allowed_ports = []
retry_schedule = ["500ms", "1s", "1s"]
timeout = "{slow_seconds + 10:.3f}s"
[log]
format = "json"
{"".join(_table(table) for table in forward)}"""


def _table(table: Mapping[str, Any]) -> str:
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in table.items()]
    return "".join(["[[forward]]\n", *lines])


async def logged_url(process: asyncio.subprocess.Process, log: Path, event: str) -> str:
    """Wait until the daemon's log has the event, and return its `url`. Raises SimulationError."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + START_SECONDS
    while clock() < deadline:
        exited = process.returncode is not None
        lines = _whole_lines(log)
        for line in lines:
            if event in line:
                return str(msgspec.json.decode(line)["url"])
        if exited:
            raise SimulationError(f"the daemon does not start: {lines[-1] if lines else 'the log is empty'}")
        await asyncio.sleep(0.02)
    raise SimulationError(f"the daemon is not ready after {START_SECONDS:g} seconds: see {log}")


def _whole_lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


async def while_alive(process: asyncio.subprocess.Process, work: Coroutine[Any, Any, T], directory: Path) -> T:
    """Run the coroutine; raise SimulationError as soon as the daemon ends."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise SimulationError(f"the daemon has ended during the run: see {directory / 'daemon.log'}")
        return await working
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _stop(process: asyncio.subprocess.Process) -> int:
    """Send SIGTERM, and SIGKILL if it does not end in time; return the exit code."""
    try:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        async with asyncio.timeout(2 * GRACE_SECONDS):
            return await process.wait()
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        code = await process.wait()
        if isinstance(error, TimeoutError):
            return code
        raise
