"""Installs the Debian packages that tests or benchmarks need and that are missing: `python tests/debian.py strace
nginx`.

Exits 1 with one line when something is missing and cannot be
installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Packages whose program has another name than they have.
PROGRAMS = {"iproute2": "ip", "postgresql": "initdb", "prometheus": "promtool", "systemd": "systemd-analyze"}


def program(name: str) -> str | None:
    """Where the program is, on the path or where Debian puts servers; None when it is missing."""
    servers = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    path = ":".join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", *servers])
    return shutil.which(name, path=path)


def missing(packages: list[str]) -> list[str]:
    """Those of the packages whose program is not there."""
    return [package for package in packages if program(PROGRAMS.get(package, package)) is None]


def main(packages: list[str]) -> int:
    wanted = missing(packages)
    if not wanted:
        return 0
    if os.geteuid() == 0 and shutil.which("apt-get"):
        # Offline: installed packages start no service.
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "SYSTEMD_OFFLINE": "1"}
        print(f"installing from Debian: {' '.join(wanted)}", flush=True)
        for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *wanted]):
            subprocess.run(["apt-get", *command], check=False, env=environment, stdout=subprocess.DEVNULL)
    if still := missing(packages):
        print(f"missing: {' '.join(still)}: run `apt-get install {' '.join(still)}` as root", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
