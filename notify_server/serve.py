"""Serving: the listener, TLS, and a stop that answers what is in progress."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import structlog
from aiohttp import web
from cryptography.x509 import load_pem_x509_certificates

from notify_server.app import GRACE, METRICS, POOL, STREAM, TRACING, make_app
from notify_server.callbacks.connection import CallbackConnection
from notify_server.config import Config, ServerConfig
from notify_server.errors import ListenError
from notify_server.service_manager import ServiceManager
from notify_server.supervise import start_task, stop_tasks
from notify_server.waiting import wait_for_store
from notify_server.web.routes import CALLBACK, DRAINING

log = structlog.get_logger("notify_server")

# Iterations of the event loop after which every connection of the listen backlog has been accepted.
ACCEPTING_TURNS = 3


def make_connections(app: web.Application, handlers: web.Server, config: ServerConfig) -> CallbackConnection:
    """Return the factory of connections to an app that has been set up; `handlers` is aiohttp's factory."""
    return CallbackConnection(config, handlers, app[CALLBACK], app[METRICS].connections_refused.add_plain)


async def serve(config: Config, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then answer what is in progress and go down within shutdown_grace.

    Waits for a database that does not accept connections yet. Raises StoreRefusedError when the store is not safe to
    open, ListenError when the address cannot be had.
    """
    manager = ServiceManager.from_environment()
    heartbeats = start_task(manager.send_heartbeats(), "heartbeats to the service manager")
    try:
        if await wait_for_store(config, stop, partial(_listen, config.server), manager):
            await _serve(config, stop, manager)
    finally:
        await stop_tasks(heartbeats)
    log.info("stopped")


async def _serve(config: Config, stop: asyncio.Event, manager: ServiceManager) -> None:
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
        connections = make_connections(app, handlers, server)
        metrics.gauge(
            "notify_server_connections", "Connections of callers that are open.", lambda: connections.connections
        )

        listener = await _listen(server, connections)
        if server.ssl_certificate is not None:
            ends_at = _certificate_ends(server.ssl_certificate)
            metrics.gauge(
                "notify_server_certificate_expiry_timestamp_seconds",
                "When the certificate in use ends, in Unix time; missing without one.",
                lambda: ends_at,
            )
        _announce(config, listener)
        manager.ready("ready for notifications" if server.takes_callbacks else "probing files")
        await stop.wait()
        manager.stopping()
        await _drain(config, app, listener, connections)
    finally:
        await runner.cleanup()


async def _listen(server: ServerConfig, connections: Callable[[], asyncio.Protocol]) -> asyncio.Server:
    try:
        tls = _tls(server)
        return await asyncio.get_running_loop().create_server(
            connections,
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


async def _drain(
    config: Config, app: web.Application, listener: asyncio.Server, connections: CallbackConnection
) -> None:
    grace = config.server.shutdown_grace
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
    await asyncio.gather(app[CALLBACK].drain(grace / 4), connections.drain(grace / 4))


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
