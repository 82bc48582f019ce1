"""The pages that find things: files by filters, groups of failures, and the search."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from urllib.parse import urlencode

from aiohttp import web
from yarl import URL

from notify_server.callbacks.refused_body import readable
from notify_server.model import FileState
from notify_server.store.reading.types import FailureGroup, Found
from notify_server.web.api.handlers import MAX_GROUPS
from notify_server.web.api.types import BatchQuery, FileQuery, SearchQuery
from notify_server.web.dashboard.dashboard import Dashboard
from notify_server.web.dashboard.forms import (
    PERIODS,
    FailuresPage,
    FilesPage,
    NotificationsPage,
    page_query,
    row_id,
    since,
)
from notify_server.web.dashboard.pages import existing, suggested
from notify_server.web.rendering import is_link, iso


async def files(dashboard: Dashboard, request: web.Request) -> web.Response:
    asked = page_query(request, FilesPage)
    received_from = since(asked.within, dashboard.now())
    query = FileQuery(
        state=asked.state, reason=asked.reason, host=asked.host, api_code=asked.api_code,
        received_from=received_from, cursor=asked.cursor,
    )  # fmt: skip
    found = await dashboard.api.files(query)
    filters = {name: getattr(query, name) for name in ("state", "reason", "host", "api_code")}
    filters["received_from"] = None if received_from is None else iso(received_from)
    chosen = {name: str(value) for name, value in filters.items() if value is not None}
    can_recheck = bool(chosen.keys() - {"received_from"}) and asked.state is not FileState.UPLOAD_FAILED
    return dashboard.render(
        request, "files.html", current="failures", asked=asked, found=found, chosen=chosen,
        suggested=await suggested(dashboard), periods=list(PERIODS), can_recheck=can_recheck,
    )  # fmt: skip


async def failures(dashboard: Dashboard, request: web.Request) -> web.Response:
    asked = page_query(request, FailuresPage)
    everything = (await dashboard.api.failures()).items
    groups = [
        group
        for group in everything
        if asked.reason in (None, group.reason)
        and asked.host in (None, group.host)
        and asked.state in (None, group.state)
    ]
    by_reason: dict[str | None, list[FailureGroup]] = {}
    for group in groups:
        by_reason.setdefault(group.reason, []).append(group)
    return dashboard.render(
        request,
        "failures.html",
        current="failures",
        by_reason=by_reason,
        full=len(everything) >= MAX_GROUPS,
        asked=asked,
        filtered=len(groups) < len(everything) or not everything,
        suggested=await suggested(dashboard),
        new=sum(group.new for group in groups),
    )


async def search(dashboard: Dashboard, request: web.Request) -> web.Response:
    q = request.query.get("q", "").strip()[:2000]
    if not q:
        return dashboard.redirect(request, "/ui/batches")
    # Most searches are for a whole batch_id, which costs no walk over the latest batches.
    named = (await dashboard.api.batches(BatchQuery(batch_id=q))).items
    found = Found(named, []) if named else await dashboard.api.search(SearchQuery(q))
    if not named and is_link(q) and not found.files:
        # An address of the platform's has the key as its path.
        found = await dashboard.api.search(SearchQuery(_key_in(q) or q))
    if len(found.batches) + len(found.files) + len(found.rejections) + len(found.api_codes) == 1:
        if found.api_codes:
            return dashboard.redirect(request, f"/ui/batches?{urlencode({'api_code': found.api_codes[0]})}")
        if found.rejections:
            return dashboard.redirect(request, f"/ui/rejections/{found.rejections[0].id}")
        kind = "batches" if found.batches else "files"
        return dashboard.redirect(request, f"/ui/{kind}/{(found.batches or found.files)[0].id}")
    return dashboard.render(request, "search.html", current="search", q=q, found=found)


def _key_in(address: str) -> str:
    """Return the object key in an address of the platform's storage, which is its path without the style after `!`."""
    try:
        return URL(address).path.lstrip("/").partition("!")[0]
    except ValueError:
        return ""


async def notifications(dashboard: Dashboard, request: web.Request) -> web.Response:
    """Show the notifications of a batch, and the body of one of them as it was received."""
    asked = page_query(request, NotificationsPage)
    batch = existing(await dashboard.api.batch(row_id(request)))
    evidence = dashboard.api.records.evidence
    rows = await evidence.deliveries(batch.id, batch.deliveries)
    raw = None
    if asked.show is not None:
        # Only those of this batch.
        raw = existing(await evidence.body(asked.show) if asked.show in {row.id for row in rows} else None)
    text = None if raw is None else raw.decode(errors="backslashreplace")
    return dashboard.render(
        request, "notifications.html", current="batches", batch=batch, shown=asked.show, raw=text,
        found=[{"row": row, "at": datetime.fromtimestamp(row.received_at / 1000, UTC)} for row in rows],
        body=None if text is None else await asyncio.to_thread(readable, text, ""),
    )  # fmt: skip
