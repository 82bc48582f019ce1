"""A real PgBouncer (Debian's) in front of a PostgreSQL of the tests."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from tests.debian import program
from tests.support.postgres import ACCOUNTS, USER, PostgresServer
from tests.support.waiting import SECONDS, free_port


class PgBouncer:
    """Runs inside `with`, as it comes from Debian but for the pool mode and the settings given."""

    def __init__(self, server: PostgresServer, mode: str, **settings: str) -> None:
        found = program("pgbouncer")
        assert found is not None, "pgbouncer is missing: apt-get install pgbouncer"
        self._program = found
        self._folder = Path(tempfile.mkdtemp(prefix="notify-pgbouncer-"))
        self._port = free_port()
        backend = urlsplit(server.url)
        options = {
            "listen_addr": "127.0.0.1", "listen_port": str(self._port), "auth_type": "any", "pool_mode": mode,
            "logfile": f"{self._folder}/log", "pidfile": f"{self._folder}/pid", "unix_socket_dir": "", **settings,
        }  # fmt: skip
        lines = [
            "[databases]",
            f"postgres = host={backend.hostname} port={backend.port} user={USER}",
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in options.items()),
        ]
        (self._folder / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self._port}/postgres"

    def __enter__(self) -> Self:
        command = [self._program]
        if os.geteuid() == 0:
            account = next(pwd.getpwnam(name) for name in ACCOUNTS if _exists(name))
            os.chown(self._folder, account.pw_uid, account.pw_gid)
            command += ["-u", account.pw_name]
        self._process = subprocess.Popen([*command, f"{self._folder}/pgbouncer.ini"], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + SECONDS
        while "process up" not in self.log():
            assert self._process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def log(self) -> str:
        log = self._folder / "log"
        return log.read_text(errors="replace") if log.exists() else ""


def _exists(account: str) -> bool:
    try:
        pwd.getpwnam(account)
    except KeyError:
        return False
    return True
