"""A PostgreSQL database as one side of a copy. Locks keep servers from registering as nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg

from notify_server.config import without_secrets
from notify_server.errors import StoreRefusedError
from notify_server.store.copying.copy import COUNTED, TABLES, Row, Side
from notify_server.store.postgres.schema import check_server, check_whole, migrate, schema_version
from notify_server.store.postgres.session import (
    Connection,
    close,
    connect,
    refuse_on_error,
    strip_nul,
    translate_errors,
)
from notify_server.store.sql import check_version, load_queries

# Prevents writes: a source must not change. A second copy of it may run at the same time.
_STANDS_STILL = f"LOCK TABLE {', '.join(TABLES)}, node IN SHARE MODE"
# Prevents nodes from registering, and other copies to this target.
_STAYS_EMPTY = "LOCK TABLE node IN SHARE ROW EXCLUSIVE MODE"
_TABLES = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace"
_COLUMNS = """
SELECT attname FROM pg_attribute
WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped
    -- Columns about running servers.
    AND NOT (attrelid = to_regclass('event') AND attname = 'xid')
    AND NOT (attrelid = to_regclass('forward') AND attname = 'claimed_by')
    AND NOT (attrelid = to_regclass('endpoint') AND attname = 'wanted_until')
ORDER BY attnum
"""
# SQLite knows by the order of ids which notifications are expanded.
_OUT_OF_ORDER = """
SELECT count(*) FROM notification
WHERE expanded_at IS NULL AND id < (SELECT max(id) FROM notification WHERE expanded_at IS NOT NULL)
"""
_LAST_GIVEN = "SELECT pg_sequence_last_value(pg_get_serial_sequence($1, 'id')::regclass)"
_GIVE_BEHIND = "SELECT setval(pg_get_serial_sequence($1, 'id')::regclass, $2)"


class PostgresSide(Side):
    """Open it with `source` or `target`; close it when done."""

    parameter = "${}"
    body_bytes = "octet_length(body)"
    refusals = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, TypeError, ValueError)

    def __init__(self, place: str, guard: asyncpg.Connection[asyncpg.Record], work: Connection) -> None:
        super().__init__(place)
        # Holds the locks in a transaction that lasts as long as this does.
        self._guard = guard
        self._work = work

    @classmethod
    async def source(cls, url: str) -> PostgresSide:
        """Open it for reading. Raises StoreRefusedError unless it is a whole record of this version that SQLite can
        hold and that no server has open.
        """
        return await refuse_on_error(url, cls._source(url), "--from")

    @classmethod
    async def _source(cls, url: str) -> PostgresSide:
        place = without_secrets(url)
        with translate_errors(place):
            guard = await _connect(url)
            try:
                await check_server(guard, place)
                check_version(place, "postgres", await schema_version(guard))
                await check_whole(guard, place)
                place = await _shown(guard, place)
                await _lock(guard, place, _STANDS_STILL)
                if waiting := await guard.fetchval(_OUT_OF_ORDER):
                    raise StoreRefusedError(
                        f"{place}: {waiting:,} notifications wait to be expanded that were accepted before others that "
                        "have been: let a server run until it has done that, and copy then"
                    )
            except BaseException:
                guard.terminate()
                raise
        return cls(place, guard, guard)

    @classmethod
    async def target(cls, url: str) -> PostgresSide:
        """Open it for writing, and migrate its schema unless it has rows. Raises StoreRefusedError when that fails, or
        a server has it open.
        """
        return await refuse_on_error(url, cls._target(url), "--to")

    @classmethod
    async def _target(cls, url: str) -> PostgresSide:
        place = without_secrets(url)
        with translate_errors(place):
            guard, work = await _connect(url), None
            try:
                work = await _connect(url)
                side = cls(await _shown(work, place), guard, work)
                # A record with rows is refused later, and stays unchanged until then.
                if await side.copied_from() is not None or await side.filled() is None:
                    await migrate(work, place, whole=False)
                    await _lock(guard, place, _STAYS_EMPTY)
            except BaseException:
                for connection in filter(None, (guard, work)):
                    connection.terminate()
                raise
        return side

    async def close(self) -> None:
        await close(self._guard)
        if self._work is not self._guard:
            assert isinstance(self._work, asyncpg.Connection)
            await close(self._work)

    async def _fetch(self, query: str, *parameters: object) -> list[Row]:
        with translate_errors(self.place):
            return [tuple(row) for row in await self._work.fetch(query, *parameters)]

    async def _execute(self, statement: str, *parameters: object) -> None:
        await self._work.execute(statement, *parameters)

    async def _tables(self) -> set[str]:
        return {name for (name,) in await self._fetch(_TABLES)}

    async def columns(self, table: str) -> list[str]:
        return [name for (name,) in await self._fetch(_COLUMNS, table)]

    async def counters(self) -> dict[str, int]:
        with translate_errors(self.place):
            given = {table: await self._work.fetchval(_LAST_GIVEN, table) for table in COUNTED}
        return {table: int(last) for table, last in given.items() if last is not None}

    async def _empty(self) -> None:
        await self._execute(f"TRUNCATE {', '.join(TABLES)}")

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        with translate_errors(self.place):
            async with self._work.transaction():
                yield

    def fit(self, columns: Sequence[str], rows: list[Row], replaced: Counter[str]) -> None:
        for place, row in enumerate(rows):
            if any(isinstance(value, str) and "\0" in value for value in row):
                fitting = [strip_nul(value) if isinstance(value, str) else value for value in row]
                replaced.update(
                    column for column, old, new in zip(columns, row, fitting, strict=True) if new != old
                )  # fmt: skip
                rows[place] = tuple(fitting)

    async def _insert(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        await self._work.copy_records_to_table(table, records=rows, columns=list(columns))

    async def finish(self, counters: dict[str, int]) -> None:
        async with self.transaction():
            # Fails if the locks were lost meanwhile.
            await self._guard.execute("SELECT")
            for table, last in counters.items():
                await self._work.execute(_GIVE_BEHIND, table, max(last, await self._last_given(table)))
            # The first reader needs statistics for its plans.
            await self._work.execute(f"ANALYZE {', '.join(TABLES)}")
            await self._work.execute("DROP TABLE copying")

    async def _last_given(self, table: str) -> int:
        return int(await self._work.fetchval(_LAST_GIVEN, table) or 0)


async def _connect(url: str) -> asyncpg.Connection[asyncpg.Record]:
    """Connect without a statement time-out: a statement may read every row."""
    return await connect(url, {"idle_in_transaction_session_timeout": "0", "statement_timeout": "0"}, None)


async def _shown(connection: Connection, place: str) -> str:
    """Return the place with the schema, which distinguishes it from others in the same database."""
    schema = await connection.fetchval("SELECT current_schema()")
    return place if schema == "public" else f"{place}, schema {schema}"


async def _lock(guard: Connection, place: str, lock: str) -> None:
    # Check before too: while servers run, waiting for the lock would block them.
    await _refuse_servers(guard, place)
    await guard.execute("BEGIN")
    await guard.execute(lock)
    await _refuse_servers(guard, place)


async def _refuse_servers(connection: Connection, place: str) -> None:
    servers = await connection.fetch(load_queries("postgres")["nodes_named"])
    if servers:
        names = ", ".join(name for name, _ in servers)
        seconds = max(seconds for _, seconds in servers)
        raise StoreRefusedError(
            f"{place}: in use by {names}: stop them first, or the copy cannot be verified; "
            f"a killed server counts for another {seconds} s"
        )
