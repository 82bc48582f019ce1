"""One daemon on PostgreSQL beside one on SQLite, on the same machine: acks, probing, and what either leaves on disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import asyncpg
import msgspec

from notify_server.clock import unix_ms
from notify_server.store.postgres.store import PostgresStore
from tests.bench.acks import SMALL, wrk
from tests.bench.figures import Column, Outcome, Row, Setting, Sheet, in_turn, median_by
from tests.bench.postgres_steps import steps
from tests.bench.probes import CONCURRENCY, LEAD_SECONDS
from tests.bench.record import API_CODE, FILES_A_BATCH, WAIT_SECONDS, add_pending, batch_name, body_of, reading
from tests.bench.servers import ONE_HOST, Origin, Server, daemon, nginx
from tests.bench.usage import cpu_seconds
from tests.support.postgres import PostgresServer, new_schema
from tests.support.waiting import free_port

SQLITE, POSTGRES = "SQLite", "PostgreSQL"
CONNECTIONS = 64
PAUSE = 0.05
# Everything else is as PostgreSQL comes.
SETTINGS = {"listen_addresses": "127.0.0.1", "log_min_messages": "warning"}

EXPANDED = "SELECT NOT EXISTS (SELECT 1 FROM notification WHERE expanded_at IS NULL)"
SETTLED = "SELECT NOT EXISTS (SELECT 1 FROM batch WHERE verdict = 'pending')"
SPAN = "SELECT (SELECT min(started_at) FROM attempt), (SELECT max(completed_at) FROM batch)"
FOUND = "SELECT count(*) FROM file WHERE state = 'available'"


class Used(msgspec.Struct):
    """One run on one store: how much was done in how many seconds, with how much CPU time of the daemon with its
    prober and of the server, and the bytes that are in the store afterwards and went through the server's log.
    """

    done: int
    seconds: float
    node_cpu: float
    server_cpu: float
    stored: int
    logged: int
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    errors: int = 0
    then_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """How much was done a second."""
        return self.done / self.seconds


class Record(Protocol):
    """A new store, and the queries made beside the daemon that has it."""

    url: str

    def add(self, addresses: Sequence[str], due_at: int) -> None:
        """Batches of FILES_A_BATCH files that wait to be requested at these addresses, from `due_at` (Unix ms) on."""

    def row(self, query: str) -> Sequence[int]:
        """The one row that the query gives."""

    def taken(self) -> tuple[float, int, int]:
        """CPU seconds of the server so far, the store's bytes, and those that have gone through the server's log."""


class SqliteRecord:
    """A file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.url = f"sqlite:///{path}"

    def add(self, addresses: Sequence[str], due_at: int) -> None:
        add_pending(self._path, addresses, due_at)

    def row(self, query: str) -> Sequence[int]:
        with reading(self._path) as connection:
            row: Sequence[int] = connection.execute(query).fetchone()
        return row

    def taken(self) -> tuple[float, int, int]:
        # Pages in the WAL reach the file later.
        return 0.0, self._path.stat().st_size if self._path.exists() else 0, 0


class PostgresRecord:
    """A schema of a server that syncs to the disk."""

    def __init__(self, server: PostgresServer, url: str, loop: asyncio.Runner) -> None:
        self._server = server
        self._loop = loop
        self.url = url
        self._connection = loop.run(asyncpg.connect(url))

    def close(self) -> None:
        self._loop.run(self._connection.close())

    def add(self, addresses: Sequence[str], due_at: int) -> None:
        self._loop.run(self._add(addresses, due_at))

    async def _add(self, addresses: Sequence[str], due_at: int) -> None:
        await (await PostgresStore.open(self.url)).close()
        now = unix_ms()
        parts = [addresses[start : start + FILES_A_BATCH] for start in range(0, len(addresses), FILES_A_BATCH)]
        batches = [(place, batch_name(place), API_CODE, len(part)) for place, part in enumerate(parts, 1)]
        deliveries = [
            (*batch, now, "127.0.0.1", "none", "-", now, body_of(batch[0], part))
            for batch, part in zip(batches, parts, strict=True)
        ]
        files = [
            (place, address.split("/", 3)[3], address, address.split("/", 3)[2], "FINISHED", "pending", due_at)
            for place, part in enumerate(parts, 1)
            for address in part
        ]
        copy = self._connection.copy_records_to_table
        await copy(
            "notification", records=deliveries,
            columns=["id", "batch_id", "api_code", "files", "received_at", "remote_addr", "signature", "request_id",
                     "expanded_at", "body"],
        )  # fmt: skip
        await copy(
            "batch", records=[(*batch, batch[3], now, now, 1, batch[0]) for batch in batches],
            columns=["id", "batch_id", "api_code", "files", "pending", "first_received_at", "last_received_at",
                     "deliveries", "last_notification"],
        )  # fmt: skip
        await copy(
            "file", records=files,
            columns=["batch", "oss_object_name", "target_url", "host", "reported_status", "state", "next_attempt_at"],
        )  # fmt: skip
        await self._connection.execute("ANALYZE")

    def row(self, query: str) -> Sequence[int]:
        row = self._loop.run(self._connection.fetchrow(query))
        assert row is not None
        return tuple(row)

    def taken(self) -> tuple[float, int, int]:
        sizes = "coalesce(sum(pg_total_relation_size(oid)), 0)::bigint"
        stored, logged = self.row(
            f"SELECT {sizes}, (pg_current_wal_insert_lsn() - '0/0')::bigint FROM pg_class"
            " WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'"
        )
        return cpu_seconds(self._server.pid), stored, logged


class Stores:
    """Makes new ones of both kinds."""

    def __init__(self, work: Path, server: PostgresServer, loop: asyncio.Runner) -> None:
        self._work = work
        self._server = server
        self._loop = loop

    @contextmanager
    def sqlite(self) -> Iterator[Record]:
        path = self._work / f"notify-{time.time_ns()}.db"
        yield SqliteRecord(path)
        for part in self._work.glob(f"{path.name}*"):
            part.unlink()

    @contextmanager
    def postgres(self) -> Iterator[Record]:
        record = PostgresRecord(self._server, self._loop.run(new_schema(self._server.url)), self._loop)
        try:
            yield record
        finally:
            record.close()


Make = Callable[[], AbstractContextManager[Record]]


def until(record: Record, query: str) -> None:
    """Return once the query's one value is true. Raises TimeoutError."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not record.row(query)[0]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {WAIT_SECONDS:.0f} s: {query}")
        time.sleep(PAUSE)


@contextmanager
def serving(record: Record, work: Path) -> Iterator[Server]:
    """The daemon on this store."""
    limits = {"verify__concurrency": str(CONCURRENCY), "verify__per_host_concurrency": str(CONCURRENCY)}
    with daemon(work / "unused.db", store__url=record.url, **limits) as server:
        yield replace(server, settle=lambda: until(record, EXPANDED))


def acks(make: Make, work: Path, seconds: int, turn: int) -> Used:
    """As many notifications as are taken, and their expansion into rows."""
    with make() as record, serving(record, work) as server:
        node, (cpu, stored, logged) = cpu_seconds(server.pid), record.taken()
        run = wrk(server, CONNECTIONS, seconds, SMALL)
        after = record.taken()
        node = cpu_seconds(server.pid) - node
    return Used(
        run.requests, run.seconds, node, after[0] - cpu, after[1] - stored, after[2] - logged,
        run.p50_ms, run.p99_ms, run.errors, run.settle_seconds,
    )  # fmt: skip


def probing(make: Make, work: Path, origin: Origin, files: int, turn: int) -> Used:
    """Files that wait, from the first request to the last verdict."""
    with make() as record:
        due_at = unix_ms() + round((LEAD_SECONDS + files / 10_000) * 1000)
        record.add(origin.addresses(files, ONE_HOST), due_at)
        with serving(record, work) as server:
            if (left := due_at - unix_ms()) < 0:
                raise RuntimeError(f"the store and the daemon were not ready in time, {-left / 1000:.1f} s late")
            time.sleep(left / 1000)
            node, (cpu, _, logged) = cpu_seconds(server.pid), record.taken()
            until(record, SETTLED)
            after = record.taken()
            node = cpu_seconds(server.pid) - node
            (found,), (first, last) = record.row(FOUND), record.row(SPAN)
    if found != files:
        raise RuntimeError(f"{files - found} of {files} files were not found")
    return Used(files, (last - first) / 1000, node, after[0] - cpu, after[1], after[2] - logged)


def _rows(runs: dict[str, list[Used]], more: Callable[[list[Used]], list[float]]) -> list[Row]:
    rates = {name: median_by(used, lambda run: run.rate) for name, used in runs.items()}

    def each(name: str, of: Callable[[Used], float]) -> float:
        return median_by(runs[name], lambda run: of(run) / run.done)

    return [
        [
            name, rates[name], rates[name] / rates[SQLITE], *more(runs[name]),
            each(name, lambda run: run.node_cpu * 1e6), each(name, lambda run: run.server_cpu * 1e6) or None,
            each(name, lambda run: run.stored), each(name, lambda run: run.logged) or None,
        ]
        for name in runs
    ]  # fmt: skip


def _columns(of: str) -> list[Column]:
    return [
        Column(f"CPU µs/{of},\ndaemon", ",.0f"), Column("server", ",.0f"),
        Column(f"bytes/{of},\nstored", ",.0f"), Column("WAL", ",.0f"),
    ]  # fmt: skip


def run(setting: Setting) -> Outcome:
    """Both stores in turn: acks first, then probing."""
    seconds, files = setting.of(6, 1), setting.of(40_000, 3_000)
    settings = SETTINGS | {"port": str(free_port())}
    with PostgresServer(settings) as server, asyncio.Runner() as loop, nginx(setting.work) as origin:
        stores = Stores(setting.work, server, loop)
        makes: dict[str, Make] = {SQLITE: stores.sqlite, POSTGRES: stores.postgres}
        taken, _ = in_turn(
            setting, {name: partial(acks, make, setting.work, seconds) for name, make in makes.items()}
        )  # fmt: skip
        asked, _ = in_turn(
            setting, {name: partial(probing, make, setting.work, origin, files) for name, make in makes.items()}
        )  # fmt: skip
        setting.say("PostgreSQL, step by step")
        step_by_step = loop.run(steps(server, loop.run(new_schema(server.url)), setting.of(10_000, 500)))
    sheets = [
        Sheet(
            f"Acks, {SMALL} files each, {CONNECTIONS} connections, median of {setting.rounds} x {seconds} s (wrk)",
            [
                Column("store"), Column("acks/s", ",.0f"), Column("ratio", ".2f"), Column("p50 ms", ".1f"),
                Column("p99 ms", ".1f"), Column("then s", ".1f"), Column("errors", ".0f"), *_columns("ack"),
            ],
            _rows(
                taken,
                lambda runs: [
                    median_by(runs, lambda run: run.p50_ms), median_by(runs, lambda run: run.p99_ms),
                    median_by(runs, lambda run: run.then_seconds), sum(run.errors for run in runs),
                ],
            ),
            "Expansion into rows included, which goes on for so many seconds after the last request.",
        ),
        Sheet(
            f"HEADs of {files:,} files, nginx on loopback, {CONCURRENCY} at a time, median of {setting.rounds}",
            [Column("store"), Column("files/s", ",.0f"), Column("ratio", ".2f"), *_columns("file")],
            _rows(asked, lambda runs: []),
            "The daemon, its prober, PostgreSQL, the origin and the load share the machine's cores.",
        ),
        *step_by_step.sheets,
    ]  # fmt: skip
    raw = {"acks": msgspec.to_builtins(taken), "probing": msgspec.to_builtins(asked), "steps": step_by_step.raw}
    return Outcome(sheets, raw)
