"""The composition root: what the daemon is made of, in which order it comes up, and in which order it goes down."""

from __future__ import annotations

import asyncio
import math
import os
import platform
import random
import sqlite3
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import certifi
import structlog
from aiohttp import web
from cryptography.x509 import load_pem_x509_certificates

from notify_server.callbacks.connection import CallbackConnection
from notify_server.callbacks.errors import error_response
from notify_server.callbacks.handler import Callback
from notify_server.clock import SteadyClock, unix_ms
from notify_server.config import Config, HostSettings, ServerConfig, version
from notify_server.contract.trace_context import trace_fields
from notify_server.errors import ListenError, StoreUnavailableError
from notify_server.model import BatchVerdict, FileResult
from notify_server.operations import Actions
from notify_server.processes.prober_client import ProberLink
from notify_server.processes.prober_protocol import ProberConfig
from notify_server.store.base import ExpansionListener, Store
from notify_server.store.reading.types import Records
from notify_server.store.sqlite.client import SqliteClient
from notify_server.store.sqlite.records import SqliteRecords
from notify_server.supervise import Grace, start_task
from notify_server.telemetry.history import HostRates, Timeline
from notify_server.telemetry.metrics import Metrics, tracing_wanted
from notify_server.verify.guard import Guard
from notify_server.verify.scheduler import Pool
from notify_server.verify.shares import limit_of
from notify_server.web import rendering
from notify_server.web.admin import Admin
from notify_server.web.api.handlers import ENDPOINTS, Api, RuntimeState
from notify_server.web.dashboard.pages import VIEWS, Dashboard, View
from notify_server.web.health import Health
from notify_server.web.openapi import Endpoint
from notify_server.web.stream import Stream

if TYPE_CHECKING:
    from notify_server.telemetry.tracing import Tracing

log = structlog.get_logger("notify_server")

STORE = web.AppKey("store", Store)
RECORDS = web.AppKey("records", Records)
# None on a node that takes callbacks only.
POOL: web.AppKey[Pool | None] = web.AppKey("pool")
METRICS = web.AppKey("metrics", Metrics)
CALLBACK = web.AppKey("callback", Callback)
HEALTH = web.AppKey("health", Health)
ADMIN = web.AppKey("admin", Admin)
API = web.AppKey("api", Api)
STREAM = web.AppKey("stream", Stream)
DASHBOARD = web.AppKey("dashboard", Dashboard)
DRAINING = web.AppKey("draining", asyncio.Event)
TRACING: web.AppKey[Tracing | None] = web.AppKey("tracing")
GRACE = web.AppKey("grace", Grace)

PRUNE_SECONDS = 600.0
PRUNE_ROWS = 500
# How long it rests after each transaction, as a multiple of what that took: it keeps up, and three quarters of the
# store's time are everybody else's.
PRUNE_PAUSES = 3.0
# What is counted over the whole record is counted so often, and for no more than this share of the time.
SURVEY_SECONDS = 5.0
SURVEY_SHARE = 0.05
# Shares of what is left of shutdown_grace: probes in flight, then the end of the probers, then closing the store. What
# remains is for the rest.
PROBES_SHARE = 0.5
STORE_SHARE = 0.8
# Turns of the event loop that it takes to have all connections that wait to be accepted.
ACCEPTING_TURNS = 3


def make_app(
    config: Config, *, wall: Callable[[], int] = unix_ms, now: Callable[[], int] | None = None
) -> web.Application:
    """The daemon as an aiohttp application, the same for the server and for tests.

    Both clocks give Unix ms. Signatures are checked against `wall`; everything else goes by `now`, a SteadyClock
    unless it is given.

    Starting it up opens the store (StoreRefusedError when that is not safe) and starts the probers.
    """
    now = now or SteadyClock(wall)
    app = web.Application()
    app[METRICS] = Metrics()
    app[DRAINING] = asyncio.Event()
    app[GRACE] = Grace(config.server.shutdown_grace)
    stream = app[STREAM] = Stream()
    admin = app[ADMIN] = Admin(config, now)
    rates = HostRates()
    started_at = datetime.fromtimestamp(now() / 1000, UTC)
    app[METRICS].watch_survey(lambda: now() / 1000)
    guard = Guard(config.verify.allowed_hosts, config.verify.allowed_networks, config.verify.allowed_ports)

    async def traces(app: web.Application) -> AsyncIterator[None]:
        tracing = app[TRACING] = _tracing()
        yield
        if tracing is not None:
            await tracing.close(config.server.shutdown_grace / 8)

    async def store(app: web.Application) -> AsyncIterator[None]:
        (commits,) = app[METRICS].commit_seconds.series.values()
        on_commit = commits.observe

        def on_work() -> None:
            if (pool := app.get(POOL)) is not None:
                pool.poll_soon()

        opened = app[STORE] = await _open_store(config, now, on_commit, on_work)
        app[METRICS].gauge("notify_server_backlog_files", "Files accepted and not settled.", lambda: opened.backlog)
        app[METRICS].gauges(
            "notify_server_nodes",
            "Servers that share the record and are alive, by what they do.",
            "role",
            lambda: {"callbacks": len(opened.nodes.taking), "probes": len(opened.nodes.probing)},
        )
        if not config.store.is_postgres:
            app[METRICS].watch_files(config.store.path)
        app[RECORDS] = await _open_records(config)
        yield
        await app[RECORDS].close()
        await opened.close(app[GRACE].left() * STORE_SHARE)

    async def verify(app: web.Application) -> AsyncIterator[None]:
        def on_verdicts(verdicts: Sequence[BatchVerdict]) -> None:
            _tell(verdicts, app[METRICS], stream)

        def on_recorded(results: Sequence[FileResult]) -> None:
            app[METRICS].recorded(results)
            rates.recorded(results, time.monotonic())
            if tracing is not None:
                tracing.probed(results)

        def share_of(host: str, settings: HostSettings) -> int:
            nodes = app[STORE].nodes
            return limit_of(host, settings, nodes.me, nodes.probing)

        tracing = app[TRACING]
        probes = config.server.probes
        links = [ProberLink(prober_config(config)) for _ in range(config.verify.processes if probes else 0)]
        pool = None
        if probes:
            pool = Pool(
                app[STORE],
                guard,
                config.verify,
                links,
                now=now,
                chance=random.random,
                on_verdicts=on_verdicts,
                on_recorded=on_recorded,
                limit_of=share_of,
            )
        app[POOL] = pool
        app[METRICS].gauge(
            "notify_server_in_flight_files", "Files whose attempt is under way.", lambda: _in_flight(pool)
        )
        app[METRICS].gauges(
            "notify_server_hosts", "Hosts remembered, by their circuit.", "circuit", pool.circuits if pool else dict
        )
        app[METRICS].gauges(
            "notify_server_probers",
            "Prober processes, by whether they run.",
            "state",
            lambda: {"up": sum(link.alive for link in links), "down": sum(not link.alive for link in links)},
        )
        app[METRICS].counter(
            "notify_server_prober_restarts",
            "Probers that were started because another had ended.",
            lambda: sum(link.restarts for link in links),
        )
        if pool is not None:
            await pool.start()
        app[METRICS].build_info(
            version=version(),
            python=platform.python_version(),
            sqlite=sqlite3.sqlite_version,
            libcurl=next((link.libcurl for link in links if link.libcurl), ""),
        )
        told = ExpansionListener(_add_hosts_to(pool), on_verdicts, app[METRICS].unknown_fields.add_plain)
        tasks = [
            start_task(app[STORE].expand_inbox(guard, now, told), "expand the inbox"),
            start_task(_housekeeping(config, app[STORE], app[METRICS], now), "prune the record"),
            start_task(_survey(app[RECORDS], app[METRICS]), "survey the record"),
        ]
        if tracing is not None:
            latest = partial(_latest_delivery, app[RECORDS])
            tasks.append(start_task(tracing.run(latest), "export traces"))
        yield
        if pool is not None:
            await pool.stop(app[GRACE].left() * PROBES_SHARE)
        if tracing is not None:
            await tracing.caught_up()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def web_side(app: web.Application) -> AsyncIterator[None]:
        pool = app[POOL]
        app[CALLBACK] = Callback(config, app[STORE], app[METRICS], now, wall, app[TRACING])
        app[HEALTH] = Health(
            app[STORE],
            app[METRICS],
            now,
            None if pool is None else lambda: pool.alive,
            app[DRAINING].is_set,
            config.server.takes_callbacks,
        )
        timeline = Timeline(
            app[METRICS], now=now, backlog=lambda: app[STORE].backlog, in_flight=lambda: _in_flight(pool)
        )
        live = RuntimeState(
            version(),
            started_at,
            config.server.roles,
            lambda: app[STORE].nodes,
            lambda: app[STORE].backlog,
            lambda: _in_flight(pool),
            list if pool is None else pool.hosts,
        )
        actions = Actions(config, app[STORE], app[RECORDS], now=now, add_hosts=_add_hosts_to(pool))
        app[API] = Api(app[RECORDS], actions, admin, live, timeline, rates, stream)
        app[DASHBOARD] = Dashboard(config, app[API], admin, version(), now)
        task = start_task(_sample(timeline, stream), "sample the time series")
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    app.cleanup_ctx.extend([traces, store, verify, web_side])
    app.router.add_route("*", config.server.callback_path, _callback, expect_handler=_expect)
    app.router.add_get("/healthz", _healthz)
    app.router.add_get("/readyz", _readyz)
    app.router.add_get("/metrics", _metrics)
    for endpoint in ENDPOINTS:
        app.router.add_route("*", endpoint.route, partial(_api, endpoint))
    app.router.add_get("/openapi.json", _openapi)
    rendering.setup(app)
    for view in VIEWS:
        app.router.add_route(view.method, view.path, partial(_view, view))
        if view.method == "GET":
            app.router.add_route("HEAD", view.path, partial(_view, view))
    app.router.add_route("*", "/{path:.*}", _not_found)
    return app


def _in_flight(pool: Pool | None) -> int:
    return 0 if pool is None else pool.in_flight


def _add_hosts_to(pool: Pool | None) -> Callable[[Iterable[str]], None]:
    """What hosts with new files are told to: on a node that does not probe nobody, the store calls those that do."""
    return (lambda hosts: None) if pool is None else pool.add_hosts


async def _open_store(
    config: Config, now: Callable[[], int], on_commit: Callable[[float], object], on_work: Callable[[], object]
) -> Store:
    if not config.store.is_postgres:
        return await SqliteClient.open(config.store.path, now=now, on_commit=on_commit)
    # Its driver is loaded by those who use it.
    from notify_server.store.postgres.store import PostgresStore

    return await PostgresStore.open(
        config.store.url,
        lease=config.store.lease,
        roles=config.server.roles,
        on_commit=on_commit,
        on_work=on_work,
    )


async def _open_records(config: Config) -> Records:
    if not config.store.is_postgres:
        return SqliteRecords(config.store.path)
    from notify_server.store.postgres.records import PostgresRecords

    return await PostgresRecords.open(config.store.url)


async def _callback(request: web.Request) -> web.StreamResponse:
    response = await request.app[CALLBACK].handle(request)
    if request.app[DRAINING].is_set():
        response.force_close()
    return response


async def _expect(request: web.BaseRequest) -> web.Response | None:
    """Give leave to send the body (RFC 9110 10.1.1)."""
    if request.headers.get("Expect", "").lower() != "100-continue":
        return error_response(str(uuid4()), 417, "417", "Expect: only 100-continue can be met")
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # What has been written so far is no part of the response.
    request.writer.output_size = 0
    return None


async def _healthz(request: web.Request) -> web.Response:
    log.debug("asked", path=request.path, remote=request.remote)
    return await request.app[HEALTH].healthz(request)


async def _readyz(request: web.Request) -> web.Response:
    log.debug("asked", path=request.path, remote=request.remote)
    return await request.app[HEALTH].readyz(request)


async def _metrics(request: web.Request) -> web.Response:
    log.debug("asked", path=request.path, remote=request.remote)
    return await request.app[HEALTH].metrics(request)


async def _api(endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
    return await request.app[API].handle(endpoint, request)


async def _view(view: View, request: web.Request) -> web.StreamResponse:
    return await request.app[DASHBOARD].handle(view, request)


async def _openapi(request: web.Request) -> web.StreamResponse:
    return await request.app[ADMIN].guard(request.app[API].describe)(request)


async def _not_found(request: web.Request) -> web.Response:
    request_id = str(uuid4())
    log.debug("nothing there", request_id=request_id, method=request.method, path=request.path, remote=request.remote)
    return error_response(request_id, 404, "404", "nothing is served at this path")


def _tell(verdicts: Sequence[BatchVerdict], metrics: Metrics, stream: Stream) -> None:
    for verdict in verdicts:
        metrics.verdicts.add(verdict.verdict)
        stream.publish("verdict", verdict)
        log.info(
            "verdict",
            batch_id=verdict.batch_id,
            api_code=verdict.api_code,
            verdict=verdict.verdict,
            files=verdict.files,
            available=verdict.available,
            request_id=verdict.request_id,
            **trace_fields(verdict.traceparent),
            seconds=(verdict.completed_at - verdict.first_received_at) / 1000,
        )


async def _sample(timeline: Timeline, stream: Stream) -> None:
    """Note what has happened, every second."""
    while True:
        now = time.monotonic()
        stream.publish("sample", timeline.sample(now))
        # A timer may ring a little early: that is this second's, not another.
        await asyncio.sleep(math.floor(now + 1.5) - now)


async def _survey(records: Records, metrics: Metrics) -> None:
    """Note what only a walk over the record tells, so that nobody who asks for metrics has to wait for it."""
    while True:
        began = time.monotonic()
        try:
            totals = await records.totals()
        except StoreUnavailableError as error:
            log.debug("cannot survey the record, trying again later", error=str(error))
        else:
            oldest = totals.oldest_pending_at
            metrics.surveyed(oldest.timestamp() if oldest is not None else None, totals.rejections)
        await asyncio.sleep(max(SURVEY_SECONDS, (time.monotonic() - began) / SURVEY_SHARE))


def _tracing() -> Tracing | None:
    """Traces, where the environment says that they are wanted; what is wrong with it does not stop the daemon."""
    if not tracing_wanted(os.environ):
        return None
    try:
        from notify_server.telemetry.tracing import Tracing

        tracing = Tracing.to_collector(version())
    except ImportError as error:
        log.warning(
            "no traces: OTEL_… asks for them, `pip install 'notify-server[otel]'` brings them", error=str(error)
        )
        return None
    except Exception as error:
        log.warning("no traces: what OTEL_… says cannot be used", error=str(error))
        return None
    log.info("traces are exported over OTLP/HTTP")
    return tracing


async def _latest_delivery(records: Records, batch: int) -> tuple[str, str | None] | None:
    try:
        found = await records.batch(batch)
    except StoreUnavailableError:
        return None
    delivery = found.last_delivery if found is not None else None
    return (delivery.request_id, delivery.traceparent) if delivery is not None else None


def prober_config(config: Config) -> ProberConfig:
    """What one prober of several is told."""
    verify = config.verify
    return ProberConfig(
        list(verify.allowed_hosts),
        [str(network) for network in verify.allowed_networks],
        list(verify.allowed_ports),
        verify.user_agent,
        str(verify.ca_file or system_certificates()),
        -(-verify.concurrency // verify.processes),
    )


def system_certificates() -> str:
    """The file of certificate authorities that are trusted unless [verify] ca_file names another."""
    # libcurl's own idea of where they are is that of the machine it was built on.
    system = ssl.get_default_verify_paths().cafile
    candidates = [system, "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"]
    return next((path for path in candidates if path and Path(path).is_file()), certifi.where())


async def _housekeeping(config: Config, store: Store, metrics: Metrics, now: Callable[[], int]) -> None:
    """Delete what is older than [retention] says, in small transactions."""
    completed_ms = round(config.retention.completed * 1000)
    rejections_ms = round(config.retention.rejections * 1000)
    while True:
        began = time.monotonic()
        try:
            started = began
            while deleted := await store.prune(now() - completed_ms, now() - rejections_ms, PRUNE_ROWS):
                metrics.pruned_rows.add_plain(deleted)
                log.debug("pruned", rows=deleted)
                await asyncio.sleep((time.monotonic() - started) * PRUNE_PAUSES)
                started = time.monotonic()
            metrics.pruned(now() / 1000, time.monotonic() - began)
        except StoreUnavailableError as error:
            log.warning("cannot prune, trying again later", error=str(error))
        await asyncio.sleep(PRUNE_SECONDS)


def make_front(app: web.Application, handlers: web.Server, config: ServerConfig) -> CallbackConnection:
    """Makes the protocols of connections to an app that has been set up; `handlers` makes aiohttp's."""
    # A callback's span is what aiohttp's task runs in.
    callback = app[CALLBACK] if app[TRACING] is None else None
    return CallbackConnection(config, handlers, callback, app[METRICS].connections_refused.add_plain)


async def serve(config: Config, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then answer what is in progress and go down within shutdown_grace.

    Raises StoreRefusedError when the store is not safe to open, ListenError when the address cannot be had.
    """
    server = config.server
    grace = server.shutdown_grace
    app = make_app(config)
    runner = web.AppRunner(
        app,
        access_log=None,
        # Bodies are refused compressed, so that a small one cannot become a large one.
        auto_decompress=False,
        # Also the deadline for a request's headers: a connection that waits for a request longer than this is closed.
        keepalive_timeout=server.header_timeout,
        # Twice at most: for handlers to end, and for those that were cancelled.
        shutdown_timeout=grace / 8,
        # What is left of a body that was refused is read for so long, so that the sender gets to read the answer.
        lingering_time=1.0,
    )
    await runner.setup()
    try:
        handlers = runner.server
        assert handlers is not None
        metrics = app[METRICS]
        front = make_front(app, handlers, server)
        metrics.gauge("notify_server_connections", "Connections of callers that are open.", lambda: front.connections)

        try:
            tls = _tls(server)
            if server.ssl_certificate is not None:
                ends_at = _certificate_ends(server.ssl_certificate)
                metrics.gauge(
                    "notify_server_certificate_expiry_timestamp_seconds",
                    "When the certificate in use ends, in Unix time; missing without one.",
                    lambda: ends_at,
                )
            listener = await asyncio.get_running_loop().create_server(
                front,
                server.host,
                server.port,
                ssl=tls,
                # A handshake is no more patient than the headers are.
                ssl_handshake_timeout=server.header_timeout if tls is not None else None,
                backlog=1024,
            )
        except OSError as error:
            raise ListenError(
                f"cannot listen on {server.host}:{server.port} ({error.strerror or error}): "
                "free the port, or set [server] host and port"
            ) from error
        _announce(config, listener)
        await stop.wait()
        log.info("stopping", grace_seconds=grace)
        app[GRACE].begin()
        if (tracing := app[TRACING]) is not None:
            tracing.deadline = asyncio.get_running_loop().time() + grace
        app[DRAINING].set()
        if (pool := app[POOL]) is not None:
            pool.finish()
        for _ in range(ACCEPTING_TURNS):
            # What the kernel has accepted already would be reset.
            await asyncio.sleep(0)
        listener.close()
        app[STREAM].close()
        await asyncio.gather(app[CALLBACK].drain(grace / 4), front.drain(grace / 4))
    finally:
        await runner.cleanup()
    log.info("stopped")


def _tls(server: ServerConfig) -> ssl.SSLContext | None:
    if server.ssl_certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(server.ssl_certificate, server.ssl_key)
    except (OSError, ssl.SSLError) as error:
        raise ListenError(
            f"[server] ssl_certificate and ssl_key: cannot be used ({error}): check that they belong together"
        ) from error
    return context


def _certificate_ends(path: Path) -> float:
    # The server's own is the first of the chain, and has been loaded by now.
    return load_pem_x509_certificates(path.read_bytes())[0].not_valid_after_utc.timestamp()


def _announce(config: Config, listener: asyncio.Server) -> None:
    scheme = "https" if config.server.ssl_certificate else "http"
    hosts = [address.getsockname()[:2] for address in listener.sockets]
    urls = [
        f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{config.server.callback_path}" for host, port in hosts
    ]
    log.info("ready for notifications", url=urls[0], store=config.store.place)
    auth = config.auth
    protected = auth.callback_token or auth.callback_networks or auth.signature == "required"
    if not config.server.takes_callbacks:
        log.info("takes no callbacks, only probes: [server] roles")
    elif not protected and not all(ip_address(host).is_loopback for host, _ in hosts):
        log.warning(
            "ANYONE WHO REACHES THIS ADDRESS CAN POST NOTIFICATIONS: "
            'set [auth] callback_token, callback_networks, or signature = "required"'
        )
