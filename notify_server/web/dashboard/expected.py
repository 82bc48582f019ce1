"""The page of expected submissions: late, short, waiting and met ones; and the action that deletes one."""

from __future__ import annotations

from aiohttp import web
from msgspec import Struct

from notify_server.expect.expectation import ExpectationState
from notify_server.operations import Text
from notify_server.store.reading.expectations import quiet_codes
from notify_server.web.api.expectations import (
    CursorId,
    ExpectationQuery,
    delete_expectation,
    expectation,
    expectations,
)
from notify_server.web.dashboard.dashboard import Dashboard
from notify_server.web.dashboard.forms import Form, page_query, row_id
from notify_server.web.dashboard.pages import existing

# Silent api_codes that the page names.
MAX_QUIET = 10
# What needs a person comes first.
STATES = (ExpectationState.LATE, ExpectationState.SHORT, ExpectationState.WAITING, ExpectationState.MET)


class ExpectedPage(Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of the expected submissions."""

    state: ExpectationState | None = None
    reference: Text | None = None
    api_code: Text | None = None
    cursor: CursorId | None = None


async def expected(dashboard: Dashboard, request: web.Request) -> web.Response:
    asked = page_query(request, ExpectedPage)
    query = ExpectationQuery(asked.state, asked.api_code, asked.reference, cursor=asked.cursor)
    records = dashboard.api.records.expectations
    counts = await records.counts()
    quiet = quiet_codes(await records.arrivals(), dashboard.quiet_limits) if dashboard.quiet_limits else []
    return dashboard.render(
        request,
        "expected.html",
        current="expected",
        asked=asked,
        states=STATES,
        filtered=bool(asked.state or asked.reference or asked.api_code),
        counts={each.state: each.number for each in counts if each.number},
        quiet=quiet[:MAX_QUIET],
        more_quiet=len(quiet[MAX_QUIET:]),
        found=await expectations(dashboard.api, query),
    )


async def confirm_delete(dashboard: Dashboard, request: web.Request) -> web.Response:
    """Show which submission it is, and a button that deletes it."""
    found = existing(await expectation(dashboard.api, row_id(request)))
    return dashboard.outcome(
        request, part="delete_expected.html", heading="expected.delete", outcome="confirm", expected=found,
        back="/ui/expected",
    )  # fmt: skip


async def delete(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    existing(await delete_expectation(dashboard.api, row_id(request)))
    return dashboard.outcome(
        request, part="delete_expected.html", heading="expected.delete", outcome="done", back="/ui/expected"
    )
