"""A real PostgreSQL for the tests: one that they start themselves, or the one that NOTIFY_SERVER_TEST_POSTGRES names.

Its own is Debian's, in a directory of its own, reached by a socket there, and syncs to the disk as in production. The
default collation is not that of bytes, so that what depends on it is found out.
"""

from __future__ import annotations

import atexit
import functools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Self

import asyncpg

from tests.debian import program

VARIABLE = "NOTIFY_SERVER_TEST_POSTGRES"
START_SECONDS = 60.0
# Nobody may run PostgreSQL as root.
ACCOUNTS = ("postgres", "nobody")
USER = "notify"
SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "fsync": "on",
    "autovacuum_naptime": "5s",
    "log_min_messages": "warning",
}

# Referenced tables come last.
TABLES = (
    "forward_attempt", "forward", "event", "endpoint", "expectation", "ready_clock", "arrival", "quiet_clock",
    "action", "acknowledgement", "history",
    "attempt", "file", "batch", "notification", "rejection", "nonce", "heartbeat", "lease", "node",
)  # fmt: skip

_serial = count(1)


def _program(name: str) -> str:
    found = program(name)
    assert found is not None, f"{name} is missing: apt-get install postgresql"
    return found


class PostgresServer:
    """A server of one's own, to be stopped and started at will, with the settings of the tests or those given. Close it
    when done.
    """

    def __init__(self, settings: Mapping[str, str] = SETTINGS) -> None:
        self._settings = settings
        self._directory = Path(tempfile.mkdtemp(prefix="notify-pg-"))
        self._as: list[str] = []
        if os.geteuid() == 0:
            account = next(pwd.getpwnam(name) for name in ACCOUNTS if _exists(name))
            os.chown(self._directory, account.pw_uid, account.pw_gid)
            # It ends with the process that it was started for, however that ends.
            self._as = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        self._data = self._directory / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._run(
            _program("initdb"), "-D", str(self._data), "-U", USER, "-A", "trust", "-E", "UTF8",
            "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en", "--no-instructions",
        )  # fmt: skip

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Through a socket of its own, or over TCP when it listens there."""
        if host := self._settings.get("listen_addresses"):
            return f"postgresql://{USER}@{host}:{self._settings['port']}/postgres"
        return f"postgresql:///postgres?host={self._directory}&user={USER}"

    @property
    def pid(self) -> int:
        """The process that all of its others descend from."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and return when it takes connections."""
        options = [part for key, value in self._settings.items() for part in ("-c", f"{key}={value}")]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self._as, *(["--pdeathsig", "QUIT"] if self._as else []), _program("postgres"),
                    "-D", str(self._data), "-k", str(self._directory), *options,
                ],
                stdout=log, stderr=log, cwd="/",
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        status = self._data / "postmaster.pid"
        while not (status.exists() and "ready" in status.read_text()):
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)

    def stop(self, signal_: signal.Signals = signal.SIGINT) -> None:
        """Stop it: SIGINT ends sessions and shuts down in order, SIGQUIT is a crash."""
        if self._process is not None:
            self._process.send_signal(signal_)
            self._process.wait(START_SECONDS)
            self._process = None

    def close(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._directory, ignore_errors=True)

    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    def _run(self, *command: str) -> None:
        done = subprocess.run([*self._as, *command], capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == 0, done.stderr


def _exists(account: str) -> bool:
    try:
        pwd.getpwnam(account)
    except KeyError:
        return False
    return True


@functools.cache
def shared_url() -> str:
    """The address of the server that all tests share, started at the first call."""
    if named := os.environ.get(VARIABLE):
        return named
    server = PostgresServer()
    atexit.register(server.close)
    server.start()
    return server.url


async def new_schema(url: str | None = None) -> str:
    """An address with a schema of its own, which is empty: there is not even a table."""
    base = url or shared_url()
    name = f"case_{os.getpid()}_{next(_serial)}"
    await fetch(base, f"CREATE SCHEMA {name}")
    return f"{base}{'&' if '?' in base else '?'}search_path={name}"


async def empty(url: str) -> None:
    """Make every table of the schema as good as new. Quicker than new ones, whose files have to reach the disk."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            "".join(f"DELETE FROM {table};" for table in TABLES)
            + "SELECT setval(oid::regclass, 1, false) FROM pg_class"
            " WHERE relkind = 'S' AND relnamespace = current_schema()::regnamespace"
        )
    finally:
        await connection.close()


async def fetch(url: str, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    """What a query gives, on a connection of its own."""
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(query, *parameters)]
    finally:
        await connection.close()
