"""Checks the callback endpoint: its address, certificate, secrets, and who can reach it."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import stat
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from pydantic import SecretStr

from notify_server.cli.doctor.findings import ASK_SECONDS, Finding, Subject, ok, problem, warning
from notify_server.listening import bind_sockets

CERTIFICATE_SOON = timedelta(days=14)


def check_listen(subject: Subject) -> Iterator[Finding]:
    server = subject.config.server
    if server.port == 0:
        yield ok("listen", f"{', '.join(server.hosts)}, any free port")
        return
    place = ", ".join(f"{host}:{server.port}" for host in server.hosts)
    remedy = "free the port, or set [server] host and port"
    local = server.local_host
    try:
        answer = _ask_healthz(local, server.port, tls=server.ssl_certificate is not None)
    except ConnectionRefusedError:
        try:
            for each in bind_sockets(server.hosts, server.port):
                each.close()
        except OSError as error:
            yield problem("listen", f"{place} cannot be listened on ({error.strerror or error})", remedy)
        else:
            yield ok("listen", f"{place} is free")
    except (OSError, http.client.HTTPException) as error:
        text = f"{place}: what listens there does not answer ({getattr(error, 'strerror', None) or error})"
        yield problem("listen", text, f"if it is a notify_server, look at its log; else {remedy}")
    else:
        if answer == (200, b"ok\n"):
            yield ok("listen", f"{place}: a notify_server runs there, and answers /healthz")
        else:
            yield problem("listen", f"{place} is in use by another program", remedy)


def _ask_healthz(host: str, port: int, *, tls: bool) -> tuple[int, bytes]:
    if tls:
        # Any certificate will do: nothing secret is sent, and the answer is not trusted.
        context = ssl._create_unverified_context()  # noqa: S323
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=ASK_SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=ASK_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        return response.status, response.read(64)


def check_certificate(subject: Subject) -> Iterator[Finding]:
    server = subject.config.server
    if server.ssl_certificate is None:
        return
    try:
        # An explicit password keeps OpenSSL from prompting on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(server.ssl_certificate, server.ssl_key, password="")
        leaf = x509.load_pem_x509_certificates(server.ssl_certificate.read_bytes())[0]
    except (OSError, ValueError) as error:
        yield problem(
            "certificate",
            f"{server.ssl_certificate} and {server.ssl_key} cannot be used ({error})",
            "set a certificate in PEM and the key that belongs to it, which has no password",
        )
        return
    now, until = datetime.now(UTC), leaf.not_valid_after_utc
    remedy = "renew it, and restart the server"
    if now > until:
        yield problem("certificate", f"{server.ssl_certificate}: expired on {until:%Y-%m-%d}", remedy)
    elif now < (since := leaf.not_valid_before_utc):
        yield problem("certificate", f"{server.ssl_certificate}: not valid before {since:%Y-%m-%d}", "check the clock")
    elif until - now < CERTIFICATE_SOON:
        yield warning("certificate", f"{server.ssl_certificate}: expires on {until:%Y-%m-%d}", remedy)
    else:
        yield ok("certificate", f"{server.ssl_certificate}: valid until {until:%Y-%m-%d}")


def check_secrets(subject: Subject) -> Iterator[Finding]:
    auth, server = subject.config.auth, subject.config.server
    secret = [] if server.ssl_key is None else [server.ssl_key]
    if subject.file is not None:
        written = tomllib.loads(subject.file.read_bytes().decode("utf-8-sig"))
        keys = written.get("auth", {}).keys() & {name for name, value in auth if isinstance(value, SecretStr)}
        # Addresses of receivers may hold a token.
        addressed = any("url" in table for table in written.get("forward", ()))
        if keys or addressed or _has_password(written.get("store", {}).get("url", "")):
            secret.append(subject.file)
    open_to_all = [path for path in secret if path.stat().st_mode & stat.S_IROTH]
    for path in open_to_all:
        yield problem(
            "secrets",
            f"{path} holds secrets, and every user of this machine can read it",
            f"chmod o-r {path}",
        )
    if not open_to_all:
        yield ok("secrets", "no file with secrets can be read by every user")


def _has_password(url: str) -> bool:
    parts = urlsplit(url)
    return parts.password is not None or "password" in parse_qs(parts.query)


def check_exposure(subject: Subject) -> Iterator[Finding]:
    auth, hosts = subject.config.auth, subject.config.server.hosts
    host = " and ".join(hosts)
    if not subject.config.server.takes_callbacks:
        yield ok("exposure", f"listens on {host}, and takes no callbacks")
        return
    protected = [
        name
        for name, there in (
            ("callback_token", auth.callback_token),
            ("callback_networks", auth.callback_networks),
            ("signature", auth.signature == "required"),
        )
        if there
    ]
    loopback = all(map(_is_loopback, hosts))
    if protected or loopback:
        yield ok("exposure", f"listens on {host}, protected by {', '.join(protected) or 'loopback'}")
    else:
        yield warning(
            "exposure",
            f"listens on {host}: no callback authentication, so anyone who can reach it can post",
            'set [auth] callback_token, callback_networks, or signature = "required"',
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
