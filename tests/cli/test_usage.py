"""The command line itself: what it says to a slip, how it completes, and what it loads."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from notify_server.cli.main import app
from tests.support.daemon import clean_environment, run_command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sever"], "No such command 'sever'. Did you mean 'serve'?"),
        (["--confg", "x"], "No such option: --confg. Did you mean --config?"),
        (["simulate", "--own-demon"], "No such option: --own-demon. Did you mean --own-daemon?"),
        (["config", "chekc"], "No such command 'chekc'. Did you mean 'check'?"),
        (["nonsense"], "No such command 'nonsense'."),
        (["serve", "--config"], "Option '--config' requires an argument."),
        (["export", "--reason", "tls_eror"],
         "Invalid value for '--reason': tls_eror is not a reason, did you mean tls_error?"),
        (["recheck", "--reason", "http_40", "--yes"],
         "Invalid value for '--reason': http_40 is not a reason: http_ is followed by the three digits of a status, "
         "like http_404"),
        (["batches", "--verdict", "complet"],
         "Invalid value for '--verdict': 'complet' is not one of 'pending', 'complete', 'incomplete'. "
         "Did you mean complete?"),
        (["recheck", "--state", "availble"],
         "Invalid value for '--state': 'availble' is not one of 'pending', 'available', 'unavailable', 'blocked', "
         "'upload_failed'. Did you mean available?"),
        (["export", "--format", "cvs"],
         "Invalid value for '--format': 'cvs' is not one of 'csv', 'ndjson'. Did you mean csv?"),
        (["events", "--types", "batch.complet"],
         "Invalid value for '--types': batch.complet is not a type of event, did you mean batch.complete?"),
        (["simulate", "--receivers", "steady,stedy"], "--receivers: stedy is not a receiver, did you mean steady?"),
        (["batches", "--limit", "0"], "Invalid value for '--limit': must be at least 1"),
        (["replay", "first"], "Invalid value for 'ID': must be a whole number"),
        (["verify"], "Name URLs, or a list of them with --file."),
    ],
)  # fmt: skip
async def test_a_misspelling_is_reported_in_one_line_with_a_suggestion(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    end = await run_command(*arguments, cwd=tmp_path)
    assert (end.code, end.stdout, end.stderr) == (2, "", said + "\n")


async def test_a_shell_completes_the_commands_and_their_options(tmp_path: Path) -> None:
    async def completed(words: str) -> list[str]:
        end = await run_command(
            cwd=tmp_path,
            environ=clean_environment(
                _NOTIFY_SERVER_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1)
            ),
        )
        return end.stdout.split()

    assert await completed("notify-server ver") == ["verify"]
    assert await completed("notify-server config s") == ["show"]
    assert await completed("notify-server doctor --js") == ["--json"]


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its name and object, groups included."""
    yield names, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *names, name)


def test_help_keeps_its_brackets_and_shows_the_types_that_people_know() -> None:
    program = typer.main.get_command(app)
    for names, command in commands(program):
        shown = command.get_help(command.make_context("notify-server", [], resilient_parsing=True))
        words = re.sub(r"\s+", " ", shown)
        assert not re.search(r"<\w+|[{}]|>=|list\[", shown), (names, shown)
        docstring = re.sub(r"\s+", " ", inspect.getdoc(command.callback) or "")
        for section in re.findall(r"\[\w+\]", docstring):
            assert section in words, names
    assert "[retention]" in typer.main.get_command(app).commands["prune"].get_help(  # type: ignore[attr-defined]
        program.make_context("notify-server", [], resilient_parsing=True)
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["verify", "--help"], ["config", "--help"], ["--version"], ["sever"]]
)
def test_what_does_nothing_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom notify_server.cli import main\ntry:\n    main()\nfinally:\n    print('loaded', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=clean_environment(),
    )
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    # typer itself brings pydantic along.
    heavy = {"aiohttp", "structlog", "uvloop", "asyncio", "sqlite3", "pycurl", "cryptography"}
    assert {"notify_server", "typer"} <= loaded
    assert not heavy & loaded


def test_the_configuration_is_checked_without_the_daemon() -> None:
    code = "import sys, notify_server.cli.config; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"aiohttp", "uvloop", "structlog"} & set(done.stdout.split())
