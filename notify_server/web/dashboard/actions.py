"""Handles the actions of the pages: recheck, reprocess, log-in, log-out, and the choice of the language."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

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
    if dashboard.admin.logged_in(request):
        return dashboard.redirect(request, to)
    return dashboard.render(request, "login.html", to=to, wrong="")


async def log_in_once(dashboard: Dashboard, request: web.Request) -> web.Response:
    """Log in by the code in the address. A HEAD request or a prefetch of the address does not consume the code."""
    if request.method != "GET" or _is_prefetch(request):
        return dashboard.render(request, "login.html", to="/", wrong="")
    code = request.match_info["code"]
    return _logged_in(dashboard, request, "/", "used", partial(dashboard.admin.log_in_once, request, code))


async def login(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    token = form.get("token", "").strip()
    return _logged_in(
        dashboard, request, local_target(form.get("next")), "wrong", partial(dashboard.admin.log_in, request, token)
    )


def _logged_in(
    dashboard: Dashboard, request: web.Request, to: str, wrong: str, log_in: Callable[[web.StreamResponse], bool]
) -> web.Response:
    """Answer a log-in, which `log_in` tries; `wrong` is the text's key for one that is refused."""
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        # A click elsewhere: a redirect would count as that site's, to which the browser sends no session cookie.
        response = dashboard.message(request, "logged_in", 200)
        response.headers["Refresh"] = f"0; url={dashboard.public_url.prefix(request)}{to}"
    else:
        response = dashboard.redirect(request, to)
    try:
        if log_in(response):
            return response
    except RefusedError as error:
        slow = dashboard.render(request, "login.html", to=to, wrong="slow", status=error.status)
        slow.headers.extend(error.headers)
        return slow
    return dashboard.render(request, "login.html", to=to, wrong=wrong, status=401)


def _is_prefetch(request: web.Request) -> bool:
    """Return True when a browser prefetches an address that was not clicked yet (W3C, `Sec-Purpose`)."""
    return "prefetch" in request.headers.get("Sec-Purpose", request.headers.get("Purpose", ""))


async def logout(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    response = dashboard.redirect(request, "/ui/login")
    await dashboard.admin.log_out(request, response)
    return response


async def language(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    response = dashboard.redirect(request, local_target(form.get("next")))
    if (chosen := form.get("to", "")) in LANGUAGES:
        response.set_cookie(LANGUAGE_COOKIE, chosen, max_age=YEAR_SECONDS, path="/", samesite="Lax", httponly=True)
    return response
