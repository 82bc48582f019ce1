"""The pages: one function for each, which shows what one or a few calls of the API return."""

from __future__ import annotations

import asyncio
import shlex
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from aiohttp import web

from notify_server.callbacks.errors import RefusedError
from notify_server.callbacks.refused_body import readable
from notify_server.contract.object_key import decode_object_key
from notify_server.model import CircuitState, FileState, Verdict
from notify_server.store.reading.types import FailureGroup, FileDetail, FileItem, Found, Totals
from notify_server.telemetry.history import Sample
from notify_server.web.api.endpoints import NO_SUCH_ID
from notify_server.web.api.handlers import MAX_GROUPS
from notify_server.web.api.types import BatchFileQuery, BatchQuery, FileQuery, PageQuery, SearchQuery, SeriesQuery
from notify_server.web.dashboard.dashboard import Dashboard, base_url, see_other
from notify_server.web.dashboard.forms import BatchesPage, BatchPage, FilesPage, moment, page_query, row_id
from notify_server.web.rendering import is_link

T = TypeVar("T")

# Max items of each kind under "Needs attention".
MAX_ATTENTION = 5
# Batches that have waited for less are no cause for concern.
CALM_SECONDS = 60.0
MAX_HOSTS_SHOWN = 200
MAX_PICTURES = 60
# Refresh interval of pages that show something unsettled.
REFRESH_SECONDS = 3


async def overview(dashboard: Dashboard, request: web.Request) -> web.Response:
    totals, now = await dashboard.api.totals(), dashboard.now()
    incomplete = await dashboard.api.batches(BatchQuery(verdict=Verdict.INCOMPLETE, limit=MAX_ATTENTION))
    oldest, waited = None, 0.0
    if totals.oldest_pending_at is not None:
        before = totals.oldest_pending_at + timedelta(milliseconds=1)
        waiting = await dashboard.api.batches(BatchQuery(verdict=Verdict.PENDING, received_before=before, limit=1))
        oldest = waiting.items[0] if waiting.items else None
        waited = now / 1000 - totals.oldest_pending_at.timestamp()
    hosts = (await dashboard.api.hosts()).items
    shunned = [host for host in hosts if host.circuit is not CircuitState.CLOSED]
    failing = (await dashboard.api.failures()).items
    return dashboard.render(
        request,
        "overview.html",
        current="overview",
        totals=totals,
        process=await dashboard.api.status(),
        pulse=_pulse((await dashboard.api.series(SeriesQuery())).items),
        oldest=oldest if waited >= CALM_SECONDS else None,
        waited=waited,
        incomplete=incomplete.items,
        shunned=shunned[:MAX_ATTENTION],
        failing=failing[:MAX_ATTENTION],
        empty=_is_empty(totals),
        curl=dashboard.sample_post(request),
    )


async def batches(dashboard: Dashboard, request: web.Request) -> web.Response:
    asked = page_query(request, BatchesPage)
    wanted = BatchQuery(
        verdict=asked.verdict,
        api_code=asked.api_code,
        received_from=moment("received_from", asked.received_from),
        received_before=moment("received_before", asked.received_before),
        cursor=asked.cursor,
    )
    found, totals = await dashboard.api.batches(wanted), await dashboard.api.totals()
    return dashboard.render(
        request,
        "batches.html",
        current="batches",
        asked=wanted,
        found=found,
        totals=totals,
        empty=_is_empty(totals),
        curl=dashboard.sample_post(request),
    )


async def batch(dashboard: Dashboard, request: web.Request) -> web.Response:
    asked, id = page_query(request, BatchPage), row_id(request)
    batch = existing(await dashboard.api.batch(id))
    pictures = asked.view == "pictures"
    missing = [FileState.UNAVAILABLE, FileState.BLOCKED, FileState.UPLOAD_FAILED, FileState.PENDING]
    if pictures:
        state: FileState | None = FileState.AVAILABLE
    elif asked.state is None:
        state = next((state for state in missing if getattr(batch, state)), None)
    else:
        state = None if asked.state == "all" else FileState(asked.state)
    query = BatchFileQuery(state=state, cursor=asked.cursor, limit=MAX_PICTURES if pictures else 50)
    files = existing(await dashboard.api.batch_files(id, query))
    return dashboard.render(
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


async def files(dashboard: Dashboard, request: web.Request) -> web.Response:
    asked = page_query(request, FilesPage)
    query = FileQuery(state=asked.state, reason=asked.reason, host=asked.host, cursor=asked.cursor)
    found = await dashboard.api.files(query)
    return dashboard.render(request, "files.html", current="failures", asked=asked, found=found)


async def file(dashboard: Dashboard, request: web.Request) -> web.Response:
    file = existing(await dashboard.api.file(row_id(request)))
    waiting = file.state is FileState.PENDING
    return dashboard.render(
        request,
        "file.html",
        current="batches",
        file=file,
        key=decode_object_key(file.oss_object_name),
        curl=_curl(file),
        slowest=max((attempt.total_ms for attempt in file.requests), default=0.0),
        due=file.next_attempt_at is not None and file.next_attempt_at.timestamp() * 1000 <= dashboard.now(),
        refresh=REFRESH_SECONDS if waiting else 0,
    )


async def failures(dashboard: Dashboard, request: web.Request) -> web.Response:
    groups = (await dashboard.api.failures()).items
    by_reason: dict[str, list[FailureGroup]] = {}
    for group in groups:
        by_reason.setdefault(group.reason, []).append(group)
    return dashboard.render(
        request, "failures.html", current="failures", by_reason=by_reason, full=len(groups) >= MAX_GROUPS
    )


async def hosts(dashboard: Dashboard, request: web.Request) -> web.Response:
    hosts = (await dashboard.api.hosts()).items
    hosts.sort(key=lambda host: host.circuit is CircuitState.CLOSED)
    return dashboard.render(
        request,
        "hosts.html",
        current="hosts",
        hosts=hosts[:MAX_HOSTS_SHOWN],
        more=max(0, len(hosts) - MAX_HOSTS_SHOWN),
        now=datetime.fromtimestamp(dashboard.now() / 1000, UTC),
        refresh=REFRESH_SECONDS,
    )


async def rejections(dashboard: Dashboard, request: web.Request) -> web.Response:
    asked = page_query(request, PageQuery)
    found = await dashboard.api.rejections(asked)
    return dashboard.render(request, "rejections.html", current="rejections", asked=asked, found=found)


async def rejection(dashboard: Dashboard, request: web.Request) -> web.Response:
    rejection = existing(await dashboard.api.rejection(row_id(request)))
    body = await asyncio.to_thread(readable, rejection.body, rejection.detail)
    return dashboard.render(request, "rejection.html", current="rejections", rejection=rejection, body=body)


async def search(dashboard: Dashboard, request: web.Request) -> web.Response:
    q = request.query.get("q", "").strip()[:2000]
    if not q:
        return see_other("/ui/batches")
    # A whole batch_id is what is mostly looked for, and costs no walk over the latest batches.
    named = (await dashboard.api.batches(BatchQuery(batch_id=q))).items
    found = Found(named, []) if named else await dashboard.api.search(SearchQuery(q))
    if not named and is_link(q) and not found.files:
        # An address of the platform's has the key as its path.
        found = await dashboard.api.search(SearchQuery(urlsplit(q).path.lstrip("/").partition("!")[0] or q))
    if len(found.batches) + len(found.files) == 1:
        kind = "batches" if found.batches else "files"
        return see_other(f"/ui/{kind}/{(found.batches or found.files)[0].id}")
    return dashboard.render(request, "search.html", current="search", q=q, found=found)


async def docs(dashboard: Dashboard, request: web.Request) -> web.Response:
    return dashboard.render(
        request,
        "docs.html",
        current="docs",
        reference=dashboard.reference,
        base=base_url(request),
        curl=dashboard.sample_post(request),
        quote=shlex.quote,
        callback_path=dashboard.callback_path,
    )


async def nothing(dashboard: Dashboard, request: web.Request) -> web.Response:
    return dashboard.message(request, "not_found", 404)


async def static(dashboard: Dashboard, request: web.Request) -> web.Response:
    response = dashboard.static.answer(request.match_info["version"], request.match_info["name"])
    return dashboard.message(request, "not_found", 404) if response is None else response


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


def existing(answer: T | None) -> T:
    """Return the answer. Raises RefusedError (404) when it is None."""
    if answer is None:
        raise RefusedError(404, "404", NO_SUCH_ID)
    return answer
