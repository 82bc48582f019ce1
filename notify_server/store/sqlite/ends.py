"""Finds on SQLite the batches of which files end soon."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable

from notify_server.events.payload import BatchRow, Ending
from notify_server.model import FileResult
from notify_server.store.ends import MAX_BATCHES, decode_files, deletions, judge, of_one_transaction
from notify_server.store.sql import load_queries

SQL = load_queries("sqlite", "ends")


def note_deletions(connection: sqlite3.Connection, results: Iterable[FileResult]) -> None:
    """Note when the objects that were just verified will be deleted."""
    for batch, at in deletions(results).items():
        connection.execute(SQL["note"], {"batch": batch, "at": at})


def any_near(connection: sqlite3.Connection, until: int) -> bool:
    """Return whether a batch may have files that end by then."""
    return connection.execute(SQL["near"], (until, 1)).fetchone() is not None


def write_expiring(
    connection: sqlite3.Connection, until: int, now: int, write: Callable[[BatchRow, list[Ending]], object]
) -> int:
    """Call `write` with each batch of which files end by then; return how many batches were looked at."""
    found = [BatchRow(*row) for row in connection.execute(SQL["near"], (until, MAX_BATCHES)).fetchall()]
    rows = of_one_transaction(found)
    for row in rows:
        (files,) = connection.execute(SQL["files"], (row.id, now)).fetchone()
        ending, next_at = judge(decode_files(files), until, now)
        if ending:
            write(row, ending)
            connection.execute(SQL["written"], (now, row.id))
        else:
            connection.execute(SQL["later"], (next_at, row.id))
    return len(rows)
