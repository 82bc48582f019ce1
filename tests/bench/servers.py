"""What the benchmarks run: the daemon, its peers and origins, each a process on loopback that is always stopped."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trustme

from tests.bench.figures import MissingToolError
from tests.bench.record import object_name, until_expanded
from tests.support.waiting import free_port

START_SECONDS = 60.0
STOP_SECONDS = 30.0
# The addresses of an origin with many hosts; 127.0.0.1 is that of an origin with one.
MANY_HOSTS = tuple(f"127.0.1.{number}" for number in range(1, 101))
ONE_HOST = ("127.0.0.1",)


@dataclass(frozen=True)
class Server:
    """A server that runs: its process, its port, and what returns once it has done all that was asked of it."""

    pid: int
    port: int
    settle: Callable[[], None] = field(default=lambda: None)


def tool(name: str) -> str:
    """The path of a program, looked up where Debian and this environment put them."""
    places = (os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin", "/sbin")
    path = shutil.which(name, path=":".join(places))
    if path is None:
        raise MissingToolError(f"{name} is not installed")
    return path


def packages(*names: str) -> None:
    """Raises MissingToolError when one of these cannot be imported."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingToolError(f"{name} is not installed")


def mortal(command: Sequence[str]) -> list[str]:
    """The command as one that is stopped when this process is gone, however it went."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--", *command] if setpriv else list(command)


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs a module of this package."""
    return [sys.executable, "-m", f"tests.bench.{name}", *map(str, arguments)]


@contextlib.contextmanager
def running(
    command: Sequence[str], port: int, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a process, from when it accepts connections at `port` until the block is left."""
    process = subprocess.Popen(mortal(command), env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"did not start: {' '.join(command)}")
            time.sleep(0.02)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- Servers that take notifications ---


@contextlib.contextmanager
def daemon(store: Path, **settings: str) -> Iterator[Server]:
    """The daemon on `store`, with loopback allowed and keys given as `section__key`."""
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
    with running([sys.executable, "-m", "notify_server"], port, environment) as process:
        yield Server(process.pid, port, lambda: until_expanded(store))


@contextlib.contextmanager
def bare_aiohttp(form: str) -> Iterator[Server]:
    """The limit: an aiohttp handler that reads and checks the notification, and keeps nothing. `form` is
    `application` (routed) or `server` (not even that).
    """
    port = free_port()
    with running(module("peers.bare_aiohttp", form, port), port) as process:
        yield Server(process.pid, port)


@contextlib.contextmanager
def fastapi(work: Path) -> Iterator[Server]:
    """What a team would write: FastAPI and aiosqlite, a commit for each request."""
    packages("fastapi", "uvicorn", "httptools", "aiosqlite")
    port = free_port()
    with running(module("peers.fastapi_aiosqlite", port, work), port) as process:
        yield Server(process.pid, port)


@contextlib.contextmanager
def webhook(work: Path) -> Iterator[Server]:
    """Debian's webhook at its cheapest: it parses the body, its rule says no, and it answers 200 without running a
    command.
    """
    program = tool("webhook")
    port = free_port()
    never = {"match": {"type": "value", "value": "never", "parameter": {"source": "payload", "name": "api_code"}}}
    hook = {
        "id": "notify",
        "execute-command": "/bin/true",
        "trigger-rule": never,
        "trigger-rule-mismatch-http-response-code": 200,
    }
    hooks = work / "hooks.json"
    hooks.write_text(json.dumps([hook]))
    command = [program, "-hooks", str(hooks), "-ip", "127.0.0.1", "-port", str(port), "-urlprefix", ""]
    with running(command, port) as process:
        yield Server(process.pid, port)


# --- Origins ---


@dataclass(frozen=True)
class Origin:
    """A server that answers 200 to every HEAD: its port, and the authority that its certificate is from."""

    scheme: str
    port: int
    ca_file: Path | None = None

    def addresses(self, files: int, hosts: Sequence[str]) -> list[str]:
        """So many different addresses, the hosts taking turns."""
        bases = [f"{self.scheme}://{host}:{self.port}" for host in hosts]
        return [f"{bases[number % len(bases)]}/{object_name(number)}" for number in range(files)]


def _certificate(directory: Path) -> Path:
    """An authority's certificate; `server.pem` beside it has key and certificate for all the origins' addresses."""
    authority = trustme.CA()
    issued = authority.issue_cert(*ONE_HOST, *MANY_HOSTS)
    issued.private_key_and_cert_chain_pem.write_to_path(directory / "server.pem")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    return directory / "ca.pem"


@contextlib.contextmanager
def nginx(directory: Path, *, tls: bool = False) -> Iterator[Origin]:
    """nginx with one worker, at all the origins' addresses. Its answer is as large as a picture: the server would read
    the first bytes of anything smaller.
    """
    port = free_port()
    ca_file = _certificate(directory) if tls else None
    listen = "".join(f"listen {host}:{port}{' ssl' if tls else ''} backlog=4096; " for host in (*ONE_HOST, *MANY_HOSTS))
    pem = f"{directory}/server.pem"
    certificate = f"ssl_certificate {pem}; ssl_certificate_key {pem}; " if tls else ""
    picture = "picture" * 300
    config = directory / "nginx.conf"
    config.write_text(
        f"worker_processes 1; daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log crit;\n"
        "events { worker_connections 8192; }\n"
        f"http {{ access_log off; keepalive_requests 100000000; keepalive_timeout 300s; server {{ {listen}{certificate}"
        'location / { default_type image/jpeg; add_header ETag "\\"0123456789abcdef\\""; '
        + f'return 200 "{picture}"; '
        + "} } }\n"
    )
    with running([tool("nginx"), "-e", f"{directory}/error.log", "-c", str(config), "-p", str(directory)], port):
        yield Origin("https" if tls else "http", port, ca_file)


@contextlib.contextmanager
def slow_origin(delay: float) -> Iterator[Origin]:
    """An origin of our own that waits `delay` seconds before each answer, which nginx cannot do."""
    port = free_port()
    with running(module("peers.slow_origin", port, delay), port):
        yield Origin("http", port)
