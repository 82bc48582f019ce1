"""The API of actions and acknowledgements: who did what, and what is known."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from notify_server.operations import Acknowledge, AcknowledgedCount
from notify_server.store.base import MAX_ID
from notify_server.store.reading.journal import ActionItem
from notify_server.store.reading.types import Attention, Limit, Page
from notify_server.web.api.handlers import Api
from notify_server.web.openapi import Endpoint

CursorId = Annotated[int, Meta(ge=0, le=MAX_ID)]


class ActionQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """A page of the actions."""

    cursor: CursorId | None = None
    limit: Limit = 50


async def actions(api: Api, query: ActionQuery) -> Page[ActionItem]:
    before = MAX_ID if query.cursor is None else query.cursor
    items = await api.records.journal.actions(before, query.limit + 1)
    following = str(items[query.limit - 1].id) if len(items) > query.limit else None
    return Page(items[: query.limit], following)


async def attention(api: Api) -> Attention:
    return await api.attention()


async def acknowledge(api: Api, wanted: Acknowledge) -> AcknowledgedCount | None:
    return await api.acknowledge(wanted)


JOURNAL_ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/api/v1/attention", attention, answer=Attention),
    Endpoint("POST", "/api/v1/acknowledge", acknowledge, body=Acknowledge, answer=AcknowledgedCount),
    Endpoint("GET", "/api/v1/actions", actions, query=ActionQuery, answer=Page[ActionItem]),
)
