"""Handles the actions of the pages: recheck, reprocess, log-in, log-out, and the choice of the language."""

from __future__ import annotations

import asyncio

from aiohttp import web

from notify_server.callbacks.errors import RefusedError
from notify_server.callbacks.refused_body import readable
from notify_server.web.dashboard.dashboard import Dashboard
from notify_server.web.dashboard.forms import Form, RecheckForm, local_target, page_query, row_id
from notify_server.web.dashboard.pages import existing
from notify_server.web.language import LANGUAGE_COOKIE, LANGUAGES
from notify_server.web.rendering import YEAR_SECONDS


async def confirm_recheck(dashboard: Dashboard, request: web.Request) -> web.Response:
    """Show the number of files, and a button that rechecks them."""
    wanted = page_query(request, RecheckForm)
    counted = existing(await dashboard.api.recheck(wanted.recheck(dry_run=True)))
    return dashboard.outcome(
        request,
        heading="recheck.title",
        outcome="confirm" if counted.files else "nothing",
        files=counted.files,
        fields=wanted.fields(),
        back=wanted.origin,
    )


async def recheck(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    wanted = RecheckForm.of(form)
    done = existing(await dashboard.api.recheck(wanted.recheck(dry_run=False)))
    response = dashboard.outcome(
        request,
        heading="recheck.title",
        outcome=("more" if done.more else "done") if done.files else "nothing",
        files=done.files,
        back=wanted.origin,
        watch=wanted.watch,
    )
    response.headers["HX-Trigger"] = "refresh"
    return response


async def replay(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    id = row_id(request)
    rejection = existing(await dashboard.api.rejection(id))
    body = await asyncio.to_thread(readable, rejection.body, rejection.detail)
    taken = existing(await dashboard.api.replay(id))
    return dashboard.outcome(
        request,
        heading="rejection.replay",
        outcome="replayed",
        taken=taken,
        batch_id=body.batch_id,
        back="/ui/rejections",
    )


async def login_form(dashboard: Dashboard, request: web.Request) -> web.Response:
    to = local_target(request.query.get("next"))
    if not dashboard.admin.needs_login or dashboard.admin.logged_in(request):
        return dashboard.redirect(request, to)
    return dashboard.render(request, "login.html", to=to, wrong="")


async def login(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    to = local_target(form.get("next"))
    response = dashboard.redirect(request, to)
    try:
        if dashboard.admin.log_in(request, form.get("token", "").strip(), response):
            return response
    except RefusedError as error:
        slow = dashboard.render(request, "login.html", to=to, wrong="slow", status=error.status)
        slow.headers.extend(error.headers)
        return slow
    return dashboard.render(request, "login.html", to=to, wrong="wrong", status=401)


async def logout(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    response = dashboard.redirect(request, "/ui/login")
    dashboard.admin.log_out(response)
    return response


async def language(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    response = dashboard.redirect(request, local_target(form.get("next")))
    if (chosen := form.get("to", "")) in LANGUAGES:
        response.set_cookie(LANGUAGE_COOKIE, chosen, max_age=YEAR_SECONDS, path="/", samesite="Lax", httponly=True)
    return response
