"""The verbs of store.expectations.Expectations on SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from notify_server.events.payload import BatchRow
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
from notify_server.store.sqlite.expecting import SQL, judge_batches, read_clock, write_clock, write_matches
from notify_server.store.sqlite.outbox import SqliteOutbox
from notify_server.store.sqlite.quiet import take_silences
from notify_server.store.sqlite.writer import Writer


class SqliteExpectations:
    """Events are written by the outbox, in the transactions of these verbs."""

    def __init__(self, writer: Writer, outbox: SqliteOutbox) -> None:
        self._writer = writer
        self._outbox = outbox

    async def register(self, wanted: Sequence[NewExpectation], now: int) -> list[Registered]:
        def check(connection: sqlite3.Connection) -> list[Registered]:
            return _check(connection, wanted)

        def write(connection: sqlite3.Connection) -> list[Registered]:
            known = _check(connection, wanted)
            if any(each.conflict for each in known):
                return known
            return self._write(connection, wanted, now)

        # A transaction costs a sync.
        known = await self._writer.read(check)
        if all(each.id for each in known):
            return known
        return await self._writer.transaction(write)

    def _write(self, connection: sqlite3.Connection, wanted: Sequence[NewExpectation], now: int) -> list[Registered]:
        away_ms = now - read_clock(connection, now).at(now)
        results: list[Registered] = []
        matched: list[int] = []
        for new in wanted:
            row = connection.execute(SQL["known"], (new.reference, new.api_code)).fetchone()
            if row is not None:
                results.append(Registered(row[0], False))
                continue
            notify_by, verdict_by = new.limits(now)
            expectation = Expectation(
                0, new.reference, new.api_code, new.batch_id, new.files, new.keys, notify_by, verdict_by,
                ExpectationState.WAITING, None, None, now, away_ms, None,
            )  # fmt: skip
            due_at = due_when_waiting(expectation)
            id = connection.execute(SQL["insert"], (*to_row(expectation)[:-1], due_at)).lastrowid
            assert id is not None
            results.append(Registered(id, True))
            batch = _come_before(connection, new, now)
            if batch is not None:
                by = MatchedBy.ORDER if new.batch_id is None else MatchedBy.BATCH_ID
                row = connection.execute(SQL["known"], (new.reference, new.api_code)).fetchone()
                write_matches(connection, [Match(from_row(row), batch, by)], now)
                matched.append(batch)
        self._outbox.write_shorts(connection, judge_batches(connection, matched), now)
        return results

    async def check_limits(self, waits: Sequence[int], now: int) -> int:
        def is_any(connection: sqlite3.Connection) -> bool:
            return connection.execute(SQL["any_limit"]).fetchone() is not None

        def write(connection: sqlite3.Connection) -> int:
            clock = read_clock(connection, now).ready(now)
            write_clock(connection, clock)
            found = [from_row(row) for row in connection.execute(SQL["due"], (clock.at(now), MAX_DUE)).fetchall()]
            if not found:
                return 0
            inbox = set(connection.execute(SQL["in_inbox"]).fetchall())
            api_codes = {api_code for _, api_code in inbox}
            taken = 0
            for each in found:
                if each.batch is None:
                    may_come = (
                        each.api_code in api_codes if each.batch_id is None else (each.batch_id, each.api_code) in inbox
                    )
                    if may_come:
                        continue
                    connection.execute(SQL["outcome"], (str(ExpectationState.LATE), each.id))
                    self._outbox.write_event(connection, NewEvent(late_event(each, clock, now), each.api_code))
                else:
                    self._pass_verdict_limit(connection, each, waits, now)
                taken += 1
            return taken

        return await self._writer.transaction(write) if await self._writer.read(is_any) else 0

    def _pass_verdict_limit(
        self, connection: sqlite3.Connection, expectation: Expectation, waits: Sequence[int], now: int
    ) -> None:
        connection.execute(SQL["outcome"], (str(expectation.state), expectation.id))
        row = connection.execute(SQL["at_risk"], (expectation.batch,)).fetchone()
        if row is not None:
            self._outbox.write_at_risk(connection, BatchRow(*row), waits, now, cause="verdict_within")

    async def check_quiet(self, limits: Sequence[QuietLimit], now: int) -> int:
        def write(connection: sqlite3.Connection) -> int:
            silences = take_silences(connection, limits, now)
            for each in silences:
                self._outbox.write_event(connection, NewEvent(quiet_event(each, now), each.arrival.api_code))
            return len(silences)

        return await self._writer.transaction(write)

    async def remove(self, id: int) -> bool:
        def write(connection: sqlite3.Connection) -> bool:
            return connection.execute(SQL["remove"], (id,)).rowcount > 0

        return await self._writer.transaction(write)


def _check(connection: sqlite3.Connection, wanted: Sequence[NewExpectation]) -> list[Registered]:
    """Return what is known of each: id 0 when it is new; a conflict also with another one of the call."""
    results = []
    first: dict[tuple[str, str], NewExpectation] = {}
    for new in wanted:
        row = connection.execute(SQL["known"], (new.reference, new.api_code)).fetchone()
        conflict = None
        if row is not None:
            conflict = differing_field(from_row(row), new)
        elif (before := first.setdefault((new.reference, new.api_code), new)) != new:
            conflict = next(name for name in new.__struct_fields__ if getattr(before, name) != getattr(new, name))
        results.append(Registered(0 if row is None else row[0], False, conflict))
    return results


def _come_before(connection: sqlite3.Connection, new: NewExpectation, now: int) -> int | None:
    """Return the batch that has come before its registration."""
    if new.batch_id is not None:
        row = connection.execute(SQL["batch_named"], (new.batch_id, new.api_code)).fetchone()
    else:
        parameters = {"api_code": new.api_code, "since": new.look_back(now)}
        row = connection.execute(SQL["free_batches"], parameters).fetchone()
    return None if row is None else int(row[0])
