"""What a part of the benchmark is given and gives: its setting, statistics, and tables for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

T = TypeVar("T")

Raw = Mapping[str, object]
Row = Sequence[str | float | None]


class MissingToolError(Exception):
    """A program or package that a benchmark needs is not installed; the text says which."""


@dataclass(frozen=True)
class Setting:
    """The arguments of a part. `work` is an empty directory of its own; `say` reports progress."""

    work: Path
    quick: bool = False
    say: Callable[[str], None] = lambda text: None

    @property
    def rounds(self) -> int:
        """How often each peer has its turn."""
        return 1 if self.quick else 3

    def of(self, whole: T, quick: T) -> T:
        """The one for a whole run, or the one for a quick run."""
        return quick if self.quick else whole


@dataclass(frozen=True)
class Column:
    """A column of figures. `form` is a format specification such as `,.0f`; the names of rows need none."""

    name: str
    form: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table: rows of texts and figures, as many as there are columns; None where there is nothing to tell."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a part gives: tables to print, and the raw figures behind them, ready for JSON."""

    sheets: Sequence[Sheet] = field(default_factory=list)
    raw: Raw = field(default_factory=dict)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the sorted values that `share` of them do not exceed (nearest rank); NaN when there is none."""
    if not values:
        return math.nan
    return values[max(0, math.ceil(share * len(values)) - 1)]


def median_by(runs: Sequence[T], of: Callable[[T], float]) -> float:
    """The median of one figure of several runs; NaN when there is none."""
    return median(of(run) for run in runs) if runs else math.nan


def cell(value: str | float | None, form: str) -> str:
    """A figure as it is printed."""
    if isinstance(value, str):
        return value
    if value is None or math.isnan(value):
        return "–"
    return format(value, form)


def table(sheet: Sheet) -> Table:
    """The sheet for the console."""
    rendered = Table(title=sheet.title, title_justify="left")
    for place, column in enumerate(sheet.columns):
        rendered.add_column(column.name, justify="right" if place else "left")
    for row in sheet.rows:
        cells = (cell(value, column.form) for value, column in zip(row, sheet.columns, strict=True))
        rendered.add_row(*(escape(text) for text in cells))
    return rendered


def show(console: Console, outcome: Outcome) -> None:
    """Print the part's tables."""
    for sheet in outcome.sheets:
        console.print()
        console.print(table(sheet))
        if sheet.note:
            console.print(sheet.note, style="dim", highlight=False)


def in_turn(setting: Setting, peers: Mapping[str, Callable[[int], T]]) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Run the peers one after the other, round by round: what disturbs the machine for a while disturbs them all.

    Each is called with the round's number. The runs by peer, and why a peer that cannot be had is missing.
    """
    runs: dict[str, list[T]] = {name: [] for name in peers}
    missing: dict[str, str] = {}
    for turn in range(setting.rounds):
        for name, run in peers.items():
            if name in missing:
                continue
            setting.say(f"round {turn + 1} of {setting.rounds}: {name}")
            try:
                runs[name].append(run(turn))
            except MissingToolError as error:
                missing[name] = str(error)
    return runs, missing


def row_name(name: str, missing: Mapping[str, str]) -> str:
    """The peer's name, and in its own row that it could not be had."""
    return f"{name} ({missing[name]})" if name in missing else name
