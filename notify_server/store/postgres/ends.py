"""Finds on PostgreSQL the batches of which files end soon."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from notify_server.events.payload import BatchRow, Ending
from notify_server.model import FileResult
from notify_server.store.ends import MAX_BATCHES, FileRow, deletions, judge, of_one_transaction
from notify_server.store.postgres.session import Connection, arrays
from notify_server.store.sql import load_queries

SQL = load_queries("postgres", "ends")


async def note_deletions(connection: Connection, results: Iterable[FileResult]) -> None:
    """Note when the objects that were just verified will be deleted. Their batches are locked."""
    if ends := deletions(results):
        await connection.execute(SQL["note"], *arrays(sorted(ends.items()), 2))


async def any_near(connection: Connection, until: int) -> bool:
    """Return whether a batch may have files that end by then."""
    found: bool = await connection.fetchval(SQL["any"], until)
    return found


async def take_expiring(
    connection: Connection, until: int, now: int
) -> tuple[int, list[tuple[BatchRow, list[Ending]]]]:
    """Return how many batches were looked at, and those of which files end by then, for events to be written."""
    found = [BatchRow(*row) for row in await connection.fetch(SQL["near"], until, MAX_BATCHES)]
    rows = of_one_transaction(found)
    files: defaultdict[int, list[FileRow]] = defaultdict(list)
    for batch, *file in await connection.fetch(SQL["files"], [row.id for row in rows], now):
        files[batch].append((file[0], file[1], file[2]))
    judged = [(row, judge(files[row.id], until, now)) for row in rows]
    expiring = [(row, ending) for row, (ending, _) in judged if ending]
    await connection.execute(SQL["written"], [row.id for row, _ in expiring], now)
    if later := [(row.id, next_at) for row, (ending, next_at) in judged if not ending]:
        await connection.execute(SQL["later"], *arrays(later, 2))
    return len(rows), expiring
