"""What the READMEs say is true."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import typer

from notify_server.cli.main import app as cli
from notify_server.config import Config, VerifyConfig
from notify_server.contract.wire import parse_notification
from notify_server.errors import ContractError
from notify_server.model import FileState, Reason, Verdict
from notify_server.store.limits import MAX_ATTEMPT_ROWS, MAX_REJECTION_BYTES, MAX_REJECTIONS
from notify_server.store.sql import load_migrations
from notify_server.web.api.endpoints import ENDPOINTS

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh-CN.md"]


@pytest.fixture(params=READMES)
def readme(request: pytest.FixtureRequest) -> str:
    return (ROOT / str(request.param)).read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    """The indented and fenced blocks, without their indentation and comments."""
    indented = re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    return [re.sub(r" *(#|--).*", "", block) for block in indented]


def test_every_state_verdict_and_reason_is_explained(readme: str) -> None:
    words = [*FileState, *Verdict, *Reason]
    assert [word for word in words if f"`{word}`" not in readme] == []


@pytest.fixture
def record() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as connection:
        for step in load_migrations("sqlite"):
            connection.executescript(step.script)
        yield connection


def test_every_table_and_view_is_named(readme: str, record: sqlite3.Connection) -> None:
    internal = {"nonce", "heartbeat", "sqlite_sequence"}
    found = record.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
    assert {name for (name,) in found if f"`{name}`" not in readme} - internal == set()


def test_the_queries_shown_run_on_the_schema(readme: str, record: sqlite3.Connection) -> None:
    queries = re.findall(r"^ {4}(SELECT .*?;)", readme, re.MULTILINE | re.DOTALL)
    for query in queries:
        record.execute(query)
    assert len(queries) >= 4


def test_every_route_is_named(readme: str) -> None:
    assert all(f"GET {path}`" in readme for path in ("/healthz", "/readyz", "/metrics"))
    assert f"POST {Config().server.callback_path}`" in readme


def test_every_make_target_named_exists_and_says_what_it_is_for(readme: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:`|^ {4})make ([a-z]+)", readme, re.MULTILINE))
    assert {"run", "test", "demo", "bench", "lint"} <= named
    assert {target for target in named if not re.search(rf"^{target}:.*## \S", makefile, re.MULTILINE)} == set()


def test_the_configuration_shown_is_valid(readme: str) -> None:
    block = next(block for block in re.findall(r"(?:^ {4}.*\n)+", readme, re.MULTILINE) if "[server]" in block)
    tables = tomllib.loads(re.sub(r"^ {4}", "", block, flags=re.MULTILINE).replace("…", "long-enough-secret"))
    assert Config(**tables).verify.allowed_hosts == ("*.ebaas.com",)


def test_the_keys_named_exist(readme: str) -> None:
    named = re.findall(r"`\[(\w+)\] (\w+)", readme)
    assert named
    for section, key in named:
        assert key in type(getattr(Config(), section)).model_fields, f"[{section}] {key}"


def test_the_schedule_and_bounds_told_are_the_defaults(readme: str) -> None:
    verify = VerifyConfig()
    assert verify.retry_schedule == (5, 30, 300, 1800, 7200, 18_000, 36_000)
    assert re.search(
        r"5 s, 30 s, 5 min, 30 min, 2 h, 5 h, 10 h|5 秒、30 秒、5 分、30 分、2 小时、5 小时、10 小时", readme
    )
    assert verify.jitter == 0.2
    assert verify.allowed_ports == (80, 443)
    assert f"{MAX_REJECTIONS:,}" in readme
    assert f"{MAX_REJECTION_BYTES // 2**20} MiB" in readme
    assert re.search(rf"\b{MAX_ATTEMPT_ROWS}\b", readme)
    assert Config().retention.completed == 90 * 86_400


def test_the_refusal_shown_is_what_the_contract_says(readme: str) -> None:
    shown = next(line for line in readme.splitlines() if '"code":"400"' in line)
    entry = {"oss_object_name": "k", "status": "FINISHED", "target_url": "ftp://h/k"}
    body = msgspec.json.encode({"batch_id": "b1", "api_code": "x", "file_list": [entry]})
    with pytest.raises(ContractError) as refused:
        parse_notification(body, max_files=10)
    assert str(refused.value) in shown


def test_the_ack_shown_is_the_default_one(readme: str) -> None:
    before, after = Config().ack.body.split("{request_id}")
    assert re.search(rf"{re.escape(before)}[0-9a-f-]{{36}}{re.escape(after)}", readme)


def test_no_place_is_left_to_be_filled(readme: str) -> None:
    assert "<!--" not in readme
    assert "TODO" not in readme


def test_both_languages_show_the_same_commands_and_output() -> None:
    english, chinese = (code_blocks((ROOT / name).read_text(encoding="utf-8")) for name in READMES)
    assert len(english) == len(chinese)
    same = [one == other for one, other in zip(english, chinese, strict=True)]
    # The flow of the data and the clone command are put into words.
    assert same.count(False) <= 2


def test_files_that_the_readmes_link_to_exist(readme: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_routes_of_the_api_that_are_shown_exist(readme: str) -> None:
    shown = set(re.findall(r"8080(/api/v1/[a-z0-9/]+)", readme))
    served = {re.sub(r"{\w+}", "1", endpoint.path) for endpoint in ENDPOINTS}
    assert shown
    assert shown <= served


def test_the_metrics_named_are_those_of_the_dashboard_that_is_checked_against_the_server(readme: str) -> None:
    table = readme.partition("| `notify_server_…` |")[2].partition("\n\n")[0]
    firsts = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = {name for first in firsts for name in re.findall(r"`([a-z_]+)", first)}
    dashboard = (ROOT / "deploy" / "grafana-dashboard.json").read_text(encoding="utf-8")
    assert len(named) > 20
    assert {name for name in named if f"notify_server_{name}" not in dashboard} == set()


def test_every_command_is_told(readme: str) -> None:
    table = readme.partition("| `serve` |")[2].partition("\n\n")[0] + "`serve`"
    told = set(re.findall(r"`(?:config )?([a-z]+)[^`]*`", table))
    commands = typer.main.get_command(cli)
    names = set(getattr(commands, "commands", {})) - {"config"}
    assert names - told == set()


@pytest.mark.parametrize("command", [[], ["serve"], ["simulate"]])
def test_every_command_has_help_with_its_options(command: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "notify_server", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert "--config" in run.stdout
    assert "Usage: notify-server" in run.stdout


def test_no_document_or_comment_speaks_of_the_machine_it_was_written_on() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    elsewhere = re.compile(r"(?<![\w.])/(root|work|farm|home/[a-z]+)/")
    paths = {name: ROOT / name for name in tracked if (ROOT / name).is_file() and not name.endswith(".png")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    assert [name for name, text in texts.items() if elsewhere.search(text)] == []
