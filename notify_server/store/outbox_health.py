"""Decides from the outcomes of deliveries whether their endpoint is failing, recovered or stopped. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from notify_server.events.payload import EndpointData, EventType, plain_event
from notify_server.store.outbox import DeliveryResult, DeliveryState, EndpointState, NewEvent, Notice

# Consecutive failures after which an endpoint counts as failing.
FAILING_AFTER = 4
# An endpoint that has only failed for this long since its last success is stopped.
STOP_AFTER_MS = 5 * 86_400_000


class Change(msgspec.Struct, frozen=True):
    """An endpoint's new state, what to log of it, and the events to write."""

    state: EndpointState
    notices: list[Notice]
    events: list[NewEvent]


def after_results(
    before: EndpointState, results: Sequence[DeliveryResult], pending: Callable[[], int], now: int
) -> Change:
    """Return the endpoint's state after the results, in their order. `pending` counts its deliveries."""
    state = before
    notices: list[Notice] = []
    events: list[NewEvent] = []

    def report(kind: EventType, what: str, result: DeliveryResult) -> None:
        stopped = what == "stopped"
        data = EndpointData(state.name, state.failures, result.status, result.error, pending(), stopped)
        events.append(NewEvent(plain_event(kind, data, now), not_to=state.name))
        notices.append(Notice(state.name, what, result.error))

    for result in results:
        if not result.sent:
            continue
        if result.state is DeliveryState.DELIVERED:
            recovered = state.failures >= FAILING_AFTER
            state = msgspec.structs.replace(state, failures=0, first_failed_at=None, last_success_at=now)
            if recovered:
                report(EventType.ENDPOINT_RECOVERED, "recovered", result)
            continue
        since = now if state.first_failed_at is None else state.first_failed_at
        state = msgspec.structs.replace(state, failures=state.failures + 1, first_failed_at=since)
        if state.stopped_at is None and (result.stop or now - since >= STOP_AFTER_MS):
            reason = result.error or "only failures for five days"
            state = msgspec.structs.replace(state, stopped_at=now, stopped_reason=reason)
            report(EventType.ENDPOINT_FAILING, "stopped", result)
        elif state.failures == FAILING_AFTER:
            report(EventType.ENDPOINT_FAILING, "failing", result)
    return Change(state, notices, events)
