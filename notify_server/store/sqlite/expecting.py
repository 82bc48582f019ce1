"""Matching and judging expectations on SQLite, in the transactions of the changes that decide. Nothing is committed."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence

import msgspec

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
from notify_server.store.sql import load_queries

SQL = load_queries("sqlite", "expectation")


def read_clock(connection: sqlite3.Connection, now: int) -> ReadyClock:
    """Return the clock of the limits; it is running when a limit is open, else it starts at `now`."""
    row = connection.execute(SQL["clock"]).fetchone()
    clock = ReadyClock(now, 0) if row is None else ReadyClock(*row)
    if row is None or connection.execute(SQL["any_limit"]).fetchone() is None:
        clock = clock.started(now)
        write_clock(connection, clock)
    return clock


def write_clock(connection: sqlite3.Connection, clock: ReadyClock) -> None:
    """Keep the clock."""
    connection.execute(SQL["clock_set"], (clock.ready_at, clock.away_ms))


def match_batches(connection: sqlite3.Connection, batches: Sequence[int], now: int) -> None:
    """Match batches of which a notification has just been merged."""
    (any_unmatched,) = connection.execute(SQL["any_unmatched"]).fetchone()
    if not any_unmatched or not batches:
        return
    ids = _json(batches)
    arrivals = [
        Arrival(id, batch_id, api_code, bool(is_first))
        for id, batch_id, api_code, is_first in connection.execute(SQL["arrivals"], (ids,)).fetchall()
    ]
    named = [from_row(row) for row in connection.execute(SQL["named"], (ids,)).fetchall()]
    first = Counter(each.api_code for each in arrivals if each.is_first)
    unnamed = [
        from_row(row)
        for api_code, number in first.items()
        for row in connection.execute(SQL["unnamed"], (api_code, number)).fetchall()
    ]
    matched = {batch for (batch,) in connection.execute(SQL["matched"], (ids,)).fetchall()} if unnamed else set()
    write_matches(connection, match_arrivals(arrivals, named, unnamed, matched), now)


def write_matches(connection: sqlite3.Connection, matches: Sequence[Match], now: int) -> None:
    """Write matches; from now on verdict_within is the open limit."""
    if not matches:
        return
    read_clock(connection, now)
    rows = [(each.batch, str(each.by), due_when_matched(each.expectation), each.expectation.id) for each in matches]
    connection.executemany(SQL["match"], rows)


def judge_batches(connection: sqlite3.Connection, batches: Sequence[int]) -> list[Short]:
    """Judge the expectations of batches that have a verdict; return those that have become short. The next event of a
    batch that is not short any more is written although its verdict is the same.
    """
    if connection.execute(SQL["any"]).fetchone() is None:
        return []
    shorts = []
    for *row, files in connection.execute(SQL["judged"], (_json(batches),)).fetchall():
        expectation = from_row(row)
        names: list[str] = []
        if needs_names(expectation):
            names = [name for (name,) in connection.execute(SQL["names"], (expectation.batch,)).fetchall()]
        outcome = after_verdict(expectation, files, names)
        connection.execute(SQL["outcome"], (str(outcome.state), expectation.id))
        if outcome.state is not expectation.state:
            if outcome.state is ExpectationState.SHORT:
                shorts.append(Short(expectation, outcome.files))
            elif expectation.state is ExpectationState.SHORT:
                connection.execute(SQL["rescued"], (expectation.batch,))
    return shorts


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
