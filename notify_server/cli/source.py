"""Chooses where a command reads the record, and who changes it: the record itself, or a running daemon over its API.

Reading never needs the daemon. A daemon that runs is the only process that may change its SQLite file, so commands call
it; several processes may change a PostgreSQL database, so commands do it themselves.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec

from notify_server.action_log import CALLER, COMMAND_AGENT
from notify_server.cli.common import UsageError, trust_only, user_name
from notify_server.clock import unix_ms
from notify_server.config import Config
from notify_server.errors import NotifyServerError, StoreRefusedError
from notify_server.operations import Actions, Prune, Pruned, Recheck, Rechecked, Replayed
from notify_server.store.admin_token import own_token
from notify_server.store.reading.types import (
    BatchDetail,
    BatchFilter,
    BatchItem,
    FailureGroup,
    FileDetail,
    FileFilter,
    FileItem,
    Found,
    Page,
    RejectionDetail,
    RejectionItem,
    Totals,
)
from notify_server.store.sql import load_migrations
from notify_server.store.sqlite.lock import holder
from notify_server.store.sqlite.read_connection import ReadConnection
from notify_server.store.sqlite.records import SqliteRecords
from notify_server.store.sqlite.store import SqliteStore

if TYPE_CHECKING:
    # Loaded only when a daemon is called: reading the file should not have to wait for it.
    import aiohttp

    from notify_server.web.api.types import Host, Status

T = TypeVar("T")

PATIENCE = 60.0
CONNECT_PATIENCE = 5.0


class SourceError(NotifyServerError):
    """The record or a part of it is not available; the text says why, and what to do."""


class NoRecordError(SourceError):
    """There is no record where the configuration says."""


class Readable(Protocol):
    """The reads of `Records` that commands use, from the record itself or from a daemon."""

    async def totals(self) -> Totals: ...

    async def batches(self, wanted: BatchFilter, cursor: str | None, limit: int) -> Page[BatchItem]: ...

    async def batch(self, id: int) -> BatchDetail | None: ...

    async def search(self, text: str, limit: int) -> Found: ...

    async def files(self, wanted: FileFilter, cursor: str | None, limit: int) -> Page[FileItem]: ...

    async def file(self, id: int) -> FileDetail | None: ...

    async def failures(self, limit: int) -> list[FailureGroup]: ...

    async def rejections(self, cursor: str | None, limit: int) -> Page[RejectionItem]: ...

    async def rejection(self, id: int) -> RejectionDetail | None: ...


class Acting(Protocol):
    """The changes that commands make: by `Actions` on the record, or by a daemon."""

    async def recheck(self, wanted: Recheck) -> Rechecked | None: ...

    async def replay(self, id: int) -> Replayed | None: ...

    async def prune(self, wanted: Prune) -> Pruned: ...


class Remote:
    """A running daemon, called over its API."""

    def __init__(self, url: str, token: str | None, trusted: ssl.SSLContext | None = None) -> None:
        self.url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._ssl: ssl.SSLContext | bool = trusted or True
        self._headers = {"User-Agent": f"{COMMAND_AGENT}{user_name()}"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, kind: type[T], method: str, path: str, body: object = None, **query: object) -> T | None:
        """Return the answer, None for 404. Raises SourceError with the daemon's message."""
        content = {"Content-Type": "application/json"} if method == "POST" else {}
        data = msgspec.json.encode(body if body is not None else {}) if method == "POST" else None
        async with self._request(method, path, query, headers=content, data=data) as response:
            answer = await response.read()
        if response.status == 404:
            return None
        self._check(response.status, answer)
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.MsgspecError as error:
            raise self._another(response.status) from error

    async def post_lines(self, kind: type[T], path: str, lines: bytes) -> T:
        """Post NDJSON and return the answer. Raises SourceError with the daemon's message."""
        content = {"Content-Type": "application/x-ndjson"}
        async with self._request("POST", path, {}, headers=content, data=lines) as response:
            answer = await response.read()
        self._check(response.status, answer)
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.MsgspecError as error:
            raise self._another(response.status) from error

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, query: Mapping[str, object], **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield the response. Raises SourceError when there is none, or it breaks off."""
        import aiohttp

        if self._session is None:
            # No limit to the total time, as long as data arrives.
            patience = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_PATIENCE, sock_read=PATIENCE)
            self._session = aiohttp.ClientSession(timeout=patience)
        parameters = {name: str(value) for name, value in query.items() if value is not None}
        headers = self._headers | options.pop("headers", {})
        url = f"{self.url}/api/v1/{path}"
        try:
            async with self._session.request(
                method, url, params=parameters, headers=headers, ssl=self._ssl, allow_redirects=False, **options
            ) as response:
                yield response
        except aiohttp.ClientPayloadError as error:
            raise SourceError(f"{self.url}: the answer broke off and is incomplete") from error
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise UsageError("--url: must start with http:// or https://, like http://127.0.0.1:8080") from error
        except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError) as error:
            raise SourceError(f"{self.url}: the server does not respond ({error or type(error).__name__})") from error

    def _check(self, status: int, answer: bytes) -> None:
        """Raise SourceError with the daemon's message unless the call succeeded."""
        if status in (200, 201):
            return
        try:
            refused = str(msgspec.json.decode(answer)["msg"])
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            raise self._another(status) from error
        if status == 401:
            refused += (
                ": set NOTIFY_SERVER__AUTH__ADMIN_TOKEN to the server's [auth] admin_token, "
                "or to the content of the file admin_token beside its database"
            )
        raise SourceError(f"{self.url}: {refused}")

    def _another(self, status: int) -> SourceError:
        return SourceError(f"{self.url}: answers {status}, and not as a notify_server of this version")

    async def _have(self, kind: type[T], path: str, **query: object) -> T:
        answer = await self.ask(kind, "GET", path, **query)
        if answer is None:
            raise SourceError(f"{self.url}: has no /api/v1/{path}")
        return answer

    async def status(self) -> Status:
        from notify_server.web.api.types import Status

        return await self._have(Status, "status")

    async def hosts(self) -> Page[Host]:
        from notify_server.web.api.types import Host

        return await self._have(Page[Host], "hosts")

    async def totals(self) -> Totals:
        return await self._have(Totals, "totals")

    async def batches(self, wanted: BatchFilter, cursor: str | None, limit: int) -> Page[BatchItem]:
        query = {
            "verdict": wanted.verdict,
            "api_code": wanted.api_code,
            "batch_id": wanted.batch_id,
            "received_from": _iso(wanted.received_from),
            "received_before": _iso(wanted.received_before),
            "acknowledged": None if wanted.acknowledged is None else str(wanted.acknowledged).lower(),
        }
        return await self._have(Page[BatchItem], "batches", cursor=cursor, limit=limit, **query)

    async def batch(self, id: int) -> BatchDetail | None:
        return await self.ask(BatchDetail, "GET", f"batches/{id}")

    async def files(self, wanted: FileFilter, cursor: str | None, limit: int) -> Page[FileItem]:
        query: dict[str, Any] = {"state": wanted.state, "reason": wanted.reason, "cursor": cursor, "limit": limit}
        if wanted.batch is not None:
            return await self._have(Page[FileItem], f"batches/{wanted.batch}/files", **query)
        return await self._have(Page[FileItem], "files", host=wanted.host, **query)

    async def export(self, wanted: FileFilter, form: str) -> AsyncGenerator[bytes, None]:
        """Yield files as the daemon exports them, in pieces."""
        period = {name: _iso(getattr(wanted, name)) for name in ("received_from", "received_before")}
        query = {"format": form, "bom": "false", **msgspec.structs.asdict(wanted), **period}
        async with self._request("GET", "export", query) as response:
            if response.status != 200:
                self._check(response.status, await response.read())
            async for piece in response.content.iter_any():
                yield piece

    async def bundle(self, batch: int, *, with_secrets: bool) -> AsyncGenerator[bytes, None]:
        """The bundle of a batch as the daemon writes it, in pieces."""
        path, query = f"batches/{batch}/bundle", {"with_secrets": str(with_secrets).lower()}
        async with self._request("GET", path, query) as response:
            if response.status != 200:
                self._check(response.status, await response.read())
            async for piece in response.content.iter_any():
                yield piece

    async def file(self, id: int) -> FileDetail | None:
        return await self.ask(FileDetail, "GET", f"files/{id}")

    async def search(self, text: str, limit: int) -> Found:
        found = await self._have(Found, "search", q=text)
        return Found(found.batches[:limit], found.files[:limit])

    async def failures(self, limit: int) -> list[FailureGroup]:
        return (await self._have(Page[FailureGroup], "failures")).items[:limit]

    async def rejections(self, cursor: str | None, limit: int) -> Page[RejectionItem]:
        return await self._have(Page[RejectionItem], "rejections", cursor=cursor, limit=limit)

    async def rejection(self, id: int) -> RejectionDetail | None:
        return await self.ask(RejectionDetail, "GET", f"rejections/{id}")

    async def recheck(self, wanted: Recheck) -> Rechecked | None:
        return await self.ask(Rechecked, "POST", "recheck", wanted)

    async def replay(self, id: int) -> Replayed | None:
        return await self.ask(Replayed, "POST", f"rejections/{id}/replay")

    async def prune(self, wanted: Prune) -> Pruned:
        answer = await self.ask(Pruned, "POST", "prune", wanted)
        assert answer is not None
        return answer


def _iso(moment_ms: int | None) -> str | None:
    return None if moment_ms is None else datetime.fromtimestamp(moment_ms / 1000, UTC).isoformat()


class Source(NamedTuple):
    """The source of a command's reads (`records`) and its name. `daemon` is a running daemon that can be called,
    `itself` is set when the record may be changed while daemons run. `served` is true if any daemon runs.
    """

    name: str
    records: Readable
    daemon: Remote | None
    served: bool
    itself: Acting | None = None


async def check_record(path: Path, holder_process: str | None) -> None:
    """Raise SourceError or StoreRefusedError unless there is a record at `path` with this version's schema."""
    try:
        async with await ReadConnection.open(path) as connection:
            present = await connection.schema_version()
            await connection.check_whole(path)
    except StoreRefusedError as error:
        raise SourceError(str(error)) from error
    known = len(load_migrations("sqlite"))
    if present > known:
        raise SourceError(
            f"{path}: has schema version {present}, this program knows {known}: "
            "use the newer notify_server that wrote it"
        )
    if present < known:
        todo = (
            "run `notify-server migrate`" if holder_process is None else "restart the server, which is an older version"
        )
        raise SourceError(f"{path}: has schema version {present}, this program needs {known}: {todo}")


@asynccontextmanager
async def reading(config: Config, url: str | None) -> AsyncIterator[Source]:
    """Open the record at `url`, or that of the configuration, beside daemons that may be writing to it. Raises
    SourceError, or StoreRefusedError for one on PostgreSQL.
    """
    async with contextlib.AsyncExitStack() as stack:
        if url is not None:
            remote = Remote(url, await admin_token(config, is_ours=_is_here(url)))
            stack.push_async_callback(remote.close)
            yield Source(f"the server at {remote.url}", remote, remote, served=True)
            return
        if config.store.is_postgres:
            yield await _on_postgres(config, stack)
            return
        path = config.store.path
        running = holder(path)
        if not path.exists():
            raise NoRecordError(
                f"no database at {path}: run this where the server runs, or use --config FILE or --url http://HOST:8080"
            )
        await check_record(path, running)
        records = SqliteRecords(path)
        stack.push_async_callback(records.close)
        if running is None:
            yield Source(f"{path} (no server running)", records, None, served=False)
            return
        certificate = config.server.ssl_certificate
        daemon = Remote(
            config.server.local_url,
            await admin_token(config, is_ours=True),
            trust_only(certificate) if certificate else None,
        )
        stack.push_async_callback(daemon.close)
        yield Source(f"{path} (server running, pid {running})", records, daemon, served=True)


async def admin_token(config: Config, *, is_ours: bool) -> str | None:
    """Return the configured admin_token; without one that of the record, which only its own server is sent."""
    if config.auth.admin_token is not None:
        return config.auth.admin_token.get_secret_value()
    return await own_token(config.store) if is_ours else None


def _is_here(url: str) -> bool:
    """Return True for an address that only a program on this machine listens on."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _on_postgres(config: Config, stack: contextlib.AsyncExitStack) -> Source:
    # Loaded only when used, because its driver takes time to load.
    from notify_server.store.postgres.admin import PostgresAdmin
    from notify_server.store.postgres.records import PostgresRecords

    desk = await PostgresAdmin.open(config.store.url)
    stack.push_async_callback(desk.close)
    records = await PostgresRecords.open(config.store.url)
    stack.push_async_callback(records.close)
    servers = f"servers running: {', '.join(desk.servers)}" if desk.servers else "no server running"
    return Source(
        f"{config.store.place} ({servers})",
        records,
        None,
        served=bool(desk.servers),
        itself=Actions(config, desk, records, now=unix_ms),
    )


@asynccontextmanager
async def acting(config: Config, source: Source) -> AsyncIterator[Acting]:
    """Choose who acts: this process where it may; else the daemon when one runs; else this process, which locks daemons
    out meanwhile. Raises StoreRefusedError when the file cannot be opened.
    """
    if source.itself is not None:
        CALLER.set(f"command {user_name()}")
        yield source.itself
        return
    if source.daemon is not None:
        if source.daemon.url.endswith(":0"):
            raise SourceError("[server] port is 0: name the address from the server's log with --url")
        yield source.daemon
        return
    store = await SqliteStore.open(config.store.path)
    records = SqliteRecords(config.store.path)
    try:
        CALLER.set(f"command {user_name()}")
        yield Actions(config, store, records, now=unix_ms)
    finally:
        await records.close()
        await store.close()
