"""Tries the public address as the platform uses it: posts a check through it, sends test.ping to every endpoint, and
checks a file. The check is no notification: no batch and no event comes of it.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import secrets
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
from yarl import URL

from notify_server.cli.doctor.findings import Check, Finding, ok, problem, warning
from notify_server.cli.source import SourceError, admin_token, reading
from notify_server.config import Config
from notify_server.contract.probe_body import Seen, check_body, proof
from notify_server.errors import NotifyServerError
from notify_server.forward.service import ForwardTested

CHECK = "public"
WAIT_SECONDS = 10.0
MAX_BODY = 64 * 1024


class Reply(NamedTuple):
    """An answer that came through the public address."""

    status: int
    location: str
    server: str
    body: bytes

    @property
    def code(self) -> str:
        """The `code` of a body in the platform's form, "" for any other body."""
        try:
            found = msgspec.json.decode(self.body)
            return str(found["code"]) if {"request_id", "code", "msg"} <= found.keys() else ""
        except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, TypeError, KeyError):
            return ""


def public_checks(config: Config, config_path: Path | None, address: str, picture: str | None) -> dict[str, Check]:
    """Return the checks of the address, of each endpoint, and of the picture."""
    checks: dict[str, Check] = {CHECK: partial(_check_address, config, address)}
    for endpoint in config.forward:
        checks[f"ping {endpoint.name}"] = partial(_check_endpoint, config, endpoint.name)
    if picture is not None:
        checks["picture"] = partial(_check_picture, config_path, picture)
    return checks


def _check_address(config: Config, address: str) -> Iterator[Finding]:
    try:
        url = URL(address, encoded=True)
        port = url.port
    except ValueError:
        url, port = URL(), None
    if url.scheme not in ("http", "https") or not url.raw_host or not port:
        yield problem(CHECK, f"{address}: is not an address", "write it as registered: https://HOST/notify?token=…")
        return
    shown = str(url.with_query(None).with_fragment(None))
    token = asyncio.run(admin_token(config, is_ours=True))
    if token is None:
        yield problem(CHECK, f"{shown}: there is no admin_token yet", "start the server, and run this beside it")
        return
    nonce = secrets.token_hex(16)
    body = check_body(token.encode(), int(time.time() * 1000), nonce)
    try:
        reply = _post(url, body)
    except NotifyServerError as error:
        text, _, remedy = str(error).rpartition(": ")
        yield problem(CHECK, f"{shown}: {text}", remedy)
        return
    if (seen := _seen(reply)) is None or seen.proof != proof(token.encode(), nonce):
        yield _refused(config, url, shown, reply, body)
        return
    yield ok(CHECK, f"{shown}: this server answers there; the sample was not stored")
    yield from _check_proxy(config, url, seen)
    if url.scheme == "http":
        yield warning(
            CHECK, f"{shown}: without TLS anyone on the way can read the token", "put TLS in front; deploy/one-server"
        )


def _post(url: URL, body: bytes, headers: dict[str, str] | None = None) -> Reply:
    """Post through the address, following nothing. Raises NotifyServerError: what is in the way, then what to do."""
    host, port = url.raw_host or "", url.port or 0
    connection = http.client.HTTPConnection(host, port, timeout=WAIT_SECONDS)
    if url.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=WAIT_SECONDS, context=ssl.create_default_context())
    target = url.raw_path + (f"?{url.raw_query_string}" if url.raw_query_string else "")
    try:
        connection.request("POST", target, body, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return Reply(
            response.status,
            response.getheader("Location", ""),
            response.getheader("Server", ""),
            response.read(MAX_BODY),
        )
    except socket.gaierror as error:
        text = f"{host} does not resolve ({error.strerror}): add a DNS record that names this machine"
        raise NotifyServerError(text) from error
    except ssl.SSLCertVerificationError as error:
        text = f"TLS: the certificate is not trusted ({error.verify_message}): install one that is for {host}"
        raise NotifyServerError(text) from error
    except ssl.SSLError as error:
        text = f"TLS: the handshake fails ({error.reason}): serve https on port {port}, or write http in the address"
        raise NotifyServerError(text) from error
    except ConnectionRefusedError as error:
        text = (
            f"port {port} refuses connections: start the proxy or the server, and open the port in the security group"
        )
        raise NotifyServerError(text) from error
    except TimeoutError as error:
        text = f"no answer in {WAIT_SECONDS:g} s: open port {port} in the firewall and the security group (安全组)"
        raise NotifyServerError(text) from error
    except (OSError, http.client.HTTPException) as error:
        text = f"the connection fails ({error or type(error).__name__}): look at the log of the proxy"
        raise NotifyServerError(text) from error
    finally:
        connection.close()


def _seen(reply: Reply) -> Seen | None:
    try:
        return msgspec.convert(msgspec.json.decode(reply.body)["data"], Seen)
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError):
        return None


def _refused(config: Config, url: URL, shown: str, reply: Reply, body: bytes) -> Finding:
    """Return why the check was not answered by this server."""
    path = config.server.callback_path
    if 300 <= reply.status < 400:
        target = str(URL(reply.location, encoded=True).with_query(None)) if reply.location else "another address"
        return problem(
            CHECK, f"{shown}: redirects to {target} ({reply.status})", "register the address that it leads to"
        )
    if reply.status in (401, 403) and reply.code:
        return _unauthorized(config, url, shown, reply, body)
    if reply.status == 404 or (reply.status == 405 and url.path.strip("/") != path.strip("/")):
        return problem(
            CHECK,
            f"{shown}: 404, nothing takes callbacks at this path",
            f"the path is {path}: correct the address, or what the proxy does to it",
        )
    if reply.status in (502, 503, 504):
        place = f"http://127.0.0.1:{config.server.port}"
        return problem(
            CHECK,
            f"{shown}: {reply.status}, the proxy gets no answer from the server",
            f"start the server, and have the proxy pass to {place}",
        )
    if reply.status == 413:
        return problem(CHECK, f"{shown}: 413, a limit in front refuses the body", "raise the proxy's limit to 9 MB")
    if reply.status == 400 and (
        b"HTTP request was sent to HTTPS" in reply.body or b"HTTP request to an HTTPS" in reply.body
    ):
        return problem(CHECK, f"{shown}: port {url.port} speaks https", "write https in the address")
    if reply.status == 400 and reply.code:
        return problem(
            CHECK,
            f"{shown}: another notify_server answers, or one with another admin_token",
            "pass the address to this server, or run doctor with that one's --config",
        )
    named = f" ({reply.server})" if reply.server else ""
    return problem(
        CHECK,
        f"{shown}: another program{named} answers {reply.status}",
        f"have the proxy pass {path} on to this server",
    )


def _unauthorized(config: Config, url: URL, shown: str, reply: Reply, body: bytes) -> Finding:
    if reply.status == 403 or config.auth.callback_token is None:
        return problem(
            CHECK,
            f"{shown}: {reply.status}, the caller is not in callback_networks",
            "add the platform's networks; this machine's too, while you test",
        )
    right = config.auth.callback_token.get_secret_value()
    if "token" not in url.query:
        return problem(CHECK, f"{shown}: 401, the address has no token", "add ?token=…, the [auth] callback_token")
    bearer = _post(url.with_query(None), body, {"Authorization": f"Bearer {right}"})
    if url.query["token"] == right and bearer.status == 200:
        return problem(
            CHECK, f"{shown}: 401, the token is lost on the way", "have the proxy keep the query of the address"
        )
    return problem(
        CHECK,
        f"{shown}: 401, the token is not the [auth] callback_token of this server",
        "write the configured token; encode + and / in it",
    )


def _check_proxy(config: Config, url: URL, seen: Seen) -> Iterator[Finding]:
    """Yield what the headers of a proxy in front say."""
    direct = url.scheme == ("https" if config.server.ssl_certificate else "http") and url.port == config.server.port
    if direct:
        return
    named = f"{seen.forwarded_for}, {seen.forwarded}"
    if not seen.forwarded_for and not seen.forwarded:
        yield warning(
            CHECK,
            f"proxy headers: none, so every caller counts as {seen.caller}",
            "have the proxy send X-Forwarded-For, and name it in [server] trusted_proxies",
        )
    elif seen.caller not in named:
        yield problem(
            CHECK,
            f"proxy headers: not believed, so every caller counts as {seen.caller}",
            f'set [server] trusted_proxies = ["{seen.caller}"]',
        )
    else:
        yield ok(CHECK, f"proxy headers: this caller is seen as {seen.caller}")
    if url.scheme == "https" and seen.proto != "https":
        yield warning(
            CHECK,
            "proxy headers: X-Forwarded-Proto does not say https, so cookies of log-ins are not Secure",
            "have the proxy send X-Forwarded-Proto",
        )


def _check_endpoint(config: Config, name: str) -> Iterator[Finding]:
    async def ping() -> ForwardTested | None:
        async with reading(config, None) as source:
            if source.daemon is None:
                raise SourceError("no server runs here that could send it")
            return await source.daemon.ask(ForwardTested, "POST", f"forward/{name}/test")

    remedy = f"`notify-server forward test {name}` shows the whole answer"
    try:
        tested = asyncio.run(ping())
    except NotifyServerError as error:
        yield problem("ping", f"{name}: test.ping was not sent ({error})", "start the server, and run this beside it")
        return
    if tested is None:
        yield problem("ping", f"{name}: the running server has no such endpoint", "restart the server")
    elif tested.delivered:
        yield ok("ping", f"{name}: test.ping was delivered in {tested.elapsed_ms:.0f} ms")
    else:
        yield problem("ping", f"{name}: test.ping was not delivered ({tested.error or tested.status})", remedy)


def _check_picture(config_path: Path | None, picture: str) -> Iterator[Finding]:
    # A process of its own, as the prober is one.
    option = ("--config", str(config_path)) if config_path is not None else ()
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-P", "-m", "notify_server", "verify", "--json", *option, "--", picture],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS * 5,
        check=False,
    )
    shown = str(URL(picture).with_query(None)) if "?" in picture else picture
    try:
        outcome = json.loads(done.stdout.splitlines()[0])
    except (ValueError, IndexError):
        yield problem(
            "picture", f"{shown}: cannot be checked ({done.stderr.strip()[-200:]})", "write its whole address"
        )
        return
    if outcome["state"] == "available":
        yield ok("picture", f"{shown}: available")
    else:
        yield problem(
            "picture",
            f"{shown}: {outcome['state']}, {outcome['reason']}",
            "docs/data-model.md says what the reason means and what to do",
        )
