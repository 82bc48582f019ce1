"""Registers this daemon as one of several on a database: its name, its lease, and notifications between nodes.

A node is alive as long as it renews its row. A node that does not renew it in time loses every claim: it drops them and
registers again under another id. Results under the old id change nothing.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import asyncpg
import structlog

from notify_server.errors import StoreUnavailableError
from notify_server.store.postgres.session import CLAIMING, Connection, Session, retry_once
from notify_server.store.sql import load_queries
from notify_server.supervise import start_task

log = structlog.get_logger("notify_server.store")

# At most one notification in each channel in this time.
NOTIFY_SECONDS = 0.1
RETRY_SECONDS = 1.0
INBOX = "notify_server_inbox"
WORK = "notify_server_work"
CALLBACKS = "callbacks"
PROBES = "probes"
ROLES = (CALLBACKS, PROBES)
SQL = load_queries("postgres")


class Peers:
    """The nodes that are alive, this one included, by role: the ids of those that take callbacks, and that probe."""

    def __init__(self) -> None:
        self.taking: list[int] = []
        self.probing: list[int] = []

    def update(self, nodes: Iterable[asyncpg.Record]) -> None:
        """Take over the ids and roles of the nodes, and log a change."""
        roles_of = [(id, roles.split()) for id, roles in nodes]
        taking, probing = ([id for id, roles in roles_of if role in roles] for role in ROLES)
        if (taking, probing) != (self.taking, self.probing):
            self.taking, self.probing = taking, probing
            log.info("sharing the work", nodes=len(roles_of), callbacks=len(taking), probes=len(probing))
            if not probing:
                log.warning("no node probes files, all of them wait: start one that has probes in [server] roles")


class Node:
    """Runs from `open` to `close`. `on_lost` is called when every claim is void, `on_inbox` and, on a node that probes,
    `on_work` when another node has accepted something, or has made files due. `last_id` is the node's id, or what it
    was before it was lost.
    """

    def __init__(
        self,
        url: str,
        place: str,
        lease: float,
        roles: Sequence[str],
        *,
        on_lost: Callable[[], object],
        on_inbox: Callable[[], object],
        on_work: Callable[[], object],
    ) -> None:
        self._place = place
        self._lease = lease
        self._on_lost = on_lost
        self._roles = roles
        self._handlers = {INBOX: on_inbox}
        if PROBES in roles:
            self._handlers[WORK] = on_work
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        # Nothing sent on it has to survive a crash.
        self._session = Session(url, place, CLAIMING, self._listen)
        self._pid = 0
        self._id: int | None = None
        self.last_id = 0
        self._to_call: set[str] = set()
        self._calls = asyncio.Event()
        self._hurry = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def id(self) -> int:
        """The id under which files are claimed now. Raises StoreUnavailableError while there is none."""
        if self._id is None:
            raise StoreUnavailableError(f"{self._place}: this node has lost its lease and is not registered yet")
        return self._id

    def is_now(self, id: int) -> bool:
        """Return whether this node still has that id."""
        return self._id == id

    async def open(self) -> None:
        """Register. Errors are not translated."""
        await self._session.open()
        await self._beat()
        self._tasks = [
            start_task(self._beats(), "PostgreSQL: lease of this node"),
            start_task(self._call_out(), "PostgreSQL: notify other nodes"),
        ]

    async def close(self) -> None:
        """Leave, and free all claims."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        id, self._id = self._id, None
        if id is not None and self._session.connected:
            with suppress(StoreUnavailableError):
                async with self._session.use(reconnect=False) as connection:
                    await connection.execute(SQL["leases_leave"], id)
                    await connection.execute(SQL["node_leave"], id)
        await self._session.close()

    def check(self) -> None:
        """Check soon whether this node is still alive."""
        self._hurry.set()

    def call(self, channel: str) -> None:
        """Notify the other nodes soon."""
        self._to_call.add(channel)
        self._calls.set()

    async def _beats(self) -> None:
        failing = False
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS if failing else self._lease / 3):
                    await self._hurry.wait()
            self._hurry.clear()
            try:
                await self._beat()
            except StoreUnavailableError as error:
                if not failing:
                    log.warning("cannot renew the lease of this node, trying again", error=str(error))
                failing = True
            else:
                failing = False

    async def _beat(self) -> None:
        async with self._session.use() as connection:
            if self._id is not None and await connection.fetchval(SQL["node_renew"], self._id, self._lease) is None:
                self._forget()
            if self._id is None:
                self._id = await connection.fetchval(
                    SQL["node_register"], self._name, self._lease, " ".join(self._roles)
                )
                self.last_id = self.id
                log.info("registered", store=self._place, node=self._id, name=self._name, roles=list(self._roles))
            await retry_once(partial(connection.execute, SQL["leases_sweep"]))
            await retry_once(partial(connection.execute, SQL["nodes_sweep"]))

    def _forget(self) -> None:
        log.warning(
            "this node did not renew its lease in time: its claims are dropped, other nodes may have claimed its files",
            node=self._id,
        )
        self._id = None
        self._on_lost()

    async def _listen(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        # Not get_server_pid: a connection pooler invents that.
        self._pid = await connection.fetchval("SELECT pg_backend_pid()")
        for channel in self._handlers:
            await connection.add_listener(channel, self._hear)
        connection.add_termination_listener(lambda _: self.check())

    def _hear(self, connection: Connection, pid: int, channel: str, payload: Any) -> None:
        if pid != self._pid:
            self._handlers[channel]()

    async def _call_out(self) -> None:
        while True:
            await self._calls.wait()
            self._calls.clear()
            channels, self._to_call = self._to_call, set()
            # Polling each second remains: a lost notification costs others a second.
            with suppress(StoreUnavailableError):
                async with self._session.use(reconnect=False) as connection:
                    for channel in channels:
                        await connection.execute(f"NOTIFY {channel}")
            await asyncio.sleep(NOTIFY_SECONDS)
