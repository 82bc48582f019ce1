"""The dashboard: what is in the record and what goes on, as pages, and the actions that a person takes there.

Every page is a call or a few of the API's own methods. It works without scripts; with them, parts of a page are
refreshed and actions are answered in place (htmx), and the overview is live.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit
from uuid import uuid4

import msgspec
import structlog
from aiohttp import web
from msgspec import Struct

from notify_server.callbacks.errors import RefusedError
from notify_server.callbacks.refused_body import readable
from notify_server.config import Config
from notify_server.contract.object_key import decode_object_key
from notify_server.errors import StoreUnavailableError
from notify_server.model import CircuitState, FileState, Verdict
from notify_server.operations import Id, Recheck, Text
from notify_server.store.reading.types import Cursor, FailureGroup, FileDetail, FileFilter, FileItem, Found, Totals
from notify_server.telemetry.history import Sample
from notify_server.web.admin import CSRF_FIELD, Admin
from notify_server.web.api.handlers import (
    ENDPOINTS,
    MAX_GROUPS,
    Api,
    BatchFileQuery,
    BatchQuery,
    FileQuery,
    PageQuery,
    SearchQuery,
    SeriesQuery,
)
from notify_server.web.openapi import document
from notify_server.web.reference import reference
from notify_server.web.rendering import (
    LANGUAGE_COOKIE,
    LANGUAGES,
    YEAR_SECONDS,
    Static,
    is_link,
    page,
    page_headers,
    texts_for,
)

log = structlog.get_logger("notify_server.web")

T = TypeVar("T")

FORM_LIMIT = 64 * 1024
MAX_FIELDS = 50
# How many there are on the overview of what needs attention.
MAX_ATTENTION = 5
# Batches that wait for less than this are no cause for concern.
CALM_SECONDS = 60.0
MAX_HOSTS_SHOWN = 200
MAX_PICTURES = 60
# What is not settled is looked at again after so many seconds.
REFRESH_SECONDS = 3


class View(NamedTuple):
    """A page or an action: where it is, and the method of Dashboard that answers. `open` ones need no log-in."""

    method: str
    path: str
    handler: str
    open: bool = False


VIEWS = (
    View("GET", "/", "overview"),
    View("GET", "/ui/batches", "batches"),
    View("GET", "/ui/batches/{id:[0-9]{1,18}}", "batch"),
    View("GET", "/ui/files", "files"),
    View("GET", "/ui/files/{id:[0-9]{1,18}}", "file"),
    View("GET", "/ui/failures", "failures"),
    View("GET", "/ui/hosts", "hosts"),
    View("GET", "/ui/rejections", "rejections"),
    View("GET", "/ui/rejections/{id:[0-9]{1,18}}", "rejection"),
    View("GET", "/ui/search", "search"),
    View("GET", "/ui/recheck", "recheck_asked"),
    View("POST", "/ui/recheck", "recheck"),
    View("POST", "/ui/rejections/{id:[0-9]{1,18}}/replay", "replay"),
    View("GET", "/docs", "docs"),
    View("GET", "/ui/login", "login_form", open=True),
    View("POST", "/ui/login", "login", open=True),
    View("POST", "/ui/logout", "logout"),
    View("POST", "/ui/language", "language", open=True),
    View("GET", "/ui/static/{version}/{name:.+}", "static", open=True),
    View("GET", "/ui{path:(/.*)?}", "nothing"),
)

Form = Mapping[str, str]


class BatchPage(Struct, frozen=True, forbid_unknown_fields=True):
    """Which files of a batch to show, and how; without a state, those that are missing, if any are."""

    state: Literal["all", "pending", "available", "unavailable", "blocked", "upload_failed"] | None = None
    view: Literal["table", "pictures"] = "table"
    cursor: Cursor | None = None


class FilesPage(Struct, frozen=True, forbid_unknown_fields=True):
    """Which files to show: those that fail for a reason, or those that wait."""

    reason: Text | None = None
    host: Text | None = None
    state: FileState | None = None
    cursor: Cursor | None = None


class BatchesPage(Struct, frozen=True, forbid_unknown_fields=True):
    """Which batches to show. Times are ISO 8601, UTC when they have no offset."""

    verdict: Verdict | None = None
    api_code: Text | None = None
    received_from: Text | None = None
    received_before: Text | None = None
    cursor: Cursor | None = None


class Asked(Struct, frozen=True, forbid_unknown_fields=True):
    """Which files are to be asked for anew."""

    file: Id | None = None
    batch: Id | None = None
    reason: Text | None = None
    host: Text | None = None
    state: FileState | None = None

    def recheck(self, *, dry_run: bool) -> Recheck:
        wanted = Recheck(file=self.file, batch=self.batch, reason=self.reason, host=self.host, dry_run=dry_run)
        return wanted if self.state is None else msgspec.structs.replace(wanted, states=[self.state])


class Dashboard:
    """`now` gives Unix ms."""

    def __init__(self, config: Config, api: Api, admin: Admin, version: str, now: Callable[[], int]) -> None:
        self._callback_path = config.server.callback_path
        self._callback_token = config.auth.callback_token is not None
        self._body_timeout = config.server.body_timeout
        self._api = api
        self._admin = admin
        self._version = version
        self._now = now
        self._static = Static()
        self._reference = reference(document(ENDPOINTS, version))

    async def handle(self, view: View, request: web.Request) -> web.StreamResponse:
        """Answer a request to the view's path."""
        request_id = str(uuid4())
        log.debug("asked", request_id=request_id, method=request.method, path=request.path, remote=request.remote)
        try:
            form = await self._form(request) if view.method == "POST" else None
            if not view.open:
                self._admin.check(request, form.get(CSRF_FIELD, "") if form is not None else None)
            elif form is not None:
                self._admin.check_same_site(request)
            handler: Callable[..., Awaitable[web.Response]] = getattr(self, view.handler)
            return await (handler(request) if form is None else handler(request, form))
        except RefusedError as error:
            log.info("refused", request_id=request_id, path=request.path, status=error.status, detail=error.message)
            return self._refused(request, error)
        except StoreUnavailableError as error:
            log.warning("not answered", request_id=request_id, path=request.path, error=str(error))
            return self._message(request, "unavailable", 503, str(error))

    # What every page has

    def _render(
        self, request: web.Request, template: str, *, status: int = 200, images: bool = False, **context: Any
    ) -> web.Response:
        texts = texts_for(request)
        known = self._admin.logged_in(request) if self._admin.needs_login else True
        everywhere = {
            "t": texts,
            "static": f"/ui/static/{self._static.version}",
            "csrf": self._admin.csrf(request),
            "here": request.rel_url.raw_path_qs if request.method == "GET" else "/",
            "needs_login": self._admin.needs_login,
            "known": known,
            "version": self._version,
            "q": "",
            "with_query": lambda **changes: _with_query(request, changes),
        }
        return page(request, template, everywhere | context, status=status, images=images)

    def _message(self, request: web.Request, kind: str, status: int, detail: str = "") -> web.Response:
        return self._render(request, "message.html", kind=kind, detail=detail, status=status)

    def _refused(self, request: web.Request, error: RefusedError) -> web.Response:
        if error.status == 401:
            if _is_htmx(request):
                here = urlsplit(request.headers.get("HX-Current-URL", "/"))
                login = f"/ui/login?{urlencode({'next': _local(f'{here.path}?{here.query}'.rstrip('?'))})}"
                return web.Response(status=401, headers={**page_headers(), "HX-Redirect": login})
            if request.method in ("GET", "HEAD") and "Authorization" not in request.headers:
                query = urlencode({"next": request.rel_url.raw_path_qs})
                return _see_other("/ui/login" if request.path == "/" else f"/ui/login?{query}")
        if error.status == 403 and not self._admin.needs_login:
            response = self._message(request, "forbidden", 403, error.message)
        elif error.status == 404:
            response = self._message(request, "not_found", 404)
        elif _is_htmx(request):
            # Shown where the action was asked for.
            response = self._render(request, "outcome.html", outcome="refused", detail=error.message, status=422)
        else:
            response = self._message(request, "refused", error.status, error.message)
        response.headers.extend(error.headers)
        return response

    async def _form(self, request: web.Request) -> dict[str, str]:
        """The fields of a form. Raises RefusedError."""
        if request.content_type != "application/x-www-form-urlencoded" or "Content-Encoding" in request.headers:
            raise RefusedError(415, "415", "Content-Type: must be application/x-www-form-urlencoded")
        body = b""
        try:
            async with asyncio.timeout(self._body_timeout):
                while part := await request.content.read(FORM_LIMIT + 1):
                    body += part
                    if len(body) > FORM_LIMIT:
                        raise RefusedError(413, "413", f"body: larger than {FORM_LIMIT} bytes")
        except TimeoutError:
            raise RefusedError(408, "408", "body: did not come in time", headers={"Connection": "close"}) from None
        try:
            return dict(parse_qsl(body.decode("utf-8", "replace"), max_num_fields=MAX_FIELDS))
        except ValueError as error:
            raise RefusedError(400, "400", f"body: more than {MAX_FIELDS} fields") from error

    # Pages

    async def overview(self, request: web.Request) -> web.Response:
        totals, now = await self._api.totals(), self._now()
        incomplete = await self._api.batches(BatchQuery(verdict=Verdict.INCOMPLETE, limit=MAX_ATTENTION))
        oldest, waited = None, 0.0
        if totals.oldest_pending_at is not None:
            before = totals.oldest_pending_at + timedelta(milliseconds=1)
            waiting = await self._api.batches(BatchQuery(verdict=Verdict.PENDING, received_before=before, limit=1))
            oldest = waiting.items[0] if waiting.items else None
            waited = now / 1000 - totals.oldest_pending_at.timestamp()
        hosts = (await self._api.hosts()).items
        shunned = [host for host in hosts if host.circuit is not CircuitState.CLOSED]
        failing = (await self._api.failures()).items
        return self._render(
            request,
            "overview.html",
            current="overview",
            totals=totals,
            process=await self._api.status(),
            pulse=_pulse((await self._api.series(SeriesQuery())).items),
            oldest=oldest if waited >= CALM_SECONDS else None,
            waited=waited,
            incomplete=incomplete.items,
            shunned=shunned[:MAX_ATTENTION],
            failing=failing[:MAX_ATTENTION],
            empty=_is_empty(totals),
            curl=self._sample_post(request),
        )

    async def batches(self, request: web.Request) -> web.Response:
        asked = _query(request, BatchesPage)
        wanted = BatchQuery(
            verdict=asked.verdict,
            api_code=asked.api_code,
            received_from=_time("received_from", asked.received_from),
            received_before=_time("received_before", asked.received_before),
            cursor=asked.cursor,
        )
        found, totals = await self._api.batches(wanted), await self._api.totals()
        return self._render(
            request,
            "batches.html",
            current="batches",
            asked=wanted,
            found=found,
            totals=totals,
            empty=_is_empty(totals),
            curl=self._sample_post(request),
        )

    async def batch(self, request: web.Request) -> web.Response:
        asked, id = _query(request, BatchPage), _id(request)
        batch = _there(await self._api.batch(id))
        pictures = asked.view == "pictures"
        missing = [FileState.UNAVAILABLE, FileState.BLOCKED, FileState.UPLOAD_FAILED, FileState.PENDING]
        if pictures:
            state: FileState | None = FileState.AVAILABLE
        elif asked.state is None:
            state = next((state for state in missing if getattr(batch, state)), None)
        else:
            state = None if asked.state == "all" else FileState(asked.state)
        query = BatchFileQuery(state=state, cursor=asked.cursor, limit=MAX_PICTURES if pictures else 50)
        files = _there(await self._api.batch_files(id, query))
        return self._render(
            request,
            "batch.html",
            images=pictures,
            current="batches",
            batch=batch,
            state=state,
            pictures=pictures,
            files=files,
            shown=[file for file in files.items if _is_picture(file)] if pictures else files.items,
            askable=batch.pending + batch.unavailable + batch.blocked,
            refresh=REFRESH_SECONDS if batch.pending and not pictures else 0,
        )

    async def files(self, request: web.Request) -> web.Response:
        asked = _query(request, FilesPage)
        if asked.reason is not None:
            found = await self._api.files(FileQuery(asked.reason, asked.host, asked.state, asked.cursor))
        else:
            asked = msgspec.structs.replace(asked, state=FileState.PENDING)
            try:
                found = await self._api.records.files(
                    FileFilter(state=FileState.PENDING, host=asked.host), asked.cursor, 50
                )
            except ValueError as error:
                raise RefusedError(400, "400", str(error)) from error
        return self._render(request, "files.html", current="failures", asked=asked, found=found)

    async def file(self, request: web.Request) -> web.Response:
        file = _there(await self._api.file(_id(request)))
        waiting = file.state is FileState.PENDING
        return self._render(
            request,
            "file.html",
            current="batches",
            file=file,
            key=decode_object_key(file.oss_object_name),
            curl=_curl(file),
            slowest=max((attempt.total_ms for attempt in file.requests), default=0.0),
            due=file.next_attempt_at is not None and file.next_attempt_at.timestamp() * 1000 <= self._now(),
            refresh=REFRESH_SECONDS if waiting else 0,
        )

    async def failures(self, request: web.Request) -> web.Response:
        groups = (await self._api.failures()).items
        by_reason: dict[str, list[FailureGroup]] = {}
        for group in groups:
            by_reason.setdefault(group.reason, []).append(group)
        return self._render(
            request, "failures.html", current="failures", by_reason=by_reason, full=len(groups) >= MAX_GROUPS
        )

    async def hosts(self, request: web.Request) -> web.Response:
        hosts = (await self._api.hosts()).items
        hosts.sort(key=lambda host: host.circuit is CircuitState.CLOSED)
        return self._render(
            request,
            "hosts.html",
            current="hosts",
            hosts=hosts[:MAX_HOSTS_SHOWN],
            more=max(0, len(hosts) - MAX_HOSTS_SHOWN),
            now=datetime.fromtimestamp(self._now() / 1000, UTC),
            refresh=REFRESH_SECONDS,
        )

    async def rejections(self, request: web.Request) -> web.Response:
        asked = _query(request, PageQuery)
        found = await self._api.rejections(asked)
        return self._render(request, "rejections.html", current="rejections", asked=asked, found=found)

    async def rejection(self, request: web.Request) -> web.Response:
        rejection = _there(await self._api.rejection(_id(request)))
        body = await asyncio.to_thread(readable, rejection.body, rejection.detail)
        return self._render(request, "rejection.html", current="rejections", rejection=rejection, body=body)

    async def search(self, request: web.Request) -> web.Response:
        q = request.query.get("q", "").strip()[:2000]
        if not q:
            return _see_other("/ui/batches")
        # A whole batch_id is what is mostly looked for, and costs no walk over the latest batches.
        named = (await self._api.batches(BatchQuery(batch_id=q))).items
        found = Found(named, []) if named else await self._api.search(SearchQuery(q))
        if not named and is_link(q) and not found.files:
            # An address of the platform's has the key as its path.
            found = await self._api.search(SearchQuery(urlsplit(q).path.lstrip("/").partition("!")[0] or q))
        if len(found.batches) + len(found.files) == 1:
            kind = "batches" if found.batches else "files"
            return _see_other(f"/ui/{kind}/{(found.batches or found.files)[0].id}")
        return self._render(request, "search.html", current="search", q=q, found=found)

    async def docs(self, request: web.Request) -> web.Response:
        return self._render(
            request,
            "docs.html",
            current="docs",
            reference=self._reference,
            base=_base(request),
            curl=self._sample_post(request),
            quote=shlex.quote,
            callback_path=self._callback_path,
        )

    async def nothing(self, request: web.Request) -> web.Response:
        return self._message(request, "not_found", 404)

    async def static(self, request: web.Request) -> web.Response:
        response = self._static.answer(request.match_info["version"], request.match_info["name"])
        return self._message(request, "not_found", 404) if response is None else response

    # Actions

    async def recheck_asked(self, request: web.Request) -> web.Response:
        """How many files it would be, and a button."""
        asked = _query(request, Asked)
        counted = _there(await self._api.recheck(asked.recheck(dry_run=True)))
        return self._outcome(
            request,
            outcome="confirm" if counted.files else "nothing",
            files=counted.files,
            fields=_fields(asked),
            back=_back(asked),
        )

    async def recheck(self, request: web.Request, form: Form) -> web.Response:
        asked = _convert({name: form[name] for name in Asked.__struct_fields__ if form.get(name)}, Asked)
        done = _there(await self._api.recheck(asked.recheck(dry_run=False)))
        response = self._outcome(
            request,
            outcome=("more" if done.more else "done") if done.files else "nothing",
            files=done.files,
            back=_back(asked),
        )
        response.headers["HX-Trigger"] = "refresh"
        return response

    async def replay(self, request: web.Request, form: Form) -> web.Response:
        id = _id(request)
        rejection = _there(await self._api.rejection(id))
        body = await asyncio.to_thread(readable, rejection.body, rejection.detail)
        taken = _there(await self._api.replay(id))
        return self._outcome(request, outcome="replayed", taken=taken, batch_id=body.batch_id, back="/ui/rejections")

    def _outcome(self, request: web.Request, **context: Any) -> web.Response:
        return self._render(request, "outcome.html" if _is_htmx(request) else "action.html", current="", **context)

    # Log-in, language

    async def login_form(self, request: web.Request) -> web.Response:
        to = _local(request.query.get("next"))
        if not self._admin.needs_login or self._admin.logged_in(request):
            return _see_other(to)
        return self._render(request, "login.html", to=to, wrong="")

    async def login(self, request: web.Request, form: Form) -> web.Response:
        to = _local(form.get("next"))
        response = _see_other(to)
        try:
            if self._admin.log_in(request, form.get("token", "").strip(), response):
                return response
        except RefusedError as error:
            slow = self._render(request, "login.html", to=to, wrong="slow", status=error.status)
            slow.headers.extend(error.headers)
            return slow
        return self._render(request, "login.html", to=to, wrong="wrong", status=401)

    async def logout(self, request: web.Request, form: Form) -> web.Response:
        response = _see_other("/ui/login")
        self._admin.log_out(response)
        return response

    async def language(self, request: web.Request, form: Form) -> web.Response:
        response = _see_other(_local(form.get("next")))
        if (chosen := form.get("to", "")) in LANGUAGES:
            response.set_cookie(LANGUAGE_COOKIE, chosen, max_age=YEAR_SECONDS, path="/", samesite="Lax", httponly=True)
        return response

    def _sample_post(self, request: web.Request) -> str:
        """A command that posts a notification."""
        key = "8ZAFUPII49GQN2AB/IMAGE/-1091150479/L2FwdF9jb21tb24vb18xZmRsdXNzNWkx"
        file = {"oss_object_name": key, "target_url": f"https://example.com/{key}.JPG", "status": "FINISHED"}
        body = {"batch_id": "my-first-batch", "api_code": "rent.dcentralize.room.add", "file_list": [file]}
        authorization = "-H 'Authorization: Bearer <callback_token>' " if self._callback_token else ""
        return (
            f"curl {shlex.quote(_base(request) + self._callback_path)} {authorization}"
            f"-H 'Content-Type: application/json' \\\n  -d {shlex.quote(msgspec.json.encode(body).decode())}"
        )


# --- What pages are made of ---


def _is_empty(totals: Totals) -> bool:
    return not totals.batches and not totals.rejections


def _is_picture(file: FileItem) -> bool:
    return is_link(file.target_url) and (file.content_type or "").lower().startswith("image/")


def _pulse(seconds: list[Sample]) -> dict[str, Any]:
    """The last ten minutes in numbers; latencies are the latest that there are."""

    def latest(name: str) -> float | None:
        values = (getattr(sample, name) for sample in reversed(seconds))
        return next((value for value in values if value is not None), None)

    counted = ("accepted", "refused", "requests", "failed_requests", "complete", "incomplete")
    latencies = ("ack_p50_ms", "ack_p99_ms", "probe_p50_ms", "probe_p99_ms")
    last = seconds[-1] if seconds else None
    return {
        "sums": {name: sum(getattr(sample, name) for sample in seconds) for name in counted},
        "rates": {
            name: getattr(last, name) / last.seconds if last is not None and last.seconds else 0.0 for name in counted
        },
        "latencies": {name: latest(name) for name in latencies},
    }


def _curl(file: FileDetail) -> str | None:
    """A command that asks as we do, for a terminal."""
    if file.target_url is None or not is_link(file.target_url):
        return None
    return f"curl --globoff --silent --show-error --head {shlex.quote(file.target_url)}"


def _fields(asked: Asked) -> dict[str, str]:
    return {name: str(value) for name, value in msgspec.structs.asdict(asked).items() if value is not None}


def _back(asked: Asked) -> str:
    if asked.file is not None:
        return f"/ui/files/{asked.file}"
    return "/ui/failures" if asked.batch is None else f"/ui/batches/{asked.batch}"


def _base(request: web.Request) -> str:
    return f"{request.scheme}://{request.host}"


def _is_htmx(request: web.Request) -> bool:
    return "HX-Request" in request.headers


# --- What is asked for ---


def _query(request: web.Request, kind: type[T]) -> T:
    """The address's parameters; those left empty in a form are not there."""
    return _convert({name: value for name, value in request.query.items() if value}, kind)


def _convert(values: Mapping[str, str], kind: type[T]) -> T:
    try:
        return msgspec.convert(dict(values), kind, strict=False)
    except msgspec.ValidationError as error:
        raise RefusedError(400, "400", str(error)) from error


def _id(request: web.Request) -> int:
    return int(request.match_info["id"])


def _there(answer: T | None) -> T:
    if answer is None:
        raise RefusedError(404, "404", "there is none with this id: it may have been deleted")
    return answer


def _time(name: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        # A time at the end of the calendar may be beyond it elsewhere.
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise RefusedError(400, "400", f"{name}: is not a time: write 2026-11-23T03:04:18Z") from error


def _with_query(request: web.Request, changes: Mapping[str, object]) -> str:
    """This address with other parameters; those that are None are left out, and the page begins anew."""
    merged: dict[str, object] = {**request.query, "cursor": None, **changes}
    query = urlencode({name: value for name, value in merged.items() if value not in (None, "")})
    return f"{request.path}?{query}" if query else request.path


def _local(target: str | None) -> str:
    """An address of ours to go to, or the overview when it could lead anywhere else."""
    return target if target is not None and re.fullmatch(r"/(?![/\\])[!-\[\]-~]*", target) else "/"


def _see_other(target: str) -> web.Response:
    return web.Response(status=303, headers={**page_headers(), "Location": target})
