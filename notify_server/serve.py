"""Serves: the listener, TLS, and a stop that finishes requests in progress."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from typing import NamedTuple

import structlog
from aiohttp import web

from notify_server.app import ADMIN, GRACE, LIVE, METRICS, POOL, STREAM, TRACING, make_app
from notify_server.callbacks.connection import CallbackConnection
from notify_server.callbacks.handshake import Handshake
from notify_server.config import Config, ServerConfig
from notify_server.listening import Certificate, Listener, listen, listen_when_free
from notify_server.reloading import Live
from notify_server.reloading import reload as reload_configuration
from notify_server.service_manager import ServiceManager
from notify_server.supervise import start_task, stop_tasks
from notify_server.waiting import wait_for_store
from notify_server.web.admin import CODE_SECONDS, Admin
from notify_server.web.routes import CALLBACK, DRAINING

log = structlog.get_logger("notify_server")

# Iterations of the event loop after which every connection of the listen backlog has been accepted.
ACCEPTING_TURNS = 3


def make_connections(app: web.Application, handlers: web.Server, config: ServerConfig) -> CallbackConnection:
    """Return the factory of connections to an app that has been set up; `handlers` is aiohttp's factory."""
    return CallbackConnection(config, handlers, app[CALLBACK].callback, app[METRICS].connections_refused.add_plain)


class Reload(NamedTuple):
    """Setting `asked` reloads the configuration, which `load` returns; it raises ConfigError."""

    asked: asyncio.Event
    load: Callable[[], Config]


async def serve(config: Config, stop: asyncio.Event, reload: Reload | None = None) -> None:
    """Serve until `stop` is set, then finish requests in progress and stop within shutdown_grace.

    Waits for a database that does not accept connections yet, and for a port that another program has. Raises
    StoreRefusedError when the store is not safe to open, ListenError when the address cannot be used.
    """
    manager = ServiceManager.from_environment()
    heartbeats = start_task(manager.send_heartbeats(), "heartbeats to the service manager")
    try:
        if await wait_for_store(config, stop, partial(_listen_meanwhile, config.server), manager):
            await _serve(config, stop, manager, reload)
    finally:
        await stop_tasks(heartbeats)
    log.info("stopped")


async def _listen_meanwhile(server: ServerConfig, connections: Callable[[], asyncio.Protocol]) -> Listener:
    return await listen(server, connections, Certificate(server).context)


async def _serve(config: Config, stop: asyncio.Event, manager: ServiceManager, reload: Reload | None) -> None:
    server = config.server
    certificate = Certificate(server)
    grace = server.shutdown_grace
    app = make_app(config)
    runner = web.AppRunner(
        app,
        access_log=None,
        # Compressed bodies are refused, so that a small one cannot become a large one.
        auto_decompress=False,
        # Also the deadline for a request's headers: a connection that waits for a request longer than this is closed.
        keepalive_timeout=server.header_timeout,
        # Twice at most: for handlers to end, and for those that were cancelled.
        shutdown_timeout=grace / 8,
        # The rest of a refused body is read for this long, so that the sender receives the answer.
        lingering_time=1.0,
    )
    await runner.setup()
    try:
        handlers = runner.server
        assert handlers is not None
        metrics = app[METRICS]
        connections = make_connections(app, handlers, server)
        metrics.gauge(
            "notify_server_connections", "Connections of callers that are open.", lambda: connections.connections
        )

        if certificate.context is not None:
            metrics.gauge(
                "notify_server_certificate_expiry_timestamp_seconds",
                "When the certificate in use ends, in Unix time; missing without one.",
                lambda: certificate.ends_at,
            )
        accept = connections if certificate.context is None else partial(Handshake, connections, certificate.context)
        listener = await listen_when_free(server, accept, stop, manager.ready)
        if listener is None:
            return
        _announce(config, listener)
        _offer_log_in(config, listener, app[ADMIN])
        manager.ready("ready for notifications" if server.takes_callbacks else "probing files")
        reloads = start_task(_reload(app[LIVE], certificate, reload), "reload the configuration") if reload else None
        await stop.wait()
        if reloads is not None:
            await stop_tasks(reloads)
        manager.stopping()
        await _drain(config, app, listener, connections)
    finally:
        await runner.cleanup()


async def _reload(live: Live, certificate: Certificate, reload: Reload) -> None:
    while True:
        await reload.asked.wait()
        reload.asked.clear()
        reload_configuration(live, certificate, reload.load)


async def _drain(config: Config, app: web.Application, listener: Listener, connections: CallbackConnection) -> None:
    grace = config.server.shutdown_grace
    log.info("stopping", grace_seconds=grace)
    app[GRACE].begin()
    if (tracing := app[TRACING]) is not None:
        tracing.deadline = asyncio.get_running_loop().time() + grace
    app[DRAINING].set()
    if (pool := app[POOL]) is not None:
        pool.finish()
    for _ in range(ACCEPTING_TURNS):
        # Connections that the kernel has accepted already would be reset.
        await asyncio.sleep(0)
    listener.close()
    app[STREAM].close()
    await asyncio.gather(app[CALLBACK].drain(grace / 4), connections.drain(grace / 4))


def _offer_log_in(config: Config, listener: Listener, admin: Admin) -> None:
    """Log an address that logs in once, unless people have a token of their own choice."""
    if admin.is_configured:
        return
    server = config.server
    port = listener.sockets[0].getsockname()[1]
    base = server.local_url.removesuffix(f":{server.port}") + f":{port}"
    if server.public_url is not None and not config.store.is_postgres:
        # Several servers may share a database, and behind the public address another of them may answer.
        base = server.public_url.rstrip("/")
    log.info(
        f"open the dashboard with this address, once within {CODE_SECONDS // 60} minutes",
        url=f"{base}/ui/login/{admin.make_code()}",
    )


def _announce(config: Config, listener: Listener) -> None:
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
            "no callback authentication: anyone who can reach this address can post notifications; "
            'set [auth] callback_token, callback_networks, or signature = "required"'
        )
