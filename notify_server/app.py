"""The composition root: builds the daemon's parts, starts them in order, and stops them in order."""

from __future__ import annotations

import asyncio
import platform
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import structlog
from aiohttp import web

from notify_server.background import (
    follow_log_outs,
    publish_verdicts,
    sample_time_series,
    start_housekeeping,
)
from notify_server.callbacks.handler import Callback
from notify_server.callbacks.response import SERVER_NAME
from notify_server.callbacks.route import CallbackRoute
from notify_server.clock import SteadyClock, unix_ms
from notify_server.config import Config, HostSettings, version
from notify_server.errors import StoreUnavailableError
from notify_server.expansion.expander import Expander
from notify_server.forward.metrics import ForwardMetrics
from notify_server.forward.news import News
from notify_server.forward.risk import watches
from notify_server.forward.sender import Sender
from notify_server.forward.service import ForwardService
from notify_server.model import BatchVerdict, FileResult
from notify_server.operations import Actions
from notify_server.processes.prober_client import ProberLink, prober_config
from notify_server.reloading import Live
from notify_server.store.admin_token import make_token
from notify_server.store.base import Engine, ExpansionListener, Store
from notify_server.store.reading.outbox import WaitingRow
from notify_server.store.reading.types import Records
from notify_server.store.sqlite.client import SqliteClient
from notify_server.store.sqlite.records import SqliteRecords
from notify_server.submissions.limits import start_watching
from notify_server.submissions.service import SubmissionService
from notify_server.supervise import Grace, start_task, stop_tasks
from notify_server.telemetry.history import Timeline
from notify_server.telemetry.host_rates import HostRates
from notify_server.telemetry.metrics import Metrics
from notify_server.telemetry.traces import open_tracing
from notify_server.verify.guard import Guard
from notify_server.verify.own_networks import own_networks
from notify_server.verify.shares import limit_of
from notify_server.verify.verifier import Verifier
from notify_server.web import rendering
from notify_server.web.admin import Admin
from notify_server.web.api.endpoints import HttpApi
from notify_server.web.api.handlers import Api
from notify_server.web.api.types import RuntimeState
from notify_server.web.dashboard.dashboard import Dashboard
from notify_server.web.health import Health
from notify_server.web.routes import CALLBACK, DASHBOARD, DRAINING, HEALTH, HTTP_API, add_routes
from notify_server.web.stream import Stream

if TYPE_CHECKING:
    from notify_server.telemetry.tracing import Tracing

log = structlog.get_logger("notify_server")

CONFIG = web.AppKey("config", Config)
LIVE = web.AppKey("live", Live)
CLOCKS: web.AppKey[Clocks] = web.AppKey("clocks")
GUARD = web.AppKey("guard", Guard)
RATES = web.AppKey("rates", HostRates)
STORE = web.AppKey("store", Store)
RECORDS = web.AppKey("records", Records)
SENDER = web.AppKey("sender", Sender)
FORWARD = web.AppKey("forward", ForwardService)
# Called whenever events may have been committed.
ON_NEWS: web.AppKey[Callable[[], object]] = web.AppKey("on_news")
# None on a node that takes callbacks only.
POOL: web.AppKey[Verifier | None] = web.AppKey("pool")
METRICS = web.AppKey("metrics", Metrics)
ADMIN = web.AppKey("admin", Admin)
API = web.AppKey("api", Api)
STREAM = web.AppKey("stream", Stream)
TRACING: web.AppKey[Tracing | None] = web.AppKey("tracing")
GRACE = web.AppKey("grace", Grace)

# Shares of the remaining shutdown_grace, in this order: attempts in flight and the probers, deliveries of events,
# closing the store. The rest is for everything else.
PROBES_SHARE = 0.5
FORWARD_SHARE = 0.3
STORE_SHARE = 0.8


class Clocks(NamedTuple):
    """Clocks that give Unix ms. Signatures are checked against `wall`, which may be set; everything else uses `now`."""

    wall: Callable[[], int]
    now: Callable[[], int]


def make_app(
    config: Config, *, wall: Callable[[], int] = unix_ms, now: Callable[[], int] | None = None
) -> web.Application:
    """Build the daemon as an aiohttp application, the same for the server and for tests.

    Both clocks give Unix ms; `now` is a SteadyClock unless it is given. Starting the application opens the store
    (StoreRefusedError when that is not safe) and starts the probers.
    """
    app = web.Application()
    app[CONFIG] = config
    app[LIVE] = Live(config)
    clocks = app[CLOCKS] = Clocks(wall, now or SteadyClock(wall))
    app[METRICS] = Metrics()
    app[METRICS].watch_survey(lambda: clocks.now() / 1000)
    app[DRAINING] = asyncio.Event()
    app[GRACE] = Grace(config.server.shutdown_grace)
    app[STREAM] = Stream()
    app[RATES] = HostRates()
    verify = config.verify
    app[GUARD] = Guard(
        verify.allowed_hosts, verify.allowed_networks, verify.allowed_ports, verify.refused_networks, own_networks()
    )
    app.on_response_prepare.append(_name_server)
    app.cleanup_ctx.extend([_traces, _record, _forwarding, _verification, _web])
    rendering.setup(app)
    add_routes(app, config.server.callback_path)
    return app


async def _traces(app: web.Application) -> AsyncIterator[None]:
    tracing = app[TRACING] = open_tracing()
    yield
    if tracing is not None:
        await tracing.close(app[CONFIG].server.shutdown_grace / 8)


async def _record(app: web.Application) -> AsyncIterator[None]:
    config, metrics = app[CONFIG], app[METRICS]
    (commits,) = metrics.commit_seconds.series.values()

    def on_work() -> None:
        if (pool := app.get(POOL)) is not None:
            pool.poll_soon()

    store = app[STORE] = await _open_store(config, app[CLOCKS].now, commits.observe, on_work)
    metrics.gauge("notify_server_backlog_files", "Files accepted and not settled.", lambda: store.backlog)
    metrics.gauges(
        "notify_server_nodes",
        "Servers that share the record and are alive, by what they do.",
        "role",
        lambda: {"callbacks": len(store.nodes.taking), "probes": len(store.nodes.probing)},
    )
    if not config.store.is_postgres:
        metrics.watch_files(config.store.path)
    app[RECORDS] = await _open_records(config)
    own_token = await make_token(config.store) if config.auth.admin_token is None else None
    admin = app[ADMIN] = Admin(config, app[CLOCKS].now, own_token, store.end_session)
    admin.end_sessions(await app[RECORDS].ended_sessions())
    yield
    await app[RECORDS].close()
    await store.close(app[GRACE].left() * STORE_SHARE)


async def _forwarding(app: web.Application) -> AsyncIterator[None]:
    config, now = app[CONFIG], app[CLOCKS].now
    metrics = ForwardMetrics(app[METRICS].registry, [each.name for each in config.forward], now)
    sender = app[SENDER] = Sender(
        config.forward,
        app[STORE].outbox,
        now=now,
        on_attempt=metrics.on_attempt,
        public_url=config.server.public_url,
    )
    news = News()
    records = app[RECORDS]
    app[FORWARD] = ForwardService(sender, app[STORE].outbox, records.outbox, records.expectations, news, now)

    def on_news() -> None:
        sender.wake()
        news.ring()

    app[ON_NEWS] = on_news
    await sender.start()

    def is_cut_off() -> bool:
        pool = app.get(POOL)
        return pool is not None and pool.cut_off

    async def read_waiting() -> list[WaitingRow]:
        waiting = await app[RECORDS].outbox.waiting()
        sender.compare(row.name for row in waiting)
        return waiting

    found = watches(app[STORE].outbox, config.verify, config.alert, now, is_cut_off, on_news)
    tasks = [start_task(watch, name) for name, watch in found]
    if config.forward:
        tasks.append(start_task(metrics.survey(read_waiting), "survey deliveries"))
    yield
    await stop_tasks(*tasks)
    await sender.stop(app[GRACE].left() * FORWARD_SHARE)


async def _verification(app: web.Application) -> AsyncIterator[None]:
    config, store, metrics, tracing = app[CONFIG], app[STORE], app[METRICS], app[TRACING]
    now = app[CLOCKS].now

    def on_verdicts(verdicts: Sequence[BatchVerdict]) -> None:
        app[ON_NEWS]()
        publish_verdicts(verdicts, metrics, app[STREAM])

    probers = config.verify.processes if config.server.probes else 0
    links = [ProberLink(prober_config(config.verify)) for _ in range(probers)]
    pool = app[POOL] = _pool(app, links, on_verdicts) if links else None
    _watch_probing(metrics, pool, links)
    if pool is not None:
        await pool.start()
    versions = {
        "version": version(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "libcurl": next((link.libcurl for link in links if link.libcurl), ""),
    }
    # Strangers must not learn versions.
    metrics.build_info(**versions if config.auth.admin_token is not None else {})
    listener = ExpansionListener(
        _add_hosts_to(pool), on_verdicts, metrics.unknown_fields.add_plain, metrics.reported_failed.add_plain
    )
    tasks = start_housekeeping(store, app[RECORDS], app[LIVE], metrics, now, _add_hosts_to(pool))
    tasks.append(start_task(follow_log_outs(app[ADMIN].end_sessions, app[RECORDS]), "follow log-outs"))
    if isinstance(store, SqliteClient):
        # In the keeper, beside the database.
        store.expand_inbox(listener)
    else:
        expander = Expander(cast("Engine", store), app[GUARD], now, listener)
        tasks.append(start_task(expander.run(), "expand the inbox"))
    if tracing is not None:
        tasks.append(start_task(tracing.run(partial(_latest_delivery, app[RECORDS])), "export traces"))
    yield
    if pool is not None:
        await pool.stop(app[GRACE].left() * PROBES_SHARE)
    if tracing is not None:
        await tracing.caught_up()
    await stop_tasks(*tasks)


def _pool(
    app: web.Application, links: Sequence[ProberLink], on_verdicts: Callable[[Sequence[BatchVerdict]], None]
) -> Verifier:
    store, metrics, rates, tracing = app[STORE], app[METRICS], app[RATES], app[TRACING]

    def on_recorded(results: Sequence[FileResult]) -> None:
        metrics.recorded(results)
        rates.recorded(results, time.monotonic())
        if tracing is not None:
            tracing.probed(results)

    def share_of(host: str, settings: HostSettings) -> int:
        nodes = store.nodes
        return limit_of(host, settings, nodes.me, nodes.probing)

    return Verifier(
        store,
        app[GUARD],
        app[CONFIG].verify,
        links,
        now=app[CLOCKS].now,
        chance=random.random,
        on_verdicts=on_verdicts,
        on_recorded=on_recorded,
        limit_of=share_of,
    )


def _watch_probing(metrics: Metrics, pool: Verifier | None, links: Sequence[ProberLink]) -> None:
    metrics.gauge("notify_server_in_flight_files", "Files in flight.", lambda: _in_flight(pool))
    metrics.gauges(
        "notify_server_hosts", "Hosts remembered, by their circuit.", "circuit", pool.circuits if pool else dict
    )
    metrics.gauge(
        "notify_server_paced_hosts",
        "Hosts that are paced because they asked for fewer requests or answer slowly.",
        (lambda: 0) if pool is None else pool.paced_hosts,
    )
    metrics.gauges(
        "notify_server_probers",
        "Prober processes, by whether they run.",
        "state",
        lambda: {"up": sum(link.alive for link in links), "down": sum(not link.alive for link in links)},
    )
    metrics.counter(
        "notify_server_prober_restarts",
        "Probers that were started because another had ended.",
        lambda: sum(link.restarts for link in links),
    )


async def _web(app: web.Application) -> AsyncIterator[None]:
    config, store, metrics, pool = app[CONFIG], app[STORE], app[METRICS], app[POOL]
    wall, now = app[CLOCKS]
    callback = Callback(config, store, metrics, now, wall, app[TRACING], app[ADMIN].token)
    app[CALLBACK] = CallbackRoute(config.server, callback)
    app[HEALTH] = Health(
        store,
        metrics,
        now,
        None if pool is None else lambda: pool.alive,
        app[DRAINING].is_set,
        config.server.takes_callbacks,
        (lambda: False) if pool is None else lambda: pool.is_short,
        app[ADMIN].guard_if_configured,
    )
    timeline = Timeline(metrics, now=now, backlog=lambda: store.backlog, in_flight=lambda: _in_flight(pool))
    state = RuntimeState(
        version(),
        datetime.fromtimestamp(now() / 1000, UTC),
        config.server.roles,
        lambda: store.nodes,
        lambda: store.backlog,
        lambda: _in_flight(pool),
        list if pool is None else pool.hosts,
    )
    actions = Actions(config, store, app[RECORDS], now=now, add_hosts=_add_hosts_to(pool))
    submissions = SubmissionService(store.expectations, app[RECORDS].expectations, now, app[ON_NEWS])
    app[API] = Api(app[RECORDS], actions, state, timeline, app[RATES], app[STREAM], app[FORWARD], submissions)
    app[HTTP_API] = HttpApi(app[API], app[ADMIN], version())
    app[DASHBOARD] = Dashboard(config, app[API], app[ADMIN], version(), now)

    def is_ready() -> bool:
        return app[HEALTH].is_ready() and store.backlog < config.verify.backlog_limit

    tasks = [start_task(sample_time_series(timeline, app[STREAM]), "sample the time series")]
    tasks += start_watching(config, store.expectations, app[RECORDS].expectations, metrics, now, is_ready, app[ON_NEWS])
    yield
    await stop_tasks(*tasks)


async def _name_server(request: web.Request, response: web.StreamResponse) -> None:
    """Name the program without its version, which aiohttp would add."""
    response.headers["Server"] = SERVER_NAME


def _in_flight(pool: Verifier | None) -> int:
    return 0 if pool is None else pool.in_flight


def _add_hosts_to(pool: Verifier | None) -> Callable[[Iterable[str]], None]:
    """Return the receiver of hosts with new files: nothing on a node that does not probe, the store notifies those that
    do.
    """
    return (lambda hosts: None) if pool is None else pool.add_hosts


async def _open_store(
    config: Config, now: Callable[[], int], on_commit: Callable[[float], object], on_work: Callable[[], object]
) -> Store:
    if not config.store.is_postgres:
        verify = config.verify
        networks = [str(network) for network in verify.allowed_networks]
        guard = verify.allowed_hosts, networks, sorted(verify.allowed_ports)
        refusals = [str(network) for network in verify.refused_networks], own_networks()
        return await SqliteClient.open(config.store.path, now=now, guard=guard, refusals=refusals, on_commit=on_commit)
    # Loaded only when used, because its driver takes time to load.
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


async def _latest_delivery(records: Records, batch: int) -> tuple[str, str | None] | None:
    try:
        found = await records.batch(batch)
    except StoreUnavailableError:
        return None
    delivery = found.last_delivery if found is not None else None
    return (delivery.request_id, delivery.traceparent) if delivery is not None else None
