"""Authorizes access to the dashboard and the API: by the admin_token, as a Bearer or through a log-in.

The address of a request is not considered: behind a proxy every request has the address of this machine.

The session cookie holds its expiry, a random text and a MAC keyed by the admin_token. Only sessions that were ended
before their time are stored, so one is valid on every node, and changing the token ends all sessions.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable
from uuid import uuid4

import structlog
from aiohttp import web

from notify_server.action_log import COMMAND_AGENT
from notify_server.callbacks.access import RateLimit, client_address, source_of, within
from notify_server.callbacks.errors import RefusedError, error_response
from notify_server.config import Config
from notify_server.errors import StoreUnavailableError

log = structlog.get_logger("notify_server.web")

COOKIE = "notify_server_session"
CSRF_FIELD = "csrf"
CSRF_HEADER = "X-CSRF-Token"
SESSION_SECONDS = 12 * 3600
# Log-in attempts per second and source, against guessing.
LOGINS_A_SECOND = 3

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# A log-in code is in the log, which others may read later.
CODE_SECONDS = 15 * 60

_SESSION = re.compile(r"[0-9]{1,15}\.[0-9a-f]{32}")

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Admin:
    """Checks requests against the admin_token and issues session cookies. `now` gives Unix ms.

    The configured token counts; `own_token` is the one that the server made for itself, for when none is configured.
    `on_session_end` writes down that a session was ended before its time (Unix ms).
    """

    def __init__(
        self,
        config: Config,
        now: Callable[[], int],
        own_token: str | None = None,
        on_session_end: Callable[[str, int], Awaitable[None]] | None = None,
    ) -> None:
        configured = config.auth.admin_token
        self.is_configured = configured is not None
        token = configured.get_secret_value() if configured is not None else own_token
        if not token:
            raise ValueError("there is no admin_token")
        self.token = token.encode()
        self._key = hmac.digest(self.token, b"notify_server log-in", hashlib.sha256)
        self._trusted = config.server.trusted_proxies
        self._secure = config.server.ssl_certificate is not None
        self._logins = RateLimit(LOGINS_A_SECOND)
        self._now = now
        self._code = b""
        self._code_ends = 0
        self._on_session_end = on_session_end
        self._ended: set[str] = set()

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

    def guard_if_configured(self, handler: Handler) -> Handler:
        """Wrap as `guard` does where a token is configured. Without one the handler is open, so that a scraper of a new
        installation works.
        """
        return self.guard(handler) if self.is_configured else handler

    def address(self, request: web.Request) -> str:
        """Return the client's address, behind the trusted proxies."""
        return client_address(request.remote or "", request.headers, self._trusted)

    def caller(self, request: web.Request) -> str:
        """Return who calls the API: a command, which names its user, or any other client."""
        agent = request.headers.get("User-Agent", "")
        user = agent.removeprefix(COMMAND_AGENT)
        by = f"command {user} from" if user != agent else "api"
        return f"{by} {self.address(request)}"

    def check(self, request: web.Request, csrf: str | None = None) -> None:
        """Raise RefusedError unless the request may read and, when its method is not safe, act.

        `csrf` is the token of a form; scripts send it in a header.
        """
        if self.authenticate(request):
            return
        if request.method in SAFE_METHODS:
            self._check_not_embedded(request)
            return
        self.check_same_site(request)
        presented = csrf if csrf is not None else request.headers.get(CSRF_HEADER, "")
        if not hmac.compare_digest(presented.encode("utf-8", "surrogatepass"), self.csrf(request).encode()):
            raise RefusedError(403, "403", f"{CSRF_HEADER}: is missing or stale, load the page again")

    def authenticate(self, request: web.Request) -> bool:
        """Return True for a request with the token, which a page of another site cannot make a browser send, and False
        for one with a session. Raise RefusedError (401) for any other, before its body is read.
        """
        if (has_token := self._presents_token(request)) is False:
            raise _unauthorized("this is not the admin_token")
        if has_token is None and not self.logged_in(request):
            raise _unauthorized("send the admin_token as Authorization: Bearer, or log in")
        return has_token is True

    def knows(self, request: web.Request) -> bool:
        """Return True when the request has the token or a session."""
        has_token = self._presents_token(request)
        return self.logged_in(request) if has_token is None else has_token

    def _presents_token(self, request: web.Request) -> bool | None:
        """Return whether the request's Bearer is the admin_token, None without a Bearer."""
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        return hmac.compare_digest(credentials.strip().encode("utf-8", "surrogatepass"), self.token)

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
        peer = self._admit(request)
        if not hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self.token):
            log.warning("log-in refused", remote=peer)
            return False
        self._start_session(request, peer, response)
        return True

    def make_code(self) -> str:
        """Return a code that logs in once, within CODE_SECONDS. The code before it is void."""
        code = secrets.token_urlsafe()
        self._code = code.encode()
        self._code_ends = self._now() + CODE_SECONDS * 1000
        return code

    def log_in_once(self, request: web.Request, code: str, response: web.StreamResponse) -> bool:
        """Return True and set the session cookie if this is the code, which is void from then on. Raises RefusedError
        (429) when the source has tried too often."""
        peer = self._admit(request)
        valid = self._code and self._now() < self._code_ends
        if not hmac.compare_digest(code.encode("utf-8", "surrogatepass"), self._code) or not valid:
            log.warning("log-in refused: the address was used already, or is too old", remote=peer)
            return False
        self._code = b""
        self._start_session(request, peer, response)
        return True

    def _admit(self, request: web.Request) -> str:
        peer = self.address(request)
        if self._logins.wait(source_of(peer), asyncio.get_running_loop().time()):
            raise RefusedError(429, "429", "too many log-ins, wait a moment", headers={"Retry-After": "1"})
        return peer

    def _start_session(self, request: web.Request, peer: str, response: web.StreamResponse) -> None:
        session = f"{self._now() // 1000 + SESSION_SECONDS}.{secrets.token_hex(16)}"
        response.set_cookie(
            COOKIE,
            f"{session}.{self._mac(f'session {session}')}",
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="Strict",
            secure=self._secure or self._came_by_tls(request),
            path="/",
        )
        log.info("logged in", remote=peer)

    async def log_out(self, request: web.Request, response: web.StreamResponse) -> None:
        """End the session, so that its cookie is worth nothing any more, and delete the cookie."""
        response.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict")
        if (session := self._session(request)) is None:
            return
        self._ended.add(session)
        if self._on_session_end is None:
            return
        try:
            await self._on_session_end(session, int(session.partition(".")[0]) * 1000)
        except StoreUnavailableError as error:
            log.warning("the log-out is not recorded: the session is valid again after a restart", error=str(error))

    def end_sessions(self, sessions: Iterable[str]) -> None:
        """Take over which sessions were ended, here before a restart or on another server."""
        now = self._now() // 1000
        self._ended = {
            each for each in (*self._ended, *sessions) if _SESSION.fullmatch(each) and int(each.partition(".")[0]) > now
        }

    def logged_in(self, request: web.Request) -> bool:
        """Return True when the request has a valid session cookie."""
        return self._session(request) is not None

    def _session(self, request: web.Request) -> str | None:
        """Return the valid session that the request's cookie names."""
        session, _, mac = request.cookies.get(COOKIE, "").rpartition(".")
        presented = mac.encode("utf-8", "surrogatepass")
        if not hmac.compare_digest(presented, self._mac(f"session {session}").encode()):
            return None
        # From here on the text is one that was issued.
        return session if self._now() < int(session.partition(".")[0]) * 1000 and session not in self._ended else None

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
