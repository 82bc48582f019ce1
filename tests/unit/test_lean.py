"""What a process of the server does not load: each library costs memory in every process and time at every start."""

import subprocess
import sys

import pytest

# Private modules too: asyncio loads `_ssl` only if `ssl` can be imported.
RICH = {"rich", "pygments"}
TLS = {"ssl", "_ssl"}


@pytest.mark.parametrize(
    ("entry", "unwanted"),
    [
        ("notify_server.cli.serve", RICH | {"cryptography", "opentelemetry", "asyncpg"}),
        ("notify_server.processes.keeper", RICH | TLS | {"aiohttp", "pydantic", "cryptography", "jinja2", "pycurl"}),
        ("notify_server.processes.prober", RICH | TLS | {"aiohttp", "pydantic", "asyncio", "structlog", "sqlite3"}),
    ],
)
def test_a_process_loads_no_library_that_it_does_not_need(entry: str, unwanted: set[str]) -> None:
    program = f"import sys, {entry}; print(*{{name.partition('.')[0] for name in sys.modules if sys.modules[name]}})"
    loaded = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True).stdout
    assert not unwanted & set(loaded.split())


def test_rich_can_be_imported_after_it_was_hidden_from_structlog() -> None:
    program = "import notify_server.lean.structlog, rich.console, structlog; structlog.dev.ConsoleRenderer()"
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
