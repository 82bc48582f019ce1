"""The latest notification of each api_code, and reports of silence, on SQLite. Nothing is committed."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

from notify_server.expect.clock import ReadyClock
from notify_server.expect.quiet import Arrival, QuietLimit, Silence, find_silences
from notify_server.store.expectations import MAX_API_CODES
from notify_server.store.sql import load_queries
from notify_server.store.sqlite.expecting import SQL as EXPECTATION_SQL

SQL = load_queries("sqlite", "quiet")


def note_arrivals(connection: sqlite3.Connection, arrived: Mapping[str, int]) -> None:
    """Note the notifications of api_codes, each with the time of its latest."""
    row = connection.execute(SQL["clock"]).fetchone()
    for api_code, received_at in arrived.items():
        quiet_since = received_at if row is None else ReadyClock(*row).at(received_at)
        _upsert(connection, api_code, received_at, quiet_since)


def take_silences(connection: sqlite3.Connection, limits: Sequence[QuietLimit], now: int) -> list[Silence]:
    """Note that this server is ready at `now`; return the silences that are to be reported, each once."""
    row = connection.execute(SQL["clock"]).fetchone()
    clock = ReadyClock(now, 0) if row is None else ReadyClock(*row).ready(now)
    if row is None:
        connection.execute(SQL["begin"], (now,))
    connection.execute(SQL["clock_set"], (clock.ready_at, clock.away_ms))
    arrivals = [Arrival(*row) for row in connection.execute(SQL["arrivals"]).fetchall()]
    inbox = {api_code for _, api_code in connection.execute(EXPECTATION_SQL["in_inbox"]).fetchall()}
    watched = find_silences(arrivals, limits, inbox, clock.at(now))
    for pattern in watched.unknown:
        _upsert(connection, pattern, None, clock.at(now))
    connection.executemany(SQL["told"], [(now, each.arrival.api_code) for each in watched.silences])
    return watched.silences


def _upsert(connection: sqlite3.Connection, api_code: str, received_at: int | None, quiet_since: int) -> None:
    parameters = {"api_code": api_code, "received_at": received_at, "quiet_since": quiet_since}
    if not connection.execute(SQL["come"], parameters).rowcount:
        connection.execute(SQL["insert"], parameters)
        connection.execute(SQL["trim"], (MAX_API_CODES,))
