"""Reads expectations. The statements are in `expectation_records.sql` of each engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from notify_server.events.payload import utc
from notify_server.expect.expectation import ExpectationState, MatchedBy
from notify_server.expect.quiet import QuietLimit
from notify_server.model import Verdict
from notify_server.store.sql import load_with_macros

Run = Callable[[str, Mapping[str, object]], Awaitable[tuple[Any, ...] | None]]


class ExpectationItem(Struct, frozen=True):
    """A submission that a notification is expected for. `notify_by` and `verdict_by` are its limits, later by the time
    during which no server was ready; `batch` is the id of the batch that was matched, `verdict` and `listed` its
    verdict and its number of files.
    """

    id: int
    reference: str
    api_code: str
    batch_id: str | None
    files: int | None
    state: ExpectationState
    matched_by: MatchedBy | None
    notify_by: datetime
    verdict_by: datetime
    created_at: datetime
    batch: int | None
    verdict: Verdict | None
    listed: int | None


class ExpectationFilter(Struct, frozen=True):
    """Conditions, all of which hold."""

    state: ExpectationState | None = None
    api_code: str | None = None
    reference: str | None = None
    batch_id: str | None = None


class ExpectationCount(Struct, frozen=True):
    """The number of expectations in a state."""

    state: ExpectationState
    number: int


class ArrivalItem(Struct, frozen=True):
    """The latest notification of an api_code, None for a pattern without one; `told_at` is when its silence was
    reported since.
    """

    api_code: str
    received_at: datetime | None
    told_at: datetime | None


def quiet_codes(arrivals: Sequence[ArrivalItem], limits: Sequence[QuietLimit]) -> list[ArrivalItem]:
    """Return the api_codes whose silence was reported, and patterns without a notification; those that are still
    watched.
    """
    seen = [each.api_code for each in arrivals if each.received_at is not None]
    return [
        each
        for each in arrivals
        if each.told_at is not None
        and any(
            limit.matches(each.api_code)
            if each.received_at is not None
            else limit.pattern == each.api_code and not any(limit.matches(api_code) for api_code in seen)
            for limit in limits
        )
    ]


class ExpectationRecords:
    """`run` runs one statement that returns one row. Calls raise StoreUnavailableError as those of Records do."""

    def __init__(self, dialect: str, run: Run) -> None:
        self._queries = load_with_macros(dialect, "expectation_records", "expectation_array", "expectation_rows")
        self._run = run

    async def expectations(self, wanted: ExpectationFilter, before: int, limit: int) -> list[ExpectationItem]:
        """Return expectations with ids below `before`, newest first."""
        values = {name: getattr(wanted, name) for name in wanted.__struct_fields__}
        parameters = {name: str(value) for name, value in values.items() if value is not None}
        # PostgreSQL holds no NUL.
        if any("\0" in value for value in parameters.values()):
            return []
        conditions = "".join(f" AND expectation.{name} = :{name}" for name in parameters)
        statement = self._queries["expectations"].replace(":conditions", conditions)
        return await self._items(statement, {"before": before, "limit": limit, **parameters})

    async def expectation(self, id: int) -> ExpectationItem | None:
        """Return one expectation."""
        found = await self._items(self._queries["expectation"], {"id": id})
        return found[0] if found else None

    async def expected(self, batch_id: str, api_code: str | None) -> list[ExpectationItem]:
        """Return expectations of this batch_id (and api_code) of which no notification has come, oldest first, at most
        2.
        """
        return await self._items(self._queries["expected"], {"batch_id": batch_id, "api_code": api_code or ""})

    async def of_batch(self, batch: int) -> list[ExpectationItem]:
        """Return the expectations that a batch was matched with, oldest first, at most 100."""
        return await self._items(self._queries["of_batch"], {"batch": batch})

    async def counts(self) -> list[ExpectationCount]:
        """Return the number of open expectations by state, each at most 100,000."""
        row = await self._run(self._queries["counts"], {})
        return msgspec.json.decode("[]" if row is None or row[0] is None else row[0], type=list[ExpectationCount])

    async def arrivals(self) -> list[ArrivalItem]:
        """Return the latest notification of each api_code, the latest first; patterns without one come last."""
        row = await self._run(self._queries["arrivals"], {})
        rows: list[list[Any]] = msgspec.json.decode("[]" if row is None or row[0] is None else row[0])
        return [ArrivalItem(api_code, utc(received_at), utc(told_at)) for api_code, received_at, told_at in rows]

    async def _items(self, statement: str, parameters: Mapping[str, object]) -> list[ExpectationItem]:
        row = await self._run(statement, parameters)
        rows: list[list[Any]] = msgspec.json.decode("[]" if row is None or row[0] is None else row[0])
        return [_item(each) for each in rows]


def _item(row: list[Any]) -> ExpectationItem:
    values = dict(zip(ExpectationItem.__struct_fields__, row, strict=True))
    times = {name: utc(values[name]) for name in ("notify_by", "verdict_by", "created_at")}
    return msgspec.convert(values | times, ExpectationItem)
