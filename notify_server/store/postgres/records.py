"""The record on PostgreSQL, read on connections of its own that cannot write. See records.Records.

Each read is one statement, cut off after READ_SECONDS.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Self, TypeVar

import asyncpg
import msgspec

from notify_server.config import without_secrets
from notify_server.errors import StoreUnavailableError
from notify_server.model import FileState, Verdict
from notify_server.store.base import MAX_ID
from notify_server.store.postgres.session import create_pool, refuse_on_error, strip_nul, translate_errors
from notify_server.store.reading.types import (
    AttemptItem,
    BatchDetail,
    BatchFilter,
    BatchItem,
    DeliveryItem,
    FailureGroup,
    FileDetail,
    FileFilter,
    FileItem,
    Found,
    HostBacklog,
    Page,
    RejectionDetail,
    RejectionItem,
    Totals,
)
from notify_server.store.sql import load_queries
from notify_server.store.sqlite.records import decode_cursor, encode_cursor

T = TypeVar("T")
Item = TypeVar("Item", BatchItem, FileItem)

CONNECTIONS = 2
READ_SECONDS = 5.0
ACQUIRE_SECONDS = 10.0
# Batches that a search for a key looks into, the latest.
SEARCHED_BATCHES = 200_000
# Rows that a page looks at when an index finds some of what is wanted and the rest is left out on the way.
WALKED = 50_000

_MACROS = ("batch_item", "file_item", "rejection_item", "next")
_ISO = r"""to_char(timestamp 'epoch' + \1 * interval '1 ms', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')"""
_LAST_CHARACTER = "\U0010ffff"


def _load() -> dict[str, str]:
    queries = dict(load_queries("postgres", "records"))
    macros = {name: queries.pop(name) for name in _MACROS}
    for name, text in queries.items():
        for macro, meaning in macros.items():
            text = text.replace(f":{macro}", meaning)
        queries[name] = re.sub(r":iso\((\w+)\)", _ISO, text)
    return queries


SQL: Mapping[str, str] = _load()


def positional(statement: str, parameters: Mapping[str, object]) -> tuple[str, list[object]]:
    """The statement with `$1`, `$2` … for what are `:name` of the parameters, and their values in that order."""
    names: list[str] = []

    def place(match: re.Match[str]) -> str:
        if match[1] not in parameters:
            return match[0]
        if match[1] not in names:
            names.append(match[1])
        return f"${names.index(match[1]) + 1}"

    return re.sub(r":(\w+)", place, statement), [parameters[name] for name in names]


class _Index(NamedTuple):
    """An order in which a table can be walked: its columns, and what else it knows."""

    table: str
    columns: tuple[str, ...]
    where: str | None = None


_BATCH_NAMED = _Index("batch", ("first_received_at", "id"))
_BATCH_VERDICT = _Index("batch", ("verdict", "first_received_at", "id"))
_BATCH_API_CODE = _Index("batch", ("api_code", "first_received_at", "id"))
_BATCH_RECEIVED = _Index("batch", ("first_received_at", "id"))
_FILE_OF_BATCH = _Index("file", ("batch", "oss_object_name"))
_FILE_FAILING = _Index("file", ("reason", "host", "state", "id"))
_FILE_DUE = _Index("file", ("host", "next_attempt_at", "id"), "state = 'pending'")
_FILE_ID = _Index("file", ("id",))

_INTEGERS = {"id", "batch", "first_received_at", "next_attempt_at", "received_from", "received_before"}


class _Walk:
    """A walk along an index: from where it has the values wanted, or from behind a cursor, in its order.

    Wanted values that the index cannot seek are `left_out` on the way. Keys of items are the columns of the order.
    """

    def __init__(self, index: _Index, wanted: Mapping[str, object], *, descending: bool = False) -> None:
        self._table = index.table
        self._descending = descending
        self._sought = [index.where] if index.where else []
        self.keys = index.columns
        self.parameters = {column: value for column, value in wanted.items() if value is not None}
        left = dict.fromkeys(self.parameters)
        while self.keys[0] in left:
            left.pop(self.keys[0])
            self._sought.append(f"{self.keys[0]} = :{self.keys[0]}")
            self.keys = self.keys[1:]
        self._left_out = [f"{column} = :{column}" for column in left]

    def seek(self, operator: str, column: str, name: str, value: object) -> None:
        """Add a condition, unless its value is None."""
        if value is not None:
            self._sought.append(f"{column} {operator} :{name}")
            self.parameters[name] = value

    def start_behind(self, cursor: str) -> None:
        """Raises ValueError when the cursor is not one of this order."""
        values = decode_cursor(cursor, [int if key in _INTEGERS else str for key in self.keys])
        if not all(map(_is_text, values)):
            raise ValueError("cursor: is not one that was given out, begin again without it")
        self.parameters.update((f"after_{key}", value) for key, value in zip(self.keys, values, strict=True))
        after = ", ".join(f":after_{key}" for key in self.keys)
        self._sought.append(f"({', '.join(self.keys)}) {'<' if self._descending else '>'} ({after})")

    @property
    def leads_nowhere(self) -> bool:
        """Whether something is wanted that PostgreSQL cannot hold, let alone have."""
        return not all(map(_is_text, self.parameters.values()))

    def sql(self, columns: str) -> str:
        conditions = _all(self._sought)
        return f"SELECT {columns} FROM {self._table} WHERE {conditions} ORDER BY {self.order()}"  # noqa: S608

    def order(self, prefix: str = "") -> str:
        direction = " DESC" if self._descending else ""
        return ", ".join(prefix + key + direction for key in self.keys)

    @property
    def counted(self) -> str:
        """What is walked over, as FROM says it."""
        return f"{self._table} WHERE {_all([*self._sought, *self._left_out])}"

    @property
    def left_out(self) -> str:
        return _all(self._left_out)

    def most(self, limit: int) -> int:
        """How many rows to look at for so many items."""
        return max(limit, WALKED) if self._left_out else limit

    def key_of(self, item: BatchItem | FileItem) -> list[int | str]:
        values = [getattr(item, key) for key in self.keys]
        return [round(value.timestamp() * 1000) if isinstance(value, datetime) else value for value in values]


def _all(conditions: Sequence[str]) -> str:
    return " AND ".join(conditions) or "true"


def _walk_batches(wanted: BatchFilter) -> _Walk:
    equal = {"verdict": wanted.verdict, "api_code": wanted.api_code}
    if wanted.batch_id is not None:
        # Few, one for each api_code: sorted.
        walk = _Walk(_BATCH_NAMED, {}, descending=True)
        for column, value in (("batch_id", wanted.batch_id), *equal.items()):
            walk.seek("=", column, column, value)
    elif wanted.verdict is not None and (wanted.api_code is None or wanted.verdict is not Verdict.COMPLETE):
        walk = _Walk(_BATCH_VERDICT, equal, descending=True)
    else:
        # Most batches are complete: an api_code tells more.
        walk = _Walk(_BATCH_RECEIVED if wanted.api_code is None else _BATCH_API_CODE, equal, descending=True)
    walk.seek(">=", "first_received_at", "received_from", wanted.received_from)
    walk.seek("<", "first_received_at", "received_before", wanted.received_before)
    return walk


def _walk_files(wanted: FileFilter) -> _Walk:
    equal = msgspec.structs.asdict(wanted)
    if wanted.batch is not None:
        return _Walk(_FILE_OF_BATCH, equal)
    if wanted.reason is not None:
        return _Walk(_FILE_FAILING, equal)
    if wanted.state is FileState.PENDING:
        return _Walk(_FILE_DUE, equal | {"state": None})
    return _Walk(_FILE_ID, equal)


def _is_text(value: object) -> bool:
    """Whether PostgreSQL can hold it, if it is a text."""
    return not isinstance(value, str) or strip_nul(value) == value


def _beyond(text: str) -> str | None:
    """The first text, byte by byte, behind all that begin with this one; None when there is nothing behind them."""
    kept = text.rstrip(_LAST_CHARACTER)
    if not kept:
        return None
    following = ord(kept[-1]) + 1
    return kept[:-1] + chr(0xE000 if following == 0xD800 else following)


class PostgresRecords:
    """Reads the database of a store that is open, here or elsewhere. Close it when done."""

    def __init__(self, url: str) -> None:
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
        """Raises StoreRefusedError when the address is none. It connects when something is read."""

        async def opened() -> Self:
            records = cls(url)
            await records._pool
            return records

        return await refuse_on_error(url, opened())

    async def close(self) -> None:
        self._closed = True
        await self._at_rest.wait()
        await self._pool.close()

    async def totals(self) -> Totals:
        row = await self._row(SQL["totals"])
        assert row is not None
        return msgspec.json.decode(row[0], type=Totals)

    async def batches(self, wanted: BatchFilter, cursor: str | None, limit: int) -> Page[BatchItem]:
        return await self._page(BatchItem, "batches", _walk_batches(wanted), cursor, limit)

    async def batch(self, id: int) -> BatchDetail | None:
        row = await self._row(SQL["batch"], id=id)
        if row is None:
            return None
        batch = msgspec.json.decode(row[0], type=BatchDetail)
        delivery = await self._row(SQL["delivery"], id=row[1])
        if delivery is None:
            return batch
        return msgspec.structs.replace(batch, last_delivery=msgspec.json.decode(delivery[0], type=DeliveryItem))

    async def files(self, wanted: FileFilter, cursor: str | None, limit: int) -> Page[FileItem]:
        return await self._page(FileItem, "files", _walk_files(wanted), cursor, limit)

    async def count(self, wanted: FileFilter) -> int:
        if wanted.reason is None and wanted.host is None:
            # Batches keep count of their files by state.
            column = "files" if wanted.state is None else wanted.state.value
            of = "true" if wanted.batch is None else "id = :batch"
            statement = SQL["file_total"].replace(":column", column).replace(":of", of)
            row = await self._row(statement, **({} if wanted.batch is None else {"batch": wanted.batch}))
        else:
            walk = _walk_files(wanted)
            if walk.leads_nowhere:
                return 0
            row = await self._row(SQL["file_count"].replace(":counted", walk.counted), **walk.parameters)
        assert row is not None
        return msgspec.convert(row[0], int)

    async def file(self, id: int) -> FileDetail | None:
        row = await self._row(SQL["file"], id=id)
        if row is None:
            return None
        requests = await self._many(AttemptItem, "attempts", file=id)
        return msgspec.structs.replace(msgspec.json.decode(row[0], type=FileDetail), requests=requests)

    async def failures(self, limit: int) -> list[FailureGroup]:
        return await self._many(FailureGroup, "failures", limit=limit)

    async def backlog(self, limit: int) -> list[HostBacklog]:
        return await self._many(HostBacklog, "backlog", limit=limit)

    async def rejections(self, cursor: str | None, limit: int) -> Page[RejectionItem]:
        before = MAX_ID if cursor is None else decode_cursor(cursor, [int])[0]
        items = await self._many(RejectionItem, "rejections", before=before, limit=limit + 1)
        if len(items) <= limit:
            return Page(items)
        return Page(items[:limit], encode_cursor(items[limit - 1].id))

    async def rejection(self, id: int) -> RejectionDetail | None:
        row = await self._row(SQL["rejection"], id=id)
        if row is None:
            return None
        item, body = row
        detail = msgspec.json.decode(item, type=RejectionDetail)
        return msgspec.structs.replace(detail, body=body.decode(errors="backslashreplace"))

    async def rejected_body(self, id: int) -> bytes | None:
        row = await self._row(SQL["rejection"], id=id)
        return None if row is None else row[1]

    async def search(self, text: str, limit: int) -> Found:
        if not _is_text(text):
            return Found([], [])
        return Found(
            await self._many(BatchItem, "batches_beginning", text=text, beyond=_beyond(text), limit=limit),
            await self._many(FileItem, "files_named", text=text, batches=SEARCHED_BATCHES, limit=limit),
        )

    async def _page(self, kind: type[Item], query: str, walk: _Walk, cursor: str | None, limit: int) -> Page[Item]:
        if cursor is not None:
            walk.start_behind(cursor)
        if walk.leads_nowhere:
            return Page([])
        statement = SQL[query]
        keys = ", ".join(walk.keys)
        for name, text in (
            ("walk_keys", walk.sql(keys)),
            ("walk", walk.sql("*")),
            ("left_out", walk.left_out),
            ("found_order", walk.order("found.")),
            ("keys", keys),
        ):
            statement = re.sub(rf":{name}\b", text.replace("\\", r"\\"), statement)
        # One more than wanted tells whether there is a next page.
        parameters = walk.parameters | {"limit": limit + 1, "most": walk.most(limit + 1)}
        row = await self._row(statement, **parameters)
        assert row is not None
        items = _items(kind, row[0])
        if len(items) > limit:
            return Page(items[:limit], encode_cursor(*walk.key_of(items[limit - 1])))
        return Page(items, None if row[1] is None else encode_cursor(*msgspec.json.decode(row[1])))

    async def _many(self, kind: type[T], query: str, **parameters: object) -> list[T]:
        row = await self._row(SQL[query], **parameters)
        assert row is not None
        return _items(kind, row[0])

    async def _row(self, statement: str, **parameters: object) -> tuple[Any, ...] | None:
        for name, value in parameters.items():
            if isinstance(value, int):
                # Beyond what a bigint can hold is beyond all that there is.
                parameters[name] = min(max(value, -MAX_ID), MAX_ID)
        if self._closed:
            raise StoreUnavailableError("the record is closed")
        self._reading += 1
        self._at_rest.clear()
        try:
            with translate_errors(self._place):
                try:
                    async with self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
                        text, values = positional(statement, parameters)
                        row = await connection.fetchrow(text, *values)
                except asyncpg.QueryCanceledError as error:
                    raise StoreUnavailableError("that is too much to read at once: narrow it down") from error
        finally:
            self._reading -= 1
            if not self._reading:
                self._at_rest.set()
        return None if row is None else tuple(row)


def _items(kind: type[T], answer: str | None) -> list[T]:
    # No rows make no array.
    return [] if answer is None else msgspec.json.decode(answer, type=list[kind])  # type: ignore[valid-type]
