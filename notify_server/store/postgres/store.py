"""Implements base.Store on PostgreSQL, for several daemons that share the work.

Claims are rows of the table `lease` that hold as long as their node is alive (node.py, claims.py); one node expands the
inbox (expansion.py). Everything runs on the event loop: no verb holds a lock for longer than a statement or two of its
transaction take, and all verbs lock rows in the order that queries.sql names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Self

import structlog

from notify_server.config import without_secrets
from notify_server.errors import NotifyServerError, StoreUnavailableError
from notify_server.model import BatchVerdict, Delivery, DueFile, FileResult, HostDue, InboxItem, Rejection, Restart
from notify_server.store.base import SESSION_PREFIX, Expansion, Nodes
from notify_server.store.batching import GroupCommit
from notify_server.store.limits import clamp
from notify_server.store.merge import first_of_each
from notify_server.store.postgres.backlog import Backlog
from notify_server.store.postgres.claims import Claims
from notify_server.store.postgres.events import Events
from notify_server.store.postgres.expansion import ExpansionLock, write_expansions
from notify_server.store.postgres.expectations import PostgresExpectations
from notify_server.store.postgres.inbox import Inbox
from notify_server.store.postgres.journal import PostgresJournal
from notify_server.store.postgres.node import INBOX, PROBES, ROLES, WORK, Node, Peers
from notify_server.store.postgres.outbox import PostgresOutbox
from notify_server.store.postgres.pool import POOL_SIZE, Pool
from notify_server.store.postgres.pooler import check_sessions
from notify_server.store.postgres.schema import migrate
from notify_server.store.postgres.session import (
    SEEKING,
    Session,
    patience,
    refuse_on_error,
    transact,
)
from notify_server.store.postgres.writes import (
    insert_deliveries,
    make_due,
    prune,
    write_deliveries,
    write_discard,
    write_heartbeat,
    write_recheck,
    write_rejections,
    write_results,
)
from notify_server.store.sql import load_queries
from notify_server.supervise import start_task

log = structlog.get_logger("notify_server.store")

SQL = load_queries("postgres")

LEASE_SECONDS = 90.0
# Acks, claims, expansion and the lease have a connection each; everything else shares the pool.
CONNECTIONS = 4 + POOL_SIZE
TICK_SECONDS = 1.0
# Nonces are deleted this long after they have expired, since the clocks of nodes differ.
NONCE_GRACE_MS = 60_000
PURGE_TICKS = 30
# Expansion batch size while acks are pending: larger batches are cheaper but starve acks of CPU.
BUSY_ITEMS = 24


class PostgresStore:
    """Owns the connections of one node. Open it with `open`; close it when done."""

    def __init__(
        self,
        url: str,
        lease: float,
        roles: Sequence[str],
        on_commit: Callable[[float], object],
        on_work: Callable[[], object],
    ) -> None:
        self._url = url
        self._place = without_secrets(url)
        self._probes = PROBES in roles
        settings = SEEKING | patience(lease)
        self._acks = Session(url, self._place, settings)
        self._expansion_lock = ExpansionLock(url, self._place, lease)
        self._inbox = Inbox(self._expansion_lock)
        self._node = Node(
            url, self._place, lease, roles, on_lost=self._forget_claims, on_inbox=self._inbox.call, on_work=on_work
        )  # fmt: skip
        self._claims = Claims(url, self._place, lease, self._node)
        self._pool = Pool(url, self._place, **settings)
        self._events = Events()
        self.outbox = PostgresOutbox(self._events, self._node, self._pool.verb_connection)
        self.expectations = PostgresExpectations(self._events, self._pool.verb_connection)
        self.journal = PostgresJournal(self._pool.verb_connection)
        self._accept = GroupCommit(
            self._write_deliveries, lambda delivery: len(delivery.body), self._accepted, on_commit
        )
        self._reject = GroupCommit(self._write_rejections, lambda rejection: len(rejection.body))

        self._backlog = Backlog()
        self._latest = 0
        self._peers = Peers()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        lease: float = LEASE_SECONDS,
        roles: Sequence[str] = ROLES,
        on_commit: Callable[[float], object] = lambda seconds: None,
        on_work: Callable[[], object] = lambda: None,
    ) -> Self:
        """Open the database at `url`, bring its schema up to date, and register this node.

        Its claims are free once its lease of `lease` seconds was not renewed in time. `roles` says whether it takes
        "callbacks", does "probes", or both. `on_commit` receives the duration of each transaction that callbacks waited
        for, in seconds; `on_work` is called when another node has made files due.

        Raises StoreRefusedError when the database cannot be used; the text says what to do.
        """
        return await refuse_on_error(url, cls(url, lease, roles, on_commit, on_work)._opened())

    async def _opened(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._disconnect()
            raise
        return self

    async def _open(self) -> None:
        await self._pool.open()
        if await check_sessions(self._url, self._place):
            log.info("connected through a connection pooler in session mode", store=self._place)
        await self._acks.open()
        async with self._acks.use() as connection:
            await migrate(connection, self._place)
            self._backlog.files = int(await connection.fetchval(SQL["backlog"]))
        await self._node.open()
        await self._count_nodes()
        if self._expands:
            await self._expansion_lock.take()
        self._task = start_task(self._ticks(), "PostgreSQL: housekeeping of this node")

    @property
    def backlog(self) -> int:
        return self._backlog.files

    @property
    def node(self) -> Node:
        """The registration of this daemon among those on the database."""
        return self._node

    @property
    def claims(self) -> Claims:
        """The claims of this node."""
        return self._claims

    @property
    def prefers_small_batches(self) -> bool:
        return False

    @property
    def nodes(self) -> Nodes:
        return Nodes(self._node.last_id, self._peers.taking, self._peers.probing)

    @property
    def _expands(self) -> bool:
        """True if this node should expand when no other does: nodes that probe do it, as long as there are any."""
        return self._probes or not self._peers.probing

    async def close(self, grace: float = 30.0) -> None:
        self._pool.refuse()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace / 2):
                await self._accept.close()
                await self._reject.close()
                await self._pool.drained()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace / 2):
                await self._disconnect()

    async def _disconnect(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(self._expansion_lock.close(), self._node.close(), self._claims.close(), self._acks.close())
        await self._pool.close()

    # The inbox

    async def accept(self, delivery: Delivery) -> int:
        return await self._accept(delivery)

    def _accepted(self, delivery: Delivery, notification: int) -> None:
        self._backlog.files += delivery.files
        self._inbox.call()
        if not self._expansion_lock.held:
            self._node.call(INBOX)

    async def _write_deliveries(self, deliveries: Sequence[Delivery]) -> list[int | NotifyServerError]:
        self._latest = max(self._latest, *(delivery.received_at for delivery in deliveries))
        with self._backlog.changing():
            async with self._acks.use() as connection:
                if any(delivery.nonce is not None or delivery.replays is not None for delivery in deliveries):
                    return await transact(connection, partial(write_deliveries, deliveries=deliveries))
                # One statement is a transaction of its own.
                return [*await insert_deliveries(connection, deliveries)]

    async def reject(self, rejection: Rejection) -> None:
        await self._reject(rejection)

    async def _write_rejections(self, rejections: Sequence[Rejection]) -> list[None]:
        async with self._pool.connection() as connection:
            await transact(connection, partial(write_rejections, rejections=rejections))
        return [None] * len(rejections)

    async def wait_inbox(self) -> None:
        await self._inbox.wait()

    async def inbox(self, limit: int) -> list[InboxItem]:
        with self._pool.verb():
            limit = min(limit, BUSY_ITEMS) if self._accept.busy else limit
            return await self._inbox.read(limit, expands=self._expands)

    async def expand(self, expansions: Sequence[Expansion], now: int) -> list[BatchVerdict]:
        with self._pool.verb(), self._backlog.changing():
            async with self._expansion_lock.use() as connection:
                done = await transact(
                    connection, partial(write_expansions, events=self._events, expansions=expansions, now=now)
                )
            self._backlog.files += done.pending - done.taken
        if done.pending:
            self._node.call(WORK)
        return done.verdicts

    async def discard(self, item: InboxItem, detail: str, now: int) -> list[BatchVerdict]:
        with self._pool.verb(), self._backlog.changing():
            async with self._expansion_lock.use() as connection:
                files, verdicts = await transact(
                    connection, partial(write_discard, events=self._events, item=item, detail=detail, now=now)
                )
            self._backlog.files -= files
        return verdicts

    # Due files

    async def due_hosts(self, after: str, limit: int) -> list[HostDue]:
        async with self._pool.verb_connection() as connection:
            rows = await connection.fetch(SQL["due_hosts"], after, limit)
        # A host whose last file was settled meanwhile has no time.
        return [HostDue(host, at) for host, at in rows if at is not None]

    async def claim(self, wanted: Sequence[tuple[str, int]], now: int) -> list[DueFile]:
        with self._pool.verb():
            return await self._claims.claim(wanted, now)

    def release(self, files: Sequence[DueFile]) -> None:
        self._claims.release(files)

    def _forget_claims(self) -> None:
        self._claims.forget_all()

    async def record(self, results: Sequence[FileResult], now: int) -> list[BatchVerdict]:
        with self._pool.verb(), self._backlog.changing():
            current = first_of_each(self._claims.held(results))
            ended = 0
            settled, verdicts = 0, list[BatchVerdict]()
            if current:
                node = self._node.id
                async with self._pool.connection() as connection:
                    ended, settled, verdicts = await transact(
                        connection, partial(write_results, events=self._events, node=node, results=current, now=now)
                    )
            self._backlog.files -= settled
            self._claims.end(current)
        if ended < len(current):
            self._node.check()
        return verdicts

    async def recheck(self, files: Sequence[int], now: int) -> Restart:
        with self._pool.verb(), self._backlog.changing():
            async with self._pool.connection() as connection:
                reopened, restart = await transact(connection, partial(write_recheck, files=files, now=now))
            self._backlog.files += reopened
        if restart.files:
            self._node.call(WORK)
        return restart

    # Housekeeping

    async def ping(self, now: int) -> None:
        with self._pool.verb():
            # On the connection of acks, so that what holds them up is seen.
            async with self._acks.use() as connection:
                await transact(connection, partial(write_heartbeat, now=now))

    async def make_due(self, beyond: int, now: int, limit: int) -> Restart:
        async with self._pool.verb_connection() as connection:
            restart = await transact(connection, partial(make_due, beyond=clamp(beyond), now=clamp(now), limit=limit))
        if restart.files:
            self._node.call(WORK)
        return restart

    async def end_session(self, session: str, ends_at: int) -> None:
        async with self._pool.verb_connection() as connection:
            await connection.execute(SQL["session_end"], SESSION_PREFIX + session, clamp(ends_at))

    async def prune(self, completed_before: int, rejected_before: int, limit: int) -> int:
        job = partial(
            prune,
            events=self._events,
            completed_before=clamp(completed_before),
            rejected_before=clamp(rejected_before),
            limit=limit,
        )
        async with self._pool.verb_connection() as connection:
            return await transact(connection, job)

    async def _ticks(self) -> None:
        tick = 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            tick += 1
            self._claims.forget_positions()
            steps = [self._poll_inbox, self._correct_backlog, self._claims.return_released, self._count_nodes]
            if tick % PURGE_TICKS == 0:
                steps += [self._purge, self.outbox.renew_endpoints]
            for step in steps:
                # A verb that needs the database reports the failure; the next tick tries again.
                with suppress(StoreUnavailableError):
                    await step()

    async def _poll_inbox(self) -> None:
        await self._inbox.poll(expands=self._expands)

    async def _correct_backlog(self) -> None:
        await self._backlog.correct(self._count_backlog)

    async def _count_backlog(self) -> int:
        async with self._pool.connection() as connection:
            return int(await connection.fetchval(SQL["backlog"]))

    async def _count_nodes(self) -> None:
        async with self._pool.connection() as connection:
            self._peers.update(await connection.fetch(SQL["nodes_alive"]))

    async def _purge(self) -> None:
        async with self._pool.connection() as connection:
            await connection.execute(SQL["nonces_purge"], self._latest - NONCE_GRACE_MS)
