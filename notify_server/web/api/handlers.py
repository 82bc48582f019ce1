"""The JSON API: what was delivered, what is known of it, and what to do about it. Its types are the record's own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, Literal, TypeVar, cast
from uuid import uuid4

import msgspec
import structlog
from aiohttp import web
from msgspec import Struct

from notify_server.callbacks.errors import RefusedError, busy, error_response
from notify_server.config import Role
from notify_server.errors import StoreUnavailableError
from notify_server.model import CircuitState, FileState, HostView, Verdict
from notify_server.operations import (
    ActionRefusedError,
    Actions,
    Id,
    Prune,
    Pruned,
    Recheck,
    Rechecked,
    Replayed,
    Text,
    Time,
    to_ms,
)
from notify_server.store.base import Nodes
from notify_server.store.export import csv_header, csv_lines, ndjson_lines
from notify_server.store.reading.types import (
    BatchDetail,
    BatchFilter,
    BatchItem,
    Cursor,
    FailureGroup,
    FileDetail,
    FileFilter,
    FileItem,
    Found,
    HostBacklog,
    Limit,
    Page,
    Records,
    RejectionDetail,
    RejectionItem,
    Totals,
)
from notify_server.telemetry.history import HostRate, HostRates, Sample, Timeline
from notify_server.web.admin import Admin
from notify_server.web.openapi import Endpoint, document
from notify_server.web.parameters import from_json, from_query, refuse_all
from notify_server.web.stream import Stream

log = structlog.get_logger("notify_server.web")

T = TypeVar("T")

BODY_LIMIT = 64 * 1024
# What a client takes for a body, or nothing of what is sent to it, before it is given up.
STALLED_SECONDS = 30.0
HEADERS = {
    "Cache-Control": "no-store",
    # No page of another site can have the answer among its own parts.
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
# What is counted over the whole record is good for this long, and for this many times what counting it took.
FRESH_SECONDS = 1.0
FRESH_FACTOR = 200.0
EXPORT_ROWS = 500
MAX_GROUPS = 500
MAX_HOSTS = 500
MAX_SEARCH = 20


class BatchQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which batches, and which page of them."""

    verdict: Verdict | None = None
    api_code: Text | None = None
    batch_id: Text | None = None
    received_from: Time | None = None
    received_before: Time | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


class BatchFileQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which files of a batch, and which page of them."""

    state: FileState | None = None
    reason: Text | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


class FileQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which of the files that fail for a reason, and which page of them."""

    reason: Text
    host: Text | None = None
    state: FileState | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


class ExportQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which files to export: of a batch, or failing for a reason, or all."""

    format: Literal["csv", "ndjson"] = "csv"
    batch: Id | None = None
    state: FileState | None = None
    reason: Text | None = None
    host: Text | None = None


class PageQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which page."""

    cursor: Cursor | None = None
    limit: Limit = 50


class SearchQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """What to look for: the beginning of a batch_id, or a whole key."""

    q: Text


class SeriesQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """How finely: of the last ten minutes by the second, or of the last day by the minute."""

    step: Literal["second", "minute"] = "second"


class Host(Struct, frozen=True):
    """A host: what waits for it, its circuit, what is under way, and how it has done in the last minute."""

    host: str
    pending: int
    next_attempt_at: datetime | None
    circuit: CircuitState
    open_for: float
    in_flight: int
    limit: int | None
    last_minute: HostRate


class NodeCounts(Struct, frozen=True):
    """How many servers that share the record are alive, by what they do."""

    callbacks: int
    probes: int


class Status(Struct, frozen=True):
    """The process: since when it runs, what it is at, and the last second."""

    version: str
    started_at: datetime
    roles: tuple[Role, ...]
    nodes: NodeCounts
    backlog: int
    in_flight: int
    last: Sample | None


class RuntimeState(Struct, frozen=True):
    """What the running verifier knows, read when it is asked for."""

    version: str
    started_at: datetime
    roles: tuple[Role, ...]
    nodes: Callable[[], Nodes]
    backlog: Callable[[], int]
    in_flight: Callable[[], int]
    hosts: Callable[[], list[HostView]]


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/api/v1/status", "The process, and the last second", "status", answer=Status),
    Endpoint("GET", "/api/v1/totals", "The record in numbers", "totals", answer=Totals),
    Endpoint(
        "GET", "/api/v1/series", "What has been going on", "series", query=SeriesQuery, answer=Page[Sample]
    ),
    Endpoint(
        "GET", "/api/v1/batches", "Batches, the latest first", "batches", query=BatchQuery, answer=Page[BatchItem]
    ),
    Endpoint("GET", "/api/v1/batches/{id}", "One batch", "batch", answer=BatchDetail),
    Endpoint(
        "GET", "/api/v1/batches/{id}/files", "Files of a batch, by key", "batch_files",
        query=BatchFileQuery, answer=Page[FileItem],
    ),
    Endpoint(
        "GET", "/api/v1/files", "Files that fail for a reason, by host", "files", query=FileQuery, answer=Page[FileItem]
    ),
    Endpoint("GET", "/api/v1/files/{id}", "One file, with its requests", "file", answer=FileDetail),
    Endpoint("GET", "/api/v1/failures", "What fails, by reason and host", "failures", answer=Page[FailureGroup]),
    Endpoint("GET", "/api/v1/hosts", "Hosts that have files waiting or were asked of late", "hosts", answer=Page[Host]),
    Endpoint(
        "GET", "/api/v1/rejections", "Refused bodies, the latest first", "rejections",
        query=PageQuery, answer=Page[RejectionItem],
    ),
    Endpoint("GET", "/api/v1/rejections/{id}", "One refused body", "rejection", answer=RejectionDetail),
    Endpoint(
        "GET", "/api/v1/search", "Batches by the beginning of their batch_id, files by their key", "search",
        query=SearchQuery, answer=Found,
    ),
    Endpoint(
        "GET", "/api/v1/export", "Files as CSV or NDJSON, streamed", "export",
        query=ExportQuery, media=("text/csv", "application/x-ndjson"),
    ),
    Endpoint(
        "GET", "/api/v1/stream", "Events as they happen: `sample` every second, and every `verdict`", "stream",
        media=("text/event-stream",),
    ),
    Endpoint("POST", "/api/v1/recheck", "Ask for files anew", "recheck", body=Recheck, answer=Rechecked),
    Endpoint("POST", "/api/v1/rejections/{id}/replay", "Take a refused body after all", "replay", answer=Replayed),
    Endpoint("POST", "/api/v1/prune", "Delete what is old", "prune", body=Prune, answer=Pruned),
)  # fmt: skip


class TimedCache:
    """Answers that cost a walk over the record, kept for a while that grows with their cost."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, Any]] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changes = 0

    async def get(self, name: str, ask: Callable[[], Awaitable[T]]) -> T:
        """The answer under this name, asked for when there is none that is fresh."""
        async with self._locks[name]:
            until, answer = self._answers.get(name, (0.0, None))
            if time.monotonic() >= until:
                began, changes = time.monotonic(), self._changes
                answer = await ask()
                ended = time.monotonic()
                # What was asked before a change may not show it.
                if changes == self._changes:
                    self._answers[name] = ended + max(FRESH_SECONDS, FRESH_FACTOR * (ended - began)), answer
            return cast("T", answer)

    def forget(self) -> None:
        """Something has been changed by hand: the next answers show it."""
        self._changes += 1
        self._answers.clear()


class Api:
    """The endpoints."""

    def __init__(
        self,
        records: Records,
        actions: Actions,
        admin: Admin,
        live: RuntimeState,
        timeline: Timeline,
        rates: HostRates,
        stream: Stream,
    ) -> None:
        self.records = records
        self._actions = actions
        self._admin = admin
        self._live = live
        self._timeline = timeline
        self._rates = rates
        self._stream = stream
        self._remembered = TimedCache()
        self._document = msgspec.json.encode(document(ENDPOINTS, live.version, guarded=admin.needs_login))

    async def describe(self, request: web.Request) -> web.Response:
        """The OpenAPI document."""
        return web.Response(body=self._document, content_type="application/json", headers=HEADERS)

    async def handle(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        """Answer a request to the endpoint's path, whatever its method."""
        request_id = str(uuid4())
        log.debug("asked", request_id=request_id, method=request.method, path=request.path, remote=request.remote)
        try:
            self._admin.check(request)
            return await self._answer(endpoint, request)
        except RefusedError as error:
            refused = error
        except StoreUnavailableError as error:
            refused = busy(str(error))
        if refused.status >= 500:
            log.warning("not answered", request_id=request_id, path=request.path, error=refused.message)
        elif refused.status in (401, 403):
            log.info("refused", request_id=request_id, path=request.path, status=refused.status, detail=refused.message)
        return error_response(request_id, refused.status, refused.code, refused.message, {**HEADERS, **refused.headers})

    async def _answer(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        if request.method not in (endpoint.method, "HEAD" if endpoint.method == "GET" else endpoint.method):
            raise RefusedError(
                405, "405", f"only {endpoint.method} is answered here", headers={"Allow": endpoint.method}
            )
        arguments: list[Any] = [request] if endpoint.media else []
        arguments += [self._id(request.match_info[name]) for name in endpoint.parameters]
        if endpoint.query is not None:
            arguments.append(from_query(request.query, endpoint.query))
        else:
            refuse_all(request.query)
        if endpoint.body is not None:
            arguments.append(from_json(await _body(request), endpoint.body))
        answer = await getattr(self, endpoint.handler)(*arguments)
        if isinstance(answer, web.StreamResponse):
            return answer
        if answer is None:
            raise RefusedError(404, "404", "there is none with this id: it may have been deleted")
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json", headers=HEADERS)

    @staticmethod
    def _id(text: str) -> int:
        # Beyond what a database counts to there is nothing.
        return min(int(text), 2**63 - 1)

    # What is going on

    async def status(self) -> Status:
        live, seconds = self._live, self._timeline.seconds
        nodes = live.nodes()
        return Status(
            live.version,
            live.started_at,
            live.roles,
            NodeCounts(len(nodes.taking), len(nodes.probing)),
            live.backlog(),
            live.in_flight(),
            seconds[-1] if seconds else None,
        )

    async def totals(self) -> Totals:
        return await self._remembered.get("totals", self.records.totals)

    async def series(self, query: SeriesQuery) -> Page[Sample]:
        return Page(list(self._timeline.seconds if query.step == "second" else self._timeline.minutes))

    async def hosts(self) -> Page[Host]:
        waiting = await self._remembered.get("backlog", lambda: self.records.backlog(MAX_HOSTS))
        backlog: dict[str, HostBacklog] = {entry.host: entry for entry in waiting}
        views = {view.host: view for view in self._live.hosts()}
        rates = self._rates.rates(time.monotonic())
        hosts = []
        for name in [*backlog, *(name for name in {**views, **rates} if name not in backlog)]:
            entry, view = backlog.get(name), views.get(name)
            hosts.append(
                Host(
                    name,
                    entry.pending if entry is not None else 0,
                    entry.next_attempt_at if entry is not None else None,
                    view.circuit if view is not None else CircuitState.CLOSED,
                    view.open_for if view is not None else 0.0,
                    view.in_flight if view is not None else 0,
                    view.limit if view is not None else None,
                    rates.get(name, HostRate(0, 0, 0.0)),
                )
            )
        return Page(hosts)

    # The record

    async def batches(self, query: BatchQuery) -> Page[BatchItem]:
        wanted = BatchFilter(
            query.verdict, query.api_code, query.batch_id, to_ms(query.received_from), to_ms(query.received_before)
        )
        return await _paged(self.records.batches(wanted, query.cursor, query.limit))

    async def batch(self, id: int) -> BatchDetail | None:
        return await self.records.batch(id)

    async def batch_files(self, id: int, query: BatchFileQuery) -> Page[FileItem] | None:
        if await self.records.batch(id) is None:
            return None
        wanted = FileFilter(batch=id, state=query.state, reason=query.reason)
        return await _paged(self.records.files(wanted, query.cursor, query.limit))

    async def files(self, query: FileQuery) -> Page[FileItem]:
        wanted = FileFilter(state=query.state, reason=query.reason, host=query.host)
        return await _paged(self.records.files(wanted, query.cursor, query.limit))

    async def file(self, id: int) -> FileDetail | None:
        return await self.records.file(id)

    async def failures(self) -> Page[FailureGroup]:
        return Page(await self._remembered.get("failures", lambda: self.records.failures(MAX_GROUPS)))

    async def rejections(self, query: PageQuery) -> Page[RejectionItem]:
        return await _paged(self.records.rejections(query.cursor, query.limit))

    async def rejection(self, id: int) -> RejectionDetail | None:
        return await self.records.rejection(id)

    async def search(self, query: SearchQuery) -> Found:
        return await self.records.search(query.q, MAX_SEARCH)

    async def export(self, request: web.Request, query: ExportQuery) -> web.StreamResponse:
        """A page at a time, so that memory is bounded, and nothing goes on once the client has gone."""
        wanted = FileFilter(query.batch, query.state, query.reason, query.host)
        csv = query.format == "csv"
        lines = csv_lines if csv else ndjson_lines
        page = await self.records.files(wanted, None, EXPORT_ROWS)
        response = await _begin(
            request,
            "text/csv; charset=utf-8" if csv else "application/x-ndjson",
            {"Content-Disposition": f'attachment; filename="files.{query.format}"'},
        )
        if request.method == "HEAD":
            return response
        with contextlib.suppress(ConnectionError):
            await _send(request, response, (csv_header() if csv else b"") + lines(page.items))
            while page.next is not None:
                try:
                    page = await self.records.files(wanted, page.next, EXPORT_ROWS)
                except StoreUnavailableError as error:
                    # What has been sent cannot be taken back: only a connection that breaks off says that more is left.
                    log.warning("export broken off", error=str(error))
                    _break_off(request)
                    break
                await _send(request, response, lines(page.items))
        return response

    async def stream(self, request: web.Request) -> web.StreamResponse:
        if self._stream.full:
            raise busy("too many are listening already, or this is on its way out")
        # nginx would keep events until it has many.
        headers = {"X-Accel-Buffering": "no"}
        if request.method == "HEAD":
            return await _begin(request, "text/event-stream", headers)
        with self._stream.listen() as messages:
            response = await _begin(request, "text/event-stream", headers)
            # The client goes whenever it likes.
            with contextlib.suppress(ConnectionError):
                async for message in messages:
                    await _send(request, response, message)
        return response

    # Actions

    async def recheck(self, wanted: Recheck) -> Rechecked | None:
        if wanted.dry_run:
            return await _refusable(self._actions.recheck(wanted))
        return await self._act(self._actions.recheck(wanted))

    async def replay(self, id: int) -> Replayed | None:
        return await self._act(self._actions.replay(id))

    async def prune(self, wanted: Prune) -> Pruned:
        return await self._act(self._actions.prune(wanted))

    async def _act(self, action: Awaitable[T]) -> T:
        try:
            return await _refusable(action)
        finally:
            self._remembered.forget()


async def _refusable(action: Awaitable[T]) -> T:
    try:
        return await action
    except ActionRefusedError as error:
        raise RefusedError(400, "400", str(error)) from error


async def _paged(page: Awaitable[Page[T]]) -> Page[T]:
    try:
        return await page
    except ValueError as error:
        raise RefusedError(400, "400", str(error)) from error


async def _body(request: web.Request) -> bytes:
    """The body. Raises RefusedError."""
    if request.content_type != "application/json" or "Content-Encoding" in request.headers:
        # A form of another site could not send this without asking first.
        raise RefusedError(415, "415", "Content-Type: must be application/json")
    body = b""
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            while part := await request.content.read(BODY_LIMIT + 1):
                body += part
                if len(body) > BODY_LIMIT:
                    raise RefusedError(413, "413", f"body: larger than {BODY_LIMIT} bytes")
    except TimeoutError:
        raise RefusedError(408, "408", "body: did not come in time", headers={"Connection": "close"}) from None
    return body


async def _begin(request: web.Request, content_type: str, headers: Mapping[str, str]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": content_type, **HEADERS, **headers})
    await response.prepare(request)
    return response


async def _send(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Send a part of the body. Raises ConnectionError when the client has gone, or takes nothing."""
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            await response.write(data)
    except TimeoutError:
        log.info("client takes nothing, cut off", path=request.path, remote=request.remote)
        _break_off(request)
        raise ConnectionResetError("the client takes nothing") from None


def _break_off(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
