"""The cost of each step of a file's way on PostgreSQL, on either side of the connection, and the bytes it stores."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import msgspec

from notify_server.background import PRUNE_ROWS
from notify_server.clock import unix_ms
from notify_server.expansion.expander import INBOX_ITEMS
from notify_server.model import AttemptRow, Delivery, DueFile, FileResult, FileState, ReportedStatus
from notify_server.store.base import MAX_ID, Expansion, NewFile
from notify_server.store.postgres.store import PostgresStore
from notify_server.verify.recorder import RECORD_ROWS
from tests.bench.acks import SMALL
from tests.bench.figures import Column, Outcome, Sheet
from tests.bench.record import API_CODE, batch_name, body_of, object_name
from tests.bench.usage import cpu_seconds
from tests.support.postgres import PostgresServer

HOST = "files.example.com"
TABLES = ("notification", "batch", "file", "attempt")
ACKS_AT_ONCE, CLAIMED_AT_ONCE = 64, 160
ACCEPT, EXPAND, CLAIM, RECORD, PRUNE = "accept, a notification", "expand, a file", "claim", "record", "prune, a row"


class Step(msgspec.Struct):
    """So many times: CPU and other seconds of all of them, and the bytes that went through the server's log."""

    times: int = 0
    server_cpu: float = 0.0
    node_cpu: float = 0.0
    seconds: float = 0.0
    logged: int = 0


class Meter:
    """Reads the server's and this process's meters around steps."""

    def __init__(self, server: PostgresServer, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._server = server
        self._connection = connection
        self.steps: dict[str, Step] = {}

    async def _read(self) -> tuple[float, float, float, int]:
        logged = await self._connection.fetchval("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
        return cpu_seconds(self._server.pid), time.process_time(), time.monotonic(), logged

    @asynccontextmanager
    async def of(self, name: str, times: int) -> AsyncIterator[None]:
        """Around a step that is taken so many times."""
        before = await self._read()
        yield
        after = await self._read()
        server, node, seconds, logged = (end - start for start, end in zip(before, after, strict=True))
        self.steps[name] = Step(times, server, node, seconds, round(logged))

    async def tables(self) -> dict[str, tuple[int, int, int]]:
        """Of each table its rows, their bytes and those of its indices, when the server has cleaned up."""
        await self._connection.execute("VACUUM (ANALYZE)", timeout=300)
        found = {}
        for table in TABLES:
            row = await self._connection.fetchrow(
                f"SELECT count(*), pg_table_size('{table}'), pg_indexes_size('{table}') FROM {table}"
            )
            assert row is not None
            found[table] = row[0], row[1], row[2]
        return found


def _found(file: DueFile, now: int) -> FileResult:
    request = AttemptRow(now, "HEAD", None, 200, None, None, 0.1, None, 0.9, 1.2, "203.0.113.7")
    return FileResult(
        file, FileState.AVAILABLE, None, 1, None, 200, 240_137, "image/jpeg", '"0123456789abcdef"', None, None,
        "203.0.113.7", 1.2, now, (request,),
    )  # fmt: skip


def _file(address: str) -> NewFile:
    name = address.split("/", 3)[3]
    return NewFile(name, address, HOST, ReportedStatus.FINISHED, FileState.PENDING, None)


async def _take(url: str, meter: Meter, numbers: range) -> None:
    """Take notifications with these numbers all the way, a step at a time."""
    now = unix_ms()
    deliveries: list[Delivery] = []
    files: dict[str, list[NewFile]] = {}
    for number in numbers:
        addresses = [f"https://{HOST}/{object_name(number * SMALL + place)}" for place in range(SMALL)]
        name, body = batch_name(number), body_of(number, addresses).encode()
        files[name] = [_file(address) for address in addresses]
        deliveries.append(
            Delivery(
                batch_id=name,
                api_code=API_CODE,
                body=body,
                files=SMALL,
                received_at=now,
                remote_addr="127.0.0.1",
                signature="none",
                request_id="914036a6-3423-451a-8817-bdd8ae7f9089",
            )
        )
    store = await PostgresStore.open(url)
    try:
        async with meter.of(ACCEPT, len(deliveries)):
            for start in range(0, len(deliveries), ACKS_AT_ONCE):
                await asyncio.gather(*map(store.accept, deliveries[start : start + ACKS_AT_ONCE]))
        async with meter.of(EXPAND, len(deliveries) * SMALL):
            while items := await store.inbox(INBOX_ITEMS):
                named = [(item, msgspec.json.decode(item.body)["batch_id"]) for item in items]
                await store.expand([Expansion(item, name, API_CODE, files[name], True) for item, name in named], now)
        claimed: list[DueFile] = []
        async with meter.of(CLAIM, len(deliveries) * SMALL):
            while more := await store.claim([(HOST, CLAIMED_AT_ONCE)], now):
                claimed += more
        results = [_found(file, now) for file in claimed]
        async with meter.of(RECORD, len(deliveries) * SMALL):
            for start in range(0, len(results), RECORD_ROWS):
                await store.record(results[start : start + RECORD_ROWS], now)
    finally:
        await store.close()


async def _prune(url: str, meter: Meter, rows: int) -> None:
    store = await PostgresStore.open(url)
    try:
        async with meter.of(PRUNE, rows):
            while await store.prune(MAX_ID, MAX_ID, PRUNE_ROWS):
                pass
    finally:
        await store.close()


async def steps(server: PostgresServer, url: str, notifications: int) -> Outcome:
    """Take so many notifications twice. What the second half takes is told, and by how much it makes the tables grow:
    it uses the space again that the first has left behind.
    """
    await (await PostgresStore.open(url)).close()
    connection = await asyncpg.connect(url)
    meter = Meter(server, connection)
    await _take(url, meter, range(notifications))
    before = await meter.tables()
    await _take(url, meter, range(notifications, 2 * notifications))
    after = await meter.tables()
    await _prune(url, meter, sum(rows for rows, *_ in after.values()))
    await connection.close()

    grown = {table: [now - then for then, now in zip(before[table], after[table], strict=True)] for table in TABLES}
    costs = Sheet(
        f"PostgreSQL, step by step: {notifications:,} notifications of {SMALL} files",
        [
            Column("µs each"), Column("CPU, server", ".1f"), Column("CPU, store's side", ".1f"),
            Column("in all", ".1f"), Column("WAL bytes", ",.0f"),
        ],
        [
            [
                name, step.server_cpu / step.times * 1e6, step.node_cpu / step.times * 1e6,
                step.seconds / step.times * 1e6, step.logged / step.times,
            ]
            for name, step in meter.steps.items()
        ],
        "One step after the other, and each waits for the disk; the daemon takes them side by side.",
    )  # fmt: skip
    kept = Sheet(
        "What is kept, bytes",
        [Column("a row of"), Column("its own", ",.0f"), Column("in indices", ",.0f")],
        [[table, own / rows, indices / rows] for table, (rows, own, indices) in grown.items()],
    )
    return Outcome([costs, kept], {"steps": msgspec.to_builtins(meter.steps), "grown": grown})
