"""Matching and judging expectations on PostgreSQL, in the transactions of the changes that decide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from notify_server.expect.clock import ReadyClock
from notify_server.expect.expectation import (
    Arrival,
    ExpectationState,
    Match,
    after_verdict,
    due_when_matched,
    match_arrivals,
    needs_names,
)
from notify_server.store.expectations import Short, from_row
from notify_server.store.postgres.session import LOCK_KEY, LOCK_SPACE, Connection, arrays
from notify_server.store.sql import load_queries

SQL = load_queries("postgres", "expectation")
_MATCHING = "match"


async def lock_matching(connection: Connection, *, shared: bool) -> None:
    """Take the lock of matching until the transaction ends: shared to expand, alone to register. It comes before all
    locks of rows.
    """
    function = "pg_advisory_xact_lock_shared" if shared else "pg_advisory_xact_lock"
    await connection.execute(f"SELECT {function}({LOCK_KEY})", LOCK_SPACE, _MATCHING)


async def read_clock(connection: Connection, now: int) -> ReadyClock:
    """Return the clock of the limits; it is running when a limit is open, else it starts at `now`."""
    row = await connection.fetchrow(SQL["clock"])
    if row is None or not row[2]:
        await connection.execute(SQL["clock_start"], now)
        row = await connection.fetchrow(SQL["clock"])
    assert row is not None
    return ReadyClock(row[0], row[1])


async def match_batches(connection: Connection, batches: Sequence[int], now: int) -> None:
    """Match batches of which a notification has just been merged. The lock of matching is held."""
    if not batches or not await connection.fetchval(SQL["any_unmatched"]):
        return
    arrivals = [Arrival(*row) for row in await connection.fetch(SQL["arrivals"], batches)]
    named = [from_row(row) for row in await connection.fetch(SQL["named"], batches)]
    first = Counter(each.api_code for each in arrivals if each.is_first)
    rows = await connection.fetch(SQL["unnamed"], list(first), list(first.values()))
    unnamed = [from_row(row) for row in rows]
    matched = {batch for (batch,) in await connection.fetch(SQL["matched"], batches)} if unnamed else set()
    await write_matches(connection, match_arrivals(arrivals, named, unnamed, matched), now)


async def write_matches(connection: Connection, matches: Sequence[Match], now: int) -> None:
    """Write matches; from now on verdict_within is the open limit."""
    if matches:
        await read_clock(connection, now)
        rows = [(each.batch, str(each.by), due_when_matched(each.expectation), each.expectation.id) for each in matches]
        await connection.execute(SQL["match"], *arrays(rows, 4))


async def judge_batches(connection: Connection, batches: Collection[int]) -> list[Short]:
    """Judge the expectations of batches that have a verdict, which are locked; return those that have become short. The
    next event of a batch that is not short any more is written although its verdict is the same.
    """
    ids = list(batches)
    if not await connection.fetchval(SQL["any_of"], ids):
        return []
    shorts: list[Short] = []
    outcomes: list[tuple[int, str]] = []
    rescued: list[int] = []
    for *row, files in await connection.fetch(SQL["judged"], ids):
        expectation = from_row(row)
        names: list[str] = []
        if needs_names(expectation):
            names = [name for (name,) in await connection.fetch(SQL["names"], expectation.batch)]
        outcome = after_verdict(expectation, files, names)
        outcomes.append((expectation.id, str(outcome.state)))
        if outcome.state is not expectation.state:
            if outcome.state is ExpectationState.SHORT:
                shorts.append(Short(expectation, outcome.files))
            elif expectation.state is ExpectationState.SHORT and expectation.batch is not None:
                rescued.append(expectation.batch)
    await connection.execute(SQL["outcomes"], *arrays(outcomes, 2))
    if rescued:
        await connection.execute(SQL["rescued"], rescued)
    return shorts
