"""The table of routes: every path that the server answers, and what answers it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple
from uuid import uuid4

import structlog
from aiohttp import web

from notify_server.callbacks.errors import error_response
from notify_server.callbacks.route import CallbackRoute
from notify_server.web.api.endpoints import ENDPOINTS, HttpApi
from notify_server.web.dashboard.dashboard import Dashboard, View
from notify_server.web.dashboard.views import VIEWS
from notify_server.web.health import Health
from notify_server.web.openapi import Endpoint

log = structlog.get_logger("notify_server")

CALLBACK = web.AppKey("callback", CallbackRoute)
HEALTH = web.AppKey("health", Health)
HTTP_API = web.AppKey("http_api", HttpApi)
DASHBOARD = web.AppKey("dashboard", Dashboard)
DRAINING = web.AppKey("draining", asyncio.Event)


class Route(NamedTuple):
    """A path, as aiohttp takes it, and the handler of its method; `*` is every method."""

    method: str
    path: str
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]]


async def _healthz(request: web.Request) -> web.Response:
    return await request.app[HEALTH].healthz(request)


async def _readyz(request: web.Request) -> web.Response:
    return await request.app[HEALTH].readyz(request)


async def _metrics(request: web.Request) -> web.StreamResponse:
    return await request.app[HEALTH].metrics(request)


async def _openapi(request: web.Request) -> web.StreamResponse:
    return await request.app[HTTP_API].openapi(request)


async def _endpoint(endpoints: Sequence[Endpoint], request: web.Request) -> web.StreamResponse:
    return await request.app[HTTP_API].answer(endpoints, request)


async def _view(view: View, request: web.Request) -> web.StreamResponse:
    return await request.app[DASHBOARD].answer(view, request)


async def _not_found(request: web.Request) -> web.StreamResponse:
    callback = request.app[CALLBACK]
    request_id = str(uuid4())
    if request.method == "POST":
        if callback.serves(request.path):
            return await _callback(request)
        callback.missed(request, request_id)
    log.debug("not found", request_id=request_id, method=request.method, path=request.path, remote=request.remote)
    return error_response(request_id, 404, "404", "nothing is served at this path")


def _by_route(endpoints: Sequence[Endpoint]) -> dict[str, list[Endpoint]]:
    found: dict[str, list[Endpoint]] = {}
    for endpoint in endpoints:
        found.setdefault(endpoint.route, []).append(endpoint)
    return found


ROUTES: tuple[Route, ...] = (
    Route("GET", "/healthz", _healthz),
    Route("GET", "/readyz", _readyz),
    Route("GET", "/metrics", _metrics),
    Route("GET", "/openapi.json", _openapi),
    *(Route("*", route, partial(_endpoint, endpoints)) for route, endpoints in _by_route(ENDPOINTS).items()),
    *(Route(view.method, view.path, partial(_view, view)) for view in VIEWS),
    Route("*", "/{path:.*}", _not_found),
)


def add_routes(app: web.Application, callback_path: str) -> None:
    """Add the callback's route, then those of the table, of which the first match answers."""
    app.router.add_route("*", callback_path, _callback, expect_handler=_expect)
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)
        if route.method == "GET":
            app.router.add_route("HEAD", route.path, route.handler)


async def _callback(request: web.Request) -> web.StreamResponse:
    response = await request.app[CALLBACK].handle(request)
    if request.app[DRAINING].is_set():
        response.force_close()
    return response


async def _expect(request: web.BaseRequest) -> web.Response | None:
    """Tell the client to send the body (RFC 9110 10.1.1)."""
    if request.headers.get("Expect", "").lower() != "100-continue":
        return error_response(str(uuid4()), 417, "417", "Expect: only 100-continue is supported")
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # The interim response is no part of the response.
    request.writer.output_size = 0
    return None
