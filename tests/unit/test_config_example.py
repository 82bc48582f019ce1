"""People copy `config.example.toml`, so it may not drift from the program."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from notify_server.config import Config, HostSettings, UsableConfig, load_config
from notify_server.config.forward import KINDS

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"
LINES = EXAMPLE.read_text(encoding="utf-8").splitlines()
ENDPOINT_TABLE = "[[forward]]"
HOST_TABLE = '[verify.hosts."*.example.com"]'
ENTRY = re.compile(r"(?P<off># )?(?P<key>[a-z_]+) = (?P<value>.+)")


def entries() -> Iterator[tuple[str, str, bool, str]]:
    """Section, key, whether it is commented out, and the line above."""
    section = ""
    for above, line in zip(["", *LINES], LINES, strict=False):
        if header := re.fullmatch(r'(?:# )?(\[\[?[a-z]+\]?(?:\.hosts\."\*\.example\.com"|\.usable)?\])', line):
            section = header[1]
        elif entry := ENTRY.fullmatch(line):
            yield section, entry["key"], bool(entry["off"]), above


def sections() -> dict[str, type[BaseModel]]:
    return {f"[{name}]": type(section) for name, section in Config() if name != "forward"}


TABLES: dict[str, type[BaseModel]] = {"[verify.usable]": UsableConfig}


def test_the_example_loads_to_exactly_the_defaults() -> None:
    assert load_config(EXAMPLE, environ={}) == Config()


def test_the_example_has_every_section_in_order() -> None:
    headers = [line for line in LINES if re.fullmatch(r"\[[a-z]+\]", line)]
    assert headers == list(sections())


@pytest.mark.parametrize("section", [*sections(), *TABLES])
def test_the_example_has_every_key_once(section: str) -> None:
    keys = [key for where, key, _, _ in entries() if where == section]
    # These have tables of their own.
    assert sorted(keys) == sorted(set((sections() | TABLES)[section].model_fields) - {"hosts", "usable"})


def test_the_example_of_a_host_has_every_key_of_a_host() -> None:
    assert [key for where, key, _, _ in entries() if where == HOST_TABLE] == list(HostSettings.model_fields)


def test_the_example_has_an_endpoint_of_each_kind_with_every_key() -> None:
    keys = [key for where, key, _, _ in entries() if where == ENDPOINT_TABLE]
    starts = [place for place, key in enumerate(keys) if key == "name"]
    found = [keys[start:end] for start, end in zip(starts, [*starts[1:], len(keys)], strict=True)]
    assert [sorted(each) for each in found] == [sorted(kind.model_fields) for kind in KINDS.values()]


def test_only_a_key_without_a_fixed_default_is_commented_out() -> None:
    for where, key, off, _ in entries():
        if where not in (HOST_TABLE, ENDPOINT_TABLE):
            field = (sections() | TABLES)[where].model_fields[key]
            assert off == (type(None) in get_args(field.annotation) or key == "user_agent"), key


def test_every_key_has_its_reason_on_the_line_above() -> None:
    for where, key, _, above in entries():
        if where not in (HOST_TABLE, ENDPOINT_TABLE):
            assert above.startswith("# "), key
            assert not ENTRY.fullmatch(above), key


def test_commented_keys_are_valid_too(tmp_path: Path) -> None:
    text = "\n".join(line.removeprefix("# ") if line[2:3] == "[" or ENTRY.fullmatch(line) else line for line in LINES)
    for name in ("tls.crt", "tls.key", "ca.pem"):
        (tmp_path / name).touch()
    path = tmp_path / "config.toml"
    path.write_text(text.replace("/etc/notify-server", str(tmp_path)), encoding="utf-8")
    config = load_config(path, environ={})
    assert config.verify.user_agent == Config().verify.user_agent
    assert config.auth.admin_token is not None
    assert config.verify.for_host("www.example.com").max_redirects == 0
    assert tomllib.loads(path.read_text(encoding="utf-8"))["verify"]["hosts"].keys() == {"*.example.com"}
