"""A database on PostgreSQL as one side of a copy. Its locks keep servers out, which enter themselves as nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg

from notify_server.config import without_secrets
from notify_server.errors import StoreRefusedError
from notify_server.store.copying.copy import CHUNK_BYTES, CHUNK_ROWS, COUNTED, TABLES, Key, Row, key_of
from notify_server.store.postgres.schema import check_server, check_whole, copied_from, migrate, schema_version
from notify_server.store.postgres.session import (
    Connection,
    close,
    connect,
    refuse_on_error,
    strip_nul,
    translate_errors,
)
from notify_server.store.sql import check_version, load_queries

# Nobody writes: a record that is copied stands still. A second copy of it may go on beside.
_STANDS_STILL = f"LOCK TABLE {', '.join(TABLES)}, node IN SHARE MODE"
# Nobody becomes a node, and nobody else copies to here.
_STAYS_EMPTY = "LOCK TABLE node IN SHARE ROW EXCLUSIVE MODE"
_COLUMNS = """
SELECT attname FROM pg_attribute
WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped
    -- These are about servers that run.
    AND NOT (attrelid = to_regclass('event') AND attname = 'xid')
    AND NOT (attrelid = to_regclass('forward') AND attname = 'claimed_by')
ORDER BY attnum
"""
# On SQLite what has not been expanded is told from what has by the order of ids.
_OUT_OF_ORDER = """
SELECT count(*) FROM notification
WHERE expanded_at IS NULL AND id < (SELECT max(id) FROM notification WHERE expanded_at IS NOT NULL)
"""
_LAST_GIVEN = "SELECT pg_sequence_last_value(pg_get_serial_sequence($1, 'id')::regclass)"
_GIVE_BEHIND = "SELECT setval(pg_get_serial_sequence($1, 'id')::regclass, $2)"


class PostgresSide:
    """Made by `source` or `target`; close it when done."""

    def __init__(self, place: str, guard: asyncpg.Connection[asyncpg.Record], work: Connection) -> None:
        self.place = place
        # Holds the locks in a transaction that lasts as long as this does.
        self._guard = guard
        self._work = work

    @classmethod
    async def source(cls, url: str) -> PostgresSide:
        """To be read. Raises StoreRefusedError when it is not a whole record of this version that can be on SQLite, or
        servers have it.
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
        """To be written, its schema brought up to date unless it has rows. Raises StoreRefusedError when it cannot be,
        or servers have it.
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
                # One with rows is refused later, and stays as it is until then.
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

    async def columns(self, table: str) -> list[str]:
        with translate_errors(self.place):
            return [name for (name,) in await self._work.fetch(_COLUMNS, table)]

    async def count(self, table: str) -> int:
        with translate_errors(self.place):
            return int(await self._work.fetchval(f"SELECT count(*) FROM {table}"))  # noqa: S608

    async def chunks(self, table: str, columns: Sequence[str], after: Key) -> AsyncIterator[list[Row]]:
        key = key_of(table)
        place = columns.index(key)
        behind = f"FROM {table} WHERE {key} > $1"
        query = f"SELECT {', '.join(columns)} {behind} ORDER BY {key} LIMIT $2"
        # How long a body is is known without reading it.
        sizes = f"SELECT octet_length(body) {behind} ORDER BY {key} LIMIT $2"
        while True:
            number = CHUNK_ROWS
            with translate_errors(self.place):
                if "body" in columns:
                    number = _fitting([size for (size,) in await self._work.fetch(sizes, after, CHUNK_ROWS)])
                rows = [tuple(row) for row in await self._work.fetch(query, after, number)]
            if not rows:
                return
            after = rows[-1][place]
            yield rows

    async def counters(self) -> dict[str, int]:
        with translate_errors(self.place):
            given = {table: await self._work.fetchval(_LAST_GIVEN, table) for table in COUNTED}
        return {table: int(last) for table, last in given.items() if last is not None}

    async def copied_from(self) -> str | None:
        with translate_errors(self.place):
            return await copied_from(self._work)

    async def filled(self) -> str | None:
        with translate_errors(self.place):
            if not await schema_version(self._work):
                return None
            for table in TABLES:
                if await self._work.fetchval(f"SELECT EXISTS (SELECT FROM {table})"):  # noqa: S608
                    return table
        return None

    async def begin(self, source: str, *, anew: bool) -> None:
        async with self.transaction():
            if anew:
                await self._work.execute(f"TRUNCATE {', '.join(TABLES)}")
            await self._work.execute("CREATE TABLE IF NOT EXISTS copying (source text NOT NULL)")
            await self._work.execute("DELETE FROM copying")
            await self._work.execute("INSERT INTO copying (source) VALUES ($1)", source)

    async def last(self, table: str) -> Key | None:
        with translate_errors(self.place):
            return await self._work.fetchval(f"SELECT max({key_of(table)}) FROM {table}")  # type: ignore[no-any-return] # noqa: S608

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

    async def append(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        try:
            await self._work.copy_records_to_table(table, records=rows, columns=list(columns))
        except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, TypeError, ValueError) as error:
            place = columns.index(key_of(table))
            raise StoreRefusedError(
                f"{self.place}: cannot have a row of {table} between {rows[0][place]} and {rows[-1][place]} ({error})"
            ) from error

    async def finish(self, counters: dict[str, int]) -> None:
        async with self.transaction():
            # Whether the locks have been held all the time.
            await self._guard.execute("SELECT")
            for table, last in counters.items():
                await self._work.execute(_GIVE_BEHIND, table, max(last, await self._last_given(table)))
            # Whoever reads it first has plans for what is there.
            await self._work.execute(f"ANALYZE {', '.join(TABLES)}")
            await self._work.execute("DROP TABLE copying")

    async def _last_given(self, table: str) -> int:
        return int(await self._work.fetchval(_LAST_GIVEN, table) or 0)


async def _connect(url: str) -> asyncpg.Connection[asyncpg.Record]:
    """Connect without a limit to the time of a statement: one may be about every row."""
    return await connect(url, {"idle_in_transaction_session_timeout": "0", "statement_timeout": "0"}, None)


async def _shown(connection: Connection, place: str) -> str:
    """The place with what else tells it from others in the same database."""
    schema = await connection.fetchval("SELECT current_schema()")
    return place if schema == "public" else f"{place}, schema {schema}"


async def _lock(guard: Connection, place: str, lock: str) -> None:
    # Before, too: while servers run, asking for the lock would hold them up.
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
            f"{place}: in use by {names}: stop them first, what changes meanwhile cannot be verified; "
            f"what has been killed counts for another {seconds} s"
        )


def _fitting(sizes: Sequence[int]) -> int:
    """How many of these, one at least, make up no more than a chunk."""
    total = 0
    for number, size in enumerate(sizes):
        total += size
        if total > CHUNK_BYTES:
            return number + 1
    return CHUNK_ROWS
