"""Registers submissions, and finds, lists and deletes their expectations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from notify_server.errors import NotifyServerError
from notify_server.expect.expectation import NewExpectation
from notify_server.store.base import MAX_ID
from notify_server.store.expectations import MAX_REGISTERED, Expectations
from notify_server.store.reading.expectations import ExpectationFilter, ExpectationItem, ExpectationRecords
from notify_server.store.reading.types import Page

# Expectations of one reference that one call deletes.
MAX_DELETED = 500


class ExpectationConflictError(NotifyServerError):
    """The submission is known with other content. `place` is its place in the call, `field` the first that differs."""

    def __init__(self, place: int, field: str) -> None:
        super().__init__(
            f"{field}: differs from what is registered with this reference and api_code: delete that first, or use "
            "another reference"
        )
        self.place = place
        self.field = field


class ExpectationsRegistered(Struct, frozen=True):
    """The numbers of submissions that are new, and that were registered before."""

    created: int
    existing: int


class ExpectationsDeleted(Struct, frozen=True):
    """The number of expectations that were deleted."""

    deleted: int


class SubmissionService:
    """`now` gives Unix ms; `on_news` is called when events may have been committed."""

    def __init__(
        self,
        store: Expectations,
        records: ExpectationRecords,
        now: Callable[[], int],
        on_news: Callable[[], object],
    ) -> None:
        self._store = store
        self._records = records
        self._now = now
        self._on_news = on_news

    async def register(self, wanted: Sequence[NewExpectation]) -> list[tuple[int, bool]]:
        """Register submissions; return the id of each, and whether it is new. Raises ExpectationConflictError; those
        before it may be registered then.
        """
        results: list[tuple[int, bool]] = []
        for start in range(0, len(wanted), MAX_REGISTERED):
            part = wanted[start : start + MAX_REGISTERED]
            registered = await self._store.register(part, self._now())
            for place, each in enumerate(registered):
                if each.conflict is not None:
                    raise ExpectationConflictError(start + place, each.conflict)
            results += [(each.id, each.created) for each in registered]
        if any(created for _, created in results):
            self._on_news()
        return results

    async def expectations(self, wanted: ExpectationFilter, cursor: int | None, limit: int) -> Page[ExpectationItem]:
        """Return expectations, newest first. `next` of the page is the id to go on from."""
        before = MAX_ID if cursor is None else cursor
        items = await self._records.expectations(wanted, before, limit + 1)
        return Page(items[:limit], str(items[limit - 1].id) if len(items) > limit else None)

    async def expectation(self, id: int) -> ExpectationItem | None:
        """Return one expectation, None when there is none with this id."""
        return await self._records.expectation(id)

    async def of_batch(self, batch: int) -> list[ExpectationItem]:
        """Return the expectations that a batch was matched with."""
        return await self._records.of_batch(batch)

    async def delete(self, id: int) -> bool:
        """Delete an expectation; return False when there is none with this id."""
        return await self._store.remove(id)

    async def delete_named(self, reference: str, api_code: str | None) -> int:
        """Delete the expectations of a reference (and api_code); return how many."""
        wanted = ExpectationFilter(api_code=api_code, reference=reference)
        found = await self._records.expectations(wanted, MAX_ID, MAX_DELETED)
        return sum([await self._store.remove(each.id) for each in found])
