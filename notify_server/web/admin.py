"""Authorizes access to the dashboard and the API: by the admin_token, as a Bearer or through a log-in; without one,
only from this machine.

The session cookie holds its expiry and a MAC keyed by the admin_token. No session is stored, so it is valid on every
node, and changing the token ends all sessions.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from uuid import uuid4

import structlog
import yarl
from aiohttp import HttpVersion11, web

from notify_server.callbacks.access import RateLimit, client_address, source_of, within
from notify_server.callbacks.errors import RefusedError, error_response
from notify_server.config import Config

log = structlog.get_logger("notify_server.web")

COOKIE = "notify_server_session"
CSRF_FIELD = "csrf"
CSRF_HEADER = "X-CSRF-Token"
SESSION_SECONDS = 12 * 3600
# Log-in attempts per second and source, against guessing.
LOGINS_A_SECOND = 3

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LOCAL_NAMES = frozenset({"localhost", "localhost."})
# Headers that proxies add. A proxy that adds none, like nginx by default, speaks HTTP/1.0.
_FORWARDED = re.compile(
    "forwarded|via|x-forwarded-.+|x-real-ip|x-client-ip|true-client-ip|cf-connecting-ip", re.IGNORECASE
)


def is_loopback(host: str) -> bool:
    """Return True for a loopback address or a name of this machine."""
    if host.lower() in LOCAL_NAMES:
        return True
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _host_of(request: web.Request) -> str:
    """The name in the Host header, without its port."""
    try:
        return yarl.URL(f"http://{request.host}").host or ""
    except ValueError:
        return ""


class Admin:
    """Checks requests against the admin_token and issues session cookies. `now` gives Unix ms."""

    def __init__(self, config: Config, now: Callable[[], int]) -> None:
        token = config.auth.admin_token
        self._token = token.get_secret_value().encode() if token is not None else None
        # Without a token there are no sessions; the random key cannot be guessed.
        self._key = hmac.digest(self._token or secrets.token_bytes(), b"notify_server log-in", hashlib.sha256)
        self._trusted = config.server.trusted_proxies
        self._secure = config.server.ssl_certificate is not None
        self._logins = RateLimit(LOGINS_A_SECOND)
        self._now = now

    @property
    def needs_login(self) -> bool:
        """True when there is an admin_token, so that browsers have to log in."""
        return self._token is not None

    def guard(self, handler: Handler) -> Handler:
        """Wrap a handler so that unauthorized requests get the API's error answer."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            request_id = str(uuid4())
            try:
                self.check(request)
            except RefusedError as error:
                log.info("refused", request_id=request_id, path=request.path, status=error.status, detail=error.message)
                return error_response(request_id, error.status, error.code, error.message, error.headers)
            return await handler(request)

        return guarded

    def check(self, request: web.Request, csrf: str | None = None) -> None:
        """Raise RefusedError unless the request may read and, when its method is not safe, act.

        `csrf` is the token of a form; scripts send it in a header.
        """
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        if self._token is None:
            self._check_local(request)
        elif scheme.lower() == "bearer":
            # A page of another site cannot make a browser send this header.
            if not hmac.compare_digest(credentials.strip().encode("utf-8", "surrogatepass"), self._token):
                raise _unauthorized("this is not the admin_token")
            return
        elif not self.logged_in(request):
            raise _unauthorized("send the admin_token as Authorization: Bearer, or log in")
        if request.method in SAFE_METHODS:
            self._check_not_embedded(request)
            return
        self.check_same_site(request)
        presented = csrf if csrf is not None else request.headers.get(CSRF_HEADER, "")
        if self._token is not None and not hmac.compare_digest(
            presented.encode("utf-8", "surrogatepass"), self.csrf(request).encode()
        ):
            raise RefusedError(403, "403", f"{CSRF_HEADER}: is missing or stale, load the page again")

    def _check_local(self, request: web.Request) -> None:
        # Requests through a proxy are not local, nor are those to a foreign name (DNS rebinding).
        peer, host = request.remote or "", _host_of(request)
        forwarded = (
            within(peer, self._trusted)
            or request.version < HttpVersion11
            or any(_FORWARDED.fullmatch(name) for name in request.headers)
        )
        if forwarded or not is_loopback(peer) or not (is_loopback(host) or host in LOCAL_NAMES):
            raise RefusedError(403, "403", "without [auth] admin_token this is answered on this machine only: set one")

    @staticmethod
    def _check_not_embedded(request: web.Request) -> None:
        """Raise RefusedError when another site's page fetches or frames this (W3C Fetch Metadata); links are fine."""
        is_link = (
            request.headers.get("Sec-Fetch-Mode") == "navigate" and request.headers.get("Sec-Fetch-Dest") == "document"
        )
        if not is_link and not _is_same_site(request):
            raise RefusedError(403, "403", "other sites cannot read this")

    def check_same_site(self, request: web.Request) -> None:
        """Raise RefusedError when a page of another site sent this. Programs send neither of the headers checked."""
        origin = request.headers.get("Origin")
        # Browsers send Sec-Fetch-Site to https and loopback only, and a proxy may have changed the host.
        if "Sec-Fetch-Site" in request.headers:
            same = _is_same_site(request)
        else:
            same = origin is None or origin.partition("://")[2] == request.host
        if not same:
            raise RefusedError(403, "403", "requests from other sites are refused")

    # Log-in

    def log_in(self, request: web.Request, token: str, response: web.StreamResponse) -> bool:
        """Return True and set the session cookie if this is the admin_token. Raises RefusedError (429) when the source
        has tried too often."""
        peer = client_address(request.remote or "", request.headers, self._trusted)
        if self._logins.wait(source_of(peer), asyncio.get_running_loop().time()):
            raise RefusedError(429, "429", "too many log-ins, wait a moment", headers={"Retry-After": "1"})
        if self._token is None or not hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self._token):
            log.warning("log-in refused", remote=peer)
            return False
        ends = self._now() // 1000 + SESSION_SECONDS
        response.set_cookie(
            COOKIE,
            f"{ends}.{self._mac(f'session {ends}')}",
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="Strict",
            secure=self._secure or self._came_by_tls(request),
            path="/",
        )
        log.info("logged in", remote=peer)
        return True

    @staticmethod
    def log_out(response: web.StreamResponse) -> None:
        """Delete the session cookie."""
        response.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict")

    def logged_in(self, request: web.Request) -> bool:
        """Return True when the request has a valid session cookie."""
        if self._token is None:
            return False
        ends, _, mac = request.cookies.get(COOKIE, "").partition(".")
        if not (ends.isascii() and ends.isdigit() and len(ends) < 16):
            return False
        presented = mac.encode("utf-8", "surrogatepass")
        expected = self._mac(f"session {ends}").encode()
        return hmac.compare_digest(presented, expected) and self._now() < int(ends) * 1000

    def csrf(self, request: web.Request) -> str:
        """Return the CSRF token, which the forms and scripts of this session send back."""
        return self._mac(f"csrf {request.cookies.get(COOKIE, '')}")

    def _came_by_tls(self, request: web.Request) -> bool:
        """Return True when a trusted proxy says that the browser used TLS."""
        scheme = request.headers.get("X-Forwarded-Proto", "").strip().lower()
        return scheme == "https" and within(request.remote or "", self._trusted)

    def _mac(self, text: str) -> str:
        return hmac.new(self._key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _is_same_site(request: web.Request) -> bool:
    return request.headers.get("Sec-Fetch-Site", "none") in ("same-origin", "none")


def _unauthorized(message: str) -> RefusedError:
    return RefusedError(401, "401", message, headers={"WWW-Authenticate": "Bearer"})
