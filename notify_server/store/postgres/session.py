"""Connects to PostgreSQL with the settings that the store needs, and translates its errors."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import asyncpg

from notify_server.config import without_secrets
from notify_server.errors import StoreNotReachedError, StoreRefusedError, StoreUnavailableError

T = TypeVar("T")
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

STORE_URL = "[store] url"
CONNECT_SECONDS = 5.0
STATEMENT_SECONDS = 10.0
PATIENCE_SECONDS = 60.0
# "ntfy": separates our advisory locks from those of other programs in the same database.
LOCK_SPACE = 0x6E746679
EXPANDING = "expand"
PRUNING = "prune"
# One lock for each purpose and schema.
LOCK_KEY = "$1::int, hashtext(current_schema() || ':' || $2)"

# Set with set_config after connecting, not as start-up parameters: PgBouncer refuses most of those.
SETTINGS = {
    "application_name": "notify_server",
    # A commit waits for the disk, whatever the default of the role or the database is.
    "synchronous_commit": "on",
    # Plans are short-lived and small: compiling one costs more than it saves.
    "jit": "off",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": f"{PATIENCE_SECONDS:.0f}s",
    # Without keepalives a peer that lost its network would hold its locks for hours.
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
# The store seeks rows by their keys; plans made while the tables were small would scan them later.
SEEKING = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_custom_plan",
}

# Claims need not wait for the disk: a crash of the server voids them anyway. The claim joins the files that it found
# with the leases that it got.
CLAIMING = SEEKING | {"synchronous_commit": "off", "enable_hashjoin": "on"}

# Keys of a URL's query that are about the connection; every other key names a setting of the server.
_CONNECTION_KEYS = {
    "database", "dbname", "gsslib", "host", "krbsrvname", "options", "passfile", "password", "port", "service",
    "ssl_max_protocol_version", "ssl_min_protocol_version", "sslcert", "sslcrl", "sslkey", "sslmode", "sslnegotiation",
    "sslpassword", "sslrootcert", "target_session_attrs", "user",
}  # fmt: skip

_UNAVAILABLE = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)


def milliseconds(seconds: float) -> str:
    """Return a duration in the notation of the server's settings."""
    return f"{round(seconds * 1000)}ms"


def patience(lease: float) -> dict[str, str]:
    """Return settings that bound how long a node that hangs within a transaction holds its locks: its lease of `lease`
    seconds, and a minute at most.
    """
    return {"idle_in_transaction_session_timeout": milliseconds(min(lease, PATIENCE_SECONDS))}


async def connect(
    url: str, settings: Mapping[str, str] = MappingProxyType({}), command_timeout: float | None = STATEMENT_SECONDS
) -> asyncpg.Connection[asyncpg.Record]:
    """Connect, with commits that are durable when they return unless `settings` say otherwise."""
    address, own = split_settings(url)
    connection = await asyncpg.connect(address, timeout=CONNECT_SECONDS, command_timeout=command_timeout)
    try:
        await _configure(connection, own | SETTINGS | dict(settings))
    except BaseException:
        connection.terminate()
        raise
    return connection


async def reach(url: str) -> None:
    """Connect and disconnect. Raises StoreNotReachedError when connecting may work later, StoreRefusedError else."""

    async def connected() -> None:
        with translate_errors(without_secrets(url)):
            await close(await connect(url))

    await refuse_on_error(url, connected())


def create_pool(url: str, size: int, **settings: str) -> asyncpg.Pool[asyncpg.Record]:
    """Return a pool that connects on demand. It has to be awaited once."""
    address, own = split_settings(url)
    return asyncpg.create_pool(
        address,
        min_size=0,
        max_size=size,
        init=partial(_configure, settings=own | SETTINGS | settings),
        # Callers close their transactions and leave no other state behind.
        reset=_keep,
        timeout=CONNECT_SECONDS,
        command_timeout=STATEMENT_SECONDS,
    )


def split_settings(url: str) -> tuple[str, dict[str, str]]:
    """Split the settings of the server, such as `search_path`, from the query of a URL."""
    parts = urlsplit(url)
    try:
        pairs = parse_qsl(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        # The driver refuses it with a reason.
        return url, {}
    query = urlencode([(key, value) for key, value in pairs if key in _CONNECTION_KEYS])
    return urlunsplit(parts._replace(query=query)), {k: v for k, v in pairs if k not in _CONNECTION_KEYS}


async def _configure(connection: Connection, settings: Mapping[str, str]) -> None:
    columns = (f"set_config(${2 * n + 1}, ${2 * n + 2}, false)" for n in range(len(settings)))
    parameters = [text for pair in settings.items() for text in pair]
    row = await connection.fetchrow(f"SELECT {', '.join(columns)}", *parameters, timeout=CONNECT_SECONDS)
    assert row is not None
    applied = dict(zip(settings, row, strict=True))
    if applied["synchronous_commit"] != settings["synchronous_commit"]:
        raise asyncpg.InterfaceError(
            f"synchronous_commit stays {applied['synchronous_commit']} though it was set to "
            f"{settings['synchronous_commit']}: commits would not be durable"
        )


async def _keep(connection: Connection) -> None:
    pass


@contextmanager
def translate_errors(place: str) -> Iterator[None]:
    """Raise StoreUnavailableError for the errors of a server that is gone, busy or in trouble."""
    try:
        yield
    except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError):
        raise
    except TimeoutError as error:
        raise StoreUnavailableError(f"{place}: does not answer in time") from error
    except _UNAVAILABLE as error:
        raise StoreUnavailableError(f"{place}: {_line(error)}") from error


async def refuse_on_error(url: str, opens: Awaitable[T], named: str = STORE_URL) -> T:
    """Await `opens` and raise StoreRefusedError with what to do when that fails; StoreNotReachedError when it may work
    later. `named` is the option that gives the URL.
    """
    try:
        return await opens
    except StoreUnavailableError as error:
        refusal = _refusal(url, error.__cause__ or error, named)
    except (*_UNAVAILABLE, ValueError) as error:
        refusal = _refusal(url, error, named)
    # Raised outside of `except`: the context of an error is printed with it, and the driver's may hold the password.
    raise refusal


def _refusal(url: str, error: BaseException, named: str = STORE_URL) -> StoreRefusedError:
    place, said = without_secrets(url), _line(error)
    for secret in _secrets(url):
        said = said.replace(secret, "***")
    match error:
        case asyncpg.InvalidAuthorizationSpecificationError():
            what = f"refuses this user ({said}): correct user and password in {named}"
        case asyncpg.InvalidCatalogNameError():
            what = f"does not exist ({said}): create the database, or name another one in {named}"
        case asyncpg.InsufficientPrivilegeError():
            what = (
                f"denies this user rights that the record needs ({said}): make it the owner of the database or schema"
            )
        case asyncpg.ReadOnlySQLTransactionError():
            what = f"is read-only, maybe a standby: name the primary in {named}"
        case asyncpg.LockNotAvailableError():
            what = "is locked by another program: end what holds its tables or changes its schema, and start again"
        case asyncpg.TooManyConnectionsError():
            return StoreNotReachedError(
                f"{place}: has no connection left ({said}): raise max_connections, or close others"
            )
        case asyncpg.CannotConnectNowError() | asyncpg.PostgresConnectionError():
            return StoreNotReachedError(f"{place}: accepts no connections ({said}): wait until PostgreSQL is up")
        case asyncpg.PostgresError() | asyncpg.InterfaceError() | asyncpg.InternalClientError():
            what = f"cannot be used ({said})"
        case _:
            return StoreNotReachedError(f"{place}: cannot be reached ({said}): start PostgreSQL, or correct {named}")
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
    """Run the job in a transaction, and once more after a conflict with another node."""

    async def run() -> T:
        async with connection.transaction():
            return await job(connection)

    return await retry_once(run)


async def retry_once(job: Callable[[], Awaitable[T]]) -> T:
    """Run the job, and once more after a conflict with another node."""
    try:
        return await job()
    except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError):
        return await job()


# Connections of one purpose


class Session:
    """Owns one connection, lends it to one caller at a time, and reconnects when it was lost."""

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
        """Connect. Errors of the driver are not translated."""
        connection = await connect(self._url, self._settings)
        try:
            if self._prepare is not None:
                await self._prepare(connection)
        except BaseException:
            connection.terminate()
            raise
        self._connection = connection

    @asynccontextmanager
    async def use(self, *, reconnect: bool = True) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """Lend the connection. Raises StoreUnavailableError when it fails, or is lost and `reconnect` is False."""
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
                    # The statement may still be running.
                    connection.terminate()
                    raise

    async def close(self) -> None:
        async with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                await close(connection)


async def close(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Close the connection, whatever its state."""
    try:
        await connection.close(timeout=1.0)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        connection.terminate()


# Values


def arrays(rows: Sequence[tuple[Any, ...]], columns: int) -> list[list[Any]]:
    """Turn rows into one array for each column, the form that the queries take."""
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(columns)]


def strip_nul(text: str) -> str:
    """Replace the characters that PostgreSQL cannot store in a text: NUL and lone surrogates."""
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text)


def row_count(status: str) -> int:
    """Return the number of rows in a command tag such as `DELETE 3`."""
    return int(status.rpartition(" ")[2])
