"""Expands on PostgreSQL: one node at a time, the holder of the lock, on the connection that holds it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import NamedTuple

import asyncpg

from notify_server.errors import StoreUnavailableError
from notify_server.model import BatchVerdict, FileState, ReportedStatus, Verdict
from notify_server.store.base import Expansion, NewFile
from notify_server.store.merge import Known, Merge, columns, distinct_batches, latest_arrivals
from notify_server.store.postgres.events import Events
from notify_server.store.postgres.expecting import lock_matching, match_batches
from notify_server.store.postgres.quiet import note_arrivals
from notify_server.store.postgres.session import (
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
from notify_server.store.sql import load_queries

SQL = load_queries("postgres")

# How long a delivery with an id may be uncommitted; how often the position of the expansion is noted; and how often it
# starts from the first delivery again.
UNSEEN_SECONDS = 60.0
MARK_SECONDS = 1.0
LOOK_AGAIN_SECONDS = 3600.0

FILE_COLUMNS = (
    "batch", "oss_object_name", "target_url", "host", "reported_status", "state", "reason", "next_attempt_at",
    "verified_at", "expires_at",
)  # fmt: skip


class ExpansionLock:
    """The right to expand. It is bound to its connection: once that is lost, it can commit nothing.

    The server ends the connection after `lease` seconds of silence: a stopped node would keep it open.
    """

    def __init__(self, url: str, place: str, lease: float) -> None:
        self._session = Session(url, place, {**SEEKING, **patience(lease), "idle_session_timeout": milliseconds(lease)})
        self._taken = False
        self._begin()

    @property
    def held(self) -> bool:
        return self._taken and self._session.connected

    async def take(self) -> bool:
        """Take the lock if it is free; return whether it is held now."""
        if not self.held:
            self._taken = False
            async with self._session.use() as connection:
                self._taken = await connection.fetchval(
                    f"SELECT pg_try_advisory_lock({LOCK_KEY})",
                    LOCK_SPACE,
                    EXPANDING,
                )
                self._begin()
        return self.held

    def _begin(self) -> None:
        # Below `first` nothing waits, and nothing will; `marks` are its later values, with their times.
        self.first = 0
        self._began = time.monotonic()
        self._last = 0
        self._marks: deque[tuple[float, int]] = deque()

    def saw(self, ids: Sequence[int]) -> None:
        """Note the waiting deliveries that were read, the first of all among them, or that there are none.

        Ids are given in order but may become visible out of order, by as long as a transaction takes. In case a server
        was stopped for longer, all are read again now and then.
        """
        now = time.monotonic()
        if now > self._began + LOOK_AGAIN_SECONDS:
            self._begin()
        self._last = max(self._last, *ids, 0)
        if not self._marks or now > self._marks[-1][0] + MARK_SECONDS:
            self._marks.append((now, ids[0] if ids else self._last))
        while self._marks[0][0] < now - UNSEEN_SECONDS:
            self.first = self._marks.popleft()[1]

    def use(self) -> AbstractAsyncContextManager[asyncpg.Connection[asyncpg.Record]]:
        """Lend the connection. Raises StoreUnavailableError unless the right is held."""
        if not self.held:
            raise StoreUnavailableError("another node expands the inbox")
        return self._session.use(reconnect=False)

    async def give_up(self) -> None:
        """Leave the right to others."""
        try:
            if self.held:
                async with self.use() as connection:
                    await connection.execute("SELECT pg_advisory_unlock_all()")
        finally:
            self._taken = False

    async def close(self) -> None:
        # Closing a connection does not wait until the server has noticed it.
        with suppress(StoreUnavailableError):
            await self.give_up()
        await self._session.close()


class Expanded(NamedTuple):
    """The changes of an expansion: the pending files it made, and the files of the items that left the inbox."""

    pending: int
    taken: int
    verdicts: list[BatchVerdict]


async def write_expansions(
    connection: Connection, events: Events, expansions: Sequence[Expansion], now: int
) -> Expanded:
    """Merge what is not fully expanded yet, whatever the caller remembers. Runs in a transaction."""
    await lock_matching(connection, shared=True)
    done = {expansion.item.id: expansion.item.files for expansion in expansions if expansion.last}
    left = {id for (id,) in await connection.fetch(SQL["inbox_done"], list(done), now)}
    still = set(left)
    if beginnings := {expansion.item.id for expansion in expansions} - done.keys():
        still |= {id for (id,) in await connection.fetch(SQL["inbox_still"], list(beginnings))}
    expansions = [expansion for expansion in expansions if expansion.item.id in still]
    # All of them now, in the order of their ids: changing files of a batch requires its lock.
    names = list({(expansion.batch_id, expansion.api_code): None for expansion in expansions})
    rows = await connection.fetch(SQL["batches_named"], *arrays(names, 2))
    batches = {(batch_id, api_code): id for id, batch_id, api_code, _ in rows}
    probed_again = {id: at for id, *_, at in rows}
    # Most other batches wait for their files.
    to_judge = list(batches.values())
    pending = 0
    for part in distinct_batches(expansions):
        ids = [batches.get((each.batch_id, each.api_code), 0) for each in part]
        merges = [Merge(id, each, probed_again.get(id)) for id, each in zip(ids, part, strict=True)]
        fresh, others = [merge for merge in merges if not merge.batch], [merge for merge in merges if merge.batch]
        await _add(connection, fresh, batches, now)
        await _merge(connection, others, now)
        probed_again |= {merge.batch: merge.probed_again_at for merge in merges}
        pending += sum(merge.pending for merge in merges)
        to_judge += [merge.batch for merge in fresh if not merge.pending]
    await match_batches(connection, list(batches.values()), now)
    if expansions:
        await note_arrivals(connection, latest_arrivals(expansions))
    return Expanded(
        pending,
        sum(files for id, files in done.items() if id in left),
        await write_verdicts(connection, events, set(to_judge), now),
    )


async def _add(connection: Connection, merges: Sequence[Merge], batches: dict[tuple[str, str], int], now: int) -> None:
    """Add batches that are not there, with their files, to the database and to `batches`."""
    if not merges:
        return
    files = [merge.settle(()) for merge in merges]
    rows = []
    for merge in merges:
        _, *counts, _, notification, _, ends_at = merge.batch_row()
        rows.append((merge.expansion.batch_id, merge.expansion.api_code, *counts, notification, ends_at))
    for id, batch_id, api_code in await connection.fetch(SQL["batches_insert"], *arrays(rows, 12)):
        batches[batch_id, api_code] = id
    for merge in merges:
        merge.batch = batches[merge.expansion.batch_id, merge.expansion.api_code]
    await _add_files(
        connection, [(merge.batch, file) for merge, added in zip(merges, files, strict=True) for file in added], now
    )


async def _merge(connection: Connection, merges: Sequence[Merge], now: int) -> None:
    """Merge expansions of different batches that exist."""
    if not merges:
        return
    existing: dict[int, list[Known]] = {}
    wanted = [(merge.batch, name) for merge in merges for name in merge.files]
    for batch, id, name, target_url, status, state in await connection.fetch(SQL["files_existing"], *arrays(wanted, 2)):
        known = Known(id, name, target_url, ReportedStatus(status), FileState(state))
        existing.setdefault(batch, []).append(known)
    added = [(merge.batch, file) for merge in merges for file in merge.settle(existing.get(merge.batch, ()))]
    if replaced := [each for merge in merges for each in merge.replaced]:
        rows = [(id, *columns(file, now)) for id, file in replaced]
        await connection.execute(SQL["files_replace"], *arrays(rows, 9))
        await connection.execute(SQL["leases_restart"], [id for merge in merges for id in merge.restarted])
    await _add_files(connection, added, now)
    await connection.execute(SQL["batches_expanded"], *arrays([merge.batch_row() for merge in merges], 13))


async def _add_files(connection: Connection, files: Sequence[tuple[int, NewFile]], now: int) -> None:
    if files:
        await connection.copy_records_to_table(
            "file",
            records=[(batch, file.oss_object_name, *columns(file, now)) for batch, file in files],
            columns=FILE_COLUMNS,
        )


async def write_verdicts(
    connection: Connection, events: Events, batches: Collection[int], now: int
) -> list[BatchVerdict]:
    """Return the verdicts that are due to these batches now. Of several nodes exactly one gets each."""
    return await write_settled(connection, events, [(batch, 0, 0, 0) for batch in batches], now)


async def write_settled(
    connection: Connection, events: Events, settled: Sequence[tuple[int, int, int, int]], now: int
) -> list[BatchVerdict]:
    """Count so many files of each batch as available, unavailable and blocked; and the verdicts that are due then."""
    if not settled:
        return []
    rows = await connection.fetch(SQL["batches_settled"], *arrays(settled, 4), now)
    verdicts = [
        BatchVerdict(id, batch_id, api_code, Verdict(verdict), *rest)
        for id, batch_id, api_code, verdict, *rest in sorted(rows, key=lambda row: int(row[0]))
        if verdict != Verdict.PENDING
    ]
    return await events.add_verdicts(connection, verdicts, now)
