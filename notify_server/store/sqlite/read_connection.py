"""Opens read-only connections to a SQLite record, which work beside the process that writes it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import aiosqlite

from notify_server.errors import StoreRefusedError, StoreUnavailableError
from notify_server.store.sql import unfinished
from notify_server.store.sqlite.database import APPLICATION_ID, BUSY_TIMEOUT_MS

# Instructions of SQLite's virtual machine between two checks of the deadline: a few milliseconds.
PROGRESS_STEPS = 100_000

Row = tuple[Any, ...]
Parameters = Sequence[object] | Mapping[str, object]


async def connect_read_only(path: Path) -> aiosqlite.Connection:
    """Open a connection that cannot write. Raises StoreRefusedError when the file does not exist, or is no record."""
    uri = _read_only_uri(path)
    try:
        connection = await aiosqlite.connect(uri, uri=True, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None)
    except sqlite3.Error as error:
        raise StoreRefusedError(f"{path}: cannot be opened ({error})") from error
    try:
        await connection.execute_fetchall("PRAGMA query_only = 1")
        ((application_id,),) = await connection.execute_fetchall("PRAGMA application_id")
        if application_id != APPLICATION_ID:
            raise StoreRefusedError(f"{path}: is not a record of notify_server: name the daemon's database")
    except BaseException as error:
        await connection.close()
        if isinstance(error, sqlite3.Error):
            raise StoreRefusedError(f"{path}: cannot be read ({error})") from error
        raise
    return connection


def _read_only_uri(path: Path) -> str:
    if not path.is_file():
        raise StoreRefusedError(f"{path}: there is no record: start the daemon, or name its database")
    return f"{path.absolute().as_uri()}?mode=ro"


class ReadConnection:
    """A connection that cannot write, with the thread that aiosqlite gives it.

    Every read is one statement fetched to its end, so that no transaction outlives the call and the writer can shorten
    its WAL. A read whose caller is cancelled is interrupted within milliseconds.
    """

    def __init__(self, connection: aiosqlite.Connection) -> None:
        """Use `open` instead."""
        self._connection = connection
        self._deadline = float("inf")

    @classmethod
    async def open(cls, path: Path, *, progress_steps: int = PROGRESS_STEPS) -> Self:
        """Open the record at `path`. Raises StoreRefusedError when the file does not exist, or is not a record.

        The deadline of a read is checked every `progress_steps`.
        """
        opened = cls(await connect_read_only(path))
        try:
            await opened._connection.set_progress_handler(opened._is_late, progress_steps)
        except BaseException:
            await opened.close()
            raise
        return opened

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection after the read in progress."""
        await self._connection.close()

    @property
    def in_transaction(self) -> bool:
        """True while a statement has not been fetched to its end."""
        return bool(self._connection.in_transaction)

    async def rows(self, statement: str, parameters: Parameters = (), *, seconds: float = float("inf")) -> list[Row]:
        """Run one statement and return all its rows. Calls must not overlap.

        Raises StoreUnavailableError when the record cannot be read, and TimeoutError after `seconds`.
        """
        return await self._run(self._connection.execute_fetchall(statement, parameters), seconds)

    async def first_rows(self, statement: str, limit: int) -> tuple[list[str], list[Row]]:
        """Run a statement and return its column names and its first rows. Raises StoreUnavailableError."""

        async def read() -> tuple[list[str], list[Row]]:
            # Closing the cursor ends the read transaction of a statement that has more rows.
            async with self._connection.execute(statement) as cursor:
                rows = await cursor.fetchmany(limit)
                return [column[0] for column in cursor.description or ()], [tuple(row) for row in rows]

        try:
            return await read()
        except sqlite3.Error as error:
            raise StoreUnavailableError(f"the record cannot be read: {error}") from error

    async def schema_version(self) -> int:
        """Return the number of the last migration applied, 0 for an empty database."""
        ((version,),) = await self.rows("PRAGMA user_version")
        return int(version)

    async def copied_from(self) -> str | None:
        """Return the source of an unfinished copy; None when the record is complete."""
        if not await self.rows("SELECT 1 FROM sqlite_master WHERE name = 'copying'"):
            return None
        ((source,),) = await self.rows("SELECT source FROM copying")
        return str(source)

    async def check_whole(self, path: Path) -> None:
        """Raise StoreRefusedError when the record is an unfinished copy."""
        if (source := await self.copied_from()) is not None:
            raise unfinished(str(path), source)

    async def _run(self, read: Any, seconds: float) -> list[Row]:
        # aiosqlite leaves a statement running when its caller is cancelled. The progress handler interrupts it in its
        # own thread: sqlite3_interrupt would be lost if the thread had not begun the statement yet.
        self._deadline = time.monotonic() + seconds
        reading: asyncio.Future[Iterable[Row]] = asyncio.ensure_future(read)
        try:
            rows = await asyncio.shield(reading)
        except asyncio.CancelledError:
            self._deadline = float("-inf")
            await _finished(reading)
            raise
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT:
                raise TimeoutError(f"not read within {seconds:g} s") from error
            raise StoreUnavailableError(f"the record cannot be read: {error}") from error
        return list(rows)

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline


async def _finished(reading: asyncio.Future[Any]) -> None:
    """Wait until the read has ended, even if the caller is cancelled again, and discard its result."""
    while not reading.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([reading])
    if not reading.cancelled():
        reading.exception()
