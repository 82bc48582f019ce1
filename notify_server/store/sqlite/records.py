"""Reads the record on SQLite, beside the writer, on aiosqlite connections that cannot write. See types.Records."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from notify_server.errors import StoreRefusedError, StoreUnavailableError
from notify_server.store.reading.queries import CLOSED, READ_SECONDS, TOO_MUCH, QueriedRecords, load_record_queries
from notify_server.store.reading.walk import IS_MISSING, IS_NEW, Index, Indexes, Walk, conjunction
from notify_server.store.sqlite.read_connection import PROGRESS_STEPS, ReadConnection

MAX_CONNECTIONS = 2

# Indexes are named: without statistics SQLite would sort, or walk along another index.
INDEXES = Indexes(
    batch_named=Index("batch INDEXED BY sqlite_autoindex_batch_1", ("first_received_at", "id")),
    batch_verdict=Index("batch INDEXED BY batch_verdict", ("verdict", "first_received_at", "id")),
    batch_attention=Index("batch INDEXED BY batch_attention", ("first_received_at", "id"), IS_NEW),
    batch_api_code=Index("batch INDEXED BY batch_api_code", ("api_code", "first_received_at", "id")),
    batch_received=Index("batch INDEXED BY batch_received", ("first_received_at", "id")),
    file_of_batch=Index("file INDEXED BY sqlite_autoindex_file_1", ("batch", "oss_object_name")),
    file_failing=Index("file INDEXED BY file_failing", ("reason", "host", "state", "id")),
    file_due=Index("file INDEXED BY file_due", ("host", "next_attempt_at", "id"), "state = 'pending'"),
    file_missing=Index("file INDEXED BY file_missing", ("state", "host", "id"), IS_MISSING),
    file_id=Index("file NOT INDEXED", ("id",)),
)
QUERIES = load_record_queries("sqlite", r"strftime('%Y-%m-%dT%H:%M:%fZ', \1 / 1000.0, 'unixepoch')")


class SqliteRecords(QueriedRecords):
    """Reads the database at `path`, which must exist and be of this version. Close it when done.

    Reads are single statements, cut off after `read_seconds`, and share MAX_CONNECTIONS connections.
    """

    dialect = "sqlite"
    queries = QUERIES
    indexes = INDEXES
    part_of = "instr"

    def __init__(self, path: Path, *, read_seconds: float = READ_SECONDS, progress_steps: int = PROGRESS_STEPS) -> None:
        self._path = path
        self.read_seconds = read_seconds
        self._progress_steps = progress_steps
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)
        self._idle: list[ReadConnection] = []
        self._closed = False

    async def close(self) -> None:
        self._closed = True
        for _ in range(MAX_CONNECTIONS):
            await self._free.acquire()
        while self._idle:
            await self._idle.pop().close()

    async def _row(self, statement: str, parameters: dict[str, object]) -> tuple[Any, ...] | None:
        if self._closed:
            raise StoreUnavailableError(CLOSED)
        async with self._free:
            connection = await self._connection()
            broken = False
            try:
                rows = await connection.rows(statement, parameters, seconds=self.read_seconds)
            except TimeoutError as error:
                raise StoreUnavailableError(TOO_MUCH) from error
            except StoreUnavailableError:
                # A new connection may get past the error, for example when the file was replaced.
                broken = True
                raise
            finally:
                if broken:
                    await connection.close()
                else:
                    self._idle.append(connection)
        return rows[0] if rows else None

    async def _connection(self) -> ReadConnection:
        if self._idle:
            return self._idle.pop()
        try:
            return await ReadConnection.open(self._path, progress_steps=self._progress_steps)
        except StoreRefusedError as error:
            raise StoreUnavailableError(str(error)) from error

    def _select(self, walk: Walk, columns: str) -> str:
        return " UNION ALL ".join(
            f"SELECT * FROM (SELECT {columns} FROM {walk.table} WHERE {conjunction([*walk.sought, *start])}"  # noqa: S608
            f" ORDER BY {walk.order()} LIMIT :most)"
            for start in _starts(walk)
        )


def _starts(walk: Walk) -> list[list[str]]:
    """Return the conditions under which the walk begins, one set for each part of it."""
    if walk.after is None:
        return [walk.bounds]
    beyond = "<" if walk.descending else ">"
    *groups, last = walk.keys
    # The rest of the cursor's own group comes first, as a part of its own: SQLite seeks no rowid when it compares all
    # keys at once, and would walk the beginning of the group again. For the same reason a bound that the cursor has
    # passed must not be sought, which `+` prevents.
    rest = [*(f"{key} = :after_{key}" for key in groups), f"{last} {beyond} :after_{last}"]
    starts = [[*rest, *(f"+{bound}" for bound in walk.bounds)]]
    if groups:
        after = ", ".join(f":after_{key}" for key in groups)
        bounds = [f"+{bound}" if beyond in bound else bound for bound in walk.bounds]
        starts.append([f"({', '.join(groups)}) {beyond} ({after})", *bounds])
    return starts
