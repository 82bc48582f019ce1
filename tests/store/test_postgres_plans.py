"""What the queries cost on PostgreSQL: each seeks what it is about, whatever is believed of the tables' contents."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import asyncpg
import pytest

from notify_server.store.postgres_session import CLAIMING, SEEKING, connect
from notify_server.store.queries import load_queries
from tests.store.builders import NOW
from tests.store.postgres_faults import opened
from tests.store.postgres_server import new_schema

SQL = load_queries("postgres")

# These grow; the others hold a few thousand rows at most.
GROWING = {"notification", "batch", "file", "attempt", "nonce"}
# Walk from one end of an index and stop early, or over what is waiting alone.
MAY_WALK = {
    "inbox": "notification_inbox",
    "inbox_waits": "notification_inbox",
    "backlog": "notification_inbox",
    "prune_notifications": "notification_pkey",
}

IDS = [7, 60, 120]
OUTCOME = [
    ["available"] * 3,
    [None] * 3,
    [1] * 3,
    [None] * 3,
    [200] * 3,
    [1] * 3,
    *[["t"] * 3] * 5,
    [1.0] * 3,
    [NOW] * 3,
]

# What each query is run with; the answers are of one size whatever the tables'.
WITH: dict[str, Sequence[Any]] = {
    "node_register": ["name", 90.0, "probes"],
    "node_renew": [1, 90.0],
    "node_leave": [1],
    "nodes_alive": [],
    "nodes_named": [],
    "nodes_sweep": [],
    "leases_leave": [1],
    "leases_sweep": [],
    "leases_unknown": [1, IDS],
    "leases_restart": [IDS],
    "leases_end": [IDS, 1],
    "accept": [["b"], ["a"], [NOW], ["r"], ["none"], ["id"], [1], [None], ["{}"]],
    "nonces_consume": [["k1", "new"], [NOW, NOW], NOW],
    "nonces_purge": [NOW],
    "rejections_replayed": [IDS],
    "reject": [[NOW], ["r"], ["400"], ["d"], [b"{}"], ["id"]],
    "rejections_bound": [10, 10],
    "inbox": [5],
    "inbox_waits": [],
    "inbox_still": [IDS],
    "inbox_done": [IDS, NOW],
    "batch_of_discarded": [1],
    "batch_not_expanding": [1],
    "batches_insert": [["b1", "new"], ["a", "a"], [NOW, NOW]],
    "batches_named": [["b1", "b2", "nowhere"], ["a", "a", "a"]],
    "batches_lock": [IDS],
    "batches_expanded": [
        IDS, *[[0] * 3] * 5, [None] * 3, [True] * 3, [NOW] * 3, [False] * 3, [1] * 3,
    ],
    "files_existing": [[2, 2, 3], ["k1", "k2", "new"]],
    "files_insert": [
        [1], ["x"], ["u"], ["h"], ["FINISHED"], ["pending"], [None], [NOW], [None],
    ],
    "files_replace": [IDS, *[["u"] * 3] * 2, ["FINISHED"] * 3, ["pending"] * 3, [None] * 3, [NOW] * 3, [None] * 3],
    "batches_of": [IDS],
    "recheck_find": [IDS],
    "recheck_files": [IDS, NOW],
    "recheck_batches": [IDS, [0] * 3, [0] * 3, [0] * 3],
    "due_hosts": ["", 5],
    "claim": [["h001", "h002"], [10, 10], NOW, 1],
    "release": [IDS, 1],
    "files_lock": [IDS],
    "record_files": [IDS, *OUTCOME],
    "record_attempts": [IDS, [NOW] * 3, ["HEAD"] * 3, [None] * 3, [200] * 3, [None] * 3, *[[1.0] * 3] * 5, ["r"] * 3],
    "attempts_trim": [IDS, 1],
    "record_batches": [IDS, [0] * 3, [0] * 3, [0] * 3],
    "verdicts": [IDS, NOW],
    "backlog": [],
    "heartbeat": [NOW],
    "prune_batches": [NOW, 10],
    "prune_files": [2, 10],
    "prune_attempts_of": [IDS],
    "prune_files_of": [IDS],
    "prune_counted": [2, 1, 1, 0, 0, 0],
    "prune_batch": [2],
    "prune_notifications": [NOW, 10],
    "prune_rejections": [NOW, 10],
}  # fmt: skip

FILL = """
INSERT INTO notification (batch_id, api_code, received_at, remote_addr, signature, request_id, files, expanded_at, body)
SELECT 'b' || n, 'a', n, 'r', 'none', 'id', 1, CASE WHEN n < 4990 THEN n END, '{}' FROM generate_series(1, 5000) AS n;
INSERT INTO batch (batch_id, api_code, first_received_at, last_received_at, files, pending, available, verdict,
                   completed_at)
SELECT 'b' || n, 'a', n, n, 10, CASE WHEN n % 100 = 0 THEN 1 ELSE 0 END, CASE WHEN n % 100 = 0 THEN 9 ELSE 10 END,
    CASE WHEN n % 100 = 0 THEN 'pending' ELSE 'complete' END, CASE WHEN n % 100 <> 0 THEN n END
FROM generate_series(1, 3000) AS n;
INSERT INTO file (batch, oss_object_name, target_url, host, reported_status, state, next_attempt_at)
SELECT 1 + n / 10, 'k' || n % 10, 'u', 'h' || lpad((n % 300)::text, 3, '0'), 'FINISHED',
    CASE WHEN n % 50 = 0 THEN 'pending' ELSE 'available' END, CASE WHEN n % 50 = 0 THEN n END
FROM generate_series(0, 29999) AS n;
INSERT INTO attempt (file, started_at, method, total_ms)
SELECT n, n, 'HEAD', 1.0 FROM generate_series(1, 30000) AS n;
INSERT INTO nonce SELECT 'k' || n, n FROM generate_series(1, 5000) AS n;
INSERT INTO lease (file, node) SELECT id, 1 FROM file WHERE state = 'pending' AND id % 3 = 0;
"""


@pytest.fixture
async def connection() -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """One such as the store's own, on new tables."""
    url = await new_schema()
    async with opened(url):
        connection = await connect(url, **SEEKING)
        yield connection
        await connection.close()


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


async def walks(connection: asyncpg.Connection[asyncpg.Record], name: str) -> list[str]:
    """What of a table that grows the query reads without seeking, one line each."""
    hashes = CLAIMING["enable_hashjoin"] if name == "claim" else SEEKING["enable_hashjoin"]
    await connection.execute(f"SET enable_hashjoin = {hashes}")
    answer = await connection.fetchval(f"EXPLAIN (FORMAT JSON) {SQL[name]}", *WITH[name])
    found = []
    for node in nodes(json.loads(answer)[0]["Plan"]):
        kind, table, index = node["Node Type"], node.get("Relation Name"), node.get("Index Name")
        if kind == "Seq Scan" and table in GROWING:
            found.append(f"{kind} on {table}")
        if "Index" in kind and "Index Cond" not in node and index != MAY_WALK.get(name):
            owner = await connection.fetchval(
                "SELECT relname FROM pg_index JOIN pg_class ON oid = indrelid WHERE indexrelid = $1::regclass", index
            )
            if owner in GROWING:
                found.append(f"{kind} of {index}")
    return found


def test_every_query_is_looked_at() -> None:
    assert WITH.keys() == SQL.keys()


async def test_no_query_walks_over_a_table_that_grows_though_it_is_believed_to_be_empty(
    connection: asyncpg.Connection[asyncpg.Record],
) -> None:
    assert {name: found for name in WITH if (found := await walks(connection, name))} == {}


async def test_no_query_walks_over_a_table_that_grows_when_it_is_known_to_be_large(
    connection: asyncpg.Connection[asyncpg.Record],
) -> None:
    async with connection.transaction():
        await connection.execute(FILL)
        await connection.execute("ANALYZE")
        assert {name: found for name in WITH if (found := await walks(connection, name))} == {}


async def test_hosts_that_are_due_are_sought_one_by_one(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    async with connection.transaction():
        await connection.execute(FILL)
        await connection.execute("ANALYZE file")
        answer = await connection.fetchval(
            f"EXPLAIN (FORMAT JSON, ANALYZE, BUFFERS) {SQL['due_hosts']}", *WITH["due_hosts"]
        )
        plan = json.loads(answer)[0]["Plan"]
        assert plan["Actual Rows"] == 5
        # Fewer rows are touched than a host has files.
        assert sum(node["Actual Loops"] for node in nodes(plan) if "Index" in node["Node Type"]) < 20
