"""The page of expected submissions: late, short, waiting and met ones."""

from __future__ import annotations

from aiohttp import web
from msgspec import Struct

from notify_server.expect.expectation import ExpectationState
from notify_server.operations import Text
from notify_server.store.reading.expectations import quiet_codes
from notify_server.web.api.expectations import CursorId, ExpectationQuery, expectations
from notify_server.web.dashboard.dashboard import Dashboard
from notify_server.web.dashboard.forms import page_query

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
