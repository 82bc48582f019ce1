"""Reads the record beside a running daemon: the views that users query, on a connection that cannot write."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Self

import msgspec

from notify_server.errors import StoreRefusedError, StoreUnavailableError
from notify_server.model import FileState, Verdict
from notify_server.store.sql import expand_rows
from notify_server.store.sqlite.writer import APPLICATION_ID, BUSY_TIMEOUT_MS

# Rows in one statement: a read that lasts keeps the daemon from shortening its WAL.
CHUNK_BATCHES = 500
CHUNK_FILES = 1000


class BatchRow(msgspec.Struct, frozen=True, array_like=True):
    """A row of the view `batch_summary`. Times are ISO text, UTC."""

    batch_id: str
    api_code: str
    verdict: Verdict
    files: int
    pending: int
    available: int
    unavailable: int
    blocked: int
    upload_failed: int
    first_received_at: str
    completed_at: str | None


class FileRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A row of the view `file_result`. `verified_at` is ISO text, UTC."""

    batch_id: str
    api_code: str
    oss_object_name: str
    target_url: str | None
    state: FileState
    reason: str | None
    http_status: int | None
    content_length: int | None
    content_type: str | None
    attempts: int
    verified_at: str | None


# The join is CROSS so that SQLite seeks the batches wanted; otherwise it may prefer to walk over all there are.
_SUMMARIES = f"""
WITH wanted (batch_id, api_code) AS (VALUES :rows)
SELECT {", ".join(BatchRow.__struct_fields__)} FROM wanted CROSS JOIN batch_summary USING (batch_id, api_code)
"""  # noqa: S608
_RESULTS = f"""
SELECT {", ".join(FileRow.__struct_fields__)} FROM file_result
WHERE batch_id = ? AND api_code = ? AND oss_object_name > ?
ORDER BY oss_object_name LIMIT ?
"""  # noqa: S608
_LAST_DELIVERY = "SELECT coalesce(max(id), 0) FROM notification"
_EXPANDED = "SELECT expanded_at IS NOT NULL FROM notification WHERE id = ?"


def connect_read_only(path: Path) -> sqlite3.Connection:
    """A connection that cannot write, for any thread. Raises StoreRefusedError when the file is not there, or is not a
    record.
    """
    if not path.is_file():
        raise StoreRefusedError(f"{path}: there is no record: start the daemon, or name its database")
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro",
            uri=True,
            timeout=BUSY_TIMEOUT_MS / 1000,
            isolation_level=None,
            check_same_thread=False,
        )
    except sqlite3.Error as error:
        raise StoreRefusedError(f"{path}: cannot be opened ({error})") from error
    try:
        connection.execute("PRAGMA query_only = 1")
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    except sqlite3.Error as error:
        connection.close()
        raise StoreRefusedError(f"{path}: cannot be read ({error})") from error
    if application_id != APPLICATION_ID:
        connection.close()
        raise StoreRefusedError(f"{path}: is not a record of notify_server: name the daemon's database")
    return connection


class Reader:
    """A record, read-only. No transaction outlives a call, so the daemon is never kept waiting.

    Calls may come from any thread, one at a time. They raise StoreUnavailableError when the file cannot be read now.
    """

    def __init__(self, path: Path) -> None:
        """Open the database at `path`. Raises StoreRefusedError when it is not there, or is not a record."""
        self._connection = connect_read_only(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def summaries(self, batches: Sequence[tuple[str, str]]) -> list[BatchRow]:
        """What is known of these batches, each (batch_id, api_code); those not in the record are left out."""
        found: list[BatchRow] = []
        for start in range(0, len(batches), CHUNK_BATCHES):
            chunk = batches[start : start + CHUNK_BATCHES]
            rows = self._read(expand_rows(_SUMMARIES, 2, len(chunk)), [text for batch in chunk for text in batch])
            found += msgspec.convert(rows, list[BatchRow])
        return found

    def results(self, batch_id: str, api_code: str) -> Iterator[FileRow]:
        """What is known of a batch's files, in the order of their keys. Nothing when the batch is not in the record."""
        after = ""
        while rows := self._read(_RESULTS, (batch_id, api_code, after, CHUNK_FILES)):
            chunk = msgspec.convert(rows, list[FileRow])
            yield from chunk
            after = chunk[-1].oss_object_name

    def last_delivery(self) -> int:
        """The id of the latest delivery accepted, 0 when there is none. Ids grow by one with every delivery."""
        ((last,),) = self._read(_LAST_DELIVERY)
        return msgspec.convert(last, int)

    def expanded(self, delivery: int) -> bool:
        """Whether this delivery, and all before it, have become batches and files. True of one pruned since."""
        return all(done for (done,) in self._read(_EXPANDED, (delivery,)))

    def first_rows(self, query: str, limit: int) -> tuple[list[str], list[tuple[object, ...]]]:
        """The columns and at most `limit` rows of a query of one's own."""
        try:
            cursor = self._connection.execute(query)
            try:
                return [column[0] for column in cursor.description], list(islice(cursor, limit))
            finally:
                # A cursor that has not come to its end holds a read transaction.
                cursor.close()
        except sqlite3.Error as error:
            raise StoreUnavailableError(f"the record cannot be read: {error}") from error

    def _read(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[object, ...]]:
        try:
            return self._connection.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            raise StoreUnavailableError(f"the record cannot be read: {error}") from error
