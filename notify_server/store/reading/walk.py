"""Plans keyset pagination: which index serves a filter, and where a page begins.

Both engines follow the same plan. They differ in how they name indexes and in how they seek past a cursor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from notify_server.model import FileState, Verdict
from notify_server.store.reading.cursor import decode_cursor
from notify_server.store.reading.types import BatchFilter, BatchItem, FileFilter, FileItem

# Max rows scanned per page when filters are not fully covered by the index.
MAX_SCANNED_ROWS = 50_000

# States that only some files are in; the condition is that of the index file_missing.
MISSING = (FileState.UNAVAILABLE, FileState.BLOCKED, FileState.UPLOAD_FAILED)
IS_MISSING = "state <> 'pending' AND state <> 'available'"
# The condition of the index batch_attention.
IS_NEW = "verdict = 'incomplete' AND (acknowledged_at IS NULL OR acknowledged_at < completed_at)"

_INTEGERS = {"id", "first_received_at", "next_attempt_at"}


class Index(NamedTuple):
    """An order in which a table can be walked: the table as FROM names it, the index's columns, and its condition."""

    table: str
    columns: tuple[str, ...]
    where: str | None = None


class Indexes(NamedTuple):
    """The indexes that pages walk along, as one engine names them."""

    batch_named: Index
    batch_verdict: Index
    batch_attention: Index
    batch_api_code: Index
    batch_received: Index
    file_of_batch: Index
    file_failing: Index
    file_due: Index
    file_missing: Index
    file_id: Index


class Walk:
    """A walk along an index, from its first matching row or from a cursor.

    Equality conditions on the leading columns are sought. The others are filtered: applied to the rows on the way.
    The remaining columns of the index are the sort key, and the keys of a cursor.
    """

    def __init__(self, index: Index, wanted: Mapping[str, object], *, descending: bool = False) -> None:
        self.table = index.table
        self.descending = descending
        self.sought = [index.where] if index.where else []
        self.bounds: list[str] = []
        self.after: list[int | str] | None = None
        self.keys = index.columns
        self.parameters = {column: value for column, value in wanted.items() if value is not None}
        left = dict.fromkeys(self.parameters)
        while self.keys[0] in left:
            left.pop(self.keys[0])
            self.sought.append(f"{self.keys[0]} = :{self.keys[0]}")
            self.keys = self.keys[1:]
        self._filtered = [f"{column} = :{column}" for column in left]

    def seek(self, column: str, value: object) -> None:
        """Require `column` to equal the value, unless it is None."""
        if value is not None:
            self.sought.append(f"{column} = :{column}")
            self.parameters[column] = value

    def bound(self, operator: str, name: str, value: int | None) -> None:
        """Bound the first key, unless the value is None."""
        if value is not None:
            self.bounds.append(f"{self.keys[0]} {operator} :{name}")
            self.parameters[name] = value

    def require_batch(self, wanted: FileFilter) -> None:
        """Require that the batch of a file meets the filters."""
        conditions = ["its.id = batch"]
        for name, condition in (
            ("api_code", "its.api_code = :api_code"),
            ("received_from", "its.first_received_at >= :received_from"),
            ("received_before", "its.first_received_at < :received_before"),
        ):
            if (value := getattr(wanted, name)) is not None:
                conditions.append(condition)
                self.parameters[name] = value
        self._filtered.append(f"EXISTS (SELECT 1 FROM batch AS its WHERE {conjunction(conditions)})")  # noqa: S608

    def start_after(self, cursor: str) -> None:
        """Begin after the row that the cursor names. Raises ValueError when it belongs to another order."""
        self.after = decode_cursor(cursor, [int if key in _INTEGERS else str for key in self.keys])
        self.parameters.update((f"after_{key}", value) for key, value in zip(self.keys, self.after, strict=True))

    def order(self, prefix: str = "") -> str:
        """Return the sort key as ORDER BY takes it."""
        direction = " DESC" if self.descending else ""
        return ", ".join(prefix + key + direction for key in self.keys)

    @property
    def counted(self) -> str:
        """All matching rows, as FROM takes them."""
        return f"{self.table} WHERE {conjunction([*self.sought, *self._filtered])}"

    @property
    def filtered(self) -> str:
        """The condition that the index does not cover."""
        return conjunction(self._filtered)

    def max_rows(self, limit: int) -> int:
        """Return how many rows to scan for a page of `limit` items."""
        return max(limit, MAX_SCANNED_ROWS) if self._filtered else limit

    def key_of(self, item: BatchItem | FileItem) -> list[int | str]:
        """Return the sort key of an item, for a cursor."""
        values = [getattr(item, key) for key in self.keys]
        return [round(value.timestamp() * 1000) if isinstance(value, datetime) else value for value in values]


def conjunction(conditions: Sequence[str]) -> str:
    """Return the conditions joined by AND; `true` when there are none."""
    return " AND ".join(conditions) or "true"


def walk_batches(indexes: Indexes, wanted: BatchFilter) -> Walk:
    """Choose the index for a page of batches, newest first."""
    equal = {"verdict": wanted.verdict, "api_code": wanted.api_code}
    if wanted.batch_id is not None:
        # A batch_id has few batches, one for each api_code: they are sorted.
        walk = Walk(indexes.batch_named, {}, descending=True)
        for column, value in (("batch_id", wanted.batch_id), *equal.items()):
            walk.seek(column, value)
        if wanted.acknowledged is False:
            walk.sought.append(IS_NEW)
    elif wanted.acknowledged is False:
        walk = Walk(indexes.batch_attention, equal, descending=True)
    elif wanted.verdict is not None and (wanted.api_code is None or wanted.verdict is not Verdict.COMPLETE):
        walk = Walk(indexes.batch_verdict, equal, descending=True)
    else:
        # Most batches are complete, so an api_code is more selective than that verdict.
        index = indexes.batch_received if wanted.api_code is None else indexes.batch_api_code
        walk = Walk(index, equal, descending=True)
    walk.bound(">=", "received_from", wanted.received_from)
    walk.bound("<", "received_before", wanted.received_before)
    return walk


def walk_files(indexes: Indexes, wanted: FileFilter) -> Walk:
    """Choose the index for a page of files."""
    equal = {name: getattr(wanted, name) for name in ("batch", "state", "reason", "host")}
    if wanted.batch is not None:
        walk = Walk(indexes.file_of_batch, equal)
    elif wanted.reason is not None:
        walk = Walk(indexes.file_failing, equal)
    elif wanted.state is FileState.PENDING:
        walk = Walk(indexes.file_due, equal | {"state": None})
    elif wanted.state in MISSING:
        walk = Walk(indexes.file_missing, equal)
    else:
        # By time, the newest are the ones that are looked for.
        walk = Walk(indexes.file_id, equal, descending=wanted.is_of_batches)
    if wanted.is_of_batches:
        walk.require_batch(wanted)
    return walk
