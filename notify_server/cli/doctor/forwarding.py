"""Checks the endpoints of `[[forward]]`: their names, addresses, certificates and clocks, or their programs.

Sends no event: an endpoint gets one HEAD request for its root.
"""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from functools import partial
from time import time

from yarl import URL

from notify_server.cli.doctor.findings import ASK_SECONDS, Check, Finding, Subject, ok, problem, warning
from notify_server.config.forward import BotEndpoint, CommandEndpoint, UrlEndpoint
from notify_server.verify.guard import Guard

CHECK = "forward"
# Receivers refuse a webhook-timestamp that is further off (Standard Webhooks), robots one of an hour.
MAX_SKEW_SECONDS = 300
SKEW_SECONDS = 30


def endpoint_checks(subject: Subject) -> dict[str, Check]:
    """Return a check for each endpoint: they run at the same time."""
    return {f"{CHECK} {each.name}": partial(_check, each) for each in subject.config.forward}


def _check(endpoint: UrlEndpoint | BotEndpoint | CommandEndpoint) -> Iterator[Finding]:
    if isinstance(endpoint, CommandEndpoint):
        yield _program(endpoint)
    else:
        yield from _receiver(endpoint)


def _program(endpoint: CommandEndpoint) -> Finding:
    program = endpoint.command[0]
    if shutil.which(program) is None:
        return problem(CHECK, f"{endpoint.name}: {program} cannot be run", "name an executable file, and `chmod +x` it")
    return ok(CHECK, f"{endpoint.name}: {program} can be run")


def _receiver(endpoint: UrlEndpoint | BotEndpoint) -> Iterator[Finding]:
    url = URL(endpoint.url.get_secret_value())
    host, port, name = url.raw_host or "", url.port or 0, endpoint.name
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        text = f"{name}: {host} does not resolve ({getattr(error, 'strerror', None) or error})"
        yield problem(CHECK, text, f"correct the host in {endpoint.place} url, or the name server")
        return
    guard = Guard((), endpoint.allowed_networks, ())
    addresses = [str(entry[4][0]) for entry in found]
    allowed = [address for address in addresses if guard.check_address(address, port) is None]
    if not allowed:
        text = f"{name}: {host} is {', '.join(sorted(set(addresses)))}, which is not public and never contacted"
        yield problem(CHECK, text, f"if it is yours, set {endpoint.place} allowed_networks")
        return
    try:
        with socket.create_connection((allowed[0], port), ASK_SECONDS) as plain:
            yield from _answer(endpoint, url, _secured(endpoint, plain, host) if url.scheme == "https" else plain)
    except ssl.SSLCertVerificationError as error:
        text = f"{name}: the certificate of {host} is not trusted ({error.verify_message})"
        yield problem(CHECK, text, f"renew it, or set {endpoint.place} ca_file to the authority's certificate")
    except ssl.SSLError as error:
        yield problem(CHECK, f"{name}: TLS with {host} fails ({error.reason})", "look at the receiver's TLS settings")
    except OSError as error:
        text = f"{name}: {host}:{port} cannot be reached ({error.strerror or error})"
        yield problem(CHECK, text, "start the receiver, or open the way to it: firewall, proxy, port")


def _secured(endpoint: UrlEndpoint | BotEndpoint, plain: socket.socket, host: str) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(endpoint.ca_file) if endpoint.ca_file is not None else None)
    return context.wrap_socket(plain, server_hostname=host)


def _answer(endpoint: UrlEndpoint | BotEndpoint, url: URL, connected: socket.socket) -> Iterator[Finding]:
    connection = http.client.HTTPConnection(url.raw_host or "", url.port, timeout=ASK_SECONDS)
    connection.sock = connected
    over = connected.version() if isinstance(connected, ssl.SSLSocket) else "no TLS"
    reached = f"{endpoint.name}: {endpoint.target} can be reached ({over})"
    try:
        connection.request("HEAD", "/")
        sent = connection.getresponse().getheader("Date")
        skew = time() - parsedate_to_datetime(sent).timestamp() if sent else None
    except (http.client.HTTPException, ValueError) as error:
        remedy = f"check which program listens there, and correct {endpoint.place} url"
        yield problem(CHECK, f"{reached}, and does not speak HTTP ({type(error).__name__})", remedy)
        return
    finally:
        connection.close()
    if skew is None or abs(skew) <= SKEW_SECONDS:
        yield ok(CHECK, reached if skew is None else f"{reached}; its clock agrees")
        return
    text = f"{reached}; this clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} its clock"
    remedy = "synchronise both with NTP: receivers refuse signatures that are 5 minutes off"
    yield (problem if abs(skew) > MAX_SKEW_SECONDS else warning)(CHECK, text, remedy)
