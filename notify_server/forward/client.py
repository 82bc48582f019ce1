"""The HTTP client of an endpoint: one session, whose connections go to vetted addresses only."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from aiohttp import ClientTimeout, DummyCookieJar, TCPConnector
from aiohttp.client_exceptions import ClientConnectorCertificateError, ClientConnectorDNSError, ClientSSLError

from notify_server.forward.outcome import ANSWER_BYTES, printable
from notify_server.verify.guard import Guard
from notify_server.verify.policy import retry_after_ms

# Connections that an endpoint may hold: its concurrency.
MAX_CONNECTIONS = 8
IDLE_SECONDS = 30.0
CONNECT_SECONDS = 5.0


class RefusedAddressError(OSError):
    """The address that was about to be dialled is not allowed."""


class Answer(NamedTuple):
    """An answer, or why there is none: then `error` says so in one line and `status` is None."""

    status: int | None
    error: str | None
    body: bytes
    headers: Mapping[str, str]
    elapsed_ms: float
    retry_after_ms: int | None = None

    @property
    def text(self) -> str | None:
        """The beginning of the body, printable; None when there was no answer."""
        return None if self.status is None else printable(self.body)


class EndpointClient:
    """Posts to one endpoint. No proxy from the environment, no cookies, no redirects."""

    def __init__(
        self,
        *,
        timeout: float,
        allowed_networks: Iterable[IPv4Network | IPv6Network],
        ca_file: Path | None,
        user_agent: str,
        now: Callable[[], int],
        place: str,
    ) -> None:
        self._guard = Guard((), allowed_networks, ())
        self._now = now
        self._place = place
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file is not None else None)
        connector = TCPConnector(
            limit=MAX_CONNECTIONS,
            keepalive_timeout=IDLE_SECONDS,
            use_dns_cache=False,
            ssl=context,
            # Every address passes through here when its socket is made, literals and names alike.
            socket_factory=self._make_socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=ClientTimeout(total=timeout, connect=min(timeout, CONNECT_SECONDS)),
            headers={"User-Agent": user_agent},
            skip_auto_headers=("Accept-Encoding",),
        )

    def _make_socket(self, info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        if self._guard.check_address(address[0], address[1]) is not None:
            raise RefusedAddressError(
                f"{address[0]} is a private address: allow it in {self._place} allowed_networks if it is yours"
            )
        return socket.socket(family, kind, protocol)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send the body and return the answer; its body is read up to ANSWER_BYTES."""
        loop = asyncio.get_running_loop()
        began = loop.time()

        def elapsed() -> float:
            return (loop.time() - began) * 1000

        try:
            async with self._session.post(
                url, data=body, headers={"Content-Type": "application/json", **headers}, allow_redirects=False
            ) as response:
                start = b""
                while len(start) < ANSWER_BYTES and (part := await response.content.read(ANSWER_BYTES - len(start))):
                    start += part
                if not response.content.at_eof():
                    # The rest is not worth reading: the connection goes with it.
                    response.close()
                return Answer(
                    response.status,
                    None,
                    start,
                    {name.lower(): value for name, value in response.headers.items()},
                    elapsed(),
                    retry_after_ms(response.headers.get("Retry-After"), self._now()),
                )
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            return Answer(None, describe_error(error), b"", {}, elapsed())

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()


def describe_error(error: BaseException) -> str:
    """Return one line about why there was no answer. It never holds the address, whose query may be a secret."""
    refused = _refused(error)
    if refused is not None:
        return str(refused)
    if isinstance(error, TimeoutError):
        return "no answer within the timeout"
    if isinstance(error, ClientConnectorDNSError):
        return "the name cannot be resolved"
    if isinstance(error, ClientConnectorCertificateError):
        return f"the certificate is not trusted: {_line(error.certificate_error)}"
    if isinstance(error, ClientSSLError):
        return f"TLS failed: {_line(error)}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {error.os_error.strerror or _line(error.os_error)}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the connection was closed without an answer"
    if isinstance(error, aiohttp.InvalidURL):
        return "the address cannot be used"
    if isinstance(error, OSError):
        return f"the connection failed: {error.strerror or type(error).__name__}"
    return f"the answer is not HTTP: {type(error).__name__}"


def _refused(error: BaseException | None) -> RefusedAddressError | None:
    for _ in range(8):
        if error is None or isinstance(error, RefusedAddressError):
            return error
        nested = [each for each in getattr(error, "exceptions", ()) if _refused(each) is not None]
        error = nested[0] if nested else getattr(error, "os_error", None) or error.__cause__ or error.__context__
    return None


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
