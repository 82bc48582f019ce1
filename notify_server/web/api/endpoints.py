"""The API over HTTP: the table of endpoints, and how a request becomes a call of Api and its answer a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import msgspec
import structlog
from aiohttp import web

from notify_server.action_log import CALLER
from notify_server.callbacks.errors import RefusedError, busy, error_response
from notify_server.errors import StoreUnavailableError
from notify_server.operations import Prune, Pruned, Recheck, Rechecked, Replayed
from notify_server.store.base import MAX_ID
from notify_server.store.reading.types import (
    BatchDetail,
    BatchItem,
    FailureGroup,
    FileDetail,
    FileItem,
    Found,
    Page,
    RejectionDetail,
    RejectionItem,
    Totals,
)
from notify_server.telemetry.history import Sample
from notify_server.web.admin import Admin
from notify_server.web.api.expectations import EXPECTATION_ENDPOINTS, MAX_BYTES
from notify_server.web.api.forward import FORWARD_ENDPOINTS
from notify_server.web.api.handlers import Api
from notify_server.web.api.journal import JOURNAL_ENDPOINTS
from notify_server.web.api.types import (
    BatchFileQuery,
    BatchQuery,
    BundleQuery,
    ExportQuery,
    FileQuery,
    Host,
    PageQuery,
    SearchQuery,
    SeriesQuery,
    Status,
)
from notify_server.web.bodies import HEADERS, read_body
from notify_server.web.language import LANGUAGES
from notify_server.web.openapi import Created, Endpoint, document
from notify_server.web.parameters import from_json, from_lines, from_query, refuse_all

log = structlog.get_logger("notify_server.web")

NO_SUCH_ID = "no row has this id: it may have been deleted"

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/api/v1/status", Api.status, answer=Status),
    Endpoint("GET", "/api/v1/totals", Api.totals, answer=Totals),
    Endpoint("GET", "/api/v1/series", Api.series, query=SeriesQuery, answer=Page[Sample]),
    Endpoint("GET", "/api/v1/batches", Api.batches, query=BatchQuery, answer=Page[BatchItem]),
    Endpoint("GET", "/api/v1/batches/{id}", Api.batch, answer=BatchDetail),
    Endpoint(
        "GET",
        "/api/v1/batches/{id}/files",
        Api.batch_files,
        query=BatchFileQuery,
        answer=Page[FileItem],
    ),
    Endpoint("GET", "/api/v1/files", Api.files, query=FileQuery, answer=Page[FileItem]),
    Endpoint("GET", "/api/v1/files/{id}", Api.file, answer=FileDetail),
    Endpoint("GET", "/api/v1/failures", Api.failures, answer=Page[FailureGroup]),
    Endpoint("GET", "/api/v1/hosts", Api.hosts, answer=Page[Host]),
    Endpoint(
        "GET",
        "/api/v1/rejections",
        Api.rejections,
        query=PageQuery,
        answer=Page[RejectionItem],
    ),
    Endpoint("GET", "/api/v1/rejections/{id}", Api.rejection, answer=RejectionDetail),
    Endpoint(
        "GET",
        "/api/v1/search",
        Api.search,
        query=SearchQuery,
        answer=Found,
    ),
    Endpoint(
        "GET",
        "/api/v1/export",
        Api.export,
        query=ExportQuery,
        media=("text/csv", "application/x-ndjson"),
    ),
    Endpoint(
        "GET",
        "/api/v1/batches/{id}/bundle",
        Api.bundle,
        query=BundleQuery,
        media=("application/zip",),
    ),
    Endpoint(
        "GET",
        "/api/v1/stream",
        Api.stream,
        media=("text/event-stream",),
    ),
    Endpoint("POST", "/api/v1/recheck", Api.recheck, body=Recheck, answer=Rechecked),
    Endpoint("POST", "/api/v1/rejections/{id}/replay", Api.replay, answer=Replayed),
    Endpoint("POST", "/api/v1/prune", Api.prune, body=Prune, answer=Pruned),
    *FORWARD_ENDPOINTS,
    *EXPECTATION_ENDPOINTS,
    *JOURNAL_ENDPOINTS,
)


def describe(version: str) -> dict[str, Any]:
    """Return the OpenAPI document. Its summaries are the English texts of the reference page."""
    texts = LANGUAGES["en"]
    return document(ENDPOINTS, version, lambda endpoint: str(texts(f"docs_of.{endpoint.id}")))


def _parameter(name: str, value: str) -> str | int:
    # No row has a larger id than both engines can hold.
    return value if name == "name" else min(int(value), MAX_ID)


class HttpApi:
    """Checks requests to endpoints, calls Api, and encodes answers and errors."""

    def __init__(self, api: Api, admin: Admin, version: str) -> None:
        self._api = api
        self._admin = admin
        self._document = msgspec.json.encode(describe(version))

    async def openapi(self, request: web.Request) -> web.StreamResponse:
        """Answer with the OpenAPI document."""

        async def answer(request: web.Request) -> web.StreamResponse:
            return web.Response(body=self._document, content_type="application/json", headers=HEADERS)

        return await self._admin.guard(answer)(request)

    async def answer(self, endpoints: Sequence[Endpoint], request: web.Request) -> web.StreamResponse:
        """Answer a request to the path of these endpoints, whatever its method."""
        request_id = str(uuid4())
        log.debug("request", request_id=request_id, method=request.method, path=request.path, remote=request.remote)
        try:
            self._admin.check(request)
            CALLER.set(self._admin.caller(request))
            return await self._call(_endpoint(endpoints, request.method), request)
        except RefusedError as error:
            refused = error
        except StoreUnavailableError as error:
            refused = busy(str(error))
        if refused.status >= 500:
            log.warning("request failed", request_id=request_id, path=request.path, error=refused.message)
        elif refused.status in (401, 403):
            log.info("refused", request_id=request_id, path=request.path, status=refused.status, detail=refused.message)
        return error_response(request_id, refused.status, refused.code, refused.message, {**HEADERS, **refused.headers})

    async def _call(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        arguments: list[Any] = [request] if endpoint.media else []
        arguments += [_parameter(name, request.match_info[name]) for name in endpoint.parameters]
        if endpoint.query is not None:
            arguments.append(from_query(request.query, endpoint.query))
        else:
            refuse_all(request.query)
        if endpoint.body is not None:
            arguments.append(await _body(endpoint, endpoint.body, request))
        answer = await endpoint.handler(self._api, *arguments)
        status = 200
        if isinstance(answer, Created):
            status, answer = 201, answer.answer
        if isinstance(answer, web.StreamResponse):
            return answer
        if answer is None:
            raise RefusedError(404, "404", NO_SUCH_ID)
        body = msgspec.json.encode(answer)
        return web.Response(status=status, body=body, content_type="application/json", headers=HEADERS)


def _endpoint(endpoints: Sequence[Endpoint], method: str) -> Endpoint:
    """Return the endpoint of the method. Raises RefusedError when there is none."""
    by_method = {endpoint.method: endpoint for endpoint in endpoints}
    found = by_method.get("GET" if method == "HEAD" else method)
    if found is None:
        allowed = ", ".join(by_method)
        raise RefusedError(405, "405", f"only {allowed} is allowed", headers={"Allow": allowed})
    return found


async def _body(endpoint: Endpoint, kind: type[msgspec.Struct], request: web.Request) -> Any:
    """Return the body as a struct; as a list of them when it is NDJSON."""
    if not endpoint.max_lines:
        return from_json(await read_body(request, "application/json"), kind)
    if request.content_type != "application/x-ndjson":
        return from_json(await read_body(request, "application/json", max_bytes=MAX_BYTES), kind)
    body = await read_body(request, "application/x-ndjson", max_bytes=MAX_BYTES)
    return from_lines(body, kind, endpoint.max_lines)
