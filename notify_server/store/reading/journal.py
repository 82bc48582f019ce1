"""Reads actions, acknowledgements and the samples of the charts. The statements are in `journal_records.sql` of each
engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from notify_server.store.sql import load_queries

T = TypeVar("T")

Run = Callable[[str, Mapping[str, object]], Awaitable[tuple[Any, ...] | None]]


class ActionItem(Struct, frozen=True):
    """An action: `who` is the channel (page, api or command) and the caller, `filter` what it applied to, `files` the
    number of files, rows or deliveries that it changed, null when it changes none.
    """

    id: int
    at: datetime
    who: str
    what: str
    filter: dict[str, str | int]
    files: int | None


class Acknowledged(Struct, frozen=True):
    """An acknowledgement: when, by whom, and the note."""

    at: datetime
    who: str
    note: str


class JournalRecords:
    """`run` runs one statement that returns one row. Calls raise StoreUnavailableError as those of Records do."""

    def __init__(self, dialect: str, run: Run) -> None:
        self._queries = load_queries(dialect, "journal_records")
        self._run = run

    async def actions(self, before: int, limit: int) -> list[ActionItem]:
        """Return actions with ids below `before`, newest first."""
        rows = await self._list(list[tuple[int, int, str, str, str, int | None]], "actions", before=before, limit=limit)
        return [
            ActionItem(id, _time(at), who, what, msgspec.json.decode(filter), files)
            for id, at, who, what, filter, files in rows
        ]

    async def acknowledgement(self, id: int) -> Acknowledged | None:
        """Return the acknowledgement that a batch refers to."""
        rows = await self._list(list[tuple[int, str, str]], "acknowledgement", id=id)
        return Acknowledged(_time(rows[0][0]), *rows[0][1:]) if rows else None

    async def rejections(self, ids: Sequence[int]) -> dict[int, Acknowledged]:
        """Return the acknowledgements of these rejections, by their ids."""
        rows = await self._list(list[tuple[int, int, str, str]], "rejections", ids=msgspec.json.encode(ids).decode())
        return {id: Acknowledged(_time(at), who, note) for id, at, who, note in rows}

    async def history(self, step: int, since: int) -> list[tuple[int, str]]:
        """Return the samples of this step from `since` on (Unix ms), oldest first, of all servers."""
        return await self._list(list[tuple[int, str]], "history", step=step, since=since)

    async def _list(self, kind: type[T], query: str, **parameters: object) -> T:
        row = await self._run(self._queries[query], parameters)
        # PostgreSQL makes no array of no rows.
        return msgspec.json.decode("[]" if row is None or row[0] is None else row[0], type=kind)


def _time(at: int) -> datetime:
    return datetime.fromtimestamp(at / 1000, UTC)
