"""Installs the Debian packages that tests or benchmarks need and that are missing: `python tests/debian.py strace
nginx`.

Each package is taken to bring a program of its own name. Exits 1 with one line when something is missing and cannot be
installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys


def missing(names: list[str]) -> list[str]:
    """Those of the programs that are not on the path, or where Debian puts servers."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in names if shutil.which(name, path=path) is None]


def main(names: list[str]) -> int:
    wanted = missing(names)
    if not wanted:
        return 0
    if os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        print(f"installing from Debian: {' '.join(wanted)}", flush=True)
        for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *wanted]):
            subprocess.run(["apt-get", *command], check=False, env=environment, stdout=subprocess.DEVNULL)
    if still := missing(names):
        print(f"missing: {' '.join(still)}: run `apt-get install {' '.join(still)}` as root", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
