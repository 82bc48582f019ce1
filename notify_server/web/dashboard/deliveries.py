"""The pages and actions of forwarding: endpoints, their deliveries, a test, a replay, stop and start."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from aiohttp import web
from msgspec import Struct

from notify_server.callbacks.errors import RefusedError
from notify_server.callbacks.refused_body import readable
from notify_server.forward.service import ForwardEndpointItem
from notify_server.model import CircuitState
from notify_server.operations import Text
from notify_server.store.outbox import DeliveryState
from notify_server.web.api import forward as api
from notify_server.web.dashboard.dashboard import Dashboard
from notify_server.web.dashboard.forms import Form, moment, page_query, row_id
from notify_server.web.dashboard.pages import REFRESH_SECONDS, existing
from notify_server.web.parameters import convert

# The beginning of a replay that the form suggests.
SUGGESTED_REPLAY = timedelta(hours=24)
PAGE_SIZE = 25


class DeliveriesPage(Struct, frozen=True, forbid_unknown_fields=True):
    """Which deliveries of an endpoint to show."""

    state: DeliveryState | None = None
    cursor: api.Cursor | None = None


class ReplayForm(Struct, frozen=True, forbid_unknown_fields=True):
    """Which events to send again. Times are ISO 8601, UTC when they have no offset."""

    since: Text
    until: Text | None = None

    def wanted(self, *, dry_run: bool) -> api.ReplayWanted:
        """Return it as the API takes it. Raises RefusedError."""
        since, until = moment("since", self.since), moment("until", self.until)
        assert since is not None
        if until is not None and until <= since:
            raise RefusedError(400, "400", "until: must be after since")
        return api.ReplayWanted(since, until, dry_run)


async def endpoints(dashboard: Dashboard, request: web.Request) -> web.Response:
    found = (await api.forward_endpoints(dashboard.api)).items
    return dashboard.render(
        request, "deliveries.html", current="deliveries", endpoints=found, now=_now(dashboard), refresh=REFRESH_SECONDS
    )


async def endpoint(dashboard: Dashboard, request: web.Request) -> web.Response:
    asked = page_query(request, DeliveriesPage)
    found = await _endpoint(dashboard, request)
    query = api.DeliveriesQuery(asked.state, asked.cursor, PAGE_SIZE)
    return dashboard.render(
        request,
        "endpoint.html",
        current="deliveries",
        endpoint=found,
        deliveries=await api.forward_deliveries(dashboard.api, found.name, query),
        asked=asked,
        delivery_states=list(DeliveryState),
        now=_now(dashboard),
        since=_now(dashboard) - SUGGESTED_REPLAY,
        paused=found.circuit is not CircuitState.CLOSED,
        refresh=0 if asked.cursor else REFRESH_SECONDS,
    )


async def delivery(dashboard: Dashboard, request: web.Request) -> web.Response:
    found = existing(await dashboard.api.forward.delivery(row_id(request)))
    name = found.delivery.endpoint
    return dashboard.render(
        request,
        "delivery.html",
        current="deliveries",
        delivery=found.delivery,
        attempts=found.attempts,
        body=readable(bytes(found.request).decode(), ""),
        endpoint=await dashboard.api.forward.endpoint(name) if name in dashboard.api.forward.names() else None,
        now=_now(dashboard),
        refresh=REFRESH_SECONDS if found.delivery.state is DeliveryState.PENDING else 0,
    )


async def confirm_replay(dashboard: Dashboard, request: web.Request) -> web.Response:
    """Show the number of events, and a button that sends them again."""
    wanted, name = page_query(request, ReplayForm).wanted(dry_run=True), request.match_info["name"]
    counted = await api.forward_replay(dashboard.api, name, wanted)
    return _outcome(
        dashboard, request, "confirm" if counted.deliveries else "nothing",
        count=counted.deliveries, since=wanted.since, until=wanted.until,
    )  # fmt: skip


async def replay(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    fields = {name: form[name] for name in ReplayForm.__struct_fields__ if form.get(name)}
    wanted = convert(fields, ReplayForm, from_text=True).wanted(dry_run=False)
    done = await api.forward_replay(dashboard.api, request.match_info["name"], wanted)
    return _outcome(dashboard, request, "replayed" if done.deliveries else "nothing", count=done.deliveries)


async def test(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    tested = await api.forward_test(dashboard.api, request.match_info["name"])
    return _outcome(dashboard, request, "tested", tested=tested)


async def stop(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    changed = await api.forward_stop(dashboard.api, request.match_info["name"])
    return dashboard.redirect(request, f"/ui/deliveries/{changed.name}")


async def start(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    changed = await api.forward_start(dashboard.api, request.match_info["name"])
    return dashboard.redirect(request, f"/ui/deliveries/{changed.name}")


async def _endpoint(dashboard: Dashboard, request: web.Request) -> ForwardEndpointItem:
    return await api.known(dashboard.api.forward.endpoint(request.match_info["name"]))


def _outcome(dashboard: Dashboard, request: web.Request, outcome: str, **context: object) -> web.Response:
    name = request.match_info["name"]
    return dashboard.outcome(
        request, part="sent_again.html", heading="deliveries.title", back=f"/ui/deliveries/{name}",
        endpoint=name, outcome=outcome, **context,
    )  # fmt: skip


def _now(dashboard: Dashboard) -> datetime:
    return datetime.fromtimestamp(dashboard.now() / 1000, UTC)
