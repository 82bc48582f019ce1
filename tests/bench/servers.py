"""What the benchmarks run: the daemon, its peers and an origin, each a real process on loopback that is always
stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

START_SECONDS = 20.0
TICKS = os.sysconf("SC_CLK_TCK")


class MissingToolError(Exception):
    """A program that a benchmark needs is not installed."""


def tool(name: str) -> str:
    """The path of a program, looked up where Debian puts them."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise MissingToolError(f"{name} is not installed: `apt-get install {name}`, or run `make bench` as root")
    return path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its children that are alive, in seconds."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(stat.parent.name) == pid or int(fields[1]) == pid:
                total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def resident_mib(pid: int) -> float:
    """Resident memory of a process and its children, in MiB."""
    pages = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(stat.parent.name) == pid or int(fields[1]) == pid:
                pages += int(fields[21])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def running(
    command: Sequence[str], port: int, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a process, from when it accepts connections at `port` until the block is left."""
    process = subprocess.Popen(command, env={**os.environ, **(environment or {})})
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start")
            time.sleep(0.02)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def daemon(store: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The daemon on `store`, with loopback allowed and keys given as `section__key`; its process and port."""
    port = free_port()
    keys = {
        "server__port": str(port),
        "store__url": f"sqlite:///{store}",
        "verify__allowed_networks": "127.0.0.0/8",
        "verify__allowed_ports": "[]",
        "log__level": "error",
        **settings,
    }
    environment = {f"NOTIFY_SERVER__{name.upper()}": value for name, value in keys.items()}
    command = [sys.executable, "-m", "notify_server"]
    with running(command, port, environment) as process:
        yield process, port


@contextlib.contextmanager
def bare_aiohttp() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The limit: an aiohttp handler that reads and checks the notification, and keeps nothing."""
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.bare_aiohttp", str(port)]
    with running(command, port) as process:
        yield process, port


@contextlib.contextmanager
def nginx(directory: Path) -> Iterator[int]:
    """An origin that answers 200 to everything, with one worker."""
    port = free_port()
    config = directory / "nginx.conf"
    config.write_text(
        f"worker_processes 1; daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log crit;\n"
        "events { worker_connections 4096; }\n"
        f"http {{ access_log off; keepalive_requests 100000000; server {{ listen 127.0.0.1:{port} backlog=4096; "
        'location / { default_type image/jpeg; add_header ETag "\\"0123456789abcdef\\""; return 200 "picture"; } } }\n'
    )
    with running([tool("nginx"), "-c", str(config), "-p", str(directory)], port):
        yield port
