"""The pages: one function for each, which shows what one or a few calls of the API return."""

from __future__ import annotations

import asyncio
import shlex
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from aiohttp import web

from notify_server.callbacks.errors import RefusedError
from notify_server.callbacks.refused_body import readable
from notify_server.contract.object_key import decode_object_key
from notify_server.events.payload import utc
from notify_server.model import CircuitState, FileState, Verdict
from notify_server.store.ends import end_of
from notify_server.store.outbox import DeliveryState
from notify_server.store.reading.types import (
    BatchFiles,
    BatchItem,
    FileDetail,
    FileItem,
    Page,
    Totals,
)
from notify_server.web.api.endpoints import NO_SUCH_ID
from notify_server.web.api.types import BatchFileQuery, BatchQuery, PageQuery, Status
from notify_server.web.dashboard.dashboard import Dashboard
from notify_server.web.dashboard.forms import (
    PERIODS,
    BatchesPage,
    BatchPage,
    moment,
    page_query,
    row_id,
    since,
)
from notify_server.web.dashboard.report import text_for_platform
from notify_server.web.language import texts_for
from notify_server.web.rendering import is_link

T = TypeVar("T")

# Max items of each kind under "Needs attention".
MAX_ATTENTION = 5
# Batches that have waited for less are no cause for concern.
CALM_SECONDS = 60.0
MAX_HOSTS_SHOWN = 200
MAX_PICTURES = 60
PAGE_FILES = 50
# Reasons that a batch's files are filtered by, and values that a filter suggests.
MAX_REASONS = 12
MAX_SUGGESTED = 200
# Files in the text for the platform.
MAX_REPORTED = 20
# Causes that a batch at risk is explained with.
MAX_CAUSES = 4
# Files that end soon, on the page of their batch.
MAX_ENDING_SHOWN = 5
# Refresh interval of pages that show something unsettled.
REFRESH_SECONDS = 3


async def overview(dashboard: Dashboard, request: web.Request) -> web.Response:
    totals, now = await dashboard.api.totals(), dashboard.now()
    attention = await dashboard.api.attention()
    incomplete = await dashboard.api.batches(BatchQuery(acknowledged=False, limit=MAX_ATTENTION))
    oldest, waited = None, 0.0
    if totals.oldest_pending_at is not None:
        before = totals.oldest_pending_at + timedelta(milliseconds=1)
        waiting = await dashboard.api.batches(BatchQuery(verdict=Verdict.PENDING, received_before=before, limit=1))
        oldest = waiting.items[0] if waiting.items else None
        waited = now / 1000 - totals.oldest_pending_at.timestamp()
    hosts = (await dashboard.api.hosts()).items
    unreachable = [host for host in hosts if host.circuit is CircuitState.OPEN and host.pending]
    status = await dashboard.api.status()
    failing = [group for group in (await dashboard.api.failures()).items if group.new]
    return dashboard.render(
        request,
        "overview.html",
        current="overview",
        totals=totals,
        attention=attention,
        process=status,
        pulse=_pulse(status),
        oldest=oldest if waited >= CALM_SECONDS else None,
        waited=waited,
        incomplete=incomplete.items,
        unreachable=unreachable[:MAX_ATTENTION],
        failing=failing[:MAX_ATTENTION],
        endpoints=[each for each in await dashboard.api.forward.endpoints() if each.state != "ok"]
        if dashboard.api.forward.names()
        else [],
        empty=_is_empty(totals),
        callback=dashboard.callback(request),
    )


async def batches(dashboard: Dashboard, request: web.Request) -> web.Response:
    asked = page_query(request, BatchesPage)
    wanted = BatchQuery(
        verdict=asked.verdict,
        api_code=asked.api_code,
        received_from=moment("received_from", asked.received_from) or since(asked.within, dashboard.now()),
        received_before=moment("received_before", asked.received_before),
        acknowledged=asked.acknowledged,
        cursor=asked.cursor,
    )
    found, totals = await dashboard.api.batches(wanted), await dashboard.api.totals()
    return dashboard.render(
        request,
        "batches.html",
        current="batches",
        asked=wanted,
        within=asked.within,
        periods=list(PERIODS),
        suggested=await suggested(dashboard),
        found=found,
        totals=totals,
        new=(await dashboard.api.attention()).batches,
        empty=_is_empty(totals),
        callback=dashboard.callback(request),
    )


async def batch(dashboard: Dashboard, request: web.Request) -> web.Response:
    asked, id = page_query(request, BatchPage), row_id(request)
    batch = existing(await dashboard.api.batch(id))
    pictures = asked.view == "pictures"
    missing = [FileState.UNAVAILABLE, FileState.BLOCKED, FileState.UPLOAD_FAILED, FileState.PENDING]
    if pictures:
        state: FileState | None = FileState.AVAILABLE
    elif asked.state is None and asked.reason is None and asked.q is None:
        state = next((state for state in missing if getattr(batch, state)), None)
    else:
        state = None if asked.state in (None, "all") else FileState(asked.state)
    numbered, files = None, Page[FileItem]([])
    if pictures:
        query = BatchFileQuery(state=state, cursor=asked.cursor, limit=MAX_PICTURES)
        files = existing(await dashboard.api.batch_files(id, query))
    else:
        wanted = BatchFiles(
            id, state, asked.reason, asked.q, asked.sort, asked.desc, (asked.page - 1) * PAGE_FILES, PAGE_FILES
        )
        numbered = await dashboard.api.records.batch_files(wanted)
    reported = await _reported(dashboard, request, batch)
    gate, sent = await dashboard.api.forward.of_batch(id)
    ending = await dashboard.api.forward.ending(id, dashboard.expiring_before)
    submissions = await dashboard.api.submissions.of_batch(id)
    waiting = any(each.state is DeliveryState.PENDING for each in sent)
    return dashboard.render(
        request,
        "batch.html",
        images=pictures,
        current="batches",
        batch=batch,
        state=state,
        pictures=pictures,
        files=files,
        asked=asked,
        page_fields={name: value for name, value in request.query.items() if name != "page" and value},
        numbered=numbered,
        last_page=1 if numbered is None else max(1, -(-numbered.total // PAGE_FILES)),
        reasons=await dashboard.api.records.batch_reasons(id, MAX_REASONS),
        shown=[file for file in files.items if _is_picture(file)] if numbered is None else numbered.items,
        report=reported,
        askable=batch.pending + batch.unavailable + batch.blocked,
        gate=gate,
        causes=Counter((each.reason, each.state) for each in gate.missing if each.reason).most_common(MAX_CAUSES)
        if gate is not None and gate.provisional
        else [],
        ending=[(each.oss_object_name, each.what, utc(each.at)) for each in ending[:MAX_ENDING_SHOWN]],
        ending_total=len(ending),
        submissions=submissions,
        sent=sent,
        latest={each.endpoint: each for each in sent},
        now=datetime.fromtimestamp(dashboard.now() / 1000, UTC),
        refresh=REFRESH_SECONDS if (batch.pending or waiting) and not pictures else 0,
    )


async def file(dashboard: Dashboard, request: web.Request) -> web.Response:
    file = existing(await dashboard.api.file(row_id(request)))
    waiting = file.state is FileState.PENDING
    # A recheck clears the result and keeps the requests.
    rechecking = waiting and file.attempts == 0 and bool(file.requests)
    return dashboard.render(
        request,
        "file.html",
        current="batches",
        file=file,
        key=decode_object_key(file.oss_object_name),
        curl=_curl(file),
        report=text_for_platform(texts_for(request), [file])
        if file.state in (FileState.UNAVAILABLE, FileState.UPLOAD_FAILED)
        else None,
        ending=_ending(file, dashboard.now(), dashboard.expiring_before),
        slowest=max((attempt.total_ms for attempt in file.requests), default=0.0),
        due=file.next_attempt_at is not None and file.next_attempt_at.timestamp() * 1000 <= dashboard.now(),
        rechecking=rechecking,
        refresh=REFRESH_SECONDS if waiting else 0,
    )


def _ending(file: FileDetail, now: int, seconds: float) -> tuple[str, datetime | None] | None:
    """Return what of a file that is pending or available ends within so many seconds, and when."""
    if file.state not in (FileState.PENDING, FileState.AVAILABLE) or not seconds:
        return None
    expires_at = None if file.expires_at is None else round(file.expires_at.timestamp() * 1000)
    end = end_of(file.oss_object_name, expires_at, file.flags or (), now)
    return (end.what, utc(end.at)) if end is not None and end.at <= now + seconds * 1000 else None


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
    return dashboard.render(
        request,
        "rejections.html",
        current="rejections",
        asked=asked,
        found=found,
        known=await dashboard.api.records.journal.rejections([each.id for each in found.items]),
        new=(await dashboard.api.attention()).rejections,
        days=dashboard.rejection_days,
    )


async def rejection(dashboard: Dashboard, request: web.Request) -> web.Response:
    rejection = existing(await dashboard.api.rejection(row_id(request)))
    body = await asyncio.to_thread(readable, rejection.body, rejection.detail)
    known = (await dashboard.api.records.journal.rejections([rejection.id])).get(rejection.id)
    return dashboard.render(
        request, "rejection.html", current="rejections", rejection=rejection, body=body, known=known
    )


async def docs(dashboard: Dashboard, request: web.Request) -> web.Response:
    return dashboard.render(
        request,
        "docs.html",
        current="docs",
        reference=dashboard.reference,
        base=dashboard.public_url.base(request),
        curl=dashboard.sample_post(request),
        quote=shlex.quote,
        callback_path=dashboard.callback_path,
    )


async def suggested(dashboard: Dashboard) -> dict[str, list[str]]:
    """Return the values that the filters suggest: reasons, hosts and api_codes that exist."""
    groups = (await dashboard.api.failures()).items
    hosts = [host.host for host in (await dashboard.api.hosts()).items] + [group.host for group in groups]
    return {
        "reason": sorted({group.reason for group in groups if group.reason is not None}),
        "host": sorted({host for host in hosts if host})[:MAX_SUGGESTED],
        "api_code": sorted(await dashboard.api.api_codes()),
    }


async def nothing(dashboard: Dashboard, request: web.Request) -> web.Response:
    return dashboard.message(request, "not_found", 404)


async def static(dashboard: Dashboard, request: web.Request) -> web.Response:
    response = dashboard.static.answer(request.match_info["version"], request.match_info["name"])
    return dashboard.message(request, "not_found", 404) if response is None else response


async def _reported(dashboard: Dashboard, request: web.Request, batch: BatchItem) -> str | None:
    """Return the text for the platform about the first missing files, None while there is nothing to report."""
    missing = [state for state in (FileState.UNAVAILABLE, FileState.UPLOAD_FAILED) if getattr(batch, state)]
    if not missing:
        return None
    query = BatchFileQuery(state=missing[0], limit=MAX_REPORTED)
    files = existing(await dashboard.api.batch_files(batch.id, query))
    return text_for_platform(texts_for(request), files.items, batch.first_received_at) if files.items else None


def _is_empty(totals: Totals) -> bool:
    return not totals.batches and not totals.rejections


def _is_picture(file: FileItem) -> bool:
    return is_link(file.target_url) and (file.content_type or "").lower().startswith("image/")


def _pulse(status: Status) -> dict[str, Any]:
    """Return the figures of the tiles: rates of the last minute, sums and latencies of the last ten."""
    minute, window = status.last_minute, status.last_ten_minutes
    counted = ("accepted", "requests", "complete", "incomplete")
    latencies = ("ack_p50_ms", "ack_p99_ms", "probe_p50_ms", "probe_p99_ms")
    return {
        "sums": {name: getattr(window, name, 0) for name in counted},
        "rates": {
            name: getattr(minute, name) / minute.seconds if minute and minute.seconds else 0.0 for name in counted
        },
        "latencies": {name: getattr(window, name, None) for name in latencies},
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
