"""Loads the SQL files of the engines: numbered migrations, and named queries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from notify_server.errors import StoreRefusedError

_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)
_COMMENT = re.compile(r"^\s*--.*\n", re.MULTILINE)


class Migration(NamedTuple):
    """One step of the schema: applying `script` to version `version - 1` gives `version`."""

    version: int
    name: str
    script: str


@cache
def load_queries(dialect: str, name: str = "queries") -> Mapping[str, str]:
    """Return the named queries of `store/<dialect>/<name>.sql`, without comments and closing semicolons."""
    text = (Path(__file__).parent / dialect / f"{name}.sql").read_text(encoding="utf-8")
    parts = _NAME.split(text)[1:]
    return {
        name: _COMMENT.sub("", block).strip().removesuffix(";")
        for name, block in zip(parts[::2], parts[1::2], strict=True)
    }


@cache
def load_with_macros(dialect: str, name: str, *macros: str) -> Mapping[str, str]:
    """Return the named queries of a file, with each `:macro` replaced by the block of that name."""
    queries = dict(load_queries(dialect, name))
    meanings = {macro: queries.pop(macro) for macro in macros}
    for query, text in queries.items():
        for macro, meaning in meanings.items():
            text = text.replace(f":{macro}", meaning)
        queries[query] = text
    return queries


@cache
def load_migrations(dialect: str) -> tuple[Migration, ...]:
    """Return the migrations of `store/<dialect>/` in order. Raises ValueError when their numbers have a gap."""
    folder = Path(__file__).parent / dialect
    found = sorted(
        Migration(int(entry.name[:4]), entry.name.removesuffix(".sql"), entry.read_text(encoding="utf-8"))
        for entry in folder.iterdir()
        if re.fullmatch(r"\d{4}_\w+\.sql", entry.name)
    )
    if [step.version for step in found] != list(range(1, len(found) + 1)):
        raise ValueError(f"store/{dialect}: the migrations are not numbered from 0001 without a gap")
    return tuple(found)


@cache
def expand_rows(query: str, columns: int, rows: int) -> str:
    """Replace `:rows` in the query by `rows` rows of `columns` parameters."""
    row = "(" + ",".join("?" * columns) + ")"
    return query.replace(":rows", ",".join([row] * rows))


def check_version(place: str, dialect: str, present: int) -> None:
    """Raise StoreRefusedError unless `present`, the schema version of the record at `place`, is the one that this
    program knows.
    """
    known = len(load_migrations(dialect))
    if present > known:
        raise StoreRefusedError(
            f"{place}: has schema version {present}, this program knows {known}: "
            "use the newer notify_server that wrote it"
        )
    if present < known:
        raise StoreRefusedError(
            f"{place}: has schema version {present}, this program needs {known}: run `notify-server migrate`"
        )


def unfinished(place: str, source: str) -> StoreRefusedError:
    """Return the error for an unfinished copy, whose table `copying` names its source."""
    return StoreRefusedError(
        f"{place}: is an unfinished copy of {source}: finish it with the same `notify-server copy` that began it"
    )
