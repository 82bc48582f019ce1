"""Reads the record on PostgreSQL, on connections of its own that cannot write. See types.Records."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, Self

import asyncpg

from notify_server.config import without_secrets
from notify_server.errors import StoreUnavailableError
from notify_server.store.postgres.session import create_pool, refuse_on_error, strip_nul, translate_errors
from notify_server.store.reading.queries import CLOSED, READ_SECONDS, TOO_MUCH, QueriedRecords, load_record_queries
from notify_server.store.reading.walk import IS_MISSING, IS_NEW, Index, Indexes, Walk, conjunction

CONNECTIONS = 2
ACQUIRE_SECONDS = 10.0

INDEXES = Indexes(
    batch_named=Index("batch", ("first_received_at", "id")),
    batch_verdict=Index("batch", ("verdict", "first_received_at", "id")),
    batch_attention=Index("batch", ("first_received_at", "id"), IS_NEW),
    batch_api_code=Index("batch", ("api_code", "first_received_at", "id")),
    batch_received=Index("batch", ("first_received_at", "id")),
    file_of_batch=Index("file", ("batch", "oss_object_name")),
    file_failing=Index("file", ("reason", "host", "state", "id")),
    file_due=Index("file", ("host", "next_attempt_at", "id"), "state = 'pending'"),
    file_missing=Index("file", ("state", "host", "id"), IS_MISSING),
    file_id=Index("file", ("id",)),
)
_ISO = r"""to_char(timestamp 'epoch' + \1 * interval '1 ms', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')"""
QUERIES = load_record_queries("postgres", _ISO)

_LAST_CHARACTER = "\U0010ffff"


class PostgresRecords(QueriedRecords):
    """Reads the database of an open store, of this process or another. Close it when done.

    Reads are single statements cut off after READ_SECONDS.
    """

    dialect = "postgres"
    queries = QUERIES
    indexes = INDEXES
    part_of = "strpos"

    def __init__(self, url: str) -> None:
        """Use `open` instead."""
        self._place = without_secrets(url)
        self._pool = create_pool(
            url,
            CONNECTIONS,
            statement_timeout=f"{round(READ_SECONDS * 1000)}ms",
            default_transaction_read_only="on",
        )
        self._closed = False
        self._reading = 0
        self._at_rest = asyncio.Event()
        self._at_rest.set()

    @classmethod
    async def open(cls, url: str) -> Self:
        """Prepare the pool, which connects at the first read. Raises StoreRefusedError when the URL is invalid."""

        async def opened() -> Self:
            records = cls(url)
            await records._pool
            return records

        return await refuse_on_error(url, opened())

    async def close(self) -> None:
        self._closed = True
        await self._at_rest.wait()
        await self._pool.close()

    async def _row(self, statement: str, parameters: dict[str, object]) -> tuple[Any, ...] | None:
        if self._closed:
            raise StoreUnavailableError(CLOSED)
        self._reading += 1
        self._at_rest.clear()
        try:
            with translate_errors(self._place):
                try:
                    async with self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
                        text, values = positional(statement, parameters)
                        row = await connection.fetchrow(text, *values)
                except asyncpg.QueryCanceledError as error:
                    raise StoreUnavailableError(TOO_MUCH) from error
        finally:
            self._reading -= 1
            if not self._reading:
                self._at_rest.set()
        return None if row is None else tuple(row)

    def _select(self, walk: Walk, columns: str) -> str:
        conditions = [*walk.sought, *walk.bounds]
        if walk.after is not None:
            after = ", ".join(f":after_{key}" for key in walk.keys)
            conditions.append(f"({', '.join(walk.keys)}) {'<' if walk.descending else '>'} ({after})")
        return f"SELECT {columns} FROM {walk.table} WHERE {conjunction(conditions)} ORDER BY {walk.order()}"  # noqa: S608

    def _can_hold(self, value: object) -> bool:
        return not isinstance(value, str) or strip_nul(value) == value

    def _prefix_range(self, text: str) -> dict[str, object]:
        return {"text": text, "beyond": _beyond(text)}


def positional(statement: str, parameters: Mapping[str, object]) -> tuple[str, list[object]]:
    """Replace the `:name` of each parameter by `$1`, `$2` …; return the statement and the values in that order."""
    names: list[str] = []

    def place(match: re.Match[str]) -> str:
        if match[1] not in parameters:
            return match[0]
        if match[1] not in names:
            names.append(match[1])
        return f"${names.index(match[1]) + 1}"

    return re.sub(r":(\w+)", place, statement), [parameters[name] for name in names]


def _beyond(text: str) -> str | None:
    """Return the first text, byte by byte, after all that begin with `text`; None when there is none."""
    kept = text.rstrip(_LAST_CHARACTER)
    if not kept:
        return None
    following = ord(kept[-1]) + 1
    return kept[:-1] + chr(0xE000 if following == 0xD800 else following)
