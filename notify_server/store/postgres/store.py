"""The store on PostgreSQL, for several daemons that share the work. See base.Store for what each verb means.

Who has claimed what is in the table `lease`, and counts as long as its node is alive (postgres_node.py); one node
expands the inbox (postgres_expansion.py). Everything runs on the event loop: no verb holds a lock for longer than a
statement or two of its transaction take, and all take them in the order that sql/postgres/queries.sql names.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Self, TypeVar

import asyncpg
import structlog

from notify_server.config import without_secrets
from notify_server.errors import NotifyServerError, StoreUnavailableError
from notify_server.expansion.expander import Expander
from notify_server.expansion.merge import first_of_each
from notify_server.model import BatchVerdict, Delivery, DueFile, FileResult, InboxItem, Rejection
from notify_server.store.base import MAX_ID, Expansion, ExpansionListener, HostDue, Nodes, Restart
from notify_server.store.batching import GroupCommit
from notify_server.store.postgres.expansion import ExpansionLock, write_expansions
from notify_server.store.postgres.node import INBOX, PROBES, ROLES, WORK, Node
from notify_server.store.postgres.session import (
    CLAIMING,
    SEEKING,
    Connection,
    Session,
    create_pool,
    migrate,
    patience,
    refuse_on_error,
    retry_once,
    transact,
    translate_errors,
)
from notify_server.store.postgres.writes import (
    insert_deliveries,
    prune,
    write_deliveries,
    write_discard,
    write_recheck,
    write_rejections,
    write_results,
)
from notify_server.store.sql import load_queries
from notify_server.supervise import start_task
from notify_server.verify.guard import Guard

T = TypeVar("T")

log = structlog.get_logger("notify_server.store")

SQL = load_queries("postgres")

LEASE_SECONDS = 90.0
# Connections for all but acks, claims, expansion and the lease, which have one each; and how long to wait for one.
POOL_SIZE = 4
CONNECTIONS = 4 + POOL_SIZE
ACQUIRE_SECONDS = 5.0
TICK_SECONDS = 1.0
# Nonces are forgotten so long after they have expired, since the clocks of nodes differ.
NONCE_GRACE_MS = 60_000
PURGE_TICKS = 30
# The backlog is corrected at a moment of rest, or after so many ticks without one.
RESTLESS_TICKS = 30
# The share of the time that adding up the backlog may take: what it costs grows with what waits.
BACKLOG_SHARE = 0.02
# Items expanded at a time while callers wait for acks, who share the processor: larger groups are cheaper, and leave
# the acks less of it. What is left over is expanded when they have gone.
BUSY_ITEMS = 24
# Before all times and ids.
_BEGINNING = (-MAX_ID, 0)


class PostgresStore:
    """Open it with `open`; close it when done."""

    def __init__(
        self,
        url: str,
        lease: float,
        roles: Sequence[str],
        on_commit: Callable[[float], object],
        on_work: Callable[[], object],
    ) -> None:
        self._place = without_secrets(url)
        self._probes = PROBES in roles
        settings = SEEKING | patience(lease)
        self._acks = Session(url, self._place, settings)
        self._claims = Session(url, self._place, CLAIMING | patience(lease))
        self._turn = ExpansionLock(url, self._place, lease)
        self._node = Node(
            url, self._place, lease, roles, on_lost=self._forget_all, on_inbox=self._hear_inbox, on_work=on_work
        )  # fmt: skip
        self._pool = create_pool(url, POOL_SIZE, **settings)
        self._accept = GroupCommit(
            self._write_deliveries, lambda delivery: len(delivery.body), self._accepted, on_commit
        )
        self._reject = GroupCommit(self._write_rejections, lambda rejection: len(rejection.body))

        self._backlog = 0
        # How often a verb that changes the backlog has begun, and how many have not ended.
        self._changes = 0
        self._changing = 0
        self._restless = 0
        self._correct_at = 0.0
        # Set while the inbox may hold something, and how often that has been heard.
        self._inbox_news = asyncio.Event()
        self._ignore_result = 0
        self._inbox_news.set()
        # What this node has claimed; given back in its turn, before anything else is claimed.
        self._held: dict[int, DueFile] = {}
        self._returned: set[int] = set()
        # Up to where files of a host have been claimed, by the time they were due and their id. What lies before is
        # held by somebody or done, but for what has come back; so it is forgotten each second, and when files are
        # short.
        self._claimed_to: dict[str, tuple[int, int]] = {}
        # Whether files may be claimed of which this node knows nothing: the answer to a claim was lost.
        self._unsure = False
        self._claiming = asyncio.Lock()
        self._latest = 0
        self._taking: Sequence[int] = ()
        self._probing: Sequence[int] = ()

        self._closing = False
        self._verbs = 0
        self._at_rest = asyncio.Event()
        self._at_rest.set()
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
        """Open the database at `url`, and bring its schema up to date. What this node has claimed is free when nothing
        has been heard of it for `lease` seconds. `roles` is what it does, "callbacks", "probes" or both. `on_commit` is
        told what each transaction took that callbacks were waiting for, in seconds; `on_work` is called when another
        node has made files due.

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
        await self._pool
        await self._acks.open()
        async with self._acks.use() as connection:
            await migrate(connection, self._place)
            self._backlog = int(await connection.fetchval(SQL["backlog"]))
        await self._node.open()
        await self._count_nodes()
        if self._expands:
            await self._turn.take()
        self._task = start_task(self._ticks(), "PostgreSQL: housekeeping of this node")

    @property
    def backlog(self) -> int:
        return self._backlog

    @property
    def node(self) -> Node:
        """This daemon as one of several."""
        return self._node

    @property
    def prefers_small_batches(self) -> bool:
        return False

    @property
    def nodes(self) -> Nodes:
        return Nodes(self._node.last_id, self._taking, self._probing)

    @property
    def _expands(self) -> bool:
        """Whether to expand if nobody else does: it is left to those that probe, as long as there are any."""
        return self._probes or not self._probing

    async def close(self, grace: float = 30.0) -> None:
        self._closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(grace / 2):
                await self._accept.close()
                await self._reject.close()
                await self._at_rest.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace / 2):
                await self._disconnect()

    async def _disconnect(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(self._turn.close(), self._node.close(), self._claims.close(), self._acks.close())
        try:
            async with asyncio.timeout(ACQUIRE_SECONDS):
                await self._pool.close()
        except (TimeoutError, OSError, asyncpg.InterfaceError):
            self._pool.terminate()

    # How verbs run

    @contextmanager
    def _verb(self) -> Iterator[None]:
        if self._closing:
            raise StoreUnavailableError("the store is closing")
        self._verbs += 1
        self._at_rest.clear()
        try:
            yield
        finally:
            self._verbs -= 1
            if not self._verbs:
                self._at_rest.set()

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Around what changes the backlog, in the database and here."""
        self._changes += 1
        self._changing += 1
        try:
            yield
        finally:
            self._changing -= 1

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        with translate_errors(self._place):
            async with self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
                yield connection

    async def _transaction(self, job: Callable[[Connection], Awaitable[T]]) -> T:
        with self._verb():
            async with self._connection() as connection:
                return await transact(connection, job)

    # The inbox

    async def accept(self, delivery: Delivery) -> int:
        return await self._accept(delivery)

    def _accepted(self, delivery: Delivery, notification: int) -> None:
        self._backlog += delivery.files
        self._hear_inbox()
        if not self._turn.held:
            self._node.call(INBOX)

    async def _write_deliveries(self, deliveries: Sequence[Delivery]) -> list[int | NotifyServerError]:
        self._latest = max(self._latest, *(delivery.received_at for delivery in deliveries))
        with self._change():
            async with self._acks.use() as connection:
                if any(delivery.nonce is not None or delivery.replays is not None for delivery in deliveries):
                    return await transact(connection, partial(write_deliveries, deliveries=deliveries))
                # One statement is a transaction of its own.
                return [*await insert_deliveries(connection, deliveries)]

    async def reject(self, rejection: Rejection) -> None:
        await self._reject(rejection)

    async def _write_rejections(self, rejections: Sequence[Rejection]) -> list[None]:
        async with self._connection() as connection:
            await transact(connection, partial(write_rejections, rejections=rejections))
        return [None] * len(rejections)

    def _hear_inbox(self) -> None:
        if self._turn.held:
            self._ignore_result += 1
            self._inbox_news.set()

    async def wait_inbox(self) -> None:
        await self._inbox_news.wait()

    async def expand_inbox(self, guard: Guard, now: Callable[[], int], told: ExpansionListener) -> None:
        await Expander(self, guard, now, told).run()

    async def inbox(self, limit: int) -> list[InboxItem]:
        with self._verb():
            heard = self._ignore_result
            items: list[InboxItem] = []
            if not self._expands:
                await self._turn.give_up()
            if self._turn.held:
                async with self._turn.use() as connection:
                    most = min(limit, BUSY_ITEMS) if self._accept.busy else limit
                    rows = await connection.fetch(SQL["inbox"], self._turn.first, most)
                    self._turn.saw([row[0] for row in rows])
                items = [InboxItem(id, body.encode(), *rest) for id, body, *rest in rows]
            # Whoever waits is kept waiting only when it is known that there is nothing.
            if not items and heard == self._ignore_result:
                self._inbox_news.clear()
            return items

    async def expand(self, expansions: Sequence[Expansion], now: int) -> list[BatchVerdict]:
        with self._verb(), self._change():
            async with self._turn.use() as connection:
                done = await transact(connection, partial(write_expansions, expansions=expansions, now=now))
            self._backlog += done.pending - done.taken
        if done.pending:
            self._node.call(WORK)
        return done.verdicts

    async def discard(self, item: InboxItem, detail: str, now: int) -> list[BatchVerdict]:
        with self._verb(), self._change():
            async with self._turn.use() as connection:
                files, verdicts = await transact(connection, partial(write_discard, item=item, detail=detail, now=now))
            self._backlog -= files
        return verdicts

    # Due files

    async def due_hosts(self, after: str, limit: int) -> list[HostDue]:
        with self._verb():
            async with self._connection() as connection:
                rows = await connection.fetch(SQL["due_hosts"], after, limit)
        # A host whose last file was settled meanwhile has no time.
        return [HostDue(host, at) for host, at in rows if at is not None]

    async def claim(self, wanted: Sequence[tuple[str, int]], now: int) -> list[DueFile]:
        # A host may be named twice, and asks for the sum.
        sums: Counter[str] = Counter()
        for host, n in wanted:
            sums[host] += n
        with self._verb():
            async with self._claiming, self._claims.use() as connection:
                await self._give_back(connection)
                id = self._node.id
                found = await self._claim(connection, sums, now, id)
                if found is not None and (short := self._cut_short(sums, found)):
                    # There may be others before where the claim began.
                    found += await self._claim(connection, short, now, id) or []
                    found.sort(key=lambda each: each[0])
                if found is not None and self._node.is_now(id):
                    files = [file for _, file in found]
                    self._held.update((file.id, file) for file in files)
                    return files
        self._node.check()
        return []

    async def _claim(
        self, connection: Connection, wanted: Mapping[str, int], now: int, node: int
    ) -> list[tuple[int, DueFile]] | None:
        """What is claimed, from where the last claim of each host ended, with the times at which it was due. None when
        this node is not alive.
        """
        after = [self._claimed_to.get(host, _BEGINNING) for host in wanted]
        parameters = list(wanted), list(wanted.values()), [at for at, _ in after], [id for _, id in after], now, node
        # Until it is known what was claimed.
        self._unsure = True
        rows = await retry_once(partial(connection.fetch, SQL["claim"], *parameters))
        self._unsure = False
        if not rows[0]["alive"]:
            return None
        found = [(at, DueFile(*rest)) for _, at, *rest in rows if at is not None]
        got = Counter(file.host for _, file in found)
        ends = {file.host: (at, file.id) for at, file in found}
        self._claimed_to.update((host, ends[host]) for host in ends if got[host] == wanted[host])
        return found

    def _cut_short(self, wanted: Mapping[str, int], found: Sequence[tuple[int, DueFile]]) -> dict[str, int]:
        """The hosts of which less was found than wanted, and not from the beginning; it is, from now on."""
        got = Counter(file.host for _, file in found)
        short = {host: n - got[host] for host, n in wanted.items() if got[host] < n and host in self._claimed_to}
        for host in short:
            del self._claimed_to[host]
        return short

    def release(self, files: Sequence[DueFile]) -> None:
        returned = {file.id for file in files if self._held.get(file.id) == file}
        for file in returned:
            del self._held[file]
        self._returned |= returned

    async def _give_back(self, connection: Connection) -> None:
        if self._unsure:
            await connection.execute(SQL["leases_unknown"], self._node.id, list(self._held))
            self._unsure = False
            self._returned.clear()
            self._claimed_to.clear()
        if self._returned:
            self._claimed_to.clear()
            returned = list(self._returned)
            await connection.execute(SQL["release"], returned, self._node.id)
            self._returned.difference_update(returned)

    def _forget_all(self) -> None:
        self._held.clear()
        self._returned.clear()
        self._claimed_to.clear()

    async def record(self, results: Sequence[FileResult], now: int) -> list[BatchVerdict]:
        with self._verb(), self._change():
            mine = [result for result in results if self._held.get(result.file.id) == result.file]
            current = first_of_each(mine)
            ended = 0
            settled, verdicts = 0, list[BatchVerdict]()
            if current:
                node = self._node.id
                async with self._connection() as connection:
                    ended, settled, verdicts = await transact(
                        connection, partial(write_results, node=node, results=current, now=now)
                    )
            self._backlog -= settled
            for result in current:
                self._held.pop(result.file.id, None)
        if ended < len(current):
            self._node.check()
        return verdicts

    async def recheck(self, files: Sequence[int], now: int) -> Restart:
        with self._verb(), self._change():
            async with self._connection() as connection:
                reopened, restart = await transact(connection, partial(write_recheck, files=files, now=now))
            self._backlog += reopened
        if restart.files:
            self._node.call(WORK)
        return restart

    # Housekeeping

    async def ping(self, now: int) -> None:
        with self._verb():
            async with self._connection() as connection:
                await connection.execute(SQL["heartbeat"], now)

    async def prune(self, completed_before: int, rejected_before: int, limit: int) -> int:
        bounds = [min(max(bound, -MAX_ID), MAX_ID) for bound in (completed_before, rejected_before)]
        return await self._transaction(
            partial(prune, completed_before=bounds[0], rejected_before=bounds[1], limit=limit)
        )

    async def _ticks(self) -> None:
        tick = 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            tick += 1
            self._claimed_to.clear()
            steps = [self._look_at_inbox, self._correct_backlog, self._return, self._count_nodes]
            if tick % PURGE_TICKS == 0:
                steps.append(self._purge)
            for step in steps:
                # What is wrong is told by who needs it; this is tried again.
                with suppress(StoreUnavailableError):
                    await step()

    async def _look_at_inbox(self) -> None:
        """Expand from now on if nobody else does; this node's own eyes are the truth about what waits."""
        if not self._turn.held:
            if self._expands and await self._turn.take():
                self._hear_inbox()
        elif not self._expands:
            # Between two looks into the inbox it can be given up.
            self._hear_inbox()
        elif not self._inbox_news.is_set():
            async with self._turn.use() as connection:
                if await connection.fetchval(SQL["inbox_waits"], self._turn.first):
                    self._hear_inbox()

    async def _correct_backlog(self) -> None:
        """What other nodes have done is known from the database alone."""
        if (began := time.monotonic()) < self._correct_at:
            return
        changes, before = self._changes, self._backlog
        busy = bool(self._changing)
        async with self._connection() as connection:
            counted = int(await connection.fetchval(SQL["backlog"]))
        self._correct_at = began + (time.monotonic() - began) / BACKLOG_SHARE
        if not busy and changes == self._changes:
            self._backlog = counted
            self._restless = 0
        elif self._restless < RESTLESS_TICKS:
            self._restless += 1
        else:
            # Exact to within what was in flight.
            self._backlog = counted + self._backlog - before
            self._restless = 0

    async def _count_nodes(self) -> None:
        async with self._connection() as connection:
            nodes = [(id, roles.split()) for id, roles in await connection.fetch(SQL["nodes_alive"])]
        taking, probing = ([id for id, roles in nodes if role in roles] for role in ROLES)
        if (taking, probing) != (self._taking, self._probing):
            self._taking, self._probing = taking, probing
            log.info("sharing the work", nodes=len(nodes), callbacks=len(taking), probes=len(probing))
            if not probing:
                log.warning("no node asks for files, they wait: start one that has probes in [server] roles")

    async def _return(self) -> None:
        if self._returned or self._unsure:
            async with self._claiming, self._claims.use() as connection:
                await self._give_back(connection)

    async def _purge(self) -> None:
        async with self._connection() as connection:
            await connection.execute(SQL["nonces_purge"], self._latest - NONCE_GRACE_MS)
