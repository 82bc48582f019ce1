"""The outbox on PostgreSQL. A delivery is claimed by the node in its row; a dead node's claim counts for nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TypeVar

import msgspec
import structlog

from notify_server.events.payload import (
    EventType,
    PingData,
    plain_event,
)
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
)
from notify_server.store.outbox_health import after_results
from notify_server.store.postgres.ends import any_near
from notify_server.store.postgres.events import SQL, Events, read_subscriptions
from notify_server.store.postgres.node import Node
from notify_server.store.postgres.session import Connection, arrays, row_count, strip_nul, transact

T = TypeVar("T")

log = structlog.get_logger("notify_server.store")

# An endpoint stays for so long after the last node that has it: nodes are restarted one after another, and the first
# one with a new endpoint may have to start twice.
WANTED_SECONDS = 600.0


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
                cancelled = row_count(await connection.execute(SQL["endpoints_cancel"], unwanted))
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
        await self._events.write(connection, events)
        return notices

    async def find_at_risk(self, received_before: int, waits: Sequence[int], now: int) -> int:
        async with self._use() as connection:
            found = await connection.fetchval(SQL["at_risk_any"], received_before)
        write = partial(self._events.judge_risk, before=received_before, waits=waits, now=now)
        return await self._transaction(write) if found else 0

    async def find_expiring(self, until: int, now: int) -> int:
        async with self._use() as connection:
            near = await any_near(connection, until)
        write = partial(self._events.write_expiring, until=until, now=now)
        return await self._transaction(write) if near else 0

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


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _clean(text: str | None) -> str | None:
    return None if text is None else strip_nul(text)
