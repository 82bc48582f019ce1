"""Checks the documents against the code: links, commands, options, configuration keys, names, queries and figures."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, get_args

import msgspec
import pytest
import typer
from pydantic import BaseModel

from notify_server.cli.main import app as cli
from notify_server.config import Config
from notify_server.contract.wire import parse_notification
from notify_server.errors import ContractError
from notify_server.model import FileState, Reason, Verdict
from notify_server.store.limits import MAX_ATTEMPT_ROWS, MAX_REJECTION_BYTES, MAX_REJECTIONS
from notify_server.store.sql import load_migrations
from notify_server.web.api.endpoints import ENDPOINTS

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh-CN.md"]
TOP = [*READMES, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [*(ROOT / name for name in TOP), *(ROOT / "docs").rglob("*.md")]
    if "receivers" not in path.parts
)
CHINESE = [page for page in PAGES if page == "README.zh-CN.md" or page.startswith("docs/zh/")]
# Older versions and their names are part of a changelog.
CURRENT = [page for page in PAGES if page != "CHANGELOG.md"]
HAN = "\u4e00-\u9fff"


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture(params=READMES)
def readme(request: pytest.FixtureRequest) -> str:
    return text_of(str(request.param))


def fences(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def prose(text: str) -> str:
    """The text without code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def code(text: str) -> list[str]:
    """Every code span and every line of a fenced block."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    without = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*re.findall(r"`([^`\n]+)`", without), *(line for block in blocks for line in block.splitlines())]


# Links


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead_links(page: str, text: str) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in slugs(target.read_text(encoding="utf-8"))):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_anchors_that_exist(page: str) -> None:
    assert dead_links(page, text_of(page)) == []


def test_a_link_to_a_missing_file_or_anchor_is_found() -> None:
    text = "[a](missing.md) [b](LICENSE) [c](docs/cli.md#none) [d](docs/cli.md#development) [e](#none)"
    assert dead_links("README.md", text) == ["missing.md", "docs/cli.md#none", "#none"]


# Commands


def command_problems(line: str) -> list[str]:
    """The command, sub-command and options of a `notify-server …` line that do not exist."""
    found = re.search(r"(?:^|[\s/$])notify-server((?: +[^\s|;>]+)*)", line)
    if not found or re.match(r"\s*(docker|#)", line):
        return []
    words = found[1].split()
    command: Any = typer.main.get_command(cli)
    at = 0
    while at < len(words) and getattr(command, "commands", None) and re.fullmatch(r"[a-z]+", words[at]):
        if words[at] not in command.commands:
            return [words[at]]
        command = command.commands[words[at]]
        at += 1
    options = {name for parameter in command.params for name in parameter.opts}
    given = [word.partition("=")[0] for word in words[at:] if re.match(r"--?[a-z]", word)]
    return [word for word in given if word not in options | {"--help"}]


def option_problems(text: str) -> list[str]:
    """Options in the rows of a table of commands that the row's command does not have."""
    wrong = []
    for row in re.findall(r"^\| `(notify-server [^`]*)`.*$", text, re.MULTILINE):
        line = next(line for line in text.splitlines() if line.startswith(f"| `{row}`"))
        name = re.sub(r" [A-Z].*", "", row)
        wrong += [f"{name} {o}" for o in re.findall(r"`(--[a-z-]+)", line) if command_problems(f"{name} {o}")]
    return wrong


@pytest.mark.parametrize("page", CURRENT)
def test_commands_and_options_exist(page: str) -> None:
    lines = [line for line in code(text_of(page)) if "venv /opt" not in line and "/etc/" not in line]
    assert [problem for line in lines for problem in command_problems(line)] == []
    assert option_problems(text_of(page)) == []


def test_a_command_or_option_that_does_not_exist_is_found() -> None:
    assert command_problems("notify-server sever") == ["sever"]
    assert command_problems(".venv/bin/notify-server recheck --batc x") == ["--batc"]
    assert command_problems("notify-server config shw") == ["shw"]
    assert command_problems("notify-server show BATCH --all") == []
    assert option_problems("| `notify-server show BATCH` | `--limitt` |") == ["notify-server show --limitt"]


@pytest.mark.parametrize("page", ["docs/cli.md", "docs/zh/cli.md"])
def test_every_command_is_described(page: str) -> None:
    described = set(re.findall(r"^\| `notify-server ([a-z]+)", text_of(page), re.MULTILINE))
    assert set(getattr(typer.main.get_command(cli), "commands", {})) == described


@pytest.mark.parametrize("page", CURRENT)
def test_make_targets_exist(page: str) -> None:
    makefile = text_of("Makefile")
    named = {name for line in code(text_of(page)) for name in re.findall(r"^(?:\S+=\S+ )?make ([a-z]+)", line)}
    assert {name for name in named if not re.search(rf"^{name}:.*## \S", makefile, re.MULTILINE)} == set()


@pytest.mark.parametrize("command", [[], ["serve"], ["simulate"]])
def test_commands_have_help_with_their_options(command: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "notify_server", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert "--config" in run.stdout
    assert "Usage: notify-server" in run.stdout


# Configuration


def key_exists(section: str, key: str | None) -> bool:
    field = Config.model_fields.get(section)
    if field is None:
        return False
    candidates = [field.annotation, *get_args(field.annotation)]
    models = [model for model in candidates if isinstance(model, type) and issubclass(model, BaseModel)]
    return key is None or any(key in model.model_fields for model in models)


def wrong_keys(text: str) -> list[str]:
    spans = code(text)
    named = [match for span in spans for match in re.findall(r"^\[(\w+)\](?: (\w+))?", span)]
    environment = [match for span in spans for match in re.findall(r"NOTIFY_SERVER__([A-Z]+)__([A-Z_]+)", span)]
    pairs = [*named, *((section.lower(), key.lower()) for section, key in environment)]
    pairs = [(section, key) for section, key in pairs if section != "section"]
    return [f"[{section}] {key}" for section, key in pairs if not key_exists(section, key or None)]


@pytest.mark.parametrize("page", CURRENT)
def test_configuration_keys_exist(page: str) -> None:
    assert wrong_keys(text_of(page)) == []


def test_a_configuration_key_that_does_not_exist_is_found() -> None:
    text = "`[verify] retry_shedule` `[servre]` `[log] level` `NOTIFY_SERVER__AUTH__TOKEN`"
    assert wrong_keys(text) == ["[verify] retry_shedule", "[servre] ", "[auth] token"]


@pytest.mark.parametrize("page", CURRENT)
def test_configuration_examples_are_valid(page: str) -> None:
    for block in fences(text_of(page), "toml"):
        tables = tomllib.loads(block)
        # Files that the example names need not exist here.
        tables.get("server", {}).pop("ssl_certificate", None)
        tables.get("server", {}).pop("ssl_key", None)
        Config(**tables)


def test_the_keys_of_the_readme_have_the_defaults_that_it_says(readme: str) -> None:
    rows = re.findall(r"^\| `\[(\w+)\] (\w+)` \| `([^`]+)` \|", readme, re.MULTILINE)
    assert len(rows) >= 4
    for section, key, default in rows:
        field = getattr(Config(), section)
        value = getattr(field, key)
        shown = value.get_secret_value() if hasattr(value, "get_secret_value") else value
        assert default in (str(shown), str(next(iter(shown), "")) if isinstance(shown, (tuple, list)) else "")


def test_the_sections_of_the_configuration_are_described() -> None:
    for page in ("docs/configuration.md", "docs/zh/configuration.md"):
        assert [name for name in Config.model_fields if f"[{name}]" not in text_of(page)] == []


def test_the_schedule_that_the_documents_give_is_the_default() -> None:
    verify = Config().verify
    assert verify.retry_schedule == (5, 30, 300, 1800, 7200, 18_000, 36_000)
    assert verify.jitter == 0.2
    assert verify.allowed_ports == (80, 443)
    assert Config().retention.completed == 90 * 86_400
    assert "5 s, 30 s, 5 min, 30 min, 2 h, 5 h, 10 h" in text_of("docs/configuration.md")
    assert "5 秒、30 秒、5 分钟、30 分钟、2 小时、5 小时、10 小时" in text_of("docs/zh/configuration.md")


# The record


@pytest.fixture
def record() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as connection:
        for step in load_migrations("sqlite"):
            connection.executescript(step.script)
        yield connection


def names_in(record: sqlite3.Connection) -> set[str]:
    found = record.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
    return {name for (name,) in found} - {"sqlite_sequence"}


def test_the_data_model_names_every_table_view_state_and_reason(record: sqlite3.Connection) -> None:
    page = text_of("docs/data-model.md")
    words = [*names_in(record), *FileState, *Verdict, *Reason]
    assert [word for word in words if f"`{word}`" not in page] == []
    assert f"{MAX_REJECTIONS:,} or {MAX_REJECTION_BYTES // 2**20} MiB" in page
    assert f"the last {MAX_ATTEMPT_ROWS} of each file" in page


def test_the_structs_of_the_data_model_are_where_it_says() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| `(\w[\w/]*\.py)` \|", text_of("docs/data-model.md"), re.MULTILINE)
    assert len(rows) >= 10
    for structs, path in rows:
        source = text_of(f"notify_server/{path}")
        assert [name for name in re.findall(r"\w+", structs) if f"class {name}(" not in source] == []


def test_states_and_verdicts_are_explained_in_the_readme(readme: str) -> None:
    assert [word for word in [*FileState, *Verdict] if f"| `{word}` |" not in readme] == []


def test_queries_run_on_the_schema(readme: str, record: sqlite3.Connection) -> None:
    queries = [query for block in fences(readme, "sql") for query in block.split(";") if query.strip()]
    assert len(queries) == 3
    for query in queries:
        record.execute(query)


# Architecture


def missing_names(text: str, tables: Iterable[str]) -> list[str]:
    """Modules, packages, processes and tables of a page on the architecture that do not exist."""
    paths = set(re.findall(r"(?<![\w./])((?:[a-z_]+/)*[a-z_]+\.py)\b", text))
    paths |= {f"web/{name}" for name in re.findall(r"\bweb/(\w+)(?![\w.])", text)}
    shapes = [name.strip() for group in re.findall(r'\[\("([\w, ]+)"\)\]', text) for name in group.split(",")]
    processes = re.findall(r"^ *subgraph (\w+)\[", text, re.MULTILINE)
    programs = {"daemon": "serve.py", **{name: f"processes/{name}.py" for name in processes if name != "daemon"}}
    paths |= {programs[name] for name in processes}
    package = ROOT / "notify_server"
    gone = [path for path in sorted(paths) if not (package / path).exists() and not (ROOT / path).exists()]
    return gone + [name for name in shapes if name not in set(tables)]


def test_the_architecture_names_what_exists(record: sqlite3.Connection) -> None:
    page = text_of("docs/architecture.md")
    assert len(fences(page, "mermaid")) == 2
    assert missing_names(page, names_in(record)) == []


def test_a_name_that_does_not_exist_is_found_in_the_architecture() -> None:
    text = 'verify/pool.py web/front\n  subgraph writer["x"]\na[("batch, outbox")]'
    assert missing_names(text, ["batch"]) == ["processes/writer.py", "verify/pool.py", "web/front", "outbox"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/glossary.md", "docs/testing.md", "docs/security.md"])
def test_paths_that_are_named_exist(page: str) -> None:
    spans = [span for span in code(text_of(page)) if re.fullmatch(r"[\w.\-]+(/[\w.\-]*)+", span)]
    assert spans
    places = [ROOT, ROOT / "notify_server"]
    assert [span for span in spans if not any((place / span).exists() for place in places)] == []


def test_contributors_find_the_file_of_at_least_twenty_rules() -> None:
    table = text_of("CONTRIBUTING.md").partition("## Where is the rule?")[2]
    assert len(re.findall(r"^\| .+\? \| `notify_server/.+` \|$", table, re.MULTILINE)) >= 20


# HTTP


def test_the_routes_of_the_api_are_described() -> None:
    page = text_of("docs/api.md")
    assert [e.path for e in ENDPOINTS if f"| `{e.method} {e.path}` |" not in page] == []
    described = set(re.findall(r"^\| `[A-Z]+ (/api/v1/[^`]+)` \|", page, re.MULTILINE))
    assert described == {endpoint.path for endpoint in ENDPOINTS}
    assert f"`POST {Config().server.callback_path}`" in page


@pytest.mark.parametrize("page", CURRENT)
def test_routes_in_examples_exist(page: str) -> None:
    served = [re.sub(r"{\w+}", r"(?:\\d+|{\\w+})", endpoint.path) for endpoint in ENDPOINTS]
    shown = set(re.findall(r"/api/v1/[a-z0-9/{}]+", "\n".join(code(text_of(page)))))
    assert [path for path in shown if not any(re.fullmatch(known, path) for known in served)] == []


def test_the_refusal_shown_is_the_contracts(readme: str) -> None:
    shown = next(line for line in readme.splitlines() if '"code":"400"' in line)
    entry = {"oss_object_name": "k", "status": "FINISHED", "target_url": "ftp://h/k"}
    body = msgspec.json.encode({"batch_id": "b1", "api_code": "x", "file_list": [entry]})
    with pytest.raises(ContractError) as refused:
        parse_notification(body, max_files=10)
    assert str(refused.value) in shown


def test_the_ack_shown_is_the_default(readme: str) -> None:
    before, after = Config().ack.body.split("{request_id}")
    assert re.search(rf"{re.escape(before)}[0-9a-f-]{{36}}{re.escape(after)}", readme)


@pytest.mark.parametrize("page", ["docs/monitoring.md", "docs/zh/monitoring.md"])
def test_the_metrics_are_those_of_the_grafana_dashboard(page: str) -> None:
    table = text_of(page).partition("| `notify_server_…` |")[2].partition("\n\n")[0]
    firsts = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = {name for first in firsts for name in re.findall(r"`([a-z_]+)", first)}
    dashboard = text_of("deploy/grafana-dashboard.json")
    assert len(named) > 20
    assert {name for name in named if f"notify_server_{name}" not in dashboard} == set()


@pytest.mark.parametrize("page", [*READMES, "docs/operations.md", "docs/zh/operations.md"])
def test_the_messages_of_the_troubleshooting_tables_are_in_the_program(page: str) -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "notify_server").rglob("*.py"))
    table = re.split(r"## (?:Troubleshooting|故障排查)", text_of(page))[1].partition("\n## ")[0]
    firsts = [row.split("|")[1] for row in table.splitlines() if row.startswith("| ")]
    shown = [span for first in firsts for span in re.findall(r"`([^`]+ [^`]+)`", first)]
    assert len(shown) >= 2
    assert [message for message in shown if message not in source] == []


# Figures


def figures(text: str, table: str, row: str) -> list[float]:
    """The numbers of a row of a plain table, found by the start of its title and the name of the row."""
    block = text[text.index(table) :].partition("\n\n")[0]
    line = next(line for line in block.splitlines() if line.startswith(row))
    return [float(cell.replace(",", "")) for cell in line[len(row) :].split() if cell != "–"]


def differing(text: str, parts: dict[str, Any]) -> list[str]:
    """The rows of the tables of performance.md that differ from the recorded runs by more than rounding."""

    def med(values: Iterable[float]) -> float:
        return median(values)

    expected: list[tuple[str, str, Sequence[float]]] = []
    for name, runs in parts["acks"]["runs"].items():
        rates = [med(turn[place]["requests"] / turn[place]["seconds"] for turn in runs) for place in range(5)]
        expected.append(("Acks a second by connections", f"{name}  ", rates))
    for name, loads in parts["latency"]["2000"]["runs"].items():
        row = [med(load[key] for load in loads) for key in ("p50_ms", "p99_ms", "p999_ms")]
        expected.append(("Latency at 2,000", f"{name}  ", row))
    for name, shared in parts["together"]["runs"].items():
        row = [med(one["load"][key] for one in shared) for key in ("p50_ms", "p99_ms", "p999_ms")]
        expected.append(("Acks at 500 a second", f"{name}  ", row))
    for name in parts["probes"]["http, 1 host"]["runs"]:
        runs = [case["runs"][name] for case in parts["probes"].values()]
        rates = [med(one["found"] / one["seconds"] for one in case) for case in runs]
        expected.append(("HEADs: files a second", f"{name}  ", rates))
    for name, grown in parts["growth"]["runs"].items():
        row = [med(one[key] for one in grown) for key in ("acks_a_second", "ack_p99_ms", "ack_cpu_us")]
        expected.append(("What the size of the record costs", f"{name}  ", row))
    for name, used in parts["postgres"]["acks"].items():
        expected.append(("Acks, 7 files each", f"{name}  ", [med(one["done"] / one["seconds"] for one in used)]))
    drained = parts["backlog"]
    row = [drained[key] for key in ("first_probe_seconds", "memory_mib", "files_a_second", "size_mib")]
    expected.append(("A backlog of 1,000,000 files", "1.36", row[1:]))
    wrong = []
    for table, name, values in expected:
        for shown, real in zip(figures(text, table, name), values, strict=False):
            if abs(shown - real) > max(0.051 if real < 5000 and shown % 1 else 0.51, abs(real) * 1e-4):
                wrong.append(f"{table}: {name.strip()}: {shown} is {real:.2f}")
    return wrong


def test_the_figures_are_those_of_the_benchmark() -> None:
    measured = json.loads(text_of("docs/benchmark.json"))
    page = text_of("docs/performance.md")
    assert differing(page, measured["parts"]) == []
    assert measured["about"]["commit"] in page
    changed = page.replace("22,592", "23,592").replace("21,946", "21,964")
    assert len(differing(changed, measured["parts"])) == 2


@pytest.mark.parametrize("page", ["docs/sizing.md", "docs/zh/sizing.md"])
def test_figures_of_other_pages_are_those_of_the_performance_page(page: str) -> None:
    for figure in ("22,592", "21,946"):
        assert figure in text_of(page)
        assert figure in text_of("docs/performance.md")


# Language and form


def test_the_readmes_are_short(readme: str) -> None:
    assert len(readme.splitlines()) <= 200


def test_both_readmes_show_the_same_commands_and_configuration() -> None:
    for language in ("sh", "json", "toml", "sql"):
        english, chinese = (
            [re.sub(r" *(#|--).*", "", block) for block in fences(text_of(name), language)] for name in READMES
        )
        assert english == chinese


def half_width(text: str) -> list[str]:
    """Half-width punctuation beside a Han character, outside of code and the targets of links."""
    plain = re.sub(r"\]\([^)]*\)", "]", prose(text))
    return re.findall(rf"[{HAN}][,;:!?()]|[(][{HAN}]|[{HAN}]\.(?=\s|$)", plain)


@pytest.mark.parametrize("page", [*CHINESE, "docs/glossary.md"])
def test_chinese_has_full_width_punctuation(page: str) -> None:
    assert half_width(text_of(page)) == []


def test_half_width_punctuation_after_a_han_character_is_found() -> None:
    assert half_width("文件,批次。原因: `a,b` [链接](x.md) (甲)") == ["件,", "因:", "(甲"]


def test_every_english_page_for_operators_has_a_chinese_one() -> None:
    pages = ("operations", "deployment", "configuration", "monitoring", "security", "sizing", "cli")
    assert [name for name in pages if not (ROOT / "docs" / "zh" / f"{name}.md").exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_finished(page: str) -> None:
    assert [word for word in ("<!--", "TODO", "@@") if word in text_of(page)] == []


def test_no_document_or_comment_names_a_path_of_the_machine_it_was_written_on() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    elsewhere = re.compile(r"(?<![\w.])/(root|work|farm|home/[a-z]+)/")
    paths = {name: ROOT / name for name in tracked if (ROOT / name).is_file() and not name.endswith(".png")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    assert [name for name, text in texts.items() if elsewhere.search(text)] == []
