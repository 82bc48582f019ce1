"""Reads the views that users query, on a connection that cannot write, beside a running server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Self

import msgspec

from notify_server.model import FileState, Verdict
from notify_server.store.sql import expand_rows
from notify_server.store.sqlite.read_connection import ReadConnection

# Rows of one statement: a long read keeps the server from shortening its WAL.
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
    vendor_request_id: str | None = None
    vendor_code: str | None = None


# The join is CROSS so that SQLite seeks the wanted batches; otherwise it may scan all batches.
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
_LAST_EVENT = "SELECT coalesce(max(id), 0) FROM event"
_VERDICTS_SINCE = """
SELECT DISTINCT batch.batch_id FROM event JOIN batch ON batch.id = event.batch
WHERE event.id > ? AND event.type IN ('batch.complete', 'batch.incomplete')
"""
_STOPPED = "SELECT name FROM endpoint WHERE stopped_at IS NOT NULL"
_EXPANDED = "SELECT expanded_at IS NOT NULL FROM notification WHERE id = ?"


class RecordViews:
    """Reads the views of a record. No transaction outlives a call, so the server's writer is never blocked.

    Calls must not overlap. They raise StoreUnavailableError when the file cannot be read now.
    """

    def __init__(self, connection: ReadConnection) -> None:
        """Use `open` instead."""
        self._connection = connection

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Open the record at `path`. Raises StoreRefusedError when the file does not exist, or is not a record."""
        return cls(await ReadConnection.open(path))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()

    async def batches(self, batches: Sequence[tuple[str, str]]) -> list[BatchRow]:
        """Return the rows of these batches, each (batch_id, api_code); unknown ones are left out."""
        found: list[BatchRow] = []
        for start in range(0, len(batches), CHUNK_BATCHES):
            chunk = batches[start : start + CHUNK_BATCHES]
            statement = expand_rows(_SUMMARIES, 2, len(chunk))
            rows = await self._connection.rows(statement, [text for batch in chunk for text in batch])
            found += msgspec.convert(rows, list[BatchRow])
        return found

    async def files(self, batch_id: str, api_code: str) -> AsyncIterator[FileRow]:
        """Yield the rows of a batch's files, by key. Yields nothing for an unknown batch."""
        after = ""
        while rows := await self._connection.rows(_RESULTS, (batch_id, api_code, after, CHUNK_FILES)):
            chunk = msgspec.convert(rows, list[FileRow])
            for row in chunk:
                yield row
            after = chunk[-1].oss_object_name

    async def last_delivery(self) -> int:
        """Return the id of the newest accepted delivery, 0 when there is none. Each delivery has the next id."""
        ((last,),) = await self._connection.rows(_LAST_DELIVERY)
        return msgspec.convert(last, int)

    async def last_event(self) -> int:
        """Return the id of the newest event, 0 when there is none."""
        ((last,),) = await self._connection.rows(_LAST_EVENT)
        return msgspec.convert(last, int)

    async def verdicts_since(self, event: int) -> set[str]:
        """Return the batch_ids of the verdicts whose events came after this one."""
        return {str(batch_id) for (batch_id,) in await self._connection.rows(_VERDICTS_SINCE, (event,))}

    async def stopped_endpoints(self) -> set[str]:
        """Return the names of the endpoints that are stopped."""
        return {str(name) for (name,) in await self._connection.rows(_STOPPED)}

    async def expanded(self, delivery: int) -> bool:
        """Return True when this delivery and all earlier ones are expanded. A pruned delivery was."""
        return all(done for (done,) in await self._connection.rows(_EXPANDED, (delivery,)))

    async def first_rows(self, query: str, limit: int) -> tuple[list[str], list[tuple[object, ...]]]:
        """Run any query and return its column names and at most `limit` rows."""
        return await self._connection.first_rows(query, limit)
