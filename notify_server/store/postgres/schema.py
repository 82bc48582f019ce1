"""Creates and migrates the schema on PostgreSQL, and checks that a server can hold a record."""

from __future__ import annotations

from contextlib import suppress

import asyncpg
import structlog

from notify_server.config import without_secrets
from notify_server.errors import StoreRefusedError
from notify_server.store.postgres.session import (
    LOCK_KEY,
    LOCK_SPACE,
    Connection,
    close,
    connect,
    refuse_on_error,
    translate_errors,
)
from notify_server.store.sql import load_migrations, unfinished

log = structlog.get_logger("notify_server.store")

OLDEST_SERVER = 14
MIGRATING = "migrate"
# How long to wait for another node that migrates the schema.
MIGRATION_SECONDS = 600.0

_SERVER = """
SELECT
    current_setting('server_encoding'),
    current_schema(),
    current_setting('fsync')::boolean AND current_setting('full_page_writes')::boolean
"""
_OWN_TABLES = """
SELECT relname FROM pg_class
WHERE relnamespace = to_regnamespace(quote_ident(current_schema()))
    AND relname IN ('notification', 'batch', 'file', 'attempt', 'rejection', 'nonce', 'heartbeat', 'node', 'lease')
ORDER BY relname
LIMIT 1
"""


async def migrate(connection: Connection, place: str, *, whole: bool = True) -> None:
    """Bring the schema up to date, one node at a time. Raises StoreRefusedError when it is not ours, newer, or, unless
    `whole` is False, an unfinished copy.
    """
    await check_server(connection, place)
    if whole:
        await check_whole(connection, place)
    if await schema_version(connection) == len(load_migrations("postgres")):
        return
    await connection.execute(f"SET lock_timeout = {round(MIGRATION_SECONDS * 1000)}")
    await connection.execute(f"SELECT pg_advisory_lock({LOCK_KEY})", LOCK_SPACE, MIGRATING, timeout=MIGRATION_SECONDS)
    try:
        await _migrate(connection, place)
    finally:
        with suppress(asyncpg.InterfaceError, asyncpg.PostgresError):
            await connection.execute(f"SELECT pg_advisory_unlock({LOCK_KEY})", LOCK_SPACE, MIGRATING)
            await connection.execute("RESET lock_timeout")


async def migrate_at(url: str) -> tuple[int, int]:
    """Migrate the schema of the database at `url`; return its versions before and after. Raises StoreRefusedError."""

    async def migrated() -> tuple[int, int]:
        place = without_secrets(url)
        with translate_errors(place):
            connection = await connect(url)
            try:
                before = await schema_version(connection)
                await migrate(connection, place)
                return before, await schema_version(connection)
            finally:
                await close(connection)

    return await refuse_on_error(url, migrated())


async def schema_version(connection: Connection) -> int:
    """Return the number of the last migration applied, 0 for an empty schema."""
    if await connection.fetchval("SELECT to_regclass(quote_ident(current_schema()) || '.schema_version')") is None:
        return 0
    return int(await connection.fetchval("SELECT version FROM schema_version"))


async def copied_from(connection: Connection) -> str | None:
    """Return the source of an unfinished copy, None when it is whole."""
    if await connection.fetchval("SELECT to_regclass(quote_ident(current_schema()) || '.copying')") is None:
        return None
    return str(await connection.fetchval("SELECT source FROM copying"))


async def check_whole(connection: Connection, place: str) -> None:
    """Raises StoreRefusedError when the record is an unfinished copy."""
    if (source := await copied_from(connection)) is not None:
        raise unfinished(place, source)


async def _migrate(connection: Connection, place: str) -> None:
    migrations = load_migrations("postgres")
    present = await schema_version(connection)
    if present > len(migrations):
        raise StoreRefusedError(
            f"{place}: has schema version {present}, this program knows {len(migrations)}: "
            "run the newer notify_server that wrote it, or restore a backup from before the upgrade"
        )
    if not present and (other := await connection.fetchval(_OWN_TABLES)):
        raise StoreRefusedError(
            f"{place}: has a table {other} of another program: name a database of its own in [store] url"
        )
    for step in migrations[present:]:
        async with connection.transaction():
            await connection.execute(step.script, timeout=MIGRATION_SECONDS)
            await connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version integer NOT NULL)")
            await connection.execute("DELETE FROM schema_version")
            await connection.execute("INSERT INTO schema_version (version) VALUES ($1)", step.version)
        log.info("schema migrated", store=place, to=step.name)


async def check_server(connection: Connection, place: str) -> None:
    """Raises StoreRefusedError when the record cannot be kept there; warns when it is not safe there."""
    version = connection.get_server_version()
    if version.major < OLDEST_SERVER:
        raise StoreRefusedError(
            f"{place}: is PostgreSQL {version.major}.{version.minor}: {OLDEST_SERVER} or newer is needed"
        )
    row = await connection.fetchrow(_SERVER)
    assert row is not None
    encoding, schema, durable = row
    if encoding != "UTF8":
        raise StoreRefusedError(f"{place}: has the encoding {encoding}: create the database with ENCODING 'UTF8'")
    if schema is None:
        raise StoreRefusedError(f"{place}: has no schema to be used: create the one that search_path names")
    if not durable:
        log.warning("ACKED NOTIFICATIONS MAY BE LOST IN A POWER CUT: set fsync and full_page_writes to on", store=place)
