"""The latest notification of each api_code, and reports of silence, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from notify_server.expect.clock import MAX_SILENCE_MS, MAX_SKEW_MS, ReadyClock
from notify_server.expect.quiet import Arrival, QuietLimit, Silence, find_silences
from notify_server.store.expectations import MAX_API_CODES
from notify_server.store.postgres.session import Connection, arrays
from notify_server.store.sql import load_queries

SQL = load_queries("postgres", "quiet")


async def note_arrivals(connection: Connection, arrived: Mapping[str, int]) -> None:
    """Note the notifications of api_codes, each with the time of its latest."""
    rows = arrays(list(arrived.items()), 2)
    inserted = await connection.fetch(SQL["come"], *rows, -MAX_SKEW_MS, MAX_SILENCE_MS)
    if any(is_new for (is_new,) in inserted):
        await connection.execute(SQL["trim"], MAX_API_CODES)


async def take_silences(connection: Connection, limits: Sequence[QuietLimit], now: int) -> list[Silence]:
    """Note that a server is ready at `now`; return the silences that are to be reported. Of several nodes one gets
    each.
    """
    if await connection.fetchval(SQL["clock_begin"], now) is not None:
        await connection.execute(SQL["begin"], now)
    # One node at a time from here on.
    before = ReadyClock(*await connection.fetchrow(SQL["clock_lock"]) or (now, 0))
    clock = before.ready(now)
    if clock != before:
        await connection.execute(SQL["clock_set"], clock.ready_at, clock.away_ms)
    arrivals = [Arrival(*row) for row in await connection.fetch(SQL["arrivals"])]
    watched = find_silences(arrivals, limits, (), clock.at(now))
    if watched.unknown:
        await connection.execute(SQL["insert"], watched.unknown, clock.at(now))
    if not watched.silences:
        return []
    inbox = {api_code for (api_code,) in await connection.fetch(SQL["inbox"])}
    silences = {each.arrival.api_code: each for each in find_silences(arrivals, limits, inbox, clock.at(now)).silences}
    rows = [(each.arrival.api_code, each.arrival.received_at, each.arrival.quiet_since) for each in silences.values()]
    told = await connection.fetch(SQL["told"], *arrays(rows, 3), now)
    return [silences[api_code] for (api_code,) in told]
