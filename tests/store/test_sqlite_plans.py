"""What the queries cost: none walks over a table that grows, whatever SQLite knows or believes of its contents."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from notify_server.store.sql import expand_rows, load_queries
from notify_server.store.sqlite.database import connect
from notify_server.store.sqlite.store import SqliteStore
from tests.store.builders import NOW, finished, take_in
from tests.support.sqlite_faults import connection_of, opened

SQL = load_queries("sqlite")
Parameters = Sequence[Any] | dict[str, Any]

# Run once, when the store is opened; or over the rejections, whose number is bounded; or every ten minutes, over the
# hosts with pending files, with a seek for each.
MAY_WALK = {"backlog", "inbox_files", "rejection_size", "late_files"}
# Walk from one end of a table and stop early; how early, the steps below tell.
WALK_FROM_AN_END = {"inbox_start", "prune_notifications", "rejection_oldest", "prune_rejections", "rejection_newest"}


def rows(*rows: Sequence[Any]) -> tuple[int, int, list[Any]]:
    """Parameters of a `:rows` query."""
    return len(rows[0]), len(rows), [value for row in rows for value in row]


FILE_IDS = [7, 60, 120]
BATCH_IDS = [1, 2, 3]
ID_TEXT = str(FILE_IDS)
OUTCOME = ["available", None, 1, None, 200, 1, "t", "e", "m", None, "a", 1.0, NOW, "v", "c", "{}", "[]"]

# What each query is run with; the answers are of one size whatever the tables'.
WITH: dict[str, Parameters | tuple[int, int, list[Any]]] = {
    "accept": rows(*(["b", "a", NOW, "r", "none", "id", 1, None, b"{}"] for _ in range(3))),
    "nonce_purge": [0],
    "late_files_due": [NOW, ID_TEXT],
    "late_deliveries_due": [NOW, NOW + 400 * 86_400_000],
    "nonce_consume": ["new", NOW],
    "reject": rows([NOW, "r", "400", "d", b"{}", "id"]),
    "rejection_replayed": ["3"],
    "rejection_oldest": [10],
    "rejection_newest": [],
    "rejection_delete_through": [3],
    "inbox_start": [],
    "inbox_end": [],
    "inbox": [0, 10**9, 5],
    "inbox_done": (1, 2, [1, 2, NOW]),
    "batch_of_discarded": [1],
    "batch_not_expanding": [1],
    "batch_insert": rows(["b1", "a", NOW, NOW], ["new", "a", NOW, NOW]),
    "batch_find": rows(["b1", "a"], ["b2", "a"], ["nowhere", "a"]),
    "batch_expanded": rows(*([id, 0, 0, 0, 0, 0, None, 1, NOW, 1, 1, None, None] for id in BATCH_IDS)),
    "files_existing": [2, '["k1", "k2", "new"]'],
    "files_insert": rows(*([1, name, "u", "h", "FINISHED", "pending", None, NOW, None, None] for name in ("x", "y"))),
    "file_replace": ["u", "h", "FINISHED", "pending", None, NOW, None, None, 60],
    "recheck_find": [ID_TEXT],
    "recheck_files": [NOW, ID_TEXT],
    "recheck_batches": rows(*([id, 0, 0, 0] for id in BATCH_IDS)),
    "due_hosts": {"after": "", "limit": 5},
    "claim": {"host": "h0001", "due": NOW - 1, "id": 5, "now": NOW, "most": 10},
    "record_files": rows(*([id, *OUTCOME] for id in FILE_IDS)),
    "record_attempts": rows(*([id, NOW, "HEAD", None, 200, None, 1, 1, 1, 1, 1, "r", "v", "c"] for id in FILE_IDS)),
    "attempts_trim": {"files": ID_TEXT, "others": 1},
    "record_batches": rows(*([id, 1, 0, 0] for id in BATCH_IDS)),
    "verdicts": (1, 3, [*BATCH_IDS, NOW]),
    "heartbeat": [NOW],
    "prune_batches": [NOW, 10],
    "prune_files": [2, 10],
    "prune_attempts_of": [ID_TEXT],
    "prune_files_of": [ID_TEXT],
    "prune_counted": [1, 1, 0, 0, 0, 2],
    "prune_batch": [2],
    "prune_notifications": {"before": NOW, "limit": 10},
    "prune_rejections": {"before": NOW, "limit": 10},
}


def fill(connection: sqlite3.Connection, batches: range, hosts: int) -> None:
    """Batches with 50 files each, every other one settled; all hosts have files waiting."""
    connection.execute("BEGIN")
    connection.executemany(
        "INSERT INTO notification (batch_id, api_code, received_at, remote_addr, signature, request_id, files,"
        " expanded_at, body) VALUES (?, 'a', ?, 'r', 'none', 'id', 50, ?, '{}')",
        [(f"b{n}", NOW - 10_000 + n, NOW if n < batches.stop - 3 else None) for n in batches],
    )
    connection.executemany(
        "INSERT INTO batch (batch_id, api_code, first_received_at, last_received_at, verdict, completed_at, files,"
        " pending, available) VALUES (?, 'a', ?, ?, ?, ?, 50, ?, ?)",
        [
            (f"b{n}", NOW, NOW, *(("pending", None, 50, 0) if n % 2 else ("complete", NOW - 10_000 + n, 0, 50)))
            for n in batches
        ],
    )
    connection.executemany(
        "INSERT INTO file (batch, oss_object_name, target_url, host, reported_status, state, next_attempt_at)"
        " VALUES (?, ?, 'https://h/k', ?, 'FINISHED', ?, ?)",
        [
            (n, f"k{k}", f"h{k % hosts:04}", *(("pending", NOW) if n % 2 else ("available", None)))
            for n in batches
            for k in range(50)
        ],
    )
    connection.execute(
        "INSERT INTO attempt (file, started_at, method, total_ms)"
        " SELECT file.id, 1, 'HEAD', made.value FROM file, json_each('[1, 2, 3]') AS made WHERE file.batch >= ?",
        (batches.start,),
    )
    connection.executemany(
        "INSERT INTO rejection (received_at, remote_addr, code, detail, body) VALUES (?, 'r', '400', 'd', x'00')",
        [(NOW - 10_000 + n,) for n in batches for _ in range(3)],
    )
    connection.executemany(
        "INSERT INTO nonce (key, expires_at) VALUES (?, ?)", [(f"{n} {k}", NOW) for n in batches for k in range(10)]
    )
    connection.execute("COMMIT")


def statement(name: str) -> tuple[str, Parameters]:
    """The query and its parameters as the store runs it."""
    parameters = WITH[name]
    if ":rows" not in SQL[name]:
        assert isinstance(parameters, list | dict)
        return SQL[name], parameters
    assert isinstance(parameters, tuple)
    columns, count, values = parameters
    return expand_rows(SQL[name], columns, count), values


@pytest.fixture(params=["never", "when full", "when nearly empty"], scope="module")
def databases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[sqlite3.Connection, sqlite3.Connection]]:
    """A small database and one eight times as large. What ANALYZE found is kept, however much the database grows."""
    directory: Path = tmp_path_factory.mktemp("plans")
    with closing(connect(directory / "small.db")) as small, closing(connect(directory / "large.db")) as large:
        for connection, scale in ((small, 1), (large, 8)):
            fill(connection, range(1, 4), 5)
            if request.param == "when nearly empty":
                connection.execute("ANALYZE")
            fill(connection, range(4, 40 * scale + 1), 5 * scale)
            if request.param == "when full":
                connection.execute("ANALYZE")
        yield small, large


def steps(connection: sqlite3.Connection, name: str) -> int:
    """How many steps of SQLite's machine the query takes."""
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1

    query, parameters = statement(name)
    connection.execute("BEGIN IMMEDIATE")
    connection.set_progress_handler(step, 1)
    try:
        connection.execute(query, parameters).fetchall()
    finally:
        connection.set_progress_handler(None, 1)
        connection.execute("ROLLBACK")
    return taken


def test_every_query_is_looked_at() -> None:
    assert set(WITH) | MAY_WALK == set(SQL)
    assert not set(WITH) & MAY_WALK


@pytest.mark.parametrize("name", WITH)
def test_a_query_costs_the_same_however_large_the_record_is(
    databases: tuple[sqlite3.Connection, sqlite3.Connection], name: str
) -> None:
    small, large = (steps(connection, name) for connection in databases)
    assert large <= 1.2 * small + 10


@pytest.mark.parametrize("name", sorted(set(WITH) - WALK_FROM_AN_END))
def test_the_plan_of_a_query_walks_over_no_table(
    databases: tuple[sqlite3.Connection, sqlite3.Connection], name: str
) -> None:
    query, parameters = statement(name)
    for connection in databases:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", parameters)]
        walks = [line for line in plan if re.match(r"SCAN (file|attempt|batch|notification|rejection|nonce)\b", line)]
        assert walks == [], plan


@pytest.mark.parametrize(
    ("name", "search"),
    [
        ("record_files", r"SEARCH file USING INTEGER PRIMARY KEY \(rowid=\?\)"),
        ("recheck_find", r"SEARCH file USING INTEGER PRIMARY KEY \(rowid=\?\)"),
        ("recheck_files", r"SEARCH file USING INTEGER PRIMARY KEY \(rowid=\?\)"),
        ("recheck_batches", r"SEARCH batch USING INTEGER PRIMARY KEY \(rowid=\?\)"),
        ("rejection_replayed", r"SEARCH rejection USING INTEGER PRIMARY KEY \(rowid=\?\)"),
        ("record_batches", r"SEARCH batch USING INTEGER PRIMARY KEY \(rowid=\?\)"),
        ("batch_expanded", r"SEARCH batch USING INTEGER PRIMARY KEY \(rowid=\?\)"),
        ("verdicts", r"SEARCH batch USING INTEGER PRIMARY KEY \(rowid=\?\)"),
        ("claim", r"SEARCH file USING INDEX file_due \(host=\? AND next_attempt_at=\? AND rowid>\?\)"),
        ("claim", r"SEARCH file USING INDEX file_due \(host=\? AND next_attempt_at>\? AND next_attempt_at<\?\)"),
        ("due_hosts", r"SEARCH file USING INDEX file_due \(host>\?\)"),
        ("files_existing", r"SEARCH file USING INDEX \w+ \(batch=\? AND oss_object_name=\?\)"),
        ("batch_find", r"SEARCH batch USING INDEX \w+ \(batch_id=\? AND api_code=\?\)"),
        ("prune_batches", r"SEARCH batch USING INDEX batch_completed \(completed_at<\?\)"),
    ],
)
def test_a_hot_query_finds_its_rows_by_the_index_made_for_it(
    databases: tuple[sqlite3.Connection, sqlite3.Connection], name: str, search: str
) -> None:
    query, parameters = statement(name)
    for connection in databases:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", parameters)]
        assert any(re.match(search, line) for line in plan), plan


def test_finding_the_start_of_the_inbox_costs_no_more_than_its_length(tmp_path: Path) -> None:
    with closing(connect(tmp_path / "notify.db")) as connection:
        fill(connection, range(1, 321), 40)
        before = steps(connection, "inbox_start")
        connection.execute("UPDATE notification SET expanded_at = NULL WHERE id > 300 - 100")
        assert steps(connection, "inbox_start") > before
        connection.execute("UPDATE notification SET expanded_at = 1")
        assert steps(connection, "inbox_start") <= before


async def test_claiming_from_many_hosts_at_once_costs_what_it_costs_one_by_one(path: Path) -> None:
    hosts = [f"h{n}.example" for n in range(40)]

    async def steps_of(store: SqliteStore, *wanted: tuple[str, int]) -> int:
        taken = 0

        def step() -> None:
            nonlocal taken
            taken += 1

        connection_of(store).set_progress_handler(step, 1)
        files = await store.claim(wanted, NOW)
        connection_of(store).set_progress_handler(None, 1)
        assert len(files) == sum(n for _, n in wanted)
        store.release(files)
        return taken

    async with opened(path) as store:
        await take_in(store, *(finished(f"{n} {host}", host=host) for host in hosts for n in range(300)))
        one_by_one = [await steps_of(store, (host, 8)) for host in hosts]
        assert await steps_of(store, *((host, 8) for host in hosts)) <= 1.2 * sum(one_by_one)
