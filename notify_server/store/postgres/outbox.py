"""The outbox on PostgreSQL. A delivery is claimed by the node in its row; a dead node's claim counts for nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TypeVar

import msgspec
import structlog

from notify_server.events.payload import (
    MAX_MISSING,
    SUPERSEDING,
    BatchRow,
    EventType,
    MissingRow,
    PingData,
    batch_event,
    plain_event,
    verdict_type,
)
from notify_server.model import BatchVerdict, FileState
from notify_server.store.expectations import Short, short_event
from notify_server.store.outbox import (
    MAX_ATTEMPT_ROWS,
    Claimed,
    DeliveryResult,
    DeliveryState,
    EndpointState,
    NewEvent,
    Notice,
    Outgoing,
    Subscription,
    due_at,
    is_wanted,
)
from notify_server.store.outbox_health import after_results
from notify_server.store.postgres.expecting import SQL as EXPECTATION_SQL
from notify_server.store.postgres.expecting import judge_batches
from notify_server.store.postgres.node import Node
from notify_server.store.postgres.session import Connection, arrays, strip_nul, transact
from notify_server.store.sql import load_queries

T = TypeVar("T")

log = structlog.get_logger("notify_server.store")

# An endpoint stays for so long after the last node that has it: nodes are restarted one after another, and the first
# one with a new endpoint may have to start twice.
WANTED_SECONDS = 600.0
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
        if new:
            await self.write(connection, new)

    async def note_retrying(self, connection: Connection, batches: Collection[int]) -> None:
        """Note that an attempt at a file of these batches failed. The batches are locked."""
        if batches:
            await connection.execute(SQL["retrying"], list(batches))

    async def prune_batches(self, connection: Connection, batches: Sequence[int]) -> int:
        """Delete the events of batches with their deliveries, and their expectations; return how many rows."""
        if not batches:
            return 0
        expectations = _count(await connection.execute(EXPECTATION_SQL["prune_of"], batches))
        names = ("prune_attempts_of", "prune_forwards_of", "prune_events_of")
        return expectations + sum([_count(await connection.execute(SQL[name], batches)) for name in names])

    async def prune_plain(self, connection: Connection, before: int, limit: int) -> int:
        """Delete events of no batch; return how many rows."""
        ids = [id for (id,) in await connection.fetch(SQL["prune_plain"], before, limit)]
        if not ids:
            return 0
        names = ("prune_plain_attempts", "prune_plain_forwards", "prune_plain_events")
        return sum([_count(await connection.execute(SQL[name], ids)) for name in names])

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


class PostgresOutbox:
    """The verbs of store.outbox.Outbox. `use` gives a connection for the time of a verb."""

    def __init__(
        self,
        events: Events,
        node: Node,
        use: Callable[[], AbstractAsyncContextManager[Connection]],
    ) -> None:
        self._events = events
        self._node = node
        self._use = use
        self._subscriptions: dict[str, Subscription] = {}
        self._returned: set[int] = set()

    async def _transaction(self, job: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._use() as connection:
            return await transact(connection, job)

    async def subscribe(self, subscriptions: Sequence[Subscription], public_url: str | None, now: int) -> None:
        self._events.public_url = public_url
        self._subscriptions = {each.name: each for each in subscriptions}
        await self._transaction(partial(self._set, names=self._subscriptions))

    async def _set(self, connection: Connection, names: Iterable[str]) -> None:
        rows = [
            (each.name, _json(each.types), _json(each.api_codes), each.delay_ms, int(each.recoveries))
            for each in map(self._subscriptions.__getitem__, names)
        ]
        await connection.execute(SQL["endpoints_set"], *arrays(rows, 5), WANTED_SECONDS)

    async def renew_endpoints(self) -> None:
        """Keep the endpoints of this node, and remove those that no node has had for WANTED_SECONDS."""

        async def write(connection: Connection) -> None:
            names = sorted(self._subscriptions)
            present = {name for (name,) in await connection.fetch(SQL["endpoints_renew"], names, WANTED_SECONDS)}
            await self._set(connection, [name for name in names if name not in present])
            if unwanted := [name for (name,) in await connection.fetch(SQL["endpoints_unwanted"])]:
                cancelled = _count(await connection.execute(SQL["endpoints_cancel"], unwanted))
                log.info("endpoints removed, no node has them", endpoints=", ".join(unwanted), cancelled=cancelled)

        await self._transaction(write)

    async def claim_deliveries(self, wanted: Sequence[tuple[str, int]], now: int) -> Claimed:
        names, numbers = [endpoint for endpoint, _ in wanted], [most for _, most in wanted]
        async with self._use() as connection:
            returned = list(self._returned)
            if returned:
                await connection.execute(SQL["release"], returned, self._node.id)
                self._returned.difference_update(returned)
            rows = await connection.fetch(SQL["claim"], names, numbers, now, self._node.id)
            next_at = {name: at for name, at in await connection.fetch(SQL["next_at"], names, now) if at is not None}
        found = [
            Outgoing(id, event, key, type, endpoint, batch, revision, occurred_at, payload.encode(), attempts, subject)
            for id, event, key, type, endpoint, batch, revision, occurred_at, payload, attempts, subject in rows
        ]
        return Claimed(found, next_at)

    def release_deliveries(self, deliveries: Sequence[int]) -> None:
        # Before the next claim.
        self._returned.update(deliveries)

    async def record_deliveries(self, results: Sequence[DeliveryResult], now: int) -> list[Notice]:
        return await self._transaction(partial(self._record, node=self._node.id, results=results, now=now))

    async def _record(
        self, connection: Connection, node: int, results: Sequence[DeliveryResult], now: int
    ) -> list[Notice]:
        by_endpoint: defaultdict[str, list[DeliveryResult]] = defaultdict(list)
        for result in results:
            by_endpoint[result.endpoint].append(result)
        endpoints = [EndpointState(*row) for row in await connection.fetch(SQL["endpoints_lock"], list(by_endpoint))]
        await connection.fetch(SQL["record_lock"], [result.id for result in results])
        rows = [
            (
                r.id, str(r.state), r.attempts, r.next_attempt_at, r.status, _clean(r.error), _clean(r.response),
                now if r.state is DeliveryState.DELIVERED else None,
            )
            for r in results
        ]  # fmt: skip
        mine = {id for (id,) in await connection.fetch(SQL["record"], *arrays(rows, 8), node)}
        sent = [r for r in results if r.sent and r.id in mine]
        await connection.copy_records_to_table(
            "forward_attempt",
            records=[(r.id, r.started_at, r.status, _clean(r.error), r.elapsed_ms) for r in sent],
            columns=("forward", "started_at", "status", "error", "total_ms"),
        )
        await connection.execute(SQL["attempts_trim"], [r.id for r in sent if r.attempts > 1], MAX_ATTEMPT_ROWS)
        await connection.execute(
            SQL["record_superseded"], [r.id for r in results if r.id in mine and r.state is DeliveryState.PENDING]
        )
        notices: list[Notice] = []
        events: list[NewEvent] = []
        for before in endpoints:
            pending = await connection.fetchval(SQL["endpoint_pending"], before.name) if before.failures else 0
            change = after_results(
                before, [r for r in by_endpoint[before.name] if r.id in mine], partial(int, pending), now
            )
            if change.state != before:
                after = change.state
                await connection.execute(
                    SQL["endpoint_health"], after.name, after.failures, after.first_failed_at, after.last_success_at,
                    after.stopped_at, _clean(after.stopped_reason),
                )  # fmt: skip
            notices += change.notices
            events += change.events
        if events:
            await self._events.write(connection, events)
        return notices

    async def find_at_risk(self, received_before: int, waits: Sequence[int], now: int) -> int:
        async with self._use() as connection:
            if not await connection.fetchval(SQL["at_risk_any"], received_before):
                return 0
        return await self._transaction(partial(self._events.judge_risk, before=received_before, waits=waits, now=now))

    async def ping_endpoint(self, endpoint: str, now: int) -> int | None:
        async def write(connection: Connection) -> int | None:
            if endpoint not in {each.name for each in await read_subscriptions(connection)}:
                return None
            event = plain_event(EventType.TEST_PING, PingData(endpoint), now)
            (id,) = await self._events.write(connection, [NewEvent(event, to=endpoint)])
            found: int = await connection.fetchval("SELECT id FROM forward WHERE event = $1 AND batch IS NULL", id)
            return found

        return await self._transaction(write)

    async def replay_deliveries(self, endpoint: str, since: int, until: int, now: int, dry_run: bool) -> int:
        async def write(connection: Connection) -> int:
            found = [each for each in await read_subscriptions(connection) if each.name == endpoint]
            if not found:
                return 0
            types, api_codes = list(found[0].types), list(found[0].api_codes)
            rows = await connection.fetch(SQL["replay_events"], endpoint, since, until, types, api_codes)
            rows = [row for row in rows if row[3] != DeliveryState.PENDING]
            if not dry_run:
                again = sorted(id for _, _, id, _ in rows if id is not None)
                await connection.execute(SQL["replay_again"], again, now)
                fresh = [(event, endpoint, batch, now) for event, batch, id, _ in rows if id is None]
                await connection.execute(SQL["forwards_insert"], *arrays(fresh, 4))
            return len(rows)

        return await self._transaction(write)

    async def stop_endpoint(self, endpoint: str, reason: str | None, now: int) -> bool:
        async def write(connection: Connection) -> bool:
            rows = await connection.fetch(SQL["endpoints_lock"], [endpoint])
            if not rows:
                return False
            before = EndpointState(*rows[0])
            failures = before.failures if reason is not None else 0
            first = before.first_failed_at if reason is not None else None
            stopped_at = now if reason is not None else None
            await connection.execute(
                SQL["endpoint_health"], endpoint, failures, first, before.last_success_at, stopped_at, _clean(reason)
            )
            return True

        return await self._transaction(write)

    async def endpoint_states(self) -> list[EndpointState]:
        async with self._use() as connection:
            return [EndpointState(*row) for row in await connection.fetch(SQL["endpoint_states"])]

    async def open_problems(self, endpoint: str) -> list[bytes]:
        async with self._use() as connection:
            return [payload.encode() for (payload,) in await connection.fetch(SQL["open_problems"], endpoint)]


async def read_subscriptions(connection: Connection) -> list[Subscription]:
    """Return the endpoints that any node has configured."""
    return [
        Subscription(name, msgspec.json.decode(types), msgspec.json.decode(api_codes), delay_ms, bool(recoveries))
        for name, types, api_codes, delay_ms, recoveries in await connection.fetch(SQL["endpoints"])
    ]


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _clean(text: str | None) -> str | None:
    return None if text is None else strip_nul(text)


def _count(status: str) -> int:
    return int(status.rpartition(" ")[2])
