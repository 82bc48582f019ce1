"""The statements about expectations seek by an index, however many are open."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from notify_server.store.postgres.session import SEEKING
from notify_server.store.sql import load_queries
from notify_server.store.sqlite.database import connect
from tests.store.builders import NOW
from tests.support.postgres import new_schema
from tests.support.postgres_faults import opened

# With the index that each of them seeks or, for the first entry of a state, steps into.
SQLITE: dict[str, tuple[Any, str]] = {
    "any_limit": ((), "expectation_due"),
    "any_unmatched": ((), "expectation_unmatched"),
    "due": ((NOW, 100), "expectation_due"),
    "named": (("[1, 2]",), "expectation_named"),
    "unnamed": (("a", 3), "expectation_unnamed"),
    "matched": (("[1, 2]",), "expectation_batch"),
    "known": (("r", "a"), "sqlite_autoindex_expectation_1"),
    "free_batches": ({"api_code": "a", "since": NOW}, "expectation_ordered"),
    "judged": (("[1, 2]",), "expectation_batch"),
    "prune_of": ((1,), "expectation_batch"),
    "prune_unmatched": ((NOW, 100), "expectation_unmatched"),
}
POSTGRES: dict[str, tuple[list[Any], str]] = {
    "any_limit": ([], "expectation_due"),
    "any_unmatched": ([], "expectation_unmatched"),
    "due": ([NOW, 100], "expectation_due"),
    "named": ([[1, 2]], "expectation_named"),
    "unnamed": ([["a"], [3]], "expectation_unnamed"),
    "matched": ([[1, 2]], "expectation_batch"),
    "known": ([["r"], ["a"]], "expectation_reference_api_code_key"),
    "free_batches": (["a", NOW, 3], "expectation_ordered"),
    "any_of": ([[1, 2]], "expectation_batch"),
    "judged": ([[1, 2]], "expectation_batch"),
    "prune_of": ([[1]], "expectation_batch"),
    "prune_unmatched": ([NOW, 100], "expectation_unmatched"),
}
COLUMNS = "reference, api_code, batch_id, notify_by, verdict_by, batch, created_at, away_ms, due_at"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("plans") / "notify.db"
    connect(path).close()
    return path


@pytest.mark.parametrize("name", SQLITE)
def test_statements_seek_by_their_index_on_sqlite(database: Path, name: str) -> None:
    parameters, index = SQLITE[name]
    statement = load_queries("sqlite", "expectation")[name]
    with closing(sqlite3.connect(database)) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
    about = [step for step in plan if re.search(r"\bexpectation\b", step)]
    assert any(index in step for step in about), plan
    assert all("USING" in step for step in about), plan


async def test_statements_seek_by_their_index_on_postgres() -> None:
    url = await new_schema()
    async with opened(url):
        connection = await asyncpg.connect(url, server_settings=SEEKING)
        try:
            await connection.execute(
                f"INSERT INTO expectation ({COLUMNS})"
                " SELECT 'r' || n, 'a', CASE WHEN n % 2 = 0 THEN 'b' || n END, n, n, CASE WHEN n % 3 = 0 THEN n END, n,"
                " 0, CASE WHEN n % 5 = 0 THEN n END FROM generate_series(1, 5000) AS n"
            )
            await connection.execute("ANALYZE expectation")
            for name, (parameters, index) in POSTGRES.items():
                statement = load_queries("postgres", "expectation")[name]
                rows = await connection.fetch(f"EXPLAIN (FORMAT JSON) {statement}", *parameters)
                plan = json.dumps(json.loads(rows[0][0]))
                assert f'"Index Name": "{index}"' in plan, (name, plan)
                assert not re.search(r'"Node Type": "Seq Scan"[^{}]*"Relation Name": "expectation"', plan), (name, plan)
        finally:
            await connection.close()
