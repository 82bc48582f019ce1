"""The API of events and forwarding."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, TypeVar

from msgspec import Meta, Struct

from notify_server.action_log import ActionKind
from notify_server.callbacks.errors import RefusedError
from notify_server.config.values import duration
from notify_server.events.payload import EventType, matching_types
from notify_server.forward.service import (
    DeliveryDetail,
    EndpointStoppedError,
    EventPage,
    ForwardChanged,
    ForwardEndpointItem,
    ForwardReplayed,
    ForwardTested,
    GateAnswer,
    UnknownEndpointError,
)
from notify_server.operations import Text, Time, to_ms
from notify_server.store.base import MAX_ID
from notify_server.store.outbox import DeliveryState
from notify_server.store.reading.outbox import DeliveryRow
from notify_server.store.reading.types import Limit, Page
from notify_server.web.api.handlers import Api
from notify_server.web.openapi import Endpoint

T = TypeVar("T")

Wait = Annotated[str, Meta(max_length=20, description='How long to wait, such as "30s"; 60 s at most.')]
Cursor = Annotated[int, Meta(ge=0, le=MAX_ID)]


class EventsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Where to go on, which events, and how long to wait for the first one."""

    after: Cursor = 0
    types: Text = "*"
    api_code: Text | None = None
    wait: Wait = "0s"
    limit: Limit = 500


class VerdictQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The batch by the partner's name, and how long to wait for its verdict."""

    batch_id: Text
    api_code: Text | None = None
    wait: Wait = "0s"


class DeliveriesQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which deliveries of an endpoint, and which page of them."""

    state: DeliveryState | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


class ReplayWanted(Struct, frozen=True, forbid_unknown_fields=True):
    """Which events to send again; with `dry_run` they are only counted."""

    since: Time
    until: Time | None = None
    dry_run: bool = False


def _seconds(text: str) -> float:
    try:
        return duration(text)
    except ValueError as error:
        raise RefusedError(400, "400", f"wait: {error}") from error


async def known(answer: Awaitable[T]) -> T:
    try:
        return await answer
    except UnknownEndpointError as error:
        raise RefusedError(404, "404", str(error)) from error
    except EndpointStoppedError as error:
        raise RefusedError(409, "409", str(error)) from error


async def events(api: Api, query: EventsQuery) -> EventPage:
    patterns = [part.strip() for part in query.types.split(",") if part.strip()]
    for pattern in patterns or [""]:
        if not matching_types([pattern]):
            raise RefusedError(400, "400", f"types: matches no event: there are {', '.join(EventType)}, and batch.*")
    return await api.forward.events(query.after, patterns, query.api_code, _seconds(query.wait), query.limit)


async def verdict(api: Api, query: VerdictQuery) -> GateAnswer:
    found = await api.forward.gate(query.batch_id, query.api_code, _seconds(query.wait))
    if not found:
        raise RefusedError(404, "404", "no notification of this batch has come")
    if len(found) > 1:
        raise RefusedError(400, "400", "api_code: several batches have this batch_id, name the api_code too")
    return found[0]


async def forward_endpoints(api: Api) -> Page[ForwardEndpointItem]:
    return Page(await api.forward.endpoints())


async def forward_deliveries(api: Api, name: str, query: DeliveriesQuery) -> Page[DeliveryRow]:
    before = MAX_ID if query.cursor is None else query.cursor
    return await known(api.forward.deliveries(name, query.state, before, query.limit))


async def forward_delivery(api: Api, id: int) -> DeliveryDetail | None:
    return await api.forward.delivery(id)


async def forward_test(api: Api, name: str) -> ForwardTested:
    tested = await known(api.forward.test(name))
    result = "delivered" if tested.delivered else tested.error
    await api.action_log.add(ActionKind.TEST_PING, endpoint=name, result=result)
    return tested


async def forward_replay(api: Api, name: str, wanted: ReplayWanted) -> ForwardReplayed:
    since = to_ms(wanted.since)
    assert since is not None
    replayed = await known(api.forward.replay(name, since, to_ms(wanted.until), dry_run=wanted.dry_run))
    if not wanted.dry_run:
        period = {"since": wanted.since, "until": wanted.until}
        times = {bound: at.isoformat() for bound, at in period.items() if at is not None}
        await api.action_log.add(ActionKind.FORWARD_REPLAY, replayed.deliveries, endpoint=name, **times)
    return replayed


async def forward_stop(api: Api, name: str) -> ForwardChanged:
    changed = await known(api.forward.stop(name))
    await api.action_log.add(ActionKind.FORWARD_STOP, endpoint=name)
    return changed


async def forward_start(api: Api, name: str) -> ForwardChanged:
    changed = await known(api.forward.start(name))
    await api.action_log.add(ActionKind.FORWARD_START, endpoint=name)
    return changed


FORWARD_ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/api/v1/events", events, query=EventsQuery, answer=EventPage),
    Endpoint(
        "GET", "/api/v1/verdict", verdict,
        query=VerdictQuery, answer=GateAnswer, refusals=(("404", "No notification of this batch has come."),),
    ),
    Endpoint("GET", "/api/v1/forward", forward_endpoints, answer=Page[ForwardEndpointItem]),
    Endpoint(
        "GET", "/api/v1/forward/{name}/deliveries", forward_deliveries,
        query=DeliveriesQuery, answer=Page[DeliveryRow],
    ),
    Endpoint("GET", "/api/v1/deliveries/{id}", forward_delivery, answer=DeliveryDetail),
    Endpoint(
        "POST", "/api/v1/forward/{name}/test", forward_test,
        answer=ForwardTested, refusals=(("409", "The endpoint is stopped."),),
    ),
    Endpoint("POST", "/api/v1/forward/{name}/replay", forward_replay, body=ReplayWanted, answer=ForwardReplayed),
    Endpoint("POST", "/api/v1/forward/{name}/stop", forward_stop, answer=ForwardChanged),
    Endpoint("POST", "/api/v1/forward/{name}/start", forward_start, answer=ForwardChanged),
)  # fmt: skip
