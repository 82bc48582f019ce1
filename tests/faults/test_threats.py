"""The README's table of attacks and faults is whole, and the tests that it names exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent.parent
ROWS = 90
LAST_ROW = 135
REAL_USE = "I"
FORWARDING = "J"
# Of each group, the first row: the groups follow one another without a gap.
GROUPS = {"A": 1, "B": 33, "C": 41, "D": 51, "E": 57, "F": 69, "G": 79, "H": 85}


class Row(NamedTuple):
    """A line of the table; `seen_by` has a path and a name, relative to tests/, each."""

    group: str
    number: int
    attack: str
    outcome: str
    seen_by: str


def read() -> list[Row]:
    rows, group = [], ""
    for line in (Path(__file__).parent / "README.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## ([A-Z])\. ", line):
            group = heading[1]
        elif re.match(r"\| [0-9]", line):
            number, attack, outcome, seen_by = (cell.strip() for cell in line.strip("|").split("|"))
            rows.append(Row(group, int(number), attack, outcome, seen_by))
    return rows


TABLE = read()


@cache
def functions(path: str) -> frozenset[str]:
    """The functions at the top level of a module, read from its text."""
    module = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_row_is_there_once_in_its_order_and_group() -> None:
    numbers = [row.number for row in TABLE]
    assert numbers[:ROWS] == list(range(1, ROWS + 1))
    # Rows of what real use has broken follow, each once, in the order of their numbers.
    assert numbers == sorted(set(numbers))
    assert {group: min(row.number for row in TABLE if row.group == group) for group in GROUPS} == GROUPS
    assert {row.group for row in TABLE} == {*GROUPS, REAL_USE, FORWARDING}
    assert all((row.group == REAL_USE) == (ROWS < row.number <= LAST_ROW) for row in TABLE)
    assert all((row.group == FORWARDING) == (row.number > LAST_ROW) for row in TABLE)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: str(row.number))
def test_every_row_can_be_read_alone_and_names_tests_that_exist(row: Row) -> None:
    assert row.attack and row.outcome
    if row.seen_by.startswith("no test"):
        assert re.fullmatch(r"no test( yet)?: [^`]+", row.seen_by)
        return
    named = row.seen_by.split("<br>")
    assert len(set(named)) == len(named)
    for entry in named:
        found = re.fullmatch(r"`([a-z0-9_/]+\.py)::([a-z0-9_]+)`", entry)
        assert found, entry
        path, name = found.groups()
        # A measurement is none of the tests, but is run by its name.
        assert (name.startswith("test_") and Path(path).name.startswith("test_")) or (
            path.startswith("torture/") and name == "run"
        )
        assert name in functions(path), entry


def test_a_name_that_is_not_there_would_be_noticed() -> None:
    assert "test_every_row_is_there_once_in_its_order_and_group" in functions("faults/test_threats.py")
    assert "test_nothing_of_the_kind" not in functions("faults/test_threats.py")
