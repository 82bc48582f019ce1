"""The outbox on SQLite. What is being sent is held in memory, and is simply still pending after a crash."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from notify_server.events.payload import (
    MAX_MISSING,
    SUPERSEDING,
    BatchRow,
    Ending,
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
from notify_server.store.sql import load_queries
from notify_server.store.sqlite.ends import any_near, write_expiring
from notify_server.store.sqlite.expecting import SQL as EXPECTATION_SQL
from notify_server.store.sqlite.expecting import judge_batches
from notify_server.store.sqlite.writer import Writer

SQL = load_queries("sqlite", "outbox")

# Batches at risk that one transaction takes.
MAX_AT_RISK = 100


class SqliteOutbox:
    """The verbs of store.outbox.Outbox, and what other verbs call in their own transactions."""

    def __init__(self, writer: Writer, connection: sqlite3.Connection) -> None:
        self._writer = writer
        self._subscriptions = _read_subscriptions(connection)
        self._public_url: str | None = None
        # Deliveries that are claimed.
        self._sending: set[int] = set()

    # In the transaction of a change

    def add_verdicts(
        self, connection: sqlite3.Connection, verdicts: list[BatchVerdict], now: int
    ) -> list[BatchVerdict]:
        """Write the events of verdicts that differ from the last event of their batch; return the verdicts with
        them.
        """
        if not verdicts:
            return verdicts
        batches = [verdict.batch for verdict in verdicts]
        shorts = judge_batches(connection, batches)
        rows = [BatchRow(*row) for row in connection.execute(SQL["verdict_batches"], (_json(batches),)).fetchall()]
        written: dict[int, tuple[int, int]] = {}
        if rows:
            connection.execute(SQL["verdict_written"], (_json([row.id for row in rows]),))
        for row in rows:
            missing = _missing(connection, row)
            event = batch_event(verdict_type(row.verdict), row, missing, now, url=self._url(row.id))
            written[row.id] = self.write_event(connection, NewEvent(event, row.api_code)), row.revision
        self.write_shorts(connection, shorts, now)
        return [
            msgspec.structs.replace(verdict, event=written[verdict.batch][0], revision=written[verdict.batch][1])
            if verdict.batch in written
            else verdict
            for verdict in verdicts
        ]

    def write_shorts(self, connection: sqlite3.Connection, shorts: Sequence[Short], now: int) -> None:
        """Write batch.short of expectations that have become short."""
        for short in shorts:
            batch = short.expectation.batch
            assert batch is not None
            batch_id, revision = connection.execute(EXPECTATION_SQL["next_revision"], (batch,)).fetchone()
            event = short_event(short, batch_id, revision, now, self._url(batch))
            self.write_event(connection, NewEvent(event, short.expectation.api_code))

    def note_retrying(self, connection: sqlite3.Connection, batches: set[int]) -> None:
        """Note that an attempt at a file of these batches failed."""
        if batches:
            connection.execute(SQL["retrying"], (_json(list(batches)),))

    def _url(self, batch: int) -> str | None:
        return None if self._public_url is None else f"{self._public_url}/ui/batches/{batch}"

    def write_event(self, connection: sqlite3.Connection, new: NewEvent) -> int:
        """Write an event and its deliveries; return its id."""
        event = new.event
        id = connection.execute(SQL["event_insert"], msgspec.structs.astuple(event)).lastrowid
        assert id is not None
        for subscription in self._subscriptions:
            parameters = {
                "batch": event.batch,
                "endpoint": subscription.name,
                "event": id,
                "sending": _json(list(self._sending)),
            }
            recovery = new.to is None and subscription.wants_recovery(event.type)
            wanted = is_wanted(subscription, new)
            if recovery:
                wanted = event.batch is None or (
                    connection.execute(SQL["had_problem"], parameters).fetchone() is not None
                )
            if (wanted or recovery) and event.revision > 1 and event.type in SUPERSEDING:
                connection.execute(SQL["supersede"], parameters)
            if wanted:
                row = (id, subscription.name, event.batch, due_at(subscription, new))
                connection.execute(SQL["forward_insert"], row)
        return id

    # The verbs

    async def subscribe(self, subscriptions: Sequence[Subscription], public_url: str | None, now: int) -> None:
        self._public_url = public_url

        def write(connection: sqlite3.Connection) -> None:
            kept = {subscription.name for subscription in subscriptions}
            for present in _read_subscriptions(connection):
                if present.name not in kept:
                    connection.execute(SQL["endpoint_cancel"], (present.name,))
                    connection.execute(SQL["endpoint_remove"], (present.name,))
            for each in subscriptions:
                row = (each.name, _json(each.types), _json(each.api_codes), each.delay_ms, int(each.recoveries))
                connection.execute(SQL["endpoint_set"], row)

        if not subscriptions and not self._subscriptions:
            return

        def committed() -> None:
            self._subscriptions = tuple(subscriptions)

        await self._writer.transaction(write, on_commit=committed)

    async def claim_deliveries(self, wanted: Sequence[tuple[str, int]], now: int) -> Claimed:
        def read(connection: sqlite3.Connection) -> Claimed:
            found: list[Outgoing] = []
            next_at: dict[str, int] = {}
            for endpoint, most in wanted:
                parameters = {"endpoint": endpoint, "now": now, "most": most + len(self._sending)}
                rows = [Outgoing(*row) for row in connection.execute(SQL["claim"], parameters).fetchall()]
                found += [row for row in rows if row.id not in self._sending][:most]
                (next,) = connection.execute(SQL["next_at"], {"endpoint": endpoint, "now": now}).fetchone()
                if next is not None:
                    next_at[endpoint] = next
            self._sending.update(row.id for row in found)
            return Claimed(found, next_at)

        return await self._writer.read(read)

    def release_deliveries(self, deliveries: Sequence[int]) -> None:
        self._writer.call(lambda: self._sending.difference_update(deliveries))

    async def record_deliveries(self, results: Sequence[DeliveryResult], now: int) -> list[Notice]:
        def write(connection: sqlite3.Connection) -> list[Notice]:
            for result in results:
                self._record(connection, result, now)
            notices: list[Notice] = []
            by_endpoint: defaultdict[str, list[DeliveryResult]] = defaultdict(list)
            for result in results:
                by_endpoint[result.endpoint].append(result)
            for endpoint, of_endpoint in by_endpoint.items():
                notices += self._health(connection, endpoint, of_endpoint, now)
            return notices

        ids = {result.id for result in results}
        return await self._writer.transaction(write, on_commit=lambda: self._sending.difference_update(ids))

    @staticmethod
    def _record(connection: sqlite3.Connection, result: DeliveryResult, now: int) -> None:
        delivered_at = now if result.state is DeliveryState.DELIVERED else None
        row = (
            str(result.state), result.attempts, result.next_attempt_at, result.status, result.error, result.response,
            delivered_at, result.id,
        )  # fmt: skip
        connection.execute(SQL["record"], row)
        if result.sent:
            attempt = (result.id, result.started_at, result.status, result.error, result.elapsed_ms)
            connection.execute(SQL["record_attempt"], attempt)
            if result.attempts > 1:
                parameters = {"forward": result.id, "others": MAX_ATTEMPT_ROWS - 1}
                connection.execute(SQL["attempts_trim"], parameters)
        if result.state is DeliveryState.PENDING:
            connection.execute(SQL["record_superseded"], (result.id,))

    def _health(
        self, connection: sqlite3.Connection, endpoint: str, results: Sequence[DeliveryResult], now: int
    ) -> list[Notice]:
        row = connection.execute(SQL["endpoint_state"], (endpoint,)).fetchone()
        if row is None:
            return []

        def pending() -> int:
            return int(connection.execute(SQL["endpoint_pending"], (endpoint,)).fetchone()[0])

        before = EndpointState(*row)
        change = after_results(before, results, pending, now)
        if change.state != before:
            after = change.state
            connection.execute(
                SQL["endpoint_health"],
                (
                    after.failures, after.first_failed_at, after.last_success_at, after.stopped_at,
                    after.stopped_reason, endpoint,
                ),
            )  # fmt: skip
        for event in change.events:
            self.write_event(connection, event)
        return change.notices

    async def find_at_risk(self, received_before: int, waits: Sequence[int], now: int) -> int:
        def read(connection: sqlite3.Connection) -> bool:
            parameters = (received_before, 1)
            return connection.execute(SQL["at_risk_candidates"], parameters).fetchone() is not None

        def write(connection: sqlite3.Connection) -> int:
            found = connection.execute(SQL["at_risk_candidates"], (received_before, MAX_AT_RISK)).fetchall()
            return sum(self._judge_risk(connection, BatchRow(*row), waits, now) for row in found)

        # Nearly always there is none, and a transaction costs a sync.
        return await self._writer.transaction(write) if await self._writer.read(read) else 0

    def _judge_risk(self, connection: sqlite3.Connection, row: BatchRow, waits: Sequence[int], now: int) -> bool:
        groups = connection.execute(SQL["retrying_files"], (row.id,)).fetchall()
        if not any(failed for *_, failed in groups):
            connection.execute(SQL["not_retrying"], (row.id,))
            return False
        self.write_at_risk(connection, row, waits, now, cause="age")
        return True

    def write_at_risk(
        self, connection: sqlite3.Connection, row: BatchRow, waits: Sequence[int], now: int, *, cause: str
    ) -> None:
        """Write batch.at_risk; `waits` is that of find_at_risk."""
        groups = connection.execute(SQL["retrying_files"], (row.id,)).fetchall()
        final_by = next_attempt_at = None
        if groups:
            final_by = max(latest + waits[min(attempts, len(waits) - 1)] for attempts, latest, _, _ in groups)
            next_attempt_at = min(first for _, _, first, _ in groups)
        row = msgspec.structs.replace(row, next_attempt_at=next_attempt_at)
        connection.execute(SQL["at_risk_written"], (now, row.id))
        missing = _missing(connection, row)
        event = batch_event(
            EventType.BATCH_AT_RISK, row, missing, now, cause=cause, final_by=final_by, url=self._url(row.id)
        )
        self.write_event(connection, NewEvent(event, row.api_code))

    async def find_expiring(self, until: int, now: int) -> int:
        def write(connection: sqlite3.Connection) -> int:
            return write_expiring(
                connection, until, now, lambda row, ending: self._expiring(connection, row, ending, now)
            )

        return await self._writer.transaction(write) if await self._writer.read(lambda c: any_near(c, until)) else 0

    def _expiring(self, connection: sqlite3.Connection, row: BatchRow, ending: Sequence[Ending], now: int) -> None:
        event = batch_event(
            EventType.BATCH_EXPIRING, row, _missing(connection, row), now, url=self._url(row.id), ending=ending
        )
        self.write_event(connection, NewEvent(event, row.api_code))

    async def ping_endpoint(self, endpoint: str, now: int) -> int | None:
        if endpoint not in {each.name for each in self._subscriptions}:
            return None

        def write(connection: sqlite3.Connection) -> int:
            event = plain_event(EventType.TEST_PING, PingData(endpoint), now)
            id = self.write_event(connection, NewEvent(event, to=endpoint))
            (delivery,) = connection.execute(
                "SELECT id FROM forward WHERE event = ? AND batch IS NULL", (id,)
            ).fetchone()
            return int(delivery)

        return await self._writer.transaction(write)

    async def replay_deliveries(self, endpoint: str, since: int, until: int, now: int, dry_run: bool) -> int:
        subscription = next((each for each in self._subscriptions if each.name == endpoint), None)
        if subscription is None:
            return 0
        parameters = {
            "endpoint": endpoint,
            "since": since,
            "until": until,
            "types": _json(subscription.types),
            "api_codes": _json(subscription.api_codes),
        }

        def write(connection: sqlite3.Connection) -> int:
            count = 0
            for event, batch, delivery, state in connection.execute(SQL["replay_events"], parameters).fetchall():
                if state == DeliveryState.PENDING:
                    continue
                count += 1
                if dry_run:
                    continue
                if delivery is None:
                    connection.execute(SQL["forward_insert"], (event, endpoint, batch, now))
                else:
                    connection.execute(SQL["replay_again"], (now, delivery))
            return count

        return await (self._writer.read(write) if dry_run else self._writer.transaction(write))

    async def stop_endpoint(self, endpoint: str, reason: str | None, now: int) -> bool:
        def write(connection: sqlite3.Connection) -> bool:
            row = connection.execute(SQL["endpoint_state"], (endpoint,)).fetchone()
            if row is None:
                return False
            before = EndpointState(*row)
            failures = before.failures if reason is not None else 0
            first = before.first_failed_at if reason is not None else None
            stopped_at = now if reason is not None else None
            health = (failures, first, before.last_success_at, stopped_at, reason, endpoint)
            connection.execute(SQL["endpoint_health"], health)
            return True

        return await self._writer.transaction(write)

    async def endpoint_states(self) -> list[EndpointState]:
        return await self._writer.read(
            lambda connection: [EndpointState(*row) for row in connection.execute(SQL["endpoint_states"]).fetchall()]
        )

    async def open_problems(self, endpoint: str) -> list[bytes]:
        return await self._writer.read(
            lambda connection: [row for (row,) in connection.execute(SQL["open_problems"], (endpoint,)).fetchall()]
        )


def prune_batch(connection: sqlite3.Connection, batch: int) -> int:
    """Delete the events of a batch with their deliveries, and its expectations; return how many rows."""
    names = ("prune_attempts_of", "prune_forwards_of", "prune_events_of")
    expectations = connection.execute(EXPECTATION_SQL["prune_of"], (batch,)).rowcount
    return expectations + sum(connection.execute(SQL[name], (batch,)).rowcount for name in names)


def prune_plain(connection: sqlite3.Connection, before: int, limit: int) -> int:
    """Delete events of no batch; return how many rows."""
    ids = _json([id for (id,) in connection.execute(SQL["prune_plain"], (before, limit)).fetchall()])
    if ids == "[]":
        return 0
    names = ("prune_plain_attempts", "prune_plain_forwards", "prune_plain_events")
    return sum(connection.execute(SQL[name], (ids,)).rowcount for name in names)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _read_subscriptions(connection: sqlite3.Connection) -> tuple[Subscription, ...]:
    return tuple(
        Subscription(name, msgspec.json.decode(types), msgspec.json.decode(api_codes), delay_ms, bool(recoveries))
        for name, types, api_codes, delay_ms, recoveries in connection.execute(SQL["endpoints"]).fetchall()
    )


def _missing(connection: sqlite3.Connection, row: BatchRow) -> list[MissingRow]:
    if row.available == row.files:
        return []
    found = connection.execute(SQL["missing"], (row.id, MAX_MISSING)).fetchall()
    return [MissingRow(batch, name, FileState(state), *rest) for batch, name, state, *rest in found]
