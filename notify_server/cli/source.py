"""Where a command finds the record, and who does what is asked: the file itself, or a running daemon over its API.

Reading never needs the daemon, whether it runs or not. While it runs, it alone may change its file, so it is asked to.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol, TypeVar

import aiohttp
import msgspec

from notify_server.actions import Actions, Prune, Pruned, Recheck, Rechecked, Replayed
from notify_server.clock import unix_ms
from notify_server.config import Config
from notify_server.errors import NotifyServerError
from notify_server.store.records import (
    BatchDetail,
    BatchFilter,
    BatchItem,
    FailureGroup,
    FileDetail,
    FileFilter,
    FileItem,
    Page,
    RejectionDetail,
    RejectionItem,
    Totals,
)
from notify_server.store.sqlite import SqliteStore
from notify_server.store.sqlite_records import SqliteRecords
from notify_server.store.sqlite_writer import holder
from notify_server.web.api import Host, Status

T = TypeVar("T")

PATIENCE = aiohttp.ClientTimeout(total=60.0, sock_connect=5.0)


class SourceError(NotifyServerError):
    """What was asked for cannot be had; the text says why, and what to do."""


class Readable(Protocol):
    """What commands read, of `Records`: from the file, or from a daemon."""

    async def totals(self) -> Totals: ...

    async def batches(self, wanted: BatchFilter, cursor: str | None, limit: int) -> Page[BatchItem]: ...

    async def batch(self, id: int) -> BatchDetail | None: ...

    async def files(self, wanted: FileFilter, cursor: str | None, limit: int) -> Page[FileItem]: ...

    async def file(self, id: int) -> FileDetail | None: ...

    async def failures(self, limit: int) -> list[FailureGroup]: ...

    async def rejections(self, cursor: str | None, limit: int) -> Page[RejectionItem]: ...

    async def rejection(self, id: int) -> RejectionDetail | None: ...


class Acting(Protocol):
    """Who acts: `Actions` on the file, or a daemon."""

    async def recheck(self, wanted: Recheck) -> Rechecked | None: ...

    async def replay(self, id: int) -> Replayed | None: ...

    async def prune(self, wanted: Prune) -> Pruned: ...


class Remote:
    """A running daemon, asked over its API."""

    def __init__(self, url: str, token: str | None, session: aiohttp.ClientSession) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def close(self) -> None:
        await self._session.close()

    async def _ask(self, kind: type[T], method: str, path: str, body: object = None, **query: object) -> T | None:
        """The answer, None for 404. Raises SourceError with the daemon's own words."""
        parameters = {name: str(value) for name, value in query.items() if value is not None}
        headers = self._headers | ({"Content-Type": "application/json"} if method == "POST" else {})
        try:
            async with self._session.request(
                method,
                f"{self.url}/api/v1/{path}",
                params=parameters,
                headers=headers,
                data=msgspec.json.encode(body if body is not None else {}) if method == "POST" else None,
                allow_redirects=False,
            ) as response:
                answer = await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise SourceError(f"{self.url}: no daemon answers there ({error or type(error).__name__})") from error
        try:
            if status == 200:
                return msgspec.json.decode(answer, type=kind)
            refused = msgspec.json.decode(answer)["msg"]
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            raise SourceError(f"{self.url}: answers {status}, and not as a notify_server of this version") from error
        if status == 404:
            return None
        if status == 401:
            refused += ": set [auth] admin_token here, or NOTIFY_SERVER__AUTH__ADMIN_TOKEN, as the daemon has it"
        raise SourceError(f"{self.url}: {refused}")

    async def _have(self, kind: type[T], path: str, **query: object) -> T:
        answer = await self._ask(kind, "GET", path, **query)
        if answer is None:
            raise SourceError(f"{self.url}: has no /api/v1/{path}")
        return answer

    async def status(self) -> Status:
        return await self._have(Status, "status")

    async def hosts(self) -> Page[Host]:
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
        }
        return await self._have(Page[BatchItem], "batches", cursor=cursor, limit=limit, **query)

    async def batch(self, id: int) -> BatchDetail | None:
        return await self._ask(BatchDetail, "GET", f"batches/{id}")

    async def files(self, wanted: FileFilter, cursor: str | None, limit: int) -> Page[FileItem]:
        query: dict[str, Any] = {"state": wanted.state, "reason": wanted.reason, "cursor": cursor, "limit": limit}
        if wanted.batch is not None:
            return await self._have(Page[FileItem], f"batches/{wanted.batch}/files", **query)
        return await self._have(Page[FileItem], "files", host=wanted.host, **query)

    async def file(self, id: int) -> FileDetail | None:
        return await self._ask(FileDetail, "GET", f"files/{id}")

    async def failures(self, limit: int) -> list[FailureGroup]:
        return (await self._have(Page[FailureGroup], "failures")).items[:limit]

    async def rejections(self, cursor: str | None, limit: int) -> Page[RejectionItem]:
        return await self._have(Page[RejectionItem], "rejections", cursor=cursor, limit=limit)

    async def rejection(self, id: int) -> RejectionDetail | None:
        return await self._ask(RejectionDetail, "GET", f"rejections/{id}")

    async def recheck(self, wanted: Recheck) -> Rechecked | None:
        return await self._ask(Rechecked, "POST", "recheck", wanted)

    async def replay(self, id: int) -> Replayed | None:
        return await self._ask(Replayed, "POST", f"rejections/{id}/replay")

    async def prune(self, wanted: Prune) -> Pruned:
        answer = await self._ask(Pruned, "POST", "prune", wanted)
        assert answer is not None
        return answer


def _iso(moment_ms: int | None) -> str | None:
    return None if moment_ms is None else datetime.fromtimestamp(moment_ms / 1000, UTC).isoformat()


class Source(NamedTuple):
    """Where a command reads (`records`), and what it says of that; `daemon` is there when one runs."""

    name: str
    records: Readable
    daemon: Remote | None


def own_url(config: Config) -> str:
    """Where the daemon of this configuration answers on this machine."""
    server = config.server
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)  # noqa: S104
    scheme = "https" if server.ssl_certificate is not None else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{server.port}"


@asynccontextmanager
async def reading(config: Config, url: str | None) -> AsyncIterator[Source]:
    """The record at `url`, or the file of the configuration, which a daemon may be writing to."""
    async with aiohttp.ClientSession(timeout=PATIENCE) as session:
        token = config.auth.admin_token.get_secret_value() if config.auth.admin_token else None
        if url is not None:
            remote = Remote(url, token, session)
            yield Source(f"the daemon at {remote.url}", remote, remote)
            return
        path = config.store.path
        records = SqliteRecords(path)
        try:
            running = holder(path)
            daemon = Remote(own_url(config), token, session) if running else None
            of = f", which process {running} has" if running else ", no daemon has it"
            yield Source(f"{path}{of}", records, daemon)
        finally:
            await records.close()


@asynccontextmanager
async def acting(config: Config, source: Source) -> AsyncIterator[Acting]:
    """Who does what is asked: the daemon when one runs, else this process, which keeps daemons out meanwhile. Raises
    StoreRefusedError when the file cannot be had."""
    if source.daemon is not None:
        yield source.daemon
        return
    store = await SqliteStore.open(config.store.path)
    records = SqliteRecords(config.store.path)
    try:
        yield Actions(config, store, records, now=unix_ms)
    finally:
        await records.close()
        await store.close()
