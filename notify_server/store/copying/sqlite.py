"""A SQLite file as one side of a copy. Its lock is held, so no server opens it."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Self

import aiosqlite

from notify_server.errors import StoreRefusedError, StoreUnavailableError
from notify_server.store.copying.copy import COUNTED, TABLES, Row, Side
from notify_server.store.sql import check_version
from notify_server.store.sqlite.database import connect
from notify_server.store.sqlite.lock import FileLock, holder
from notify_server.store.sqlite.read_connection import ReadConnection, connect_read_only

_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table'"
_AUTOINCREMENT = f"{_TABLES} AND sql LIKE '%AUTOINCREMENT%'"
_REMEMBERED = "UPDATE sqlite_sequence SET seq = ? WHERE name = ?"
_REMEMBER = """
INSERT INTO sqlite_sequence (name, seq) SELECT ?, ? WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = ?)
"""


class SqliteSide(Side):
    """Open it with `source` or `target`; close it when done."""

    parameter = "?{}"
    body_bytes = "length(CAST(body AS BLOB))"
    refusals = (sqlite3.IntegrityError,)

    def __init__(self, path: Path, lock: FileLock, connection: aiosqlite.Connection) -> None:
        super().__init__(str(path.resolve()))
        self._lock = lock
        self._connection = connection

    @classmethod
    async def source(cls, path: Path) -> Self:
        """Open it for reading. Raises StoreRefusedError unless it is a whole record of this version that no server has
        open.
        """
        async with await ReadConnection.open(path) as connection:
            check_version(str(path), "sqlite", await connection.schema_version())
            await connection.check_whole(path)
        with _locked(path) as lock:
            return cls(path, lock, await connect_read_only(path))

    @classmethod
    async def target(cls, path: Path) -> Self:
        """Open it for writing; create it if missing, and migrate its schema unless it has rows. Raises
        StoreRefusedError when that fails, or a server has it open.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreRefusedError(
                f"{path.parent}: cannot be created ({error.strerror}): name another directory"
            ) from error
        with _locked(path) as lock:
            if _has_content(path):
                present = cls(path, lock, await connect_read_only(path))
                # A record with rows is refused later, and stays unchanged until then.
                if await present._is_refused():
                    return present
            return cls(path, lock, await aiosqlite.Connection(partial(connect, path, whole=False), 64))

    async def _is_refused(self) -> bool:
        """Return True for a record with rows that is no unfinished copy; close the connection otherwise."""
        refused = False
        try:
            refused = await self.copied_from() is None and await self.filled() is not None
        finally:
            if not refused:
                await self._connection.close()
        return refused

    async def close(self) -> None:
        await self._connection.close()
        self._lock.close()

    async def _fetch(self, query: str, *parameters: object) -> list[Row]:
        with self._usable():
            return [tuple(row) for row in await self._connection.execute_fetchall(query, parameters)]

    async def _execute(self, statement: str, *parameters: object) -> None:
        await self._connection.execute(statement, parameters)

    async def _tables(self) -> set[str]:
        return {name for (name,) in await self._fetch(_TABLES)}

    async def columns(self, table: str) -> list[str]:
        return [name for (name,) in await self._fetch("SELECT name FROM pragma_table_info(?)", table)]

    async def counters(self) -> dict[str, int]:
        given = {name: int(last) for name, last in await self._fetch("SELECT name, seq FROM sqlite_sequence")}
        for table in COUNTED:
            given[table] = max(int(await self.last(table) or 0), given.get(table, 0))
        return {table: last for table, last in given.items() if last}

    async def _empty(self) -> None:
        for table in reversed(TABLES):
            await self._execute(f"DELETE FROM {table}")  # noqa: S608

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        with self._usable():
            await self._execute("BEGIN IMMEDIATE")
            try:
                yield
                await self._execute("COMMIT")
            finally:
                # A full disk has already rolled back by itself.
                if self._connection.in_transaction:
                    await self._execute("ROLLBACK")

    def fit(self, columns: Sequence[str], rows: list[Row], replaced: Counter[str]) -> None:
        """SQLite stores every value that PostgreSQL does."""

    async def _insert(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        values = ", ".join("?" * len(columns))
        await self._connection.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values})", rows)  # noqa: S608

    async def finish(self, counters: dict[str, int]) -> None:
        async with self.transaction():
            for (table,) in await self._fetch(_AUTOINCREMENT):
                if table in counters:
                    await self._execute(_REMEMBERED, counters[table], table)
                    await self._execute(_REMEMBER, table, counters[table], table)
            await self._execute("DROP TABLE copying")

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise StoreUnavailableError(f"{self.place}: {error}") from error


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


@contextmanager
def _locked(path: Path) -> Iterator[FileLock]:
    """Take the lock, and keep it unless an exception is raised."""
    if (process := holder(path)) is not None:
        raise StoreRefusedError(f"{path}: in use by process {process}: stop it first, or the copy cannot be verified")
    lock = FileLock(path)
    try:
        yield lock
    except BaseException:
        lock.close()
        raise
