"""What reading the record costs: a page costs what is on it and a bounded walk, whatever is asked for and however large
the record is; what costs more says so in store/records.py.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import pytest

from notify_server.model import FileState, Verdict
from notify_server.store.reading import queries, walk
from notify_server.store.reading.types import BatchFiles, BatchFilter, FileFilter, Page
from notify_server.store.sql import load_queries
from notify_server.store.sqlite.database import connect
from notify_server.store.sqlite.records import SqliteRecords
from tests.store.builders import NOW

FILES = 14
VERDICTS = ("pending", "complete", "incomplete")
# In turns among each batch's files; an available file that failed before has a reason too.
KINDS = (
    ("pending", None, NOW),
    ("pending", "timeout", NOW),
    ("available", None, None),
    ("available", "timeout", None),
    ("unavailable", "http_404", None),
    ("blocked", "private_address", None),
    ("upload_failed", None, None),
)


def fill(connection: sqlite3.Connection, batches: range, hosts: int) -> None:
    """Batches of every verdict, though none of `b` is incomplete, and files of every kind."""
    connection.execute("BEGIN")
    connection.executemany(
        "INSERT INTO batch (batch_id, api_code, first_received_at, last_received_at, verdict) VALUES (?, ?, ?, ?, ?)",
        [
            (
                f"batch {n}",
                "b" if n % 2 and VERDICTS[n % 3] != "incomplete" else "a",
                NOW + n // 4,
                NOW,
                VERDICTS[n % 3],
            )
            for n in batches
        ],
    )
    connection.executemany(
        "INSERT INTO file (batch, oss_object_name, target_url, host, reported_status, state, reason, next_attempt_at)"
        " VALUES (?, ?, 'https://h/k', ?, 'FINISHED', ?, ?, ?)",
        [(n, f"k{k:03}", f"h{(n + k) % hosts:04}", *KINDS[k % len(KINDS)]) for n in batches for k in range(FILES)],
    )
    connection.execute(
        "INSERT INTO attempt (file, started_at, method, total_ms) SELECT id, 1, 'HEAD', 1 FROM file WHERE batch >= ?",
        (batches.start,),
    )
    connection.executemany(
        "INSERT INTO rejection (received_at, remote_addr, code, detail, body) VALUES (?, 'r', '400', 'd', x'00')",
        [(NOW,) for _ in batches],
    )
    connection.execute("COMMIT")


class Observed(SqliteRecords):
    """Keeps the statements that it has run, with what they were run with."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path
        self.ran: list[tuple[str, Mapping[str, object]]] = []

    async def _row(self, statement: str, parameters: dict[str, object]) -> tuple[Any, ...] | None:
        self.ran.append((statement, parameters))
        return await super()._row(statement, parameters)

    def taken(self) -> tuple[int, list[str]]:
        """The steps that they take of SQLite's machine, and the lines of their plans."""
        steps, lines = 0, []

        def step() -> None:
            nonlocal steps
            steps += 1

        with closing(sqlite3.connect(self.path)) as connection:
            for statement, parameters in self.ran:
                plan = connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
                lines += [row[3] for row in plan]
                connection.set_progress_handler(step, 1)
                connection.execute(statement, parameters).fetchall()
                connection.set_progress_handler(None, 1)
        self.ran.clear()
        return steps, lines


Filter = TypeVar("Filter", BatchFilter, FileFilter)
NextRequest = Callable[[SqliteRecords], Coroutine[Any, Any, object]]


@pytest.fixture(params=["never", "when full", "when nearly empty"], scope="module")
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small database and one four times as large. What ANALYZE found is kept, however much the database grows."""
    directory = tmp_path_factory.mktemp("records")
    small, large = directory / "small.db", directory / "large.db"
    for path, scale in ((small, 1), (large, 4)):
        with closing(connect(path)) as connection:
            fill(connection, range(1, 4), 5)
            if request.param == "when nearly empty":
                connection.execute("ANALYZE")
            fill(connection, range(4, 120 * scale + 1), 5 * scale)
            if request.param == "when full":
                connection.execute("ANALYZE")
    return small, large


@pytest.fixture
async def databases(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Observed, Observed]]:
    monkeypatch.setattr(walk, "MAX_SCANNED_ROWS", 10)
    for bound in ("BATCHES", "FILES", "NOTIFICATIONS"):
        monkeypatch.setattr(queries, f"MAX_SEARCHED_{bound}", 20)
    small, large = map(Observed, paths)
    yield small, large
    for records in (small, large):
        await records.close()


async def costs(databases: tuple[Observed, Observed], ask: NextRequest) -> tuple[int, int, list[str]]:
    """The steps that it takes in the small and in the large database, and the lines of both plans."""
    steps, plans = [], []
    for records in databases:
        await ask(records)
        taken, plan = records.taken()
        steps.append(taken)
        plans += plan
    return steps[0], steps[1], plans


def pages(
    wanted: Filter, call: Callable[[Filter, SqliteRecords, str | None], Coroutine[Any, Any, Page[Any]]]
) -> dict[str, NextRequest]:
    """To ask for the first page of a listing, and for one further on."""

    async def later(records: SqliteRecords) -> object:
        assert isinstance(records, Observed)
        cursor: str | None = None
        for _ in range(2):
            cursor = (await call(wanted, records, cursor)).next or cursor
        records.ran.clear()
        return await call(wanted, records, cursor)

    return {f"first page of {wanted}": lambda records: call(wanted, records, None), f"later page of {wanted}": later}


def batch_listings() -> dict[str, NextRequest]:
    """Every combination of filters for batches."""
    asked: dict[str, NextRequest] = {}
    filters = product(
        (None, "batch 7"), (None, *Verdict), (None, "a", "b", "nowhere"), (None, NOW + 2), (None, NOW + 8)
    )
    for values in filters:
        wanted = BatchFilter(values[1], values[2], values[0], *values[3:])
        asked |= pages(wanted, lambda wanted, records, cursor: records.batches(wanted, cursor, 2))
    return asked


def file_listings() -> dict[str, NextRequest]:
    """Every combination of filters for files."""
    asked: dict[str, NextRequest] = {}
    reasons, hosts = (None, "timeout", "http_404", "nothing"), (None, "h0001", "nowhere")
    for values in product((None, 7), (None, *FileState), reasons, hosts):
        wanted = FileFilter(*values)
        asked |= pages(wanted, lambda wanted, records, cursor: records.files(wanted, cursor, 2))
    return asked


# Ends with the page, or with the rows that a page may look at.
ALONG_AN_ORDER = {
    "SCAN file",
    "SCAN file USING INDEX file_due",
    "SCAN batch USING INDEX batch_received",
    "SCAN batch USING COVERING INDEX batch_received",
}


@pytest.mark.parametrize("listings", [batch_listings, file_listings], ids=["batches", "files"])
async def test_a_page_of_any_listing_costs_the_same_however_large_the_record_is_and_is_never_sorted(
    databases: tuple[Observed, Observed], listings: Callable[[], dict[str, NextRequest]]
) -> None:
    wrong: dict[str, object] = {}
    for name, ask in listings().items():
        small, large, plan = await costs(databases, ask)
        if large > 1.3 * small + 100:
            wrong[name] = small, large
        walks = {line for line in plan if re.match(r"SCAN (file|batch)\b", line)} - ALONG_AN_ORDER
        # Batches of one batch_id are as many as there are api_codes.
        sorts = "TEMP B-TREE" in str(plan) and "batch_id='batch 7'" not in name
        if walks or sorts:
            wrong[name] = plan
    assert wrong == {}


async def test_files_of_a_batch_are_found_by_their_batch_whatever_else_is_asked_of_them(
    databases: tuple[Observed, Observed],
) -> None:
    for name, ask in file_listings().items():
        if "batch=7" in name:
            *_, plan = await costs(databases, ask)
            found = {line for line in plan if re.match(r"(SEARCH|SCAN) file\b", line)}
            key = " AND oss_object_name>?" if name.startswith("later") else ""
            index = "INDEX sqlite_autoindex_file_1 (batch=?"
            assert found <= {
                f"SEARCH file USING {covering}{index}{keys})" for covering in ("", "COVERING ") for keys in ("", key)
            }
            assert f"SEARCH file USING {index}{key})" in found or not key


ONE_THING: dict[str, NextRequest] = {
    "batch": lambda records: records.batch(7),
    "file": lambda records: records.file(7),
    "rejection": lambda records: records.rejection(7),
    "body": lambda records: records.rejected_body(7),
    "rejections": lambda records: records.rejections(None, 5),
    "search": lambda records: records.search("batch 7", 5),
    "search for a key": lambda records: records.search("k001", 5),
    "search in vain": lambda records: records.search("nowhere", 5),
    "files of a batch by size": lambda records: records.batch_files(BatchFiles(7, text="k", sort="size")),
    "reasons of a batch": lambda records: records.batch_reasons(7, 5),
    "api_codes": lambda records: records.api_codes(5),
    "count of a batch": lambda records: records.count(FileFilter(batch=7)),
    "count of a batch by state": lambda records: records.count(FileFilter(batch=7, state=FileState.BLOCKED)),
    "count of a batch by reason": lambda records: records.count(FileFilter(batch=7, reason="timeout")),
    "count of a batch by host": lambda records: records.count(FileFilter(batch=7, host="h0001")),
    "ended sessions": lambda records: records.ended_sessions(),
    "count of what is not there": lambda records: records.count(FileFilter(reason="http_404", host="nowhere")),
}


@pytest.mark.parametrize("name", ONE_THING)
async def test_one_thing_costs_the_same_however_large_the_record_is(
    databases: tuple[Observed, Observed], name: str
) -> None:
    small, large, plan = await costs(databases, ONE_THING[name])
    assert large <= 1.2 * small + 10, plan


# The walk follows the order of the groups and skips the other rows.
WALKS: list[tuple[NextRequest, str]] = [
    (lambda records: records.totals(), r"SCAN batch$"),
    (
        lambda records: records.failures(5),
        r"SEARCH file USING COVERING INDEX file_(failing \(reason|missing \(state)",
    ),
    (lambda records: records.search("0" * 8 + "-0000" * 3 + "-" + "0" * 12, 5), r"(SEARCH|SCAN) (batch|file)"),
    (lambda records: records.attention(), r"SCAN batch USING INDEX batch_attention"),
    (lambda records: records.backlog(5), r"SCAN file USING INDEX file_due"),
    (lambda records: records.count(FileFilter()), r"SCAN batch$"),
    (lambda records: records.count(FileFilter(state=FileState.BLOCKED)), r"SCAN batch$"),
    (
        lambda records: records.count(FileFilter(state=FileState.PENDING, host="h0001")),
        r"SEARCH file USING INDEX file_due \(host=\?\)",
    ),
    (
        lambda records: records.count(FileFilter(reason="timeout")),
        r"SEARCH file USING COVERING INDEX file_failing \(reason=\?\)",
    ),
    (
        lambda records: records.count(FileFilter(reason="timeout", state=FileState.PENDING)),
        r"SEARCH file USING COVERING INDEX file_failing \(reason=\?\)",
    ),
]


@pytest.mark.parametrize(("ask", "walk"), WALKS)
async def test_what_costs_a_walk_walks_over_what_it_says(
    databases: tuple[Observed, Observed], ask: NextRequest, walk: str
) -> None:
    *_, plan = await costs(databases, ask)
    tables = [line for line in plan if re.match(r"(SCAN|SEARCH) (batch|file)\b", line)]
    assert re.match(walk, tables[0]), plan
    assert all("GROUP BY" not in line for line in plan)
    # Besides, the oldest batch that is pending.
    assert all(re.match(walk, line) or "batch_verdict (verdict=?)" in line for line in tables), plan


async def test_every_query_is_looked_at(databases: tuple[Observed, Observed]) -> None:
    asked = [*batch_listings().values(), *file_listings().values(), *ONE_THING.values(), *(ask for ask, _ in WALKS)]
    # A count of all that is old walks over all that is old, by its nature.
    asked.append(lambda records: records.prunable(0, 0))
    small, _ = databases
    for ask in asked:
        await ask(small)
    seen = "\n".join(statement for statement, _ in small.ran)
    fragments = {name: re.split(r":\w+(?:\(\w+\))?", text) for name, text in load_queries("sqlite", "records").items()}
    unseen = [name for name, parts in fragments.items() if not all(part.strip() in seen for part in parts)]
    assert unseen == []
