"""Answers the calls of Records from an engine's SQL: what both engines have in common."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar

import msgspec

from notify_server.contract.source_path import encoded_beginning
from notify_server.store.base import MAX_ID, SESSION_PREFIX
from notify_server.store.reading.cursor import UNKNOWN_CURSOR, decode_cursor, encode_cursor
from notify_server.store.reading.evidence import EvidenceRecords
from notify_server.store.reading.expectations import ExpectationRecords
from notify_server.store.reading.journal import JournalRecords
from notify_server.store.reading.outbox import OutboxRecords
from notify_server.store.reading.types import (
    AttemptItem,
    Attention,
    BatchDetail,
    BatchFiles,
    BatchFilter,
    BatchItem,
    DeliveryItem,
    FailureGroup,
    FileDetail,
    FileFilter,
    FileItem,
    Found,
    HostBacklog,
    Numbered,
    Page,
    Prunable,
    ReasonCount,
    RejectionDetail,
    RejectionItem,
    Totals,
)
from notify_server.store.reading.walk import Indexes, Walk, conjunction, walk_batches, walk_files
from notify_server.store.sql import load_with_macros

T = TypeVar("T")
Item = TypeVar("Item", BatchItem, FileItem)

# Time limit of one statement.
READ_SECONDS = 5.0
# A search for a key looks into this many batches, the newest.
MAX_SEARCHED_BATCHES = 200_000
# What no index finds is looked for among the newest of each kind only.
MAX_SEARCHED_FILES = 100_000
MAX_SEARCHED_NOTIFICATIONS = 50_000
MIN_PART = 4
MAX_API_CODES = 200
REQUEST_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# The columns that the files of a batch can be sorted by.
SORTS = {
    "key": "oss_object_name", "state": "state", "reason": "reason", "attempts": "attempts",
    "next": "next_attempt_at", "size": "content_length",
}  # fmt: skip
TOO_MUCH = "that is too much to read at once: narrow it down"
CLOSED = "the record is closed"


def load_record_queries(dialect: str, iso: str) -> Mapping[str, str]:
    """Return the statements of `store/<dialect>/records.sql` with their macros expanded.

    `iso` replaces `:iso(column)`, as in re.sub: it turns Unix ms into ISO text.
    """
    queries = load_with_macros(dialect, "records", "batch_item", "file_item", "rejection_item", "next")
    return {name: re.sub(r":iso\((\w+)\)", iso, text) for name, text in queries.items()}


class QueriedRecords(ABC):
    """Builds the statements and decodes their answers, which are JSON. An engine runs them.

    `queries` are its statements (`load_record_queries`), `indexes` the names of its indexes.
    """

    dialect: str
    queries: Mapping[str, str]
    indexes: Indexes
    # The function that gives the place of a part in a text, 0 when it is not there.
    part_of: str

    @cached_property
    def outbox(self) -> OutboxRecords:
        return OutboxRecords(self.dialect, self._run)

    @cached_property
    def expectations(self) -> ExpectationRecords:
        return ExpectationRecords(self.dialect, self._run)

    @cached_property
    def journal(self) -> JournalRecords:
        return JournalRecords(self.dialect, self._run)

    @cached_property
    def evidence(self) -> EvidenceRecords:
        return EvidenceRecords(self.dialect, self._run)

    @abstractmethod
    async def _row(self, statement: str, parameters: dict[str, object]) -> tuple[Any, ...] | None:
        """Run a statement with `:name` parameters and return its first row. Raises StoreUnavailableError."""

    @abstractmethod
    def _select(self, walk: Walk, columns: str) -> str:
        """Return the SELECT of a walk."""

    def _can_hold(self, value: object) -> bool:
        """Return False for a value that the engine cannot hold, so that no row has it."""
        return True

    def _prefix_range(self, text: str) -> dict[str, object]:
        """Return the parameters of `batches_beginning`."""
        return {"text": text}

    async def totals(self) -> Totals:
        row = await self._get("totals")
        assert row is not None
        return msgspec.json.decode(row[0], type=Totals)

    async def batches(self, wanted: BatchFilter, cursor: str | None, limit: int) -> Page[BatchItem]:
        return await self._page(BatchItem, "batches", walk_batches(self.indexes, wanted), cursor, limit)

    async def batch(self, id: int) -> BatchDetail | None:
        row = await self._get("batch", id=id)
        if row is None:
            return None
        batch = msgspec.json.decode(row[0], type=BatchDetail)
        if row[2] is not None:
            batch = msgspec.structs.replace(batch, acknowledged=await self.journal.acknowledgement(row[2]))
        delivery = await self._get("delivery", id=row[1])
        if delivery is None:
            return batch
        return msgspec.structs.replace(batch, last_delivery=msgspec.json.decode(delivery[0], type=DeliveryItem))

    async def attention(self) -> Attention:
        row = await self._get("attention")
        assert row is not None
        return msgspec.json.decode(row[0], type=Attention)

    async def files(self, wanted: FileFilter, cursor: str | None, limit: int) -> Page[FileItem]:
        return await self._page(FileItem, "files", walk_files(self.indexes, wanted), cursor, limit)

    async def count(self, wanted: FileFilter) -> int:
        if wanted.reason is None and wanted.host is None and not wanted.is_of_batches:
            # Batches keep count of their files by state.
            column = "files" if wanted.state is None else wanted.state.value
            of = "true" if wanted.batch is None else "id = :batch"
            statement = self.queries["file_total"].replace(":column", column).replace(":of", of)
            row = await self._run(statement, {} if wanted.batch is None else {"batch": wanted.batch})
        else:
            walk = walk_files(self.indexes, wanted)
            if not all(map(self._can_hold, walk.parameters.values())):
                return 0
            row = await self._run(self.queries["file_count"].replace(":counted", walk.counted), walk.parameters)
        assert row is not None
        return msgspec.convert(row[0], int)

    async def file(self, id: int) -> FileDetail | None:
        row = await self._get("file", id=id)
        if row is None:
            return None
        requests = await self._list(AttemptItem, "attempts", file=id)
        return msgspec.structs.replace(msgspec.json.decode(row[0], type=FileDetail), requests=requests)

    async def failures(self, limit: int) -> list[FailureGroup]:
        return await self._list(FailureGroup, "failures", limit=limit)

    async def backlog(self, limit: int) -> list[HostBacklog]:
        return await self._list(HostBacklog, "backlog", limit=limit)

    async def rejections(self, cursor: str | None, limit: int) -> Page[RejectionItem]:
        before = MAX_ID if cursor is None else decode_cursor(cursor, [int])[0]
        items = await self._list(RejectionItem, "rejections", before=before, limit=limit + 1)
        if len(items) <= limit:
            return Page(items)
        return Page(items[:limit], encode_cursor(items[limit - 1].id))

    async def rejection(self, id: int) -> RejectionDetail | None:
        row = await self._get("rejection", id=id)
        if row is None:
            return None
        item, body = row
        detail = msgspec.json.decode(item, type=RejectionDetail)
        return msgspec.structs.replace(detail, body=body.decode(errors="backslashreplace"))

    async def rejected_body(self, id: int) -> bytes | None:
        row = await self._get("rejection", id=id)
        return None if row is None else row[1]

    async def prunable(self, completed_before: int, rejected_before: int) -> Prunable:
        row = await self._get("prunable", completed_before=completed_before, rejected_before=rejected_before)
        assert row is not None
        return Prunable(*row)

    async def search(self, text: str, limit: int) -> Found:
        if not self._can_hold(text):
            return Found([], [])
        prefix = self._prefix_range(text)
        api_codes = [each for each in await self.api_codes(MAX_API_CODES) if each.startswith(text)]
        batches = await self._list(BatchItem, "batches_beginning", **prefix, limit=limit)
        files = await self._list(FileItem, "files_named", **prefix, batches=MAX_SEARCHED_BATCHES, limit=limit)
        if batches or files:
            return Found(batches, files, api_codes=api_codes)
        if REQUEST_ID.fullmatch(text):
            batches = await self._list(
                BatchItem, "batches_of_request", text=text, most=MAX_SEARCHED_NOTIFICATIONS, limit=limit
            )
            rejections = await self._list(RejectionItem, "rejections_of_request", text=text, limit=limit)
            return Found(batches, [], rejections)
        if len(text) >= MIN_PART:
            batches = await self._list(
                BatchItem, "batches_containing", text=text, most=MAX_SEARCHED_NOTIFICATIONS, limit=limit
            )
            files = await self._list(
                FileItem, "files_containing", text=text, source=f"/{encoded_beginning(text) or text}",
                most=MAX_SEARCHED_FILES, limit=limit,
            )  # fmt: skip
        return Found(batches, files, api_codes=api_codes)

    async def batch_files(self, wanted: BatchFiles) -> Numbered[FileItem]:
        equal = {"batch": wanted.batch, "state": wanted.state, "reason": wanted.reason}
        parameters: dict[str, object] = {name: value for name, value in equal.items() if value is not None}
        conditions = [f"{name} = :{name}" for name in parameters]
        if wanted.text is not None:
            part = f"{self.part_of}(oss_object_name, :{{}}) > 0"
            conditions.append(f"({part.format('text')} OR {part.format('source')})")
            parameters |= {"text": wanted.text, "source": f"/{encoded_beginning(wanted.text) or wanted.text}"}
        if not all(map(self._can_hold, parameters.values())):
            return Numbered([], 0)
        direction = "DESC" if wanted.descending else "ASC"
        # Files without a value come last either way; the key makes the order definite.
        order = f"{SORTS[wanted.sort]} IS NULL, {SORTS[wanted.sort]} {direction}, oss_object_name"
        statement = self.queries["batch_files"].replace(":conditions", conjunction(conditions))
        row = await self._run(
            statement.replace(":order", order), parameters | {"limit": wanted.limit, "offset": wanted.offset}
        )
        assert row is not None
        return Numbered(_decode(FileItem, row[0]), row[1])

    async def batch_reasons(self, batch: int, limit: int) -> list[ReasonCount]:
        return await self._list(ReasonCount, "batch_reasons", batch=batch, limit=limit)

    async def api_codes(self, limit: int) -> list[str]:
        return await self._list(str, "api_codes", limit=limit)

    async def _page(self, kind: type[Item], query: str, walk: Walk, cursor: str | None, limit: int) -> Page[Item]:
        if cursor is not None:
            walk.start_after(cursor)
            if not all(map(self._can_hold, walk.after or ())):
                raise ValueError(UNKNOWN_CURSOR)
        if not all(map(self._can_hold, walk.parameters.values())):
            return Page([])
        keys = ", ".join(walk.keys)
        statement = self.queries[query]
        for name, text in (
            ("walk_keys", self._select(walk, keys)),
            ("walk", self._select(walk, "*")),
            ("left_out", walk.filtered),
            ("found_order", walk.order("found.")),
            ("keys", keys),
        ):
            statement = re.sub(rf":{name}\b", text.replace("\\", r"\\"), statement)
        # One more item than fits tells that there is a next page.
        row = await self._run(statement, walk.parameters | {"limit": limit + 1, "most": walk.max_rows(limit + 1)})
        assert row is not None
        items = _decode(kind, row[0])
        if len(items) > limit:
            return Page(items[:limit], encode_cursor(*walk.key_of(items[limit - 1])))
        return Page(items, None if row[1] is None else encode_cursor(*msgspec.json.decode(row[1])))

    async def ended_sessions(self) -> list[str]:
        # The range of all keys that begin with the prefix: "0" follows "/".
        keys = await self._list(str, "ended_sessions", first=SESSION_PREFIX, end=SESSION_PREFIX[:-1] + "0")
        return [key.removeprefix(SESSION_PREFIX) for key in keys]

    async def _list(self, kind: type[T], query: str, **parameters: object) -> list[T]:
        row = await self._get(query, **parameters)
        assert row is not None
        return _decode(kind, row[0])

    async def _get(self, query: str, **parameters: object) -> tuple[Any, ...] | None:
        return await self._run(self.queries[query], parameters)

    async def _run(self, statement: str, parameters: Mapping[str, object]) -> tuple[Any, ...] | None:
        # No row has a number beyond what both engines can hold.
        bounded = {
            name: min(max(value, -MAX_ID), MAX_ID) if isinstance(value, int) else value
            for name, value in parameters.items()
        }
        return await self._row(statement, bounded)


def _decode(kind: type[T], answer: str | None) -> list[T]:
    # PostgreSQL makes no array of no rows.
    return [] if answer is None else msgspec.json.decode(answer, type=list[kind])  # type: ignore[valid-type]
