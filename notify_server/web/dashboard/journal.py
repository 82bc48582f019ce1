"""The pages and actions of the journal: who did what, and what is acknowledged."""

from __future__ import annotations

from urllib.parse import urlencode

from aiohttp import web
from msgspec import Struct

from notify_server.model import FileState
from notify_server.operations import Acknowledge, Id, Note, ReasonCode, Text
from notify_server.web.api.journal import ActionQuery, CursorId
from notify_server.web.api.journal import actions as read_actions
from notify_server.web.dashboard.dashboard import Dashboard
from notify_server.web.dashboard.forms import Form, page_query
from notify_server.web.dashboard.pages import existing
from notify_server.web.parameters import convert


class ActionsPage(Struct, frozen=True, forbid_unknown_fields=True):
    """A page of the actions."""

    cursor: CursorId | None = None


class AcknowledgeForm(Struct, frozen=True, forbid_unknown_fields=True):
    """What to acknowledge, as in operations.Acknowledge."""

    batch: Id | None = None
    rejection: Id | None = None
    state: FileState | None = None
    reason: ReasonCode | None = None
    host: Text | None = None
    all: Text | None = None
    api_code: Text | None = None
    note: Note = ""

    def wanted(self, *, dry_run: bool) -> Acknowledge:
        """Return it as the API takes it. Raises RefusedError."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        if self.state is not None and self.host is None:
            # A form sends no empty field; files reported FAILED may have no host.
            values["host"] = ""
        return convert(values | {"dry_run": dry_run}, Acknowledge)

    def fields(self) -> dict[str, str]:
        """Return it as the fields of a form, without the note."""
        values = {name: getattr(self, name) for name in self.__struct_fields__ if name != "note"}
        return {name: str(value) for name, value in values.items() if value is not None}

    @property
    def origin(self) -> str:
        """The page that the action belongs to."""
        if self.batch is not None:
            return f"/ui/batches/{self.batch}"
        if self.rejection is not None:
            return f"/ui/rejections/{self.rejection}"
        if self.all == "batches":
            return f"/ui/batches?{urlencode({'verdict': 'incomplete'})}"
        return "/ui/rejections" if self.all == "rejections" else "/ui/failures"


async def confirm_acknowledge(dashboard: Dashboard, request: web.Request) -> web.Response:
    """Show the number, a field for the note, and a button that acknowledges."""
    asked = page_query(request, AcknowledgeForm)
    counted = existing(await dashboard.api.acknowledge(asked.wanted(dry_run=True)))
    return dashboard.outcome(
        request, part="acknowledge.html", heading="acknowledge.title",
        outcome="confirm" if counted.acknowledged else "nothing", n=counted.acknowledged, fields=asked.fields(),
        back=asked.origin,
    )  # fmt: skip


async def acknowledge(dashboard: Dashboard, request: web.Request, form: Form) -> web.Response:
    fields = {name: form[name] for name in AcknowledgeForm.__struct_fields__ if form.get(name)}
    asked = convert(fields, AcknowledgeForm, from_text=True)
    done = existing(await dashboard.api.acknowledge(asked.wanted(dry_run=False)))
    response = dashboard.outcome(
        request, part="acknowledge.html", heading="acknowledge.title",
        outcome=("more" if done.more else "done") if done.acknowledged else "nothing", n=done.acknowledged,
        back=asked.origin,
    )  # fmt: skip
    response.headers["HX-Trigger"] = "refresh"
    return response


async def actions(dashboard: Dashboard, request: web.Request) -> web.Response:
    asked = page_query(request, ActionsPage)
    found = await read_actions(dashboard.api, ActionQuery(asked.cursor))
    return dashboard.render(request, "actions.html", current="actions", asked=asked, found=found)
