"""Listens on the configured addresses: sockets, TLS and its certificate, and retries while another program has the
port.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import structlog

from notify_server.config import ServerConfig
from notify_server.errors import ListenError

log = structlog.get_logger("notify_server")

RETRY_SECONDS = 1.0
BACKLOG = 1024
# Kernels without IPv6.
_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


class Certificate:
    """The certificate and key in use. `context` is None without one; `ends_at` is Unix time."""

    def __init__(self, server: ServerConfig) -> None:
        """Raises ListenError when they cannot be used."""
        self.context: ssl.SSLContext | None = None
        self.ends_at: float | None = None
        if server.ssl_certificate is not None:
            self.context, self.ends_at = _load(server.ssl_certificate, server.ssl_key)

    def reload(self, server: ServerConfig) -> None:
        """Read the files again, for connections from now on. Raises ListenError, and keeps the present ones, when they
        cannot be used.
        """
        if self.context is None or server.ssl_certificate is None:
            return
        _, self.ends_at = _load(server.ssl_certificate, server.ssl_key)
        self.context.load_cert_chain(server.ssl_certificate, server.ssl_key)


class Listener:
    """The sockets that connections are accepted on."""

    def __init__(self, servers: list[asyncio.Server]) -> None:
        self._servers = servers
        self.sockets = [each for server in servers for each in server.sockets]

    def close(self) -> None:
        """Accept no more connections."""
        for server in self._servers:
            server.close()


async def listen(
    server: ServerConfig, connections: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None = None
) -> Listener:
    """Listen on every address of `[server] host`; with `tls`, connections are made after its handshake. Raises
    ListenError.
    """
    loop = asyncio.get_running_loop()
    servers: list[asyncio.Server] = []
    try:
        for each in bind_sockets(server.hosts, server.port):
            servers.append(  # noqa: PERF401 - those made so far are closed at an error
                await loop.create_server(
                    connections,
                    sock=each,
                    ssl=tls,
                    # A handshake has the time-out of the headers.
                    ssl_handshake_timeout=server.header_timeout if tls is not None else None,
                    backlog=BACKLOG,
                )
            )
    except OSError as error:
        Listener(servers).close()
        raise ListenError(
            f"cannot listen on {' and '.join(server.hosts)}, port {server.port} ({error.strerror or error}): "
            "free the port, or set [server] host and port"
        ) from error
    return Listener(servers)


async def listen_when_free(
    server: ServerConfig,
    connections: Callable[[], asyncio.Protocol],
    stop: asyncio.Event,
    on_wait: Callable[[str], object],
) -> Listener | None:
    """Listen; while another program has the port, try again each second, which is logged once. Returns None when `stop`
    was set meanwhile.
    """
    waiting = False
    while not stop.is_set():
        try:
            return await listen(server, connections)
        except ListenError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EADDRINUSE:
                raise
            if not waiting:
                waiting = True
                log.warning("waiting for the port", error=str(error))
                on_wait(f"waiting for the port: {error}")
        with suppress(TimeoutError):
            async with asyncio.timeout(RETRY_SECONDS):
                await stop.wait()
    return None


def bind_sockets(hosts: tuple[str, ...], port: int) -> Iterator[socket.socket]:
    """Yield a bound socket for each address, all on one port. "::" stands for both families."""
    wanted = [host for given in hosts for host in ((given, "0.0.0.0") if given == "::" else (given,))]  # noqa: S104
    seen = set()
    for host in dict.fromkeys(wanted):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            place = (address[0], port)
            if place in seen:
                continue
            seen.add(place)
            try:
                each = socket.socket(family, kind, protocol)
            except OSError as error:
                if host == "::" and error.errno in _NO_FAMILY:
                    continue
                raise
            try:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    # One socket for both families would show IPv4 callers under other addresses.
                    each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                each.bind((address[0], port, *address[2:]))
            except OSError as error:
                each.close()
                if host == "::" and error.errno in _NO_FAMILY:
                    continue
                raise
            port = port or each.getsockname()[1]
            yield each


def _load(certificate: Path, key: Path | None) -> tuple[ssl.SSLContext, float]:
    # Only a server that ends TLS itself needs it, and it takes 3 MiB.
    from cryptography.x509 import load_pem_x509_certificates

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
        # The server's own certificate is the first of the chain.
        ends_at = load_pem_x509_certificates(certificate.read_bytes())[0].not_valid_after_utc.timestamp()
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ListenError(
            f"[server] ssl_certificate and ssl_key: cannot be used ({error}): check that they belong together"
        ) from error
    return context, ends_at
