"""Plays the services that events are forwarded to, on loopback, each with a fault, and compares their events with the
plan.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

import msgspec
from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

from notify_server.model import FileState, Verdict
from notify_server.simulator.loopback_server import LoopbackServer
from notify_server.simulator.plan import PlantedBatch

# How long the receiver that is down stays so, from the first request on.
DOWN_SECONDS = 2.0
FIRST_FAILURES = 3
POLL_SECONDS = 0.05


class Behaviour(StrEnum):
    """How a receiver behaves, in the order in which they are shown."""

    STEADY = "steady"
    DOWN = "down at first"
    SLOW = "slow"
    FAILS_FIRST = "500 at first"
    FALSE_OK = "200 with an error at first"
    GONE = "gone"


NAMES: Mapping[Behaviour, str] = {
    Behaviour.STEADY: "steady",
    Behaviour.DOWN: "down",
    Behaviour.SLOW: "slow",
    Behaviour.FAILS_FIRST: "fails-first",
    Behaviour.FALSE_OK: "false-ok",
    Behaviour.GONE: "gone",
}
BEHAVIOURS = {name: behaviour for behaviour, name in NAMES.items()}


def receivers_named(names: str) -> list[Behaviour]:
    """Return the behaviours of these names, with commas between them. Raises ValueError."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in BEHAVIOURS]:
        near = get_close_matches(unknown[0], BEHAVIOURS, 1)
        remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(BEHAVIOURS)}"
        raise ValueError(f"--receivers: {unknown[0]} is not a receiver, {remedy}")
    return [BEHAVIOURS[name] for name in dict.fromkeys(wanted)]


class Received(msgspec.Struct):
    """The requests that one receiver got: `last` has the newest event that it accepted of each batch, by batch_id."""

    requests: int = 0
    accepted: int = 0
    unsigned: int = 0
    older: int = 0
    repeated: int = 0
    first_at: float | None = None
    last: dict[str, tuple[int, str]] = msgspec.field(default_factory=dict)
    keys: set[str] = msgspec.field(default_factory=set)


class ForwardTally(msgspec.Struct, frozen=True):
    """Of one receiver: the batches whose verdict it should have, and has; `fault` is what is wrong, if anything."""

    behaviour: Behaviour
    requests: int
    expected: int
    as_expected: int
    fault: str | None


class Receivers(LoopbackServer):
    """The receivers of a run."""

    def __init__(self, behaviours: Iterable[Behaviour], *, slow_seconds: float = 1.0) -> None:
        super().__init__(self._answer)
        self.received = {behaviour: Received() for behaviour in behaviours}
        self.secret = "whsec_" + base64.b64encode(os.urandom(24)).decode()
        self._slow_seconds = slow_seconds

    def tables(self) -> list[dict[str, Any]]:
        """Return the `[[forward]]` tables that have a daemon send verdicts to these receivers."""
        return [
            {
                "name": NAMES[behaviour],
                "url": f"{self.address}{NAMES[behaviour]}",
                "secrets": [self.secret],
                "events": ["batch.complete", "batch.incomplete"],
                "accept": "json:code=000",
                "timeout": f"{self._slow_seconds + 5:.3f}s",
                "allowed_networks": ["127.0.0.0/8"],
            }
            for behaviour in self.received
        ]

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        behaviour = BEHAVIOURS[request.path[1:]]
        received, now = self.received[behaviour], asyncio.get_running_loop().time()
        body = await request.read()
        received.requests += 1
        received.first_at = received.first_at or now
        match behaviour:
            case Behaviour.DOWN if now < received.first_at + DOWN_SECONDS:
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            case Behaviour.SLOW:
                await asyncio.sleep(self._slow_seconds)
            case Behaviour.FAILS_FIRST if received.requests <= FIRST_FAILURES:
                return web.Response(status=500)
            case Behaviour.FALSE_OK if received.requests <= FIRST_FAILURES:
                return web.json_response({"code": "500", "msg": "the stock service is not available"})
            case Behaviour.GONE:
                return web.Response(status=410)
        self._accept(received, body, request.headers)
        return web.json_response({"code": "000"})

    def _accept(self, received: Received, body: bytes, headers: Mapping[str, str]) -> None:
        try:
            Webhook(self.secret).verify(body, {name.lower(): value for name, value in headers.items()})
        # The library raises ValueError for a signature that is no base64.
        except (WebhookVerificationError, ValueError):
            received.unsigned += 1
            return
        data, key = json.loads(body)["data"], headers["webhook-id"]
        received.accepted += 1
        received.repeated += key in received.keys
        received.keys.add(key)
        revision, _ = received.last.get(data["batch_id"], (0, ""))
        received.older += data["revision"] < revision
        if data["revision"] >= revision:
            received.last[data["batch_id"]] = (data["revision"], data["verdict"])

    async def settled(self, expected: Mapping[str, Verdict], seconds: float) -> None:
        """Return once every receiver has the expected verdicts, or after so many seconds."""
        deadline = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < deadline:
            if all(_has(received, expected) for kind, received in self.received.items() if kind is not Behaviour.GONE):
                return
            await asyncio.sleep(POLL_SECONDS)

    def compare(self, expected: Mapping[str, Verdict], stopped: Iterable[str]) -> list[ForwardTally]:
        """Return how each receiver's events compare with the expected verdicts, by batch_id. `stopped` has the names of
        the endpoints that the daemon has stopped.
        """
        return [
            ForwardTally(
                kind,
                received.requests,
                0 if kind is Behaviour.GONE else len(expected),
                sum(received.last.get(batch_id, (0, ""))[1] == verdict for batch_id, verdict in expected.items()),
                _fault(kind, received, expected, NAMES[kind] in stopped),
            )
            for kind, received in self.received.items()
        ]


def expected_verdicts(batches: Iterable[PlantedBatch]) -> dict[str, Verdict]:
    """Return the verdict that each planted batch should reach, by batch_id."""
    return {
        batch.batch_id: Verdict.COMPLETE if batch.count(FileState.AVAILABLE) == len(batch.files) else Verdict.INCOMPLETE
        for batch in batches
    }


def _has(received: Received, expected: Mapping[str, Verdict]) -> bool:
    return all(received.last.get(batch_id, (0, ""))[1] == verdict for batch_id, verdict in expected.items())


def _fault(kind: Behaviour, received: Received, expected: Mapping[str, Verdict], stopped: bool) -> str | None:
    if kind is Behaviour.GONE:
        return None if stopped or not expected else "answered 410 and is not stopped"
    if stopped:
        return "is stopped"
    if missing := len(expected.keys() - received.last.keys()):
        return f"{missing:,} batches are missing"
    for number, text in (
        (received.unsigned, "with a wrong signature"),
        (received.older, "after a newer one of the same batch"),
        (received.repeated, "a second time, though it was accepted"),
    ):
        if number:
            return f"{number:,} events came {text}"
    return None if _has(received, expected) else "another verdict than planted"
