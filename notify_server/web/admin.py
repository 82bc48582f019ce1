"""Who may look at the record and act on it: whoever has the admin_token, as a Bearer or through a log-in; without one,
whoever is on this machine.

A log-in is a cookie that proves itself: when it ends, and a MAC that only the admin_token makes. Nothing of it is
stored, so it holds on every node, and changing the token ends them all.
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
# Log-ins a second from one source: a person needs one, and a program that guesses needs many.
LOGINS_A_SECOND = 3

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LOCAL_NAMES = frozenset({"localhost", "localhost."})
# What proxies add. One that adds nothing, as nginx unless it is told to, still speaks HTTP/1.0 to us.
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
    """`now` gives Unix ms."""

    def __init__(self, config: Config, now: Callable[[], int]) -> None:
        token = config.auth.admin_token
        self._token = token.get_secret_value().encode() if token is not None else None
        # Without a token nobody logs in, and nobody can know the key.
        self._key = hmac.digest(self._token or secrets.token_bytes(), b"notify_server log-in", hashlib.sha256)
        self._trusted = config.server.trusted_proxies
        self._secure = config.server.ssl_certificate is not None
        self._logins = RateLimit(LOGINS_A_SECOND)
        self._now = now

    @property
    def needs_login(self) -> bool:
        """Whether there is an admin_token, so that a browser has to log in."""
        return self._token is not None

    def guard(self, handler: Handler) -> Handler:
        """The handler, for those who are let in; others are answered as the API answers."""

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
        """Raises RefusedError unless the request may look, and, where its method is not safe, act.

        `csrf` is the token of a form; a script sends it in a header.
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
        # Whoever comes through a proxy, or under a name that a page of another site has made point here, is not local.
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
        """A page of another site may lead here, but neither fetch nor frame what is here (W3C Fetch Metadata)."""
        led = (
            request.headers.get("Sec-Fetch-Mode") == "navigate" and request.headers.get("Sec-Fetch-Dest") == "document"
        )
        if not led and not _is_same_site(request):
            raise RefusedError(403, "403", "other sites cannot look at this")

    def check_same_site(self, request: web.Request) -> None:
        """Raises RefusedError when a page of another site has made the browser send this. Programs send neither of the
        headers that tell.
        """
        origin = request.headers.get("Origin")
        # Browsers tell the site on https and on this machine only. A proxy may have changed the host.
        if "Sec-Fetch-Site" in request.headers:
            same = _is_same_site(request)
        else:
            same = origin is None or origin.partition("://")[2] == request.host
        if not same:
            raise RefusedError(403, "403", "requests from other sites are not taken")

    # Log-in

    def log_in(self, request: web.Request, token: str, response: web.StreamResponse) -> bool:
        """Give the response the cookie if this is the admin_token; whether it is. Raises RefusedError (429) when this
        source has tried too often."""
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
        """Take the cookie away."""
        response.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict")

    def logged_in(self, request: web.Request) -> bool:
        """Whether the request has a cookie of ours that has not ended."""
        if self._token is None:
            return False
        ends, _, mac = request.cookies.get(COOKIE, "").partition(".")
        if not (ends.isascii() and ends.isdigit() and len(ends) < 16):
            return False
        presented = mac.encode("utf-8", "surrogatepass")
        expected = self._mac(f"session {ends}").encode()
        return hmac.compare_digest(presented, expected) and self._now() < int(ends) * 1000

    def csrf(self, request: web.Request) -> str:
        """What forms and scripts of a page send back, so that it is known to be ours."""
        return self._mac(f"csrf {request.cookies.get(COOKIE, '')}")

    def _came_by_tls(self, request: web.Request) -> bool:
        """Whether a trusted proxy says that the browser spoke TLS to it."""
        told = request.headers.get("X-Forwarded-Proto", "").strip().lower()
        return told == "https" and within(request.remote or "", self._trusted)

    def _mac(self, text: str) -> str:
        return hmac.new(self._key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _is_same_site(request: web.Request) -> bool:
    return request.headers.get("Sec-Fetch-Site", "none") in ("same-origin", "none")


def _unauthorized(message: str) -> RefusedError:
    return RefusedError(401, "401", message, headers={"WWW-Authenticate": "Bearer"})
