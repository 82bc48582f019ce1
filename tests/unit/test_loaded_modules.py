"""A process loads only what it needs. Which module may import which is checked by import-linter (pyproject.toml)."""

from __future__ import annotations

import subprocess
import sys

HOUSE = "notify_server"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_daemon_loads_neither_libcurl_nor_the_command_lines_parts() -> None:
    loaded = python("import sys, notify_server.app; print(*sys.modules)").split()
    assert "notify_server.app" in loaded
    assert not {name for name in loaded if name.split(".")[0] in ("pycurl", "typer", "click")}
    assert not {name for name in loaded if name.startswith("notify_server.cli")}
    assert not {"notify_server.processes.prober", "notify_server.processes.keeper"} & set(loaded)


def test_the_daemon_does_not_need_rich() -> None:
    # structlog loads it where it is installed, which cannot be helped; nothing of the house may.
    assert python(
        "import sys; sys.modules.update(dict.fromkeys(['rich', 'typer', 'pycurl']))\n"
        "import notify_server.app; print('imported')"
    ) == ("imported\n")


def test_a_prober_loads_nothing_of_the_daemons() -> None:
    loaded = python("import sys, notify_server.processes.prober; print(*sys.modules)").split()
    assert "pycurl" in loaded
    unwanted = {"pydantic", "aiohttp", "structlog", "sqlite3", "asyncio", "cryptography", "uvloop"}
    unwanted |= {"typer", "rich", "prometheus_client"}
    assert not unwanted & {name.split(".")[0] for name in loaded}
    house = {name for name in loaded if name.split(".")[0] == HOUSE}
    allowed = {
        "processes",
        "processes.prober",
        "processes.prober_handle",
        "processes.prober_headers",
        "processes.prober_names",
        "processes.prober_places",
        "processes.prober_protocol",
        "processes.sniffing",
        "processes.frames",
        "processes.worker",
        "verify",
        "verify.guard",
        "contract",
        "contract.host",
        "model",
    }
    assert house == {HOUSE, *(f"{HOUSE}.{name}" for name in allowed)}
