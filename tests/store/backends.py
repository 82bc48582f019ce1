"""The backends that the conformance suite runs against.

A case sees what a store has written through `Backend.rows`, a SELECT on the fixed tables and views. Another backend is
one more subclass of `Backend` and one more entry of `BACKENDS`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import msgspec
import pytest

from notify_server.expansion.expander import Expander
from notify_server.model import BatchVerdict, InboxItem
from notify_server.store.base import Engine, Expansion, ExpansionListener
from notify_server.store.postgres import records as postgres_records
from notify_server.store.postgres import store as postgres
from notify_server.store.postgres import writes as postgres_writes
from notify_server.store.reading import walk
from notify_server.store.reading.types import Records
from notify_server.store.sqlite import client as kept
from notify_server.store.sqlite import records as sqlite_records
from notify_server.store.sqlite import store as sqlite
from notify_server.store.sqlite import writes as sqlite_writes
from notify_server.verify.guard import Guard
from tests.store.builders import NOW
from tests.store.keeper import INBOX_VERBS
from tests.support.postgres import empty, fetch, new_schema

Row = tuple[Any, ...]


class Backend(ABC):
    """One database, and at most one store open on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._store: Engine | None = None
        self._records: Records | None = None

    async def open(self) -> Engine:
        assert self._store is None
        self._store = await self._open()
        return self._store

    async def records(self) -> Records:
        """What the database tells, beside the store that is open."""
        if self._records is None:
            self._records = await self._open_records()
        return self._records

    async def close(self) -> None:
        if self._records is not None:
            records, self._records = self._records, None
            await records.close()
        if self._store is not None:
            store, self._store = self._store, None
            await store.close()

    async def reopen(self) -> Engine:
        """Close the store and open it again, as a restart of the daemon does."""
        await self.close()
        return await self.open()

    @abstractmethod
    async def _open(self) -> Engine: ...

    @abstractmethod
    async def _open_records(self) -> Records: ...

    async def remove_endpoints(self) -> None:
        """Let the time pass after which endpoints that no daemon has are removed, where that is not at once."""
        return

    async def expand_inbox(self, guard: Guard, listener: ExpansionListener) -> None:
        """Expand the inbox of the open store until cancelled."""
        assert self._store is not None
        await Expander(self._store, guard, lambda: NOW, listener).run()

    @abstractmethod
    async def rows(self, query: str) -> list[Row]:
        """What a SELECT gives while the store is open."""

    @abstractmethod
    async def columns(self, table: str) -> list[str]:
        """The columns of a table or view, in their order."""

    @abstractmethod
    def bound(self, patch: pytest.MonkeyPatch, *, rejections: int, rejection_bytes: int) -> None:
        """Keep at most so many rejections."""

    @abstractmethod
    def walk(self, patch: pytest.MonkeyPatch, rows: int) -> None:
        """Look at no more than so many rows for a page whose items no index finds."""


class SqliteBackend(Backend):
    _reader: sqlite3.Connection | None = None

    async def _open(self) -> Engine:
        store = await self._open_store()
        self._reader = sqlite3.connect(self.directory / "notify.db", isolation_level=None)
        self._reader.execute("PRAGMA query_only = 1")
        return store

    async def _open_store(self) -> Engine:
        return await sqlite.SqliteStore.open(self.directory / "notify.db")

    async def _open_records(self) -> Records:
        return sqlite_records.SqliteRecords(self.directory / "notify.db")

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        await super().close()

    async def rows(self, query: str) -> list[Row]:
        assert self._reader is not None
        return self._reader.execute(query).fetchall()

    async def columns(self, table: str) -> list[str]:
        return [name for _, name, *_ in await self.rows(f"PRAGMA table_info({table})")]

    def bound(self, patch: pytest.MonkeyPatch, *, rejections: int, rejection_bytes: int) -> None:
        patch.setattr(sqlite_writes, "MAX_REJECTIONS", rejections)
        patch.setattr(sqlite_writes, "MAX_REJECTION_BYTES", rejection_bytes)

    def walk(self, patch: pytest.MonkeyPatch, rows: int) -> None:
        patch.setattr(walk, "MAX_SCANNED_ROWS", rows)


class KeeperClient(kept.SqliteClient):
    """The client with the verbs of the inbox, which the daemon leaves to the keeper."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._decoders |= {name: msgspec.msgpack.Decoder(verb.answer).decode for name, verb in INBOX_VERBS.items()}

    async def wait_inbox(self) -> None:
        await self._call("wait_inbox")

    async def inbox(self, limit: int) -> list[InboxItem]:
        items: list[InboxItem] = await self._call("inbox", limit)
        return items

    async def expand(self, expansions: Sequence[Expansion], now: int) -> list[BatchVerdict]:
        verdicts: list[BatchVerdict] = await self._call("expand", expansions, now)
        return verdicts

    async def discard(self, item: InboxItem, detail: str, now: int) -> list[BatchVerdict]:
        verdicts: list[BatchVerdict] = await self._call("discard", item, detail, now)
        return verdicts


class KeptBackend(SqliteBackend):
    """SQLite in a process of its own, as the daemon has it."""

    _kept: KeeperClient

    async def _open_store(self) -> Engine:
        command = [sys.executable, "-m", "tests.store.keeper", str(self.directory / "bounds.json")]
        self._kept = await KeeperClient.open(
            self.directory / "notify.db", now=lambda: NOW, guard=((), (), (80, 443)), command=command
        )
        return self._kept

    async def expand_inbox(self, guard: Guard, listener: ExpansionListener) -> None:
        self._kept.expand_inbox(listener)
        await asyncio.get_running_loop().create_future()

    def bound(self, patch: pytest.MonkeyPatch, *, rejections: int, rejection_bytes: int) -> None:
        bounds = {"MAX_REJECTIONS": rejections, "MAX_REJECTION_BYTES": rejection_bytes}
        (self.directory / "bounds.json").write_text(json.dumps(bounds))
        assert self._kept.pid is not None
        os.kill(self._kept.pid, signal.SIGUSR1)


class PostgresBackend(Backend):
    """A schema of its own on the server that all tests share; it is emptied and reused when no test holds it."""

    _free: ClassVar[list[str]] = []
    _url: str | None = None
    _reader: asyncpg.Connection[asyncpg.Record] | None = None

    async def url(self) -> str:
        if self._url is None:
            if self._free:
                self._url = self._free.pop()
                await empty(self._url)
            else:
                self._url = await new_schema()
            weakref.finalize(self, self._free.append, self._url)
        return self._url

    async def strays(self) -> list[Row]:
        """Files of no batch, and attempts of no file: the database itself checks no references."""
        return await fetch(
            await self.url(),
            "SELECT 'file', id FROM file WHERE NOT EXISTS (SELECT FROM batch WHERE batch.id = file.batch)"
            " UNION ALL"
            " SELECT 'attempt', id FROM attempt WHERE NOT EXISTS (SELECT FROM file WHERE file.id = attempt.file)",
        )

    async def _open(self) -> Engine:
        url = await self.url()
        store, self._reader = await asyncio.gather(postgres.PostgresStore.open(url), asyncpg.connect(url))
        return store

    async def remove_endpoints(self) -> None:
        assert isinstance(self._store, postgres.PostgresStore)
        await fetch(await self.url(), "UPDATE endpoint SET wanted_until = '-infinity'")
        await self._store.outbox.renew_endpoints()

    async def _open_records(self) -> Records:
        return await postgres_records.PostgresRecords.open(await self.url())

    async def close(self) -> None:
        if self._reader is not None:
            reader, self._reader = self._reader, None
            await reader.close()
        await super().close()
        assert await self.strays() == []

    async def rows(self, query: str) -> list[Row]:
        assert self._reader is not None
        return [tuple(row) for row in await self._reader.fetch(query)]

    async def columns(self, table: str) -> list[str]:
        rows = await self.rows(
            "SELECT column_name FROM information_schema.columns"
            f" WHERE table_schema = current_schema() AND table_name = '{table}' ORDER BY ordinal_position"
        )
        return [name for (name,) in rows]

    def bound(self, patch: pytest.MonkeyPatch, *, rejections: int, rejection_bytes: int) -> None:
        patch.setattr(postgres_writes, "MAX_REJECTIONS", rejections)
        patch.setattr(postgres_writes, "MAX_REJECTION_BYTES", rejection_bytes)

    def walk(self, patch: pytest.MonkeyPatch, rows: int) -> None:
        patch.setattr(walk, "MAX_SCANNED_ROWS", rows)


BACKENDS: dict[str, type[Backend]] = {"sqlite": SqliteBackend, "kept": KeptBackend, "postgres": PostgresBackend}


# What cases look at.
EVIDENCE = (
    "http_status, content_length, content_type, etag, last_modified, final_url, remote_addr, elapsed_ms,"
    " vendor_request_id, vendor_code, headers, flags, verified_at"
)
FILES = (
    "SELECT oss_object_name, target_url, host, reported_status, state, reason, attempts, next_attempt_at,"
    f" {EVIDENCE} FROM file ORDER BY oss_object_name"
)
# Of a file that has not been probed: all of the evidence but `verified_at`.
NO_EVIDENCE = (None,) * 12


async def states(backend: Backend) -> list[Row]:
    return await backend.rows("SELECT oss_object_name, target_url, state FROM file ORDER BY oss_object_name")


async def summary(backend: Backend) -> list[Row]:
    return await backend.rows(
        "SELECT batch_id, verdict, files, pending, available, unavailable, blocked, upload_failed"
        " FROM batch_summary ORDER BY batch_id"
    )
