"""The verbs of store.expectations.Expectations on PostgreSQL."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TypeVar

from notify_server.events.payload import BatchRow
from notify_server.expect.clock import ReadyClock
from notify_server.expect.expectation import (
    Expectation,
    ExpectationState,
    Match,
    MatchedBy,
    NewExpectation,
    differing_field,
    due_when_waiting,
)
from notify_server.expect.quiet import QuietLimit
from notify_server.store.expectations import MAX_DUE, Registered, from_row, late_event, quiet_event, to_row
from notify_server.store.outbox import NewEvent
from notify_server.store.postgres.events import Events
from notify_server.store.postgres.expecting import SQL, judge_batches, lock_matching, read_clock, write_matches
from notify_server.store.postgres.quiet import take_silences
from notify_server.store.postgres.session import Connection, arrays, transact

T = TypeVar("T")
_Name = tuple[str, str]


class PostgresExpectations:
    """`use` gives a connection for the time of a verb; `events` writes events in the transactions of these verbs."""

    def __init__(self, events: Events, use: Callable[[], AbstractAsyncContextManager[Connection]]) -> None:
        self._events = events
        self._use = use

    async def _transaction(self, job: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._use() as connection:
            return await transact(connection, job)

    async def register(self, wanted: Sequence[NewExpectation], now: int) -> list[Registered]:
        return await self._transaction(partial(self._register, wanted=wanted, now=now))

    async def _register(self, connection: Connection, wanted: Sequence[NewExpectation], now: int) -> list[Registered]:
        await lock_matching(connection, shared=False)
        names = list({(new.reference, new.api_code): None for new in wanted})
        rows = await connection.fetch(SQL["known"], *arrays(names, 2))
        known = {(each.reference, each.api_code): each for each in map(from_row, rows)}
        fresh: dict[_Name, NewExpectation] = {}
        conflicts: list[str | None] = []
        for new in wanted:
            name = new.reference, new.api_code
            if name in known:
                conflicts.append(differing_field(known[name], new))
            else:
                before = fresh.setdefault(name, new)
                differing = (each for each in new.__struct_fields__ if getattr(before, each) != getattr(new, each))
                conflicts.append(next(differing, None))
        if any(conflicts):
            ids = [
                known[new.reference, new.api_code].id if (new.reference, new.api_code) in known else 0 for new in wanted
            ]
            return [Registered(id, False, conflict) for id, conflict in zip(ids, conflicts, strict=True)]
        if fresh:
            known |= await self._insert(connection, list(fresh.values()), now)
        results = []
        for new in wanted:
            name = new.reference, new.api_code
            results.append(Registered(known[name].id, fresh.pop(name, None) is not None))
        return results

    async def _insert(
        self, connection: Connection, fresh: Sequence[NewExpectation], now: int
    ) -> dict[_Name, Expectation]:
        away_ms = now - (await read_clock(connection, now)).at(now)
        rows = []
        for new in fresh:
            notify_by, verdict_by = new.limits(now)
            expectation = Expectation(
                0, new.reference, new.api_code, new.batch_id, new.files, new.keys, notify_by, verdict_by,
                ExpectationState.WAITING, None, None, now, away_ms, None,
            )  # fmt: skip
            rows.append((*to_row(expectation)[:-1], due_when_waiting(expectation)))
        written = [from_row(row) for row in await connection.fetch(SQL["insert"], *arrays(rows, 13))]
        by_name = {(each.reference, each.api_code): each for each in written}
        matches = await self._matches(connection, [(new, by_name[new.reference, new.api_code]) for new in fresh], now)
        if matches:
            batches = sorted({each.batch for each in matches})
            await connection.execute(SQL["batches_lock"], batches)
            await write_matches(connection, matches, now)
            shorts = await judge_batches(connection, batches)
            await self._events.write_shorts(connection, shorts, now)
        return by_name

    async def _matches(
        self, connection: Connection, fresh: Sequence[tuple[NewExpectation, Expectation]], now: int
    ) -> list[Match]:
        """Return the matches of batches that have come before."""
        names = [(new.batch_id, new.api_code) for new, _ in fresh if new.batch_id is not None]
        found = await connection.fetch(SQL["batches_named"], *arrays(names, 2)) if names else []
        named = {(batch_id, api_code): id for id, batch_id, api_code in found}
        matches = [
            Match(each, named[new.batch_id, new.api_code], MatchedBy.BATCH_ID)
            for new, each in fresh
            if new.batch_id is not None and (new.batch_id, new.api_code) in named
        ]
        # Those that have just been matched by name are not free.
        taken = {each.batch for each in matches}
        unnamed: defaultdict[str, list[tuple[NewExpectation, Expectation]]] = defaultdict(list)
        for new, each in fresh:
            if new.batch_id is None:
                unnamed[new.api_code].append((new, each))
        for api_code, waiting in unnamed.items():
            since = min(new.look_back(now) for new, _ in waiting)
            rows = await connection.fetch(SQL["free_batches"], api_code, since, len(waiting) + len(taken))
            free = [id for (id,) in rows if id not in taken]
            matches += [Match(each, batch, MatchedBy.ORDER) for (_, each), batch in zip(waiting, free, strict=False)]
        return matches

    async def check_limits(self, waits: Sequence[int], now: int) -> int:
        async with self._use() as connection:
            if not await connection.fetchval(SQL["any_limit"]):
                return 0
        clock = await self._transaction(partial(_note_ready, now=now))
        async with self._use() as connection:
            if not await connection.fetch(SQL["due"], clock.at(now), 1):
                return 0
        return await self._transaction(partial(self._pass_limits, clock=clock, waits=waits, now=now))

    async def _pass_limits(self, connection: Connection, clock: ReadyClock, waits: Sequence[int], now: int) -> int:
        found = await connection.fetch(SQL["due"], clock.at(now), MAX_DUE)
        ids, batches = [id for id, _ in found], [batch for _, batch in found if batch is not None]
        locked = [id for (id,) in await connection.fetch(SQL["due_batches"], batches)]
        rows = await connection.fetch(SQL["due_lock"], ids, clock.at(now), locked)
        due = [from_row(row) for row in rows]
        # Only now: what was expanded before it was locked has been matched.
        api_codes = list({each.api_code for each in due if each.batch is None})
        inbox = {(batch_id, api_code) for batch_id, api_code in await connection.fetch(SQL["in_inbox"], api_codes)}
        coming = {api_code for _, api_code in inbox}
        late = [
            each
            for each in due
            if each.batch is None
            and not (each.api_code in coming if each.batch_id is None else (each.batch_id, each.api_code) in inbox)
        ]
        matched = [each for each in due if each.batch is not None]
        outcomes = [(each.id, str(ExpectationState.LATE)) for each in late]
        outcomes += [(each.id, str(each.state)) for each in matched]
        await connection.execute(SQL["outcomes"], *arrays(outcomes, 2))
        if late:
            events = [NewEvent(late_event(each, clock, now), each.api_code) for each in late]
            await self._events.write(connection, events)
        if matched:
            batches = list({each.batch for each in matched if each.batch is not None})
            at_risk = [BatchRow(*row) for row in await connection.fetch(SQL["at_risk"], batches)]
            await self._events.write_at_risk(connection, at_risk, waits, now, cause="verdict_within")
        return len(outcomes)

    async def check_quiet(self, limits: Sequence[QuietLimit], now: int) -> int:
        async def write(connection: Connection) -> int:
            silences = await take_silences(connection, limits, now)
            if silences:
                events = [NewEvent(quiet_event(each, now), each.arrival.api_code) for each in silences]
                await self._events.write(connection, events)
            return len(silences)

        return await self._transaction(write)

    async def remove(self, id: int) -> bool:
        async with self._use() as connection:
            return await connection.execute(SQL["remove"], id) != "DELETE 0"


async def _note_ready(connection: Connection, now: int) -> ReadyClock:
    row = await connection.fetchrow(SQL["clock_lock"])
    if row is None:
        return await read_clock(connection, now)
    before = ReadyClock(*row)
    clock = before.ready(now)
    if clock != before:
        await connection.execute(SQL["clock_set"], clock.ready_at, clock.away_ms)
    return clock
