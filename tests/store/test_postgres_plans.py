"""What the queries cost on PostgreSQL: each seeks what it is about, whatever is believed of the tables' contents, and
touches as much in a large record as in a small one.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import product
from typing import Any

import asyncpg
import pytest

from notify_server.model import FileState, Verdict
from notify_server.store.base import MAX_ID
from notify_server.store.postgres.records import PostgresRecords
from notify_server.store.postgres.session import CLAIMING, SEEKING, connect
from notify_server.store.reading import queries, walk
from notify_server.store.reading.types import BatchFilter, FileFilter, Records
from notify_server.store.sql import load_queries
from tests.store.builders import NOW
from tests.support.postgres import new_schema
from tests.support.postgres_faults import opened

SQL = load_queries("postgres")

# These grow; the others hold a few thousand rows at most.
GROWING = {"notification", "batch", "file", "attempt", "nonce"}
# Walk from one end of an index and stop early, or over waiting rows only.
MAY_WALK = {
    "backlog": "notification_inbox",
    "prune_notifications": "notification_pkey",
}

# What waits is the same in every record: so many batches with a pending file at each of so many hosts.
BATCHES, HOSTS = 300, 10
SMALL, LARGE = 10_000, 1_000_000
EXPLAIN = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)"
# What a page of people's may look at; and what those of one kind may differ by.
WALKED = 100

# Groups as large as they come: a plan that is right for a few may be another for many.
MANY = 256
IDS = list(range(11, 11 + MANY))
OUTCOME = [
    ["available"] * MANY,
    [None] * MANY,
    [1] * MANY,
    [None] * MANY,
    [200] * MANY,
    [1] * MANY,
    *[["t"] * MANY] * 5,
    [1.0] * MANY,
    [NOW] * MANY,
    *[["v"] * MANY] * 4,
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
    "accept": [
        *(column * MANY for column in (["b"], ["a"], [NOW], ["r"], ["none"], ["id"], [1], [None], ["{}"])),
    ],
    "nonces_consume": [["k1", *(f"new{n}" for n in IDS)], [NOW] * (MANY + 1), NOW],
    "nonces_purge": [10],
    "session_end": ["session/1", NOW],
    "secret_keep": ["name", "value"],
    "secret": ["name"],
    "late_files_due": [NOW + 400 * 86_400_000, NOW, 100],
    "late_deliveries_due": [NOW, NOW + 400 * 86_400_000],
    "rejections_replayed": [IDS],
    "reject": [[NOW], ["r"], ["400"], ["d"], [b"{}"], ["id"]],
    "rejections_bound": [10, 10],
    "inbox": [0, 64],
    "inbox_waits": [0],
    "inbox_still": [IDS],
    "inbox_done": [IDS, NOW],
    "batch_of_discarded": [1],
    "batch_not_expanding": [1],
    "batches_insert": [
        [f"new{n}" for n in IDS], ["a"] * MANY, *[[0] * MANY] * 5, [None] * MANY, [True] * MANY, [NOW] * MANY,
        [1] * MANY, [None] * MANY,
    ],
    "batches_named": [[*(f"w{n}" for n in IDS), "nowhere"], ["a"] * (MANY + 1)],
    "batches_lock": [IDS],
    "batches_expanded": [
        IDS, *[[0] * MANY] * 5, [None] * MANY, [True] * MANY, [NOW] * MANY, [False] * MANY, [1] * MANY,
        *[[None] * MANY] * 2,
    ],
    "files_existing": [[*IDS, 3], [*(f"k{n % 10}" for n in IDS), "new"]],
    "files_replace": [
        IDS, *[["u"] * MANY] * 2, ["FINISHED"] * MANY, ["pending"] * MANY, [None] * MANY, [NOW] * MANY,
        *[[None] * MANY] * 2,
    ],
    "batches_of": [IDS],
    "recheck_find": [IDS],
    "recheck_files": [IDS, NOW],
    "recheck_batches": [IDS, [0] * MANY, [0] * MANY, [0] * MANY],
    "due_hosts": ["", 5],
    "claim": [["w0", "w1"], [128, 128], [-MAX_ID, 100], [0, 5], NOW, 1],
    "release": [IDS, 1],
    "record_begin": [IDS, IDS, 1],
    "record_files": [IDS, *OUTCOME, 50],
    "batches_settled": [IDS, [1] * MANY, [0] * MANY, [0] * MANY, NOW],
    "backlog": [],
    "heartbeat": [NOW],
    "prune_batches": [NOW, 500],
    "prune_files": [IDS, 500],
    "prune_attempts_of": [IDS],
    "prune_files_of": [IDS],
    "prune_batches_of": [IDS, [10] * MANY],
    "prune_counted": [2, 1, 1, 0, 0, 0],
    "prune_notifications": [NOW, 500],
    "prune_rejections": [NOW, 10],
}  # fmt: skip

WAITING = f"""
INSERT INTO notification (batch_id, api_code, received_at, remote_addr, signature, request_id, files, expanded_at, body)
SELECT 'w' || n, 'a', n, 'r', 'none', 'id', {HOSTS}, CASE WHEN n > 60 THEN n END, '{{}}'
FROM generate_series(1, {BATCHES}) AS n;
INSERT INTO batch (batch_id, api_code, first_received_at, last_received_at, files, pending, last_notification)
SELECT 'w' || n, 'a', n, n, {HOSTS}, {HOSTS}, n FROM generate_series(1, {BATCHES}) AS n;
INSERT INTO file (batch, oss_object_name, target_url, host, reported_status, state, reason, next_attempt_at)
SELECT 1 + n / {HOSTS}, 'k' || n % {HOSTS}, 'u', 'w' || n % {HOSTS}, 'FINISHED', 'pending',
    CASE WHEN n % 3 = 0 THEN 'timeout' END, n
FROM generate_series(0, {BATCHES * HOSTS - 1}) AS n;
INSERT INTO node VALUES (1, 'alive', now() + interval '1 day', 'probes');
INSERT INTO lease (file, node) SELECT id, CASE WHEN id % 6 = 0 THEN 1 ELSE 2 END FROM file WHERE id % 3 = 0;
"""
# Of months: batches of ten files, one in ten of them incomplete, each file with one attempt.
HISTORY = """
INSERT INTO notification (batch_id, api_code, received_at, remote_addr, signature, request_id, files, expanded_at, body)
SELECT 'b' || n, 'a', n, 'r', 'none', 'id', 10, n, '{}' FROM generate_series(1, :files / 10) AS n;
INSERT INTO batch (batch_id, api_code, first_received_at, last_received_at, files, available, unavailable, verdict,
                   completed_at, last_notification)
SELECT 'b' || n, CASE WHEN n % 2 = 0 THEN 'a' ELSE 'b' END, n, n, 10, CASE WHEN n % 10 = 0 THEN 9 ELSE 10 END,
    CASE WHEN n % 10 = 0 THEN 1 ELSE 0 END, CASE WHEN n % 10 = 0 THEN 'incomplete' ELSE 'complete' END, n, n
FROM generate_series(1, :files / 10) AS n;
INSERT INTO file (batch, oss_object_name, target_url, host, reported_status, state, reason, attempts)
SELECT :batches + 1 + n / 10, 'k' || n % 10, 'u', 'h' || lpad((n % 300)::text, 3, '0'), 'FINISHED',
    CASE WHEN n % 100 = 99 THEN 'unavailable' ELSE 'available' END, CASE WHEN n % 100 = 99 THEN 'http_404' END, 1
FROM generate_series(0, :files - 1) AS n;
INSERT INTO attempt (file, started_at, method, total_ms) SELECT id, id, 'HEAD', 1.0 FROM file;
INSERT INTO nonce SELECT 'k' || n, n FROM generate_series(1, :files / 100) AS n;
"""


async def record_of(files: int) -> str:
    """The address of a record with what waits, and a history of so many files."""
    url = await new_schema()
    async with opened(url):
        pass
    connection = await asyncpg.connect(url, server_settings={"synchronous_commit": "off"})
    await connection.execute(WAITING + HISTORY.replace(":files", str(files)).replace(":batches", str(BATCHES)))
    # What a server has done of itself by then.
    await connection.execute("VACUUM (ANALYZE)")
    await connection.close()
    return url


@pytest.fixture(scope="module")
def urls() -> tuple[str, str]:
    """A small record, and a large one with the same files waiting."""

    async def made() -> tuple[str, str]:
        return await record_of(SMALL), await record_of(LARGE)

    return asyncio.run(made())


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


@pytest.fixture
async def tidied(urls: tuple[str, str]) -> tuple[str, str]:
    """Both records without what was rolled back in them, as a server leaves it after a while."""
    for url in urls:
        connection = await asyncpg.connect(url)
        await connection.execute("VACUUM (INDEX_CLEANUP ON)")
        await connection.close()
    return urls


def reads(name: str) -> bool:
    """Whether the query leaves nothing behind, rolled back or not."""
    return re.search(r"INSERT INTO|DELETE FROM|\bSET\b", SQL[name]) is None


@asynccontextmanager
async def connected(url: str, name: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """One such as the store's own, for this query; nothing that is done on it stays."""
    connection = await connect(url, (CLAIMING if name == "claim" else SEEKING))
    try:
        transaction = connection.transaction()
        await transaction.start()
        yield connection
        await transaction.rollback()
    finally:
        await connection.close()


async def walks(url: str, name: str) -> list[str]:
    """What of a table that grows the query reads without seeking, one line each."""
    async with connected(url, name) as connection:
        answer = await connection.fetchval(f"EXPLAIN (FORMAT JSON) {SQL[name]}", *WITH[name])
        found = []
        for node in nodes(json.loads(answer)[0]["Plan"]):
            kind, table, index = node["Node Type"], node.get("Relation Name"), node.get("Index Name")
            if kind == "Seq Scan" and table in GROWING:
                found.append(f"{kind} on {table}")
            if "Index" in kind and "Index Cond" not in node and index != MAY_WALK.get(name):
                owner = await connection.fetchval(
                    "SELECT relname FROM pg_index JOIN pg_class ON oid = indrelid WHERE indexrelid = $1::regclass",
                    index,
                )
                if owner in GROWING:
                    found.append(f"{kind} of {index}")
    return found


def cost(plan: dict[str, Any]) -> tuple[int, int]:
    """The rows of tables and indices that were looked at, and the pages that were touched."""
    rows = 0
    for node in nodes(plan):
        if "Relation Name" in node or "Index Name" in node:
            seen = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
            rows += round((seen + node.get("Rows Removed by Index Recheck", 0)) * node["Actual Loops"])
    return rows, plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


def costs_more(small: tuple[int, int], large: tuple[int, int], walked: int = 0) -> bool:
    """Whether it is more than the indices of a larger table being higher makes of it, by a page or two a seek, and than
    a walk over so many rows."""
    return large[0] > small[0] * 1.1 + 5 + walked or large[1] > small[1] * 2 + 20 + walked


async def taken(url: str, name: str) -> tuple[int, int]:
    """What the query costs when it is run."""
    async with connected(url, name) as connection:
        # The first time reads the catalogue too.
        for _ in range(2):
            transaction = connection.transaction()
            await transaction.start()
            answer = await connection.fetchval(f"{EXPLAIN} {SQL[name]}", *WITH[name])
            await transaction.rollback()
    return cost(json.loads(answer)[0]["Plan"])


def test_every_query_is_looked_at() -> None:
    assert WITH.keys() == SQL.keys()


async def test_no_query_walks_over_a_table_that_grows_though_it_is_believed_to_be_empty() -> None:
    url = await new_schema()
    async with opened(url):
        pass
    assert {name: found for name in WITH if (found := await walks(url, name))} == {}


async def test_no_query_walks_over_a_table_that_grows_when_it_is_known_to_be_large(urls: tuple[str, str]) -> None:
    assert {name: found for name in WITH if (found := await walks(urls[1], name))} == {}


async def test_every_query_costs_the_same_in_a_large_record_as_in_a_small_one(
    tidied: tuple[str, str],
) -> None:
    wrong = {}
    for name in sorted(WITH, key=reads, reverse=True):
        small, large = [await taken(url, name) for url in tidied]
        if costs_more(small, large):
            wrong[name] = small, large
    assert wrong == {}


async def test_hosts_that_are_due_are_sought_one_by_one(urls: tuple[str, str]) -> None:
    # Fewer rows are touched than a host has files.
    assert (await taken(urls[1], "due_hosts"))[0] < 20


async def test_a_claim_costs_what_it_claims_however_much_this_node_holds_already(urls: tuple[str, str]) -> None:
    async def claiming(after: int) -> tuple[int, int]:
        async with connected(urls[1], "claim") as connection:
            await connection.execute(
                "INSERT INTO lease (file, node) SELECT id, 1 FROM file WHERE host = 'w0' AND next_attempt_at < 2000"
                " ON CONFLICT (file) DO UPDATE SET node = 1"
            )
            answer = await connection.fetchval(f"{EXPLAIN} {SQL['claim']}", ["w0"], [10], [after], [0], NOW, 1)
            return cost(json.loads(answer)[0]["Plan"])

    from_the_beginning, from_behind = await claiming(-MAX_ID), await claiming(2000)
    assert from_behind[0] < 100 < 200 < from_the_beginning[0]


async def test_the_inbox_costs_what_waits_though_nothing_that_has_been_expanded_is_cleaned_up(
    urls: tuple[str, str],
) -> None:
    async with connected(urls[1], "inbox") as connection:
        await connection.execute(
            "INSERT INTO notification (batch_id, api_code, received_at, remote_addr, signature, request_id, files,"
            " body) SELECT 'e' || n, 'a', n, 'r', 'none', 'id', 1, '{}' FROM generate_series(1, 20000) AS n"
        )
        await connection.execute("UPDATE notification SET expanded_at = 1 WHERE batch_id LIKE 'e%' OR id <= 60")
        last: int = await connection.fetchval(SQL["accept"], *(column[:1] for column in WITH["accept"]))

        async def pages(first: int) -> int:
            answer = await connection.fetchval(f"{EXPLAIN} {SQL['inbox']}", first, 64)
            return cost(json.loads(answer)[0]["Plan"])[1]

        assert await pages(last - 100) < 20 < 200 < await pages(0)


# Reads for people


class Observed(PostgresRecords):
    """Tells what reading costs: runs each statement once more and has it explained."""

    cost = (0, 0)

    async def _row(self, statement: str, parameters: dict[str, object]) -> tuple[Any, ...] | None:
        row = await super()._row(f"{EXPLAIN} {statement}", parameters)
        assert row is not None
        rows, pages = cost(json.loads(row[0])[0]["Plan"])
        self.cost = self.cost[0] + rows, self.cost[1] + pages
        return await super()._row(statement, parameters)


NextRequest = Callable[[Records], Awaitable[object]]


def listings() -> Iterator[tuple[str, NextRequest]]:
    """Every combination of filters for batches and files, and one read of each other kind."""
    for values in product((None, *Verdict), (None, "a", "nowhere"), (None, "b7"), (None, 30), (None, 3000)):
        batches = BatchFilter(*values)
        yield str(batches), lambda records, wanted=batches: records.batches(wanted, None, 20)  # type: ignore[misc]
    for each in product((None, 7), (None, *FileState), (None, "timeout", "nothing"), (None, "w1", "nowhere")):
        files = FileFilter(*each)
        yield str(files), lambda records, wanted=files: records.files(wanted, None, 20)  # type: ignore[misc]
    yield "batch", lambda records: records.batch(7)
    yield "file", lambda records: records.file(7)
    yield "rejections", lambda records: records.rejections(None, 5)
    yield "search", lambda records: records.search("b77", 5)
    yield "count", lambda records: records.count(FileFilter(batch=7, state=FileState.BLOCKED))
    yield "backlog", lambda records: records.backlog(5)


async def test_a_page_of_anything_costs_the_same_in_a_large_record_as_in_a_small_one(
    tidied: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "MAX_SCANNED_ROWS", WALKED)
    monkeypatch.setattr(queries, "MAX_SEARCHED_BATCHES", WALKED)
    observed = [await Observed.open(url) for url in tidied]
    try:
        wrong = {}
        for name, ask in listings():
            for records in observed:
                records.cost = (0, 0)
                await ask(records)
            small, large = [records.cost for records in observed]
            # Twice: where it ended is found by walking there again.
            walked = 2 * WALKED
            if costs_more(small, large, walked):
                wrong[name] = small, large
    finally:
        for records in observed:
            await records.close()
    assert wrong == {}
