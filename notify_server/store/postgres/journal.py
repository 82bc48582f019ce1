"""The verbs of store.journal.Journal on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

from notify_server.store.base import valid_ids
from notify_server.store.journal import KEPT_MS, Group, KeptSample, NewAcknowledgement, NewAction
from notify_server.store.postgres.session import Connection, arrays, strip_nul, transact
from notify_server.store.sql import load_queries

SQL = load_queries("postgres", "journal")


class PostgresJournal:
    """`use` gives a connection for the time of a verb."""

    def __init__(self, use: Callable[[], AbstractAsyncContextManager[Connection]]) -> None:
        self._use = use

    async def add_action(self, action: NewAction) -> None:
        async with self._use() as connection:
            row = action.at, strip_nul(action.who), action.what, strip_nul(action.filter), action.files
            await connection.execute(SQL["action"], *row)

    async def acknowledge(self, wanted: NewAcknowledgement) -> int:
        async with self._use() as connection:
            return await transact(connection, partial(_acknowledge, wanted=wanted))

    async def keep_samples(self, samples: Sequence[KeptSample]) -> None:
        latest = {(each.step, each.at, each.server): each.sample for each in samples}
        rows = [(*key, sample) for key, sample in latest.items()]
        bounds = [(each.step, each.at - KEPT_MS[each.step]) for each in samples]
        async with self._use() as connection:
            await connection.execute(SQL["samples"], *arrays(rows, 4))
            await connection.execute(SQL["samples_prune"], *arrays(bounds, 2))


async def prune(connection: Connection, completed_before: int, rejected_before: int, limit: int) -> int:
    """Delete old actions and acknowledgements; return how many."""
    # What an acknowledgement is of is older, and so deleted too.
    before = min(completed_before, rejected_before)
    return _count(await connection.execute(SQL["prune_actions"], limit, completed_before)) + _count(
        await connection.execute(SQL["prune_acknowledgements"], before, limit)
    )


async def _acknowledge(connection: Connection, wanted: NewAcknowledgement) -> int:
    by = wanted.at, strip_nul(wanted.who), strip_nul(wanted.note)
    number = 0
    batches = [id for (id,) in await connection.fetch(SQL["batches"], valid_ids(wanted.batches))]
    if batches:
        id = await connection.fetchval(SQL["acknowledgement"], *by)
        number += _count(await connection.execute(SQL["batches_acknowledge"], wanted.at, id, batches))
    if wanted.rejections:
        number += _count(await connection.execute(SQL["rejections"], *by, valid_ids(wanted.rejections)))
    for group in wanted.groups:
        number += await _acknowledge_group(connection, by, group)
    return number


async def _acknowledge_group(connection: Connection, by: tuple[int, str, str], group: Group) -> int:
    name = group.reason, strip_nul(group.host), group.state
    known = await connection.fetchval(SQL["group_known"], *name)
    row = await connection.fetchrow(SQL["group_of_reason" if group.reason else "group_reported"], *name, known or 0)
    assert row is not None
    files, last = row
    if files or known is not None:
        await connection.execute(SQL["group_acknowledge"], *by, *name, last or known)
    return int(files)


def _count(status: str) -> int:
    return int(status.rpartition(" ")[2])
