"""Writes events and their deliveries on PostgreSQL, in the transactions of the changes that they are about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import msgspec

from notify_server.events.payload import (
    MAX_MISSING,
    SUPERSEDING,
    BatchRow,
    EventType,
    MissingRow,
    batch_event,
    verdict_type,
)
from notify_server.model import BatchVerdict, FileState
from notify_server.store.expectations import Short, short_event
from notify_server.store.outbox import (
    NewEvent,
    Subscription,
    due_at,
    is_wanted,
)
from notify_server.store.postgres.ends import take_expiring
from notify_server.store.postgres.expecting import SQL as EXPECTATION_SQL
from notify_server.store.postgres.expecting import judge_batches
from notify_server.store.postgres.session import Connection, arrays, row_count
from notify_server.store.sql import load_queries

SQL = load_queries("postgres", "outbox")
MAX_AT_RISK = 100


class Events:
    """Writes events in the transactions of other verbs. `public_url` is the dashboard's address."""

    def __init__(self) -> None:
        self.public_url: str | None = None

    async def add_verdicts(self, connection: Connection, verdicts: list[BatchVerdict], now: int) -> list[BatchVerdict]:
        """Write the events of verdicts that differ from the last event of their batch; return the verdicts with
        them.
        """
        if not verdicts:
            return verdicts
        batches = [verdict.batch for verdict in verdicts]
        shorts = await judge_batches(connection, batches)
        rows = {row[0]: BatchRow(*row) for row in await connection.fetch(SQL["verdict_batches"], batches)}
        if not rows:
            await self.write_shorts(connection, shorts, now)
            return verdicts
        missing = await self._missing(connection, rows.values())
        new = [
            NewEvent(
                batch_event(verdict_type(row.verdict), row, missing[row.id], now, url=self._url(row.id)), row.api_code
            )
            for row in sorted(rows.values(), key=lambda row: row.id)
        ]
        ids = dict(zip(sorted(rows), await self.write(connection, new), strict=True))
        await self.write_shorts(connection, shorts, now)
        return [
            msgspec.structs.replace(each, event=ids[each.batch], revision=rows[each.batch].revision)
            if each.batch in rows
            else each
            for each in verdicts
        ]

    async def write_shorts(self, connection: Connection, shorts: Sequence[Short], now: int) -> None:
        """Write batch.short of expectations that have become short. Their batches are locked."""
        new = []
        for short in shorts:
            batch = short.expectation.batch
            assert batch is not None
            row = await connection.fetchrow(EXPECTATION_SQL["next_revision"], batch)
            assert row is not None
            event = short_event(short, row[0], row[1], now, self._url(batch))
            new.append(NewEvent(event, short.expectation.api_code))
        await self.write(connection, new)

    async def note_retrying(self, connection: Connection, batches: Collection[int]) -> None:
        """Note that an attempt at a file of these batches failed. The batches are locked."""
        if batches:
            await connection.execute(SQL["retrying"], list(batches))

    async def prune_batches(self, connection: Connection, batches: Sequence[int]) -> int:
        """Delete the events of batches with their deliveries, and their expectations; return how many rows."""
        if not batches:
            return 0
        expectations = row_count(await connection.execute(EXPECTATION_SQL["prune_of"], batches))
        names = ("prune_attempts_of", "prune_forwards_of", "prune_events_of")
        return expectations + sum([row_count(await connection.execute(SQL[name], batches)) for name in names])

    async def prune_plain(self, connection: Connection, before: int, limit: int) -> int:
        """Delete events of no batch; return how many rows."""
        ids = [id for (id,) in await connection.fetch(SQL["prune_plain"], before, limit)]
        if not ids:
            return 0
        names = ("prune_plain_attempts", "prune_plain_forwards", "prune_plain_events")
        return sum([row_count(await connection.execute(SQL[name], ids)) for name in names])

    async def judge_risk(self, connection: Connection, before: int, waits: Sequence[int], now: int) -> int:
        """Write batch.at_risk of the batches of which a file's latest attempt failed; return how many."""
        rows = [BatchRow(*row) for row in await connection.fetch(SQL["at_risk_candidates"], before, MAX_AT_RISK)]
        groups = await connection.fetch(SQL["retrying_files"], [row.id for row in rows])
        failed = {batch for batch, *_, has_failed in groups if has_failed}
        at_risk = [row for row in rows if row.id in failed]
        await connection.execute(SQL["not_retrying"], [row.id for row in rows if row not in at_risk])
        if at_risk:
            await self.write_at_risk(connection, at_risk, waits, now, cause="age")
        return len(at_risk)

    async def write_at_risk(
        self, connection: Connection, rows: Sequence[BatchRow], waits: Sequence[int], now: int, *, cause: str
    ) -> None:
        """Write batch.at_risk of batches, which are locked; `waits` is that of find_at_risk."""
        ids = [row.id for row in rows]
        groups: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for batch, attempts, latest, first, _ in await connection.fetch(SQL["retrying_files"], ids):
            groups[batch].append((attempts, latest, first))
        await connection.execute(SQL["at_risk_written"], ids, now)
        missing = await self._missing(connection, rows)
        new = []
        for row in rows:
            final_by = next_attempt_at = None
            if of_batch := groups[row.id]:
                final_by = max(latest + waits[min(attempts, len(waits) - 1)] for attempts, latest, _ in of_batch)
                next_attempt_at = min(first for *_, first in of_batch)
            timed = msgspec.structs.replace(row, next_attempt_at=next_attempt_at)
            event = batch_event(
                EventType.BATCH_AT_RISK, timed, missing[row.id], now,
                cause=cause, final_by=final_by, url=self._url(row.id),
            )  # fmt: skip
            new.append(NewEvent(event, row.api_code))
        await self.write(connection, new)

    async def write_expiring(self, connection: Connection, until: int, now: int) -> int:
        """Write batch.expiring of the batches of which files end by then; return how many were looked at."""
        looked_at, expiring = await take_expiring(connection, until, now)
        missing = await self._missing(connection, [row for row, _ in expiring])
        kind, url = EventType.BATCH_EXPIRING, self._url
        await self.write(
            connection,
            [
                NewEvent(batch_event(kind, row, missing[row.id], now, url=url(row.id), ending=ending), row.api_code)
                for row, ending in expiring
            ],
        )
        return looked_at

    def _url(self, batch: int) -> str | None:
        return None if self.public_url is None else f"{self.public_url}/ui/batches/{batch}"

    @staticmethod
    async def _missing(connection: Connection, rows: Collection[BatchRow]) -> defaultdict[int, list[MissingRow]]:
        missing: defaultdict[int, list[MissingRow]] = defaultdict(list)
        if lacking := [row.id for row in rows if row.available < row.files]:
            for batch, name, state, *rest in await connection.fetch(SQL["missing"], lacking, MAX_MISSING):
                missing[batch].append(MissingRow(batch, name, FileState(state), *rest))
        return missing

    async def write(self, connection: Connection, new: Sequence[NewEvent]) -> list[int]:
        """Write events and their deliveries; return the ids of the events."""
        if not new:
            return []
        rows = [(e.key, e.type, e.batch, e.revision, e.occurred_at, e.payload.decode()) for e in (n.event for n in new)]
        by_key = {key: id for id, key in await connection.fetch(SQL["events_insert"], *arrays(rows, 6))}
        ids = [by_key[each.event.key] for each in new]
        subscriptions = await read_subscriptions(connection)
        if not subscriptions:
            return ids
        recoveries = [
            (n.event.batch, each.name)
            for n in new
            for each in subscriptions
            if n.to is None and each.wants_recovery(n.event.type)
        ]
        had: set[tuple[int | None, str]] = {each for each in recoveries if each[0] is None}
        if batches := [batch for batch, _ in recoveries if batch is not None]:
            names = [name for _, name in recoveries]
            had |= {(batch, endpoint) for batch, endpoint in await connection.fetch(SQL["had_problem"], batches, names)}
        deliveries: list[tuple[int, str, int | None, int]] = []
        newer: list[tuple[int | None, str, int]] = []
        for id, n in zip(ids, new, strict=True):
            for each in subscriptions:
                recovery = n.to is None and each.wants_recovery(n.event.type)
                wanted = (n.event.batch, each.name) in had if recovery else is_wanted(each, n)
                if (wanted or recovery) and n.event.revision > 1 and n.event.type in SUPERSEDING:
                    newer.append((n.event.batch, each.name, id))
                if wanted:
                    deliveries.append((id, each.name, n.event.batch, due_at(each, n)))
        if newer:
            await connection.execute(SQL["supersede"], *arrays(newer, 3))
        if deliveries:
            await connection.execute(SQL["forwards_insert"], *arrays(deliveries, 4))
        return ids


async def read_subscriptions(connection: Connection) -> list[Subscription]:
    """Return the endpoints that any node has configured."""
    return [
        Subscription(name, msgspec.json.decode(types), msgspec.json.decode(api_codes), delay_ms, bool(recoveries))
        for name, types, api_codes, delay_ms, recoveries in await connection.fetch(SQL["endpoints"])
    ]
