"""Ways to make SQLite fail under a store: other processes, and a connection that fails at a chosen statement."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from notify_server.store.sqlite.store import SqliteStore

HOLD_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
connection.rollback()
print("free", flush=True)
"""

# Nobody else can so much as read.
HOLD_ALL = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA locking_mode = EXCLUSIVE")
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
connection.close()
print("free", flush=True)
"""

HOLD_STORE = """
import asyncio, sys
from contextlib import closing
from pathlib import Path
from notify_server.store.sqlite.store import SqliteStore

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await store.close()
    print("closed", flush=True)

asyncio.run(main())
"""


class Child:
    """A Python process that says when it is ready, and finishes on request."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def says(self, line: str) -> None:
        """Wait until it prints this line."""
        assert self.process.stdout is not None
        async with asyncio.timeout(20):
            while printed := await self.process.stdout.readline():
                if printed.decode().strip() == line:
                    return
        raise AssertionError(f"the child ended before it said {line!r}")

    async def finish(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.says(line)
        await self.process.wait()


@contextlib.asynccontextmanager
async def child(script: str, *arguments: str | Path) -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, *arguments,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Child(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(path)
    try:
        yield store
    finally:
        await store.close()


def connection_of(store: SqliteStore) -> sqlite3.Connection:
    """The writer's own connection, for its settings. For use while nothing is being written."""
    connection = store._writer._connection
    assert connection is not None
    return connection


def select(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA query_only = 1")
        return connection.execute(query).fetchall()


class FlakyConnection(sqlite3.Connection):
    """A connection whose `fault` may answer a statement with an error instead of running it."""

    fault: Callable[[str], sqlite3.Error | None] | None = None

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        fault = FlakyConnection.fault
        if fault is not None and (error := fault(sql)) is not None:
            raise error
        return super().execute(sql, parameters)


def io_error(code: int = sqlite3.SQLITE_IOERR_WRITE) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code
    return error


class Interruption:
    """Interrupts a connection's work once, when it has taken so many steps; what begins and ends transactions is left
    alone, since it has happened by the time that it can be interrupted.
    """

    def __init__(self, connection: sqlite3.Connection, steps: int) -> None:
        self.left = steps
        self.happened = False
        self._statement = ""
        self._connection = connection
        connection.set_trace_callback(self._begin)
        connection.set_progress_handler(self._step, 1)

    def _begin(self, statement: str) -> None:
        self._statement = statement

    def _step(self) -> bool:
        if self.happened or self._statement in ("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"):
            return False
        self.left -= 1
        self.happened = self.left == 0
        return self.happened

    def lift(self) -> None:
        self._connection.set_trace_callback(None)
        self._connection.set_progress_handler(None, 1)
