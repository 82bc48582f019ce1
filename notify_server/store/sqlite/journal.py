"""The verbs of store.journal.Journal on SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import partial

import msgspec

from notify_server.store.journal import KEPT_MS, Group, KeptSample, NewAcknowledgement, NewAction
from notify_server.store.sql import load_queries
from notify_server.store.sqlite.writer import Writer

SQL = load_queries("sqlite", "journal")


class SqliteJournal:
    """Writes through `writer`."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def add_action(self, action: NewAction) -> None:
        row = msgspec.structs.astuple(action)
        await self._writer.transaction(lambda connection: connection.execute(SQL["action"], row))

    async def acknowledge(self, wanted: NewAcknowledgement) -> int:
        return await self._writer.transaction(partial(_acknowledge, wanted=wanted))

    async def keep_samples(self, samples: Sequence[KeptSample]) -> None:
        rows = [(each.step, each.at, each.server, each.sample) for each in samples]
        bounds = [(each.step, each.at - KEPT_MS[each.step]) for each in samples]

        def write(connection: sqlite3.Connection) -> None:
            connection.executemany(SQL["sample"], rows)
            connection.executemany(SQL["samples_prune"], bounds)

        await self._writer.transaction(write)


def prune(connection: sqlite3.Connection, completed_before: int, rejected_before: int, limit: int) -> int:
    """Delete old actions and acknowledgements; return how many."""
    deleted = connection.execute(SQL["prune_actions"], (limit, completed_before)).rowcount
    # What it acknowledged is older, and so deleted too.
    before = min(completed_before, rejected_before)
    return deleted + connection.execute(SQL["prune_acknowledgements"], (before, limit)).rowcount


def _acknowledge(connection: sqlite3.Connection, wanted: NewAcknowledgement) -> int:
    by = wanted.at, wanted.who, wanted.note
    number = 0
    batches = [id for (id,) in connection.execute(SQL["batches"], (_json(wanted.batches),)).fetchall()]
    if batches:
        id = connection.execute(SQL["acknowledgement"], by).lastrowid
        number += connection.execute(SQL["batches_acknowledge"], (wanted.at, id, _json(batches))).rowcount
    if wanted.rejections:
        number += connection.execute(SQL["rejections"], (*by, _json(wanted.rejections))).rowcount
    for group in wanted.groups:
        number += _acknowledge_group(connection, wanted, group)
    return number


def _acknowledge_group(connection: sqlite3.Connection, wanted: NewAcknowledgement, group: Group) -> int:
    parameters: dict[str, object] = {"reason": group.reason, "host": group.host, "state": group.state}
    known = connection.execute(SQL["group_known"], parameters).fetchone()
    query = SQL["group_of_reason" if group.reason else "group_reported"]
    after = 0 if known is None else known[0]
    files, last = connection.execute(query, parameters | {"after": after}).fetchone()
    if files or known:
        by = {"at": wanted.at, "who": wanted.who, "note": wanted.note}
        connection.execute(SQL["group_acknowledge"], parameters | by | {"last_file": last or after})
    return int(files)


def _json(ids: Sequence[int]) -> str:
    return msgspec.json.encode(list(ids)).decode()
