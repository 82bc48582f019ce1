"""A file of SQLite as one side of a copy. Its lock is held, so no server gets it; the one connection is this one's."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from notify_server.errors import StoreRefusedError, StoreUnavailableError
from notify_server.store.copying.copy import CHUNK_BYTES, CHUNK_ROWS, COUNTED, TABLES, Key, Row, key_of
from notify_server.store.sql import check_version
from notify_server.store.sqlite.database import check_whole, connect, copied_from, schema_version
from notify_server.store.sqlite.lock import FileLock, holder
from notify_server.store.sqlite.reader import connect_read_only

_AUTOINCREMENT = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE '%AUTOINCREMENT%'"
_REMEMBERED = "UPDATE sqlite_sequence SET seq = ? WHERE name = ?"
_REMEMBER = """
INSERT INTO sqlite_sequence (name, seq) SELECT ?, ? WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = ?)
"""


class SqliteSide:
    """Made by `source` or `target`; close it when done."""

    def __init__(self, path: Path, lock: FileLock, connection: sqlite3.Connection) -> None:
        self._path = path
        self._lock = lock
        self._connection = connection

    @classmethod
    def source(cls, path: Path) -> SqliteSide:
        """To be read. Raises StoreRefusedError when it is not a whole record of this version, or a server has it."""
        connection = connect_read_only(path)
        try:
            check_version(str(path), "sqlite", schema_version(connection))
            check_whole(connection, path)
            with _locked(path) as lock:
                return cls(path, lock, connection)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def target(cls, path: Path) -> SqliteSide:
        """To be written, made if it is not there, its schema brought up to date unless it has rows. Raises
        StoreRefusedError when it cannot be, or a server has it.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreRefusedError(
                f"{path.parent}: cannot be created ({error.strerror}): name another directory"
            ) from error
        with _locked(path) as lock:
            if path.exists() and path.stat().st_size:
                with contextlib.closing(connect_read_only(path)) as present:
                    # One with rows is refused later, and stays as it is until then.
                    if copied_from(present) is None and _filled(present):
                        return cls(path, lock, connect_read_only(path))
            return cls(path, lock, connect(path, whole=False))

    @property
    def place(self) -> str:
        return str(self._path.resolve())

    async def close(self) -> None:
        self._connection.close()
        self._lock.close()

    async def columns(self, table: str) -> list[str]:
        with self._usable():
            return [name for (name,) in self._connection.execute("SELECT name FROM pragma_table_info(?)", (table,))]

    async def count(self, table: str) -> int:
        with self._usable():
            (number,) = self._connection.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608
        return int(number)

    async def chunks(self, table: str, columns: Sequence[str], after: Key) -> AsyncIterator[list[Row]]:
        key = key_of(table)
        place, body = columns.index(key), columns.index("body") if "body" in columns else None
        query = f"SELECT {', '.join(columns)} FROM {table} WHERE {key} > ? ORDER BY {key} LIMIT ?"  # noqa: S608
        while True:
            rows: list[Row] = []
            size = 0
            with self._usable(), contextlib.closing(self._connection.execute(query, (after, CHUNK_ROWS))) as cursor:
                for row in cursor:
                    rows.append(row)
                    size += 0 if body is None else len(row[body])
                    if size > CHUNK_BYTES:
                        break
            if not rows:
                return
            after = rows[-1][place]
            yield rows

    async def counters(self) -> dict[str, int]:
        with self._usable():
            given = dict(self._connection.execute("SELECT name, seq FROM sqlite_sequence").fetchall())
        for table in COUNTED:
            highest = await self.last(table)
            given[table] = max(int(highest or 0), given.get(table, 0))
        return {table: last for table, last in given.items() if last}

    async def copied_from(self) -> str | None:
        with self._usable():
            return copied_from(self._connection)

    async def filled(self) -> str | None:
        with self._usable():
            return _filled(self._connection)

    async def begin(self, source: str, *, anew: bool) -> None:
        async with self.transaction():
            for table in reversed(TABLES) if anew else ():
                self._connection.execute(f"DELETE FROM {table}")  # noqa: S608
            self._connection.execute("CREATE TABLE IF NOT EXISTS copying (source TEXT NOT NULL)")
            self._connection.execute("DELETE FROM copying")
            self._connection.execute("INSERT INTO copying (source) VALUES (?)", (source,))

    async def last(self, table: str) -> Key | None:
        with self._usable():
            (highest,) = self._connection.execute(f"SELECT max({key_of(table)}) FROM {table}").fetchone()  # noqa: S608
        return highest  # type: ignore[no-any-return]

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        with self._usable():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            finally:
                # A full disk has already rolled back by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def fit(self, columns: Sequence[str], rows: list[Row], replaced: Counter[str]) -> None:
        """SQLite holds whatever PostgreSQL does."""

    async def append(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        values = ", ".join("?" * len(columns))
        insert = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values})"  # noqa: S608
        try:
            self._connection.executemany(insert, rows)
        except sqlite3.IntegrityError as error:
            place = columns.index(key_of(table))
            raise StoreRefusedError(
                f"{self._path}: cannot have a row of {table} between {rows[0][place]} and {rows[-1][place]} ({error})"
            ) from error

    async def finish(self, counters: dict[str, int]) -> None:
        async with self.transaction():
            for (table,) in self._connection.execute(_AUTOINCREMENT).fetchall():
                if table in counters:
                    self._connection.execute(_REMEMBERED, (counters[table], table))
                    self._connection.execute(_REMEMBER, (table, counters[table], table))
            self._connection.execute("DROP TABLE copying")

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise StoreUnavailableError(f"{self._path}: {error}") from error


@contextmanager
def _locked(path: Path) -> Iterator[FileLock]:
    """The lock, which is kept unless something goes wrong."""
    if (process := holder(path)) is not None:
        raise StoreRefusedError(
            f"{path}: in use by process {process}: stop that first, what changes meanwhile cannot be verified"
        )
    lock = FileLock(path)
    try:
        yield lock
    except BaseException:
        lock.close()
        raise


def _filled(connection: sqlite3.Connection) -> str | None:
    there = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for table in TABLES:
        if table in there and connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone():  # noqa: S608
            return table
    return None
