"""Connections to PostgreSQL: how they are made, what goes wrong with them, and the schema that they find."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
import structlog

from notify_server.config import without_secrets
from notify_server.errors import StoreRefusedError, StoreUnavailableError
from notify_server.store.sql import load_migrations, unfinished

T = TypeVar("T")
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

log = structlog.get_logger("notify_server.store")

OLDEST_SERVER = 14
STORE_URL = "[store] url"
CONNECT_SECONDS = 5.0
STATEMENT_SECONDS = 10.0
PATIENCE_SECONDS = 60.0
# For as long as another node may take to bring the schema up to date.
MIGRATION_SECONDS = 600.0
# "ntfy": tells our advisory locks from those of other programs in the same database.
LOCK_SPACE = 0x6E746679
MIGRATING = "migrate"
EXPANDING = "expand"
PRUNING = "prune"
# One for each purpose and schema.
LOCK_KEY = "$1::int, hashtext(current_schema() || ':' || $2)"

SETTINGS = {
    "application_name": "notify_server",
    # A commit waits for the disk, whatever the role's or the database's own setting is.
    "synchronous_commit": "on",
    # Plans are short-lived and small: compiling one costs more than it saves.
    "jit": "off",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": f"{PATIENCE_SECONDS:.0f}s",
    # A peer that is gone without a word must not hold its locks for hours.
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
# What the store does is to seek rows by their keys; a plan of a time when the tables were small would not.
SEEKING = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_custom_plan",
}

# A claim that a crash undoes is one that it voids: it need not wait for the disk. What it has found is joined with what
# it got of that.
CLAIMING = SEEKING | {"synchronous_commit": "off", "enable_hashjoin": "on"}

_UNAVAILABLE = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
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


def milliseconds(seconds: float) -> str:
    """A span of time as a setting of the server's."""
    return f"{round(seconds * 1000)}ms"


def patience(lease: float) -> dict[str, str]:
    """Settings by which a node that is stopped half-way through a transaction holds its locks no longer than its lease,
    in seconds, and a minute at most.
    """
    return {"idle_in_transaction_session_timeout": milliseconds(min(lease, PATIENCE_SECONDS))}


async def connect(url: str, **settings: str) -> asyncpg.Connection[asyncpg.Record]:
    """A connection whose commits are durable when they return."""
    return await asyncpg.connect(
        url, timeout=CONNECT_SECONDS, command_timeout=STATEMENT_SECONDS, server_settings=SETTINGS | settings
    )


def create_pool(url: str, size: int, **settings: str) -> asyncpg.Pool[asyncpg.Record]:
    """A pool of connections that are made when they are needed. It has to be awaited once."""
    return asyncpg.create_pool(
        url,
        min_size=0,
        max_size=size,
        # Transactions are closed by who opened them, and nothing else is left behind.
        reset=_keep,
        timeout=CONNECT_SECONDS,
        command_timeout=STATEMENT_SECONDS,
        server_settings=SETTINGS | settings,
    )


async def _keep(connection: Connection) -> None:
    pass


@contextmanager
def translate_errors(place: str) -> Iterator[None]:
    """Turn what a server that is gone, busy or in trouble makes of a statement into StoreUnavailableError."""
    try:
        yield
    except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError):
        raise
    except TimeoutError as error:
        raise StoreUnavailableError(f"{place}: does not answer in time") from error
    except _UNAVAILABLE as error:
        raise StoreUnavailableError(f"{place}: {_line(error)}") from error


async def refuse_on_error(url: str, opens: Awaitable[T], named: str = STORE_URL) -> T:
    """What `opens` gives; what goes wrong with it becomes StoreRefusedError, with what to do. `named` is where the
    address was given."""
    try:
        return await opens
    except StoreUnavailableError as error:
        refusal = _refusal(url, error.__cause__ or error, named)
    except (*_UNAVAILABLE, ValueError) as error:
        refusal = _refusal(url, error, named)
    # Out here because an error's context is printed with it, and what the driver says may hold the password.
    raise refusal


def _refusal(url: str, error: BaseException, named: str = STORE_URL) -> StoreRefusedError:
    place, said = without_secrets(url), _line(error)
    for secret in _secrets(url):
        said = said.replace(secret, "***")
    match error:
        case asyncpg.InvalidAuthorizationSpecificationError():
            what = f"lets this user not in ({said}): correct user and password in {named}"
        case asyncpg.InvalidCatalogNameError():
            what = f"is not there ({said}): create the database, or name another one in {named}"
        case asyncpg.InsufficientPrivilegeError():
            what = f"lets this user not do what is needed ({said}): make it the owner of the database or schema"
        case asyncpg.ReadOnlySQLTransactionError():
            what = f"is read-only, maybe a standby: name the primary in {named}"
        case asyncpg.LockNotAvailableError():
            what = "is locked by another program: end what holds its tables or changes its schema, and start again"
        case asyncpg.TooManyConnectionsError():
            what = f"has no connection left ({said}): raise max_connections, or close others"
        case asyncpg.PostgresError() | asyncpg.InterfaceError() | asyncpg.InternalClientError():
            what = f"cannot be used ({said})"
        case _:
            what = f"cannot be reached ({said}): start PostgreSQL, or correct {named}"
    return StoreRefusedError(f"{place}: {what}")


def _secrets(url: str) -> list[str]:
    parts = urlsplit(url)
    userinfo = parts.netloc.rpartition("@")[0]
    query = parse_qs(parts.query)
    password = userinfo.partition(":")[2]
    found = [password, unquote(password), *query.get("password", []), *query.get("sslpassword", [])]
    return sorted(filter(None, found), key=len, reverse=True)


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


async def transact(connection: Connection, job: Callable[[Connection], Awaitable[T]]) -> T:
    """Run the job in a transaction, once more when nodes were in each other's way."""

    async def run() -> T:
        async with connection.transaction():
            return await job(connection)

    return await retry_once(run)


async def retry_once(job: Callable[[], Awaitable[T]]) -> T:
    """Run the job, and again when it has failed because nodes were in each other's way."""
    try:
        return await job()
    except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError):
        return await job()


# The schema


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
    """Bring the schema of the database at `url` up to date; its version before, and now. Raises StoreRefusedError."""

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
    """The number of the last migration applied, 0 for an empty schema."""
    if await connection.fetchval("SELECT to_regclass(quote_ident(current_schema()) || '.schema_version')") is None:
        return 0
    return int(await connection.fetchval("SELECT version FROM schema_version"))


async def copied_from(connection: Connection) -> str | None:
    """What the record is an unfinished copy of; None when it is whole."""
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
        log.warning("WHAT IS ACKED MAY BE LOST IN A POWER CUT: set fsync and full_page_writes to on", store=place)


# Connections of one purpose


class Session:
    """One connection, for one caller at a time, made anew when it has been lost."""

    def __init__(
        self,
        url: str,
        place: str,
        settings: Mapping[str, str] = SEEKING,
        prepare: Callable[[asyncpg.Connection[asyncpg.Record]], Awaitable[None]] | None = None,
    ) -> None:
        self._url = url
        self._place = place
        self._prepare = prepare
        self._settings = settings
        self._lock = asyncio.Lock()
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    async def open(self) -> None:
        """Connect. What goes wrong is raised as it is."""
        connection = await connect(self._url, **self._settings)
        try:
            if self._prepare is not None:
                await self._prepare(connection)
        except BaseException:
            connection.terminate()
            raise
        self._connection = connection

    @asynccontextmanager
    async def use(self, *, reconnect: bool = True) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """The connection. Raises StoreUnavailableError for what goes wrong with it; without `reconnect` also when it
        has been lost."""
        async with self._lock:
            with translate_errors(self._place):
                if not self.connected:
                    if not reconnect:
                        raise StoreUnavailableError(f"{self._place}: the connection is lost")
                    await self.open()
                connection = self._connection
                assert connection is not None
                try:
                    yield connection
                except TimeoutError:
                    # Nobody knows what it is doing.
                    connection.terminate()
                    raise

    async def close(self) -> None:
        async with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                await close(connection)


async def close(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Close it, whatever state it is in."""
    try:
        await connection.close(timeout=1.0)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        connection.terminate()


# Values


def arrays(rows: Sequence[tuple[Any, ...]], columns: int) -> list[list[Any]]:
    """Rows as one array for each column, as the queries take them."""
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(columns)]


def strip_nul(text: str) -> str:
    """Text as PostgreSQL can hold it: without NUL and lone surrogates."""
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text)
