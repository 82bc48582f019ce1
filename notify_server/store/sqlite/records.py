"""The record on SQLite, read beside the writer on connections of its own that cannot write. See records.Records.

A read that lasts would keep the writer from shortening its WAL: each is one statement, cut off after READ_SECONDS.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from notify_server.errors import StoreRefusedError, StoreUnavailableError
from notify_server.model import FileState, Verdict
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
from notify_server.store.sqlite.reader import connect_read_only

T = TypeVar("T")
Item = TypeVar("Item", BatchItem, FileItem)

THREADS = 2
READ_SECONDS = 5.0
# Steps of SQLite's machine between two looks at the clock: a few milliseconds.
STEPS = 100_000
# Batches that a search for a key looks into, the latest.
SEARCHED_BATCHES = 200_000
# Rows that a page looks at when an index finds some of what is wanted and the rest is left out on the way.
WALKED = 50_000

_NEWEST = 2**63 - 1
_MACROS = ("batch_item", "file_item", "rejection_item", "next")


def _load() -> dict[str, str]:
    queries = dict(load_queries("sqlite", "records"))
    macros = {name: queries.pop(name) for name in _MACROS}
    for name, text in queries.items():
        for macro, meaning in macros.items():
            text = text.replace(f":{macro}", meaning)
        queries[name] = re.sub(r":iso\((\w+)\)", r"strftime('%Y-%m-%dT%H:%M:%fZ', \1 / 1000.0, 'unixepoch')", text)
    return queries


SQL: Mapping[str, str] = _load()


def encode_cursor(*keys: int | str) -> str:
    """The columns that a page ended with, as text that fits in an address."""
    return msgspec.json.encode(keys).hex()


def decode_cursor(cursor: str, kinds: Sequence[type]) -> list[int | str]:
    """What `encode_cursor` was given, when it is of these types. Raises ValueError when it is not one of ours."""
    try:
        keys = msgspec.json.decode(bytes.fromhex(cursor), type=tuple[*kinds])  # type: ignore[valid-type]
    except (ValueError, msgspec.MsgspecError):
        raise ValueError("cursor: is not one that was given out, begin again without it") from None
    return list(keys)


class _Index(NamedTuple):
    """An order in which a table can be walked: what FROM says of it, its columns, and what else it knows."""

    table: str
    columns: tuple[str, ...]
    where: str | None = None


# Told by name: SQLite would rather sort, or walk over another, as long as it knows little of what the tables hold.
_BATCH_NAMED = _Index("batch INDEXED BY sqlite_autoindex_batch_1", ("first_received_at", "id"))
_BATCH_VERDICT = _Index("batch INDEXED BY batch_verdict", ("verdict", "first_received_at", "id"))
_BATCH_API_CODE = _Index("batch INDEXED BY batch_api_code", ("api_code", "first_received_at", "id"))
_BATCH_RECEIVED = _Index("batch INDEXED BY batch_received", ("first_received_at", "id"))
_FILE_OF_BATCH = _Index("file INDEXED BY sqlite_autoindex_file_1", ("batch", "oss_object_name"))
_FILE_FAILING = _Index("file INDEXED BY file_failing", ("reason", "host", "state", "id"))
_FILE_DUE = _Index("file INDEXED BY file_due", ("host", "next_attempt_at", "id"), "state = 'pending'")
_FILE_ID = _Index("file NOT INDEXED", ("id",))

_INTEGERS = {"id", "first_received_at", "next_attempt_at"}


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
            self.seek(f"{self.keys[0]} = :{self.keys[0]}")
            self.keys = self.keys[1:]
        self._left_out = [f"{column} = :{column}" for column in left]
        self._within: list[str] = []
        self._starts: list[list[str]] | None = None

    def seek(self, condition: str, **parameters: object) -> None:
        """Add a condition, unless a parameter of it is None."""
        if None not in parameters.values():
            self._sought.append(condition)
            self.parameters.update(parameters)

    def within(self, operator: str, name: str, value: int | None) -> None:
        """Bound the first key, unless the value is None."""
        if value is not None:
            self._within.append(f"{self.keys[0]} {operator} :{name}")
            self.parameters[name] = value

    def start_behind(self, cursor: str) -> None:
        """Raises ValueError when the cursor is not one of this order."""
        values = decode_cursor(cursor, [int if key in _INTEGERS else str for key in self.keys])
        self.parameters.update((f"after_{key}", value) for key, value in zip(self.keys, values, strict=True))
        beyond = "<" if self._descending else ">"
        *groups, last = self.keys
        # The rest of the group that the cursor lies in comes first, for itself: comparing all keys at once would walk
        # over the beginning of the group again, since SQLite seeks no rowid in that way. For the same reason a bound
        # that the cursor is beyond already must not be what is sought, which `+` sees to.
        rest = [*(f"{key} = :after_{key}" for key in groups), f"{last} {beyond} :after_{last}"]
        self._starts = [[*rest, *(f"+{bound}" for bound in self._within)]]
        if groups:
            after = ", ".join(f":after_{key}" for key in groups)
            bounds = [f"+{bound}" if beyond in bound else bound for bound in self._within]
            self._starts.append([f"({', '.join(groups)}) {beyond} ({after})", *bounds])

    def sql(self, columns: str) -> str:
        direction = " DESC" if self._descending else ""
        order = ", ".join(key + direction for key in self.keys)
        return " UNION ALL ".join(
            f"SELECT * FROM (SELECT {columns} FROM {self._table} WHERE {_all([*self._sought, *start])}"  # noqa: S608
            f" ORDER BY {order} LIMIT :most)"
            for start in self._starts or [self._within]
        )

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
    return " AND ".join(conditions) or "1"


def _walk_batches(wanted: BatchFilter) -> _Walk:
    equal = {"verdict": wanted.verdict, "api_code": wanted.api_code}
    if wanted.batch_id is not None:
        # Few, one for each api_code: sorted.
        walk = _Walk(_BATCH_NAMED, {}, descending=True)
        for column, value in (("batch_id", wanted.batch_id), *equal.items()):
            walk.seek(f"{column} = :{column}", **{column: value})
    elif wanted.verdict is not None and (wanted.api_code is None or wanted.verdict is not Verdict.COMPLETE):
        walk = _Walk(_BATCH_VERDICT, equal, descending=True)
    else:
        # Most batches are complete: an api_code tells more.
        walk = _Walk(_BATCH_RECEIVED if wanted.api_code is None else _BATCH_API_CODE, equal, descending=True)
    walk.within(">=", "received_from", wanted.received_from)
    walk.within("<", "received_before", wanted.received_before)
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


class SqliteRecords:
    """Reads the database at `path`, which must be there and of this version. Close it when done."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = ThreadPoolExecutor(THREADS, "sqlite-reader")
        self._of_thread = threading.local()
        self._connections: list[sqlite3.Connection] = []

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
        for connection in self._connections:
            connection.close()

    async def totals(self) -> Totals:
        return await self._one(Totals, "totals")

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
            of = "1" if wanted.batch is None else "id = :batch"
            row = await self._row(SQL["file_total"].replace(":column", column).replace(":of", of), batch=wanted.batch)
        else:
            walk = _walk_files(wanted)
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
        before = _NEWEST if cursor is None else decode_cursor(cursor, [int])[0]
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
        return Found(
            await self._many(BatchItem, "batches_beginning", text=text, limit=limit),
            await self._many(FileItem, "files_named", text=text, batches=SEARCHED_BATCHES, limit=limit),
        )

    async def _page(self, kind: type[Item], query: str, walk: _Walk, cursor: str | None, limit: int) -> Page[Item]:
        if cursor is not None:
            walk.start_behind(cursor)
        statement = SQL[query]
        keys = ", ".join(walk.keys)
        for name, text in (("walk_keys", walk.sql(keys)), ("walk", walk.sql("*")), ("left_out", walk.left_out)):
            statement = statement.replace(f":{name}", text)
        # One more than wanted tells whether there is a next page.
        parameters = walk.parameters | {"limit": limit + 1, "most": walk.most(limit + 1)}
        row = await self._row(statement.replace(":keys", keys), **parameters)
        assert row is not None
        items = msgspec.json.decode(row[0], type=list[kind])  # type: ignore[valid-type]
        if len(items) > limit:
            return Page(items[:limit], encode_cursor(*walk.key_of(items[limit - 1])))
        return Page(items, None if row[1] is None else encode_cursor(*msgspec.json.decode(row[1])))

    async def _many(self, kind: type[T], query: str, **parameters: object) -> list[T]:
        row = await self._row(SQL[query], **parameters)
        assert row is not None
        return msgspec.json.decode(row[0], type=list[kind])  # type: ignore[valid-type]

    async def _one(self, kind: type[T], query: str) -> T:
        row = await self._row(SQL[query])
        assert row is not None
        return msgspec.json.decode(row[0], type=kind)

    async def _row(self, statement: str, **parameters: object) -> tuple[Any, ...] | None:
        for name, value in parameters.items():
            if isinstance(value, int):
                # Beyond what SQLite can hold is beyond all that it holds.
                parameters[name] = min(max(value, -_NEWEST), _NEWEST)
        try:
            reading = asyncio.get_running_loop().run_in_executor(self._threads, self._fetch, statement, parameters)
        except RuntimeError as error:
            raise StoreUnavailableError("the record is closed") from error
        return await reading

    def _fetch(self, statement: str, parameters: Mapping[str, object]) -> tuple[Any, ...] | None:
        try:
            connection: sqlite3.Connection | None = getattr(self._of_thread, "connection", None)
            if connection is None:
                connection = self._of_thread.connection = connect_read_only(self._path)
                self._connections.append(connection)
            deadline = time.monotonic() + READ_SECONDS
            connection.set_progress_handler(lambda: time.monotonic() > deadline, STEPS)
            row: tuple[Any, ...] | None = connection.execute(statement, parameters).fetchone()
        except StoreRefusedError as error:
            raise StoreUnavailableError(str(error)) from error
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT:
                raise StoreUnavailableError("that is too much to read at once: narrow it down") from error
            # Whatever it was, a new connection may be past it.
            if connection is not None:
                self._of_thread.connection = None
                self._connections.remove(connection)
                connection.close()
            raise StoreUnavailableError(f"the record cannot be read: {error}") from error
        return row
