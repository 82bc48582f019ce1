"""Answers the API's calls: deliveries, results and actions. The dashboard uses the same methods."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import TypeVar
from urllib.parse import quote

import structlog
from aiohttp import web

from notify_server.callbacks.errors import RefusedError, busy
from notify_server.errors import StoreUnavailableError
from notify_server.events.payload import VERDICTS
from notify_server.forward.service import ForwardService
from notify_server.model import CircuitState
from notify_server.operations import (
    Acknowledge,
    AcknowledgedCount,
    ActionRefusedError,
    Actions,
    Prune,
    Pruned,
    Recheck,
    Rechecked,
    Replayed,
    to_ms,
)
from notify_server.store.bundle import write_bundle
from notify_server.store.export import csv_header, csv_lines, file_name, ndjson_lines
from notify_server.store.reading.types import (
    Attention,
    BatchDetail,
    BatchFilter,
    BatchItem,
    FailureGroup,
    FileDetail,
    FileFilter,
    FileItem,
    Found,
    HostBacklog,
    Page,
    Records,
    RejectionDetail,
    RejectionItem,
    Totals,
)
from notify_server.submissions.service import SubmissionService
from notify_server.telemetry.history import Sample, Timeline
from notify_server.telemetry.host_rates import HostRate, HostRates
from notify_server.web.api.cache import TimedCache
from notify_server.web.api.types import (
    BatchFileQuery,
    BatchQuery,
    BundleQuery,
    ExportQuery,
    FileQuery,
    Host,
    NodeCounts,
    PageQuery,
    RuntimeState,
    SearchQuery,
    SeriesQuery,
    Status,
)
from notify_server.web.bodies import abort, begin, send
from notify_server.web.stream import Stream, missed_verdict

log = structlog.get_logger("notify_server.web")

T = TypeVar("T")

EXPORT_ROWS = 500
BUNDLE_PART = 256 * 1024
MAX_GROUPS = 500
MAX_HOSTS = 500
MAX_FOUND = 20
MAX_API_CODES = 200


class Api:
    """One method for each endpoint. A method returns None when there is no row with the id, and raises RefusedError
    when the call cannot be answered.
    """

    def __init__(
        self,
        records: Records,
        actions: Actions,
        runtime: RuntimeState,
        timeline: Timeline,
        rates: HostRates,
        stream: Stream,
        forward: ForwardService,
        submissions: SubmissionService,
    ) -> None:
        self.records = records
        self.forward = forward
        self.submissions = submissions
        self.action_log = actions.log
        self._actions = actions
        self._runtime = runtime
        self._timeline = timeline
        self._rates = rates
        self._stream = stream
        self._cache = TimedCache()

    # --- The process ---

    async def status(self) -> Status:
        runtime, seconds = self._runtime, self._timeline.seconds
        nodes = runtime.nodes()
        return Status(
            runtime.version,
            runtime.started_at,
            runtime.roles,
            NodeCounts(len(nodes.taking), len(nodes.probing)),
            runtime.backlog(),
            runtime.in_flight(),
            seconds[-1] if seconds else None,
            self._timeline.window(60.0),
            self._timeline.window(600.0),
        )

    async def totals(self) -> Totals:
        return await self._cache.get("totals", self.records.totals)

    async def attention(self) -> Attention:
        return await self._cache.get("attention", self.records.attention)

    async def api_codes(self) -> list[str]:
        return await self._cache.get("api_codes", lambda: self.records.api_codes(MAX_API_CODES))

    async def series(self, query: SeriesQuery) -> Page[Sample]:
        return Page(list(self._timeline.seconds if query.step == "second" else self._timeline.minutes))

    async def hosts(self) -> Page[Host]:
        waiting = await self._cache.get("backlog", lambda: self.records.backlog(MAX_HOSTS))
        backlog: dict[str, HostBacklog] = {entry.host: entry for entry in waiting}
        views = {view.host: view for view in self._runtime.hosts()}
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
                    view.rate if view is not None else None,
                    view.resting_for if view is not None else 0.0,
                )
            )
        return Page(hosts)

    # --- The record ---

    async def batches(self, query: BatchQuery) -> Page[BatchItem]:
        period = to_ms(query.received_from), to_ms(query.received_before)
        wanted = BatchFilter(query.verdict, query.api_code, query.batch_id, *period, query.acknowledged)
        return await _paged(self.records.batches(wanted, query.cursor, query.limit))

    async def batch(self, id: int) -> BatchDetail | None:
        return await self.records.batch(id)

    async def batch_files(self, id: int, query: BatchFileQuery) -> Page[FileItem] | None:
        if await self.records.batch(id) is None:
            return None
        wanted = FileFilter(batch=id, state=query.state, reason=query.reason)
        return await _paged(self.records.files(wanted, query.cursor, query.limit))

    async def files(self, query: FileQuery) -> Page[FileItem]:
        wanted = query.filter()
        return await _paged(self.records.files(wanted, query.cursor, query.limit))

    async def file(self, id: int) -> FileDetail | None:
        return await self.records.file(id)

    async def failures(self) -> Page[FailureGroup]:
        return Page(await self._cache.get("failures", lambda: self.records.failures(MAX_GROUPS)))

    async def rejections(self, query: PageQuery) -> Page[RejectionItem]:
        return await _paged(self.records.rejections(query.cursor, query.limit))

    async def rejection(self, id: int) -> RejectionDetail | None:
        return await self.records.rejection(id)

    async def search(self, query: SearchQuery) -> Found:
        return await self.records.search(query.q, MAX_FOUND)

    async def export(self, request: web.Request, query: ExportQuery) -> web.StreamResponse:
        """Stream files page by page, in bounded memory, and stop when the client is gone."""
        wanted = query.filter()
        batch = None if wanted.batch is None else await self.records.batch(wanted.batch)
        name = file_name(
            (batch.batch_id if batch is not None else None, query.api_code, query.host, query.reason, query.state),
            query.format,
        )
        csv = query.format == "csv"
        lines = csv_lines if csv else ndjson_lines
        page = await self.records.files(wanted, None, EXPORT_ROWS)
        response = await begin(
            request,
            "text/csv; charset=utf-8" if csv else "application/x-ndjson",
            {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}"},
        )
        if request.method == "HEAD":
            return response
        with contextlib.suppress(ConnectionError):
            await send(request, response, (csv_header(bom=query.bom) if csv else b"") + lines(page.items))
            while page.next is not None:
                try:
                    page = await self.records.files(wanted, page.next, EXPORT_ROWS)
                except StoreUnavailableError as error:
                    # The status is sent already: only a broken connection tells the client that rows are missing.
                    log.warning("export aborted", error=str(error))
                    abort(request)
                    break
                await send(request, response, lines(page.items))
        return response

    async def bundle(self, request: web.Request, id: int, query: BundleQuery) -> web.StreamResponse | None:
        """Send the dispute bundle of a batch. It is written to a temporary file first, so an error has a status."""
        batch = await self.records.batch(id)
        if batch is None:
            return None
        headers = {"Content-Disposition": f'attachment; filename="bundle-{id}.zip"'}
        if request.method == "HEAD":
            return await begin(request, "application/zip", headers)
        with tempfile.TemporaryFile() as file:
            await write_bundle(self.records, batch, file, datetime.now(UTC), with_secrets=query.with_secrets)
            file.seek(0)
            response = await begin(request, "application/zip", headers)
            with contextlib.suppress(ConnectionError):
                while part := file.read(BUNDLE_PART):
                    await send(request, response, part)
        return response

    async def stream(self, request: web.Request) -> web.StreamResponse:
        if self._stream.full:
            raise busy("too many listeners, or the server is shutting down: try again later")
        # nginx would buffer the events.
        headers = {"X-Accel-Buffering": "no"}
        if request.method == "HEAD":
            return await begin(request, "text/event-stream", headers)
        last = request.headers.get("Last-Event-ID", "")
        seen = int(last) if re.fullmatch(r"[0-9]{1,18}", last) else None
        with self._stream.listen() as messages:
            response = await begin(request, "text/event-stream", headers)
            with contextlib.suppress(ConnectionError):
                # Missed events first; they may be among the messages too.
                while seen is not None and (missed := await self.forward.events(seen, VERDICTS, None, 0, 100)).items:
                    for item in missed.items:
                        await send(request, response, missed_verdict(item))
                    seen = missed.next
                async for message in messages:
                    if message.id is None or seen is None or message.id > seen:
                        await send(request, response, message.data)
        return response

    # --- Actions ---

    async def recheck(self, wanted: Recheck) -> Rechecked | None:
        if wanted.dry_run:
            return await _refusable(self._actions.recheck(wanted))
        return await self._act(self._actions.recheck(wanted))

    async def replay(self, id: int) -> Replayed | None:
        return await self._act(self._actions.replay(id))

    async def acknowledge(self, wanted: Acknowledge) -> AcknowledgedCount | None:
        return await self._act(self._actions.acknowledge(wanted))

    async def prune(self, wanted: Prune) -> Pruned:
        return await self._act(self._actions.prune(wanted))

    async def _act(self, action: Awaitable[T]) -> T:
        try:
            return await _refusable(action)
        finally:
            self._cache.clear()


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
