"""Expansion on PostgreSQL: by one node at a time, the one that holds the lock, on the connection that holds it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, NamedTuple

import asyncpg

from notify_server.errors import StoreUnavailableError
from notify_server.model import BatchVerdict, FileState, ReportedStatus, Verdict
from notify_server.store.base import Expansion, NewFile
from notify_server.store.merge import Known, Merge, columns, distinct_batches
from notify_server.store.postgres_session import (
    EXPANDING,
    LOCK_KEY,
    LOCK_SPACE,
    SEEKING,
    Connection,
    Session,
    arrays,
    milliseconds,
    patience,
)
from notify_server.store.queries import load_queries

SQL = load_queries("postgres")


class Turn:
    """The right to expand. It goes with its connection: when that is lost, nothing can be committed by it any more. The
    server ends the connection when nothing has come over it for `lease` seconds: a node that is stopped keeps it open.
    """

    def __init__(self, url: str, place: str, lease: float) -> None:
        self._session = Session(url, place, {**SEEKING, **patience(lease), "idle_session_timeout": milliseconds(lease)})
        self._taken = False

    @property
    def held(self) -> bool:
        return self._taken and self._session.connected

    async def take(self) -> bool:
        """Take it if nobody else has it; whether it is held now."""
        if not self.held:
            self._taken = False
            async with self._session.use() as connection:
                self._taken = await connection.fetchval(
                    f"SELECT pg_try_advisory_lock({LOCK_KEY})",
                    LOCK_SPACE,
                    EXPANDING,
                )
        return self.held

    def use(self) -> AbstractAsyncContextManager[asyncpg.Connection[asyncpg.Record]]:
        """The connection. Raises StoreUnavailableError unless the right is held."""
        if not self.held:
            raise StoreUnavailableError("another node expands the inbox")
        return self._session.use(reconnect=False)

    async def give_up(self) -> None:
        """Leave it to others."""
        try:
            if self.held:
                async with self.use() as connection:
                    await connection.execute("SELECT pg_advisory_unlock_all()")
        finally:
            self._taken = False

    async def close(self) -> None:
        # Closing a connection does not wait until the server has noticed.
        with suppress(StoreUnavailableError):
            await self.give_up()
        await self._session.close()


class Expanded(NamedTuple):
    """What an expansion has changed: the pending files it made, the files of the items it took out of the inbox."""

    pending: int
    taken: int
    verdicts: list[BatchVerdict]


async def write_expansions(connection: Connection, expansions: Sequence[Expansion], now: int) -> Expanded:
    """Merge what has not been expanded to its end before, whatever the caller remembers. Runs in a transaction."""
    items = list({expansion.item.id for expansion in expansions})
    still = {id for (id,) in await connection.fetch(SQL["inbox_still"], items)}
    expansions = [expansion for expansion in expansions if expansion.item.id in still]
    first: dict[tuple[str, str], int] = {}
    for expansion in expansions:
        first.setdefault((expansion.batch_id, expansion.api_code), expansion.item.received_at)
    fresh = arrays([(*key, received_at) for key, received_at in first.items()], 3)
    await connection.execute(SQL["batches_insert"], *fresh)
    # All of them now, in the order of their ids: whoever changes files of a batch holds it.
    rows = await connection.fetch(SQL["batches_named"], *fresh[:2])
    batches = {(batch_id, api_code): id for id, _, batch_id, api_code in rows}
    filled = {id for id, size, *_ in rows if size}

    merges: list[Merge] = []
    for part in distinct_batches(expansions):
        together = [Merge(batches[expansion.batch_id, expansion.api_code], expansion) for expansion in part]
        await _merge(connection, together, filled, now)
        merges += together
    done = {expansion.item.id: expansion.item.files for expansion in expansions if expansion.last}
    await connection.execute(SQL["inbox_done"], list(done), now)
    return Expanded(
        sum(merge.pending for merge in merges),
        sum(done.values()),
        await write_verdicts(connection, batches.values(), now),
    )


async def _merge(connection: Connection, merges: Sequence[Merge], filled: set[int], now: int) -> None:
    """Merge expansions of different batches. `filled` are the batches that have files, and those that come to."""
    existing: dict[int, list[Known]] = {}
    wanted = [(merge.batch, name) for merge in merges if merge.batch in filled for name in merge.files]
    if wanted:
        for batch, id, name, target_url, status, state in await connection.fetch(
            SQL["files_existing"], *arrays(wanted, 2)
        ):
            known = Known(id, name, target_url, ReportedStatus(status), FileState(state))
            existing.setdefault(batch, []).append(known)
    added: list[tuple[int, NewFile]] = []
    for merge in merges:
        added += [(merge.batch, file) for file in merge.settle(existing.get(merge.batch, ()))]
    if replaced := [each for merge in merges for each in merge.replaced]:
        rows = [(id, *columns(file, now)) for id, file in replaced]
        await connection.execute(SQL["files_replace"], *arrays(rows, 8))
        await connection.execute(SQL["leases_restart"], [id for merge in merges for id in merge.restarted])
    if added:
        fresh: list[tuple[Any, ...]] = [(batch, file.oss_object_name, *columns(file, now)) for batch, file in added]
        await connection.execute(SQL["files_insert"], *arrays(fresh, 9))
        filled.update(batch for batch, _ in added)
    await connection.execute(SQL["batches_expanded"], *arrays([merge.batch_row() for merge in merges], 11))


async def write_verdicts(connection: Connection, batches: Iterable[int], now: int) -> list[BatchVerdict]:
    """The verdicts that are due to these batches now. Of several nodes exactly one gets each."""
    rows = await connection.fetch(SQL["verdicts"], list(batches), now)
    return [
        BatchVerdict(id, batch_id, api_code, Verdict(verdict), *rest)
        for id, batch_id, api_code, verdict, *rest in sorted(rows, key=lambda row: int(row[0]))
    ]
