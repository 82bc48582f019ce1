"""Provides what all pages share: access, forms, rendering, and error pages."""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode
from uuid import uuid4

import msgspec
import structlog
from aiohttp import web
from yarl import URL

from notify_server.action_log import CALLER
from notify_server.callbacks.errors import RefusedError
from notify_server.config import Config
from notify_server.errors import StoreUnavailableError
from notify_server.web.admin import CSRF_FIELD, Admin
from notify_server.web.api.endpoints import describe
from notify_server.web.api.handlers import Api
from notify_server.web.dashboard.forms import local_target, read_form
from notify_server.web.language import texts_for
from notify_server.web.public_url import PublicUrl, is_loopback
from notify_server.web.reference import reference
from notify_server.web.rendering import Static, page, page_headers

log = structlog.get_logger("notify_server.web")


class View(NamedTuple):
    """A page or an action. `handler` takes the dashboard, the request and, for POST, the form's fields.

    Views that are `open` need no log-in.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[web.Response]]
    open: bool = False


class Callback(NamedTuple):
    """The callback URL, what must be done before it is registered (a key of the texts), and a command that tests it."""

    url: str
    warning: str | None
    curl: str


class Dashboard:
    """The pages' context. `now` gives Unix ms."""

    def __init__(self, config: Config, api: Api, admin: Admin, version: str, now: Callable[[], int]) -> None:
        self.callback_path = config.server.callback_path
        self.api = api
        self.admin = admin
        self.now = now
        self.public_url = PublicUrl(config.server)
        self.static = Static()
        self.reference = reference(describe(version))
        self.rejection_days = config.retention.rejections / 86_400
        self.expiring_before = config.alert.expiring_before
        self.quiet_limits = config.alert.quiet_limits
        self._callback_token = config.auth.callback_token is not None
        self._body_timeout = config.server.body_timeout
        self._version = version

    async def answer(self, view: View, request: web.Request) -> web.StreamResponse:
        """Answer a request to the view's path."""
        request_id = str(uuid4())
        # The path of a log-in holds its code.
        log.debug("request", request_id=request_id, method=request.method, path=view.path, remote=request.remote)
        try:
            if not view.open:
                self.admin.authenticate(request)
            form = await read_form(request, self._body_timeout) if view.method == "POST" else None
            if not view.open:
                self.admin.check(request, form.get(CSRF_FIELD, "") if form is not None else None)
            elif form is not None:
                self.admin.check_same_site(request)
            CALLER.set(f"page {self.admin.address(request)}")
            return await (view.handler(self, request) if form is None else view.handler(self, request, form))
        except RefusedError as error:
            log.info("refused", request_id=request_id, path=request.path, status=error.status, detail=error.message)
            return self._refused(request, error)
        except StoreUnavailableError as error:
            log.warning("request failed", request_id=request_id, path=request.path, error=str(error))
            return self.message(request, "unavailable", 503, str(error))

    def render(
        self, request: web.Request, template: str, *, status: int = 200, images: bool = False, **context: Any
    ) -> web.Response:
        """Render a template with what every page needs."""
        prefix = self.public_url.prefix(request)
        common = {
            "t": texts_for(request),
            "static": f"/ui/static/{self.static.version}",
            "csrf": self.admin.csrf(request),
            "here": request.rel_url.raw_path_qs if request.method == "GET" else "/",
            "logged_in": self.admin.logged_in(request),
            "known": self.admin.knows(request),
            "version": self._version,
            "q": "",
            "root": prefix,
            "with_query": lambda **changes: _with_query(request, changes),
        }
        return page(request, template, common | context, status=status, images=images, prefix=prefix)

    def message(self, request: web.Request, kind: str, status: int, detail: str = "") -> web.Response:
        """Render a page with only an error."""
        return self.render(request, "message.html", kind=kind, detail=detail, status=status)

    def redirect(self, request: web.Request, target: str) -> web.Response:
        """Redirect to a path of this site."""
        location = self.public_url.prefix(request) + target
        return web.Response(status=303, headers={**page_headers(), "Location": location})

    def outcome(
        self, request: web.Request, *, heading: str, part: str = "outcome.html", **context: Any
    ) -> web.Response:
        """Render the result of an action: in place of its button, or as a page where there are no scripts. `heading` is
        a key of the texts.
        """
        template = part if is_htmx(request) else "action.html"
        return self.render(request, template, current="", part=part, heading=heading, **context)

    def callback(self, request: web.Request) -> Callback:
        """Describe the callback to someone who is about to register it."""
        url = self.public_url.base(request) + self.callback_path
        return Callback(
            # The platform sends no header of ours, so the token goes into the URL.
            f"{url}?token=<callback_token>" if self._callback_token else url,
            _warning(url),
            self.sample_post(request),
        )

    def sample_post(self, request: web.Request) -> str:
        """Return a command that posts a notification."""
        key = "8ZAFUPII49GQN2AB/IMAGE/-1091150479/L2FwdF9jb21tb24vb18xZmRsdXNzNWkx"
        file = {"oss_object_name": key, "target_url": f"https://example.com/{key}.JPG", "status": "FINISHED"}
        body = {"batch_id": "my-first-batch", "api_code": "rent.dcentralize.room.add", "file_list": [file]}
        authorization = "-H 'Authorization: Bearer <callback_token>' " if self._callback_token else ""
        return (
            f"curl {shlex.quote(self.public_url.base(request) + self.callback_path)} {authorization}"
            f"-H 'Content-Type: application/json' \\\n  -d {shlex.quote(msgspec.json.encode(body).decode())}"
        )

    def _refused(self, request: web.Request, error: RefusedError) -> web.Response:
        prefix = self.public_url.prefix(request)
        if error.status == 401:
            if is_htmx(request):
                login = f"/ui/login?{urlencode({'next': _current_page(request, prefix)})}"
                return web.Response(status=401, headers={**page_headers(), "HX-Redirect": prefix + login})
            if request.method in ("GET", "HEAD") and "Authorization" not in request.headers:
                query = urlencode({"next": request.rel_url.raw_path_qs})
                return self.redirect(request, "/ui/login" if request.path == "/" else f"/ui/login?{query}")
        if error.status == 404:
            response = self.message(request, "not_found", 404)
        elif is_htmx(request):
            # Shown in place of the action's button.
            response = self.render(request, "outcome.html", outcome="refused", detail=error.message, status=422)
        else:
            response = self.message(request, "refused", error.status, error.message)
        response.headers.extend(error.headers)
        return response


def _warning(url: str) -> str | None:
    """Return why the platform cannot use this URL (a key of the texts); None when it can."""
    try:
        parsed = URL(url)
    except ValueError:
        return None
    if is_loopback(parsed.host or ""):
        return "loopback"
    return "plain_http" if parsed.scheme == "http" else None


def is_htmx(request: web.Request) -> bool:
    """Return True when a script asks for a part of a page."""
    return "HX-Request" in request.headers


def _current_page(request: web.Request, prefix: str) -> str:
    """Return the page that a script runs on, to come back to after the log-in."""
    try:
        url = URL(request.headers.get("HX-Current-URL", "/"), encoded=True)
    except ValueError:
        return "/"
    return local_target(url.raw_path_qs.removeprefix(prefix))


def _with_query(request: web.Request, changes: Mapping[str, object]) -> str:
    """Return this page's address with other parameters, without those that are None, and on its first page."""
    merged: dict[str, object] = {**request.query, "cursor": None, **changes}
    query = urlencode({name: value for name, value in merged.items() if value not in (None, "")})
    return f"{request.path}?{query}" if query else request.path
