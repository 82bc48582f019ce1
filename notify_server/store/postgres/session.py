"""Connects to PostgreSQL with the settings that the store needs, and translates its errors."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg

from notify_server.config import without_secrets
from notify_server.errors import StoreRefusedError, StoreUnavailableError

T = TypeVar("T")
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

STORE_URL = "[store] url"
CONNECT_SECONDS = 5.0
STATEMENT_SECONDS = 10.0
PATIENCE_SECONDS = 60.0
# "ntfy": tells our advisory locks from those of other programs in the same database.
LOCK_SPACE = 0x6E746679
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
