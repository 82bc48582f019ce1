"""The queue of a robot: all that happens within `group_wait` becomes one message, and problems are repeated."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import msgspec
import structlog

from notify_server.config.forward import BotEndpoint
from notify_server.errors import StoreUnavailableError
from notify_server.events.payload import EventType
from notify_server.forward import digest
from notify_server.forward.bots import dingtalk, feishu, wecom
from notify_server.forward.bots.answer import Judgement, Message
from notify_server.forward.circuit import Circuit
from notify_server.forward.client import EndpointClient
from notify_server.forward.outcome import Attempt
from notify_server.forward.queue import MIN_WAIT_SECONDS, POLL_SECONDS, Listener, to_result
from notify_server.forward.recorder import Recorder
from notify_server.model import CircuitState
from notify_server.store.outbox import DeliveryResult, DeliveryState, Outbox, Outgoing

log = structlog.get_logger("notify_server.forward")

ROBOTS: Mapping[str, ModuleType] = {"dingtalk": dingtalk, "wecom": wecom, "feishu": feishu}
# Events that one message is made of.
MAX_EVENTS = 500
THROTTLED_MS = 60_000


class BotQueue:
    """Runs from `run` until that is cancelled. It sends one message at a time, at the robot's pace."""

    def __init__(
        self,
        endpoint: BotEndpoint,
        client: EndpointClient,
        outbox: Outbox,
        recorder: Recorder,
        *,
        now: Callable[[], int],
        chance: Callable[[], float],
        listener: Listener,
        dashboard: str | None = None,
    ) -> None:
        self.name = endpoint.name
        self.circuit = Circuit()
        self.in_flight = 0
        self._endpoint = endpoint
        self._robot = ROBOTS[endpoint.bot]
        self._client = client
        self._outbox = outbox
        self._recorder = recorder
        self._now = now
        self._chance = chance
        self._listener = listener
        self._dashboard = dashboard
        self._news = asyncio.Event()
        self._not_before = 0
        self._next_at: int | None = None
        self._last_message_at = now()
        # Of batches that were complete again while others were not.
        self._recovered: list[Mapping[str, Any]] = []

    def wake(self) -> None:
        """Look for due events now."""
        self._news.set()

    def try_now(self) -> None:
        """Let a trial through although the circuit is open."""
        self.circuit.try_now(self._now())
        self.wake()

    async def run(self) -> None:
        """Send messages until cancelled."""
        while True:
            self._news.clear()
            wait = POLL_SECONDS
            try:
                if self._may_send():
                    await self._step()
                wait = self._wait()
            except StoreUnavailableError as error:
                log.debug("cannot claim deliveries, trying again", endpoint=self.name, error=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._news.wait()

    def _may_send(self) -> bool:
        now = self._now()
        return now >= self._not_before and self.circuit.slots(now, 1) > 0

    def _wait(self) -> float:
        now = self._now()
        times = [self._next_at] if self._next_at is not None else []
        if not self._may_send():
            times = [self._not_before]
            if self.circuit.state(now) is CircuitState.OPEN and self.circuit.open_until is not None:
                times = [max(self._not_before, self.circuit.open_until)]
        soonest = min(((at - now) / 1000 for at in times), default=POLL_SECONDS)
        return max(MIN_WAIT_SECONDS, min(soonest, POLL_SECONDS))

    async def _step(self) -> None:
        now = self._now()
        claimed = await self._outbox.claim_deliveries([(self.name, MAX_EVENTS)], now)
        self._next_at = claimed.next_at.get(self.name)
        deliveries = claimed.deliveries
        if not deliveries:
            await self._remind(now)
            return
        if all(each.type == EventType.TEST_PING for each in deliveries):
            await self._deliver(deliveries, self._compose([_payload(each) for each in deliveries[:1]]))
            return
        # The group_wait of the first event is over: the events since then join its message.
        horizon = now + round(self._endpoint.group_wait * 1000)
        room = MAX_EVENTS - len(deliveries)
        if room and horizon > now:
            deliveries = deliveries + (await self._outbox.claim_deliveries([(self.name, room)], horizon)).deliveries
        recoveries = [each for each in deliveries if each.type == EventType.BATCH_COMPLETE]
        problems = [each for each in deliveries if each.type not in (EventType.BATCH_COMPLETE, EventType.TEST_PING)]
        pings = [each for each in deliveries if each.type == EventType.TEST_PING]
        if problems:
            await self._deliver([*problems, *pings], self._compose([_payload(each) for each in problems]))
            await self._keep(recoveries)
        elif await self._outbox.open_problems(self.name):
            await self._keep(recoveries)
            if pings:
                self._outbox.release_deliveries([each.id for each in pings])
        else:
            payloads = [*self._recovered, *(_payload(each) for each in recoveries)]
            message = digest.recovered(self._endpoint.language, payloads, dashboard=self._dashboard)
            if await self._deliver([*recoveries, *pings], message):
                self._recovered.clear()

    def _compose(self, payloads: Sequence[Mapping[str, Any]], *, reminder: bool = False) -> Message:
        return digest.compose(self._endpoint.language, payloads, reminder=reminder, dashboard=self._dashboard)

    async def _remind(self, now: int) -> None:
        if now - self._last_message_at < self._endpoint.repeat * 1000:
            return
        self._last_message_at = now
        problems = [msgspec.json.decode(payload) for payload in await self._outbox.open_problems(self.name)]
        if problems:
            await self._post(self._compose(problems, reminder=True))

    async def _keep(self, recoveries: Sequence[Outgoing]) -> None:
        """Hold recoveries back: one message for all of them is sent when the last problem has ended."""
        if not recoveries:
            return
        self._recovered += [_payload(each) for each in recoveries]
        now = self._now()
        await self._recorder.add(
            [
                DeliveryResult(
                    each.id, self.name, DeliveryState.DELIVERED, each.attempts, None, None, None, None, now, 0.0,
                    sent=False,
                )
                for each in recoveries
            ]
        )  # fmt: skip

    async def _deliver(self, deliveries: Sequence[Outgoing], message: Message) -> bool:
        started_at = self._now()
        attempt, wait_ms = await self._post(message)
        now = self._now()
        for delivery in deliveries:
            self._listener.on_attempt(self.name, delivery, attempt)
        if attempt.throttled:
            # The robot's pace is no fault of the message.
            results = [
                DeliveryResult(
                    each.id, self.name, DeliveryState.PENDING, each.attempts, now + wait_ms, attempt.status,
                    attempt.error, attempt.response, started_at, attempt.elapsed_ms, sent=False,
                )
                for each in deliveries
            ]  # fmt: skip
        else:
            chance = self._chance()
            results = [to_result(each, attempt, started_at, now, chance) for each in deliveries]
            # One message is one attempt, however many events it is made of.
            results = [results[0], *(msgspec.structs.replace(each, sent=attempt.delivered) for each in results[1:])]
        await self._recorder.add(results)
        self.wake()
        return attempt.delivered

    async def _post(self, message: Message) -> tuple[Attempt, int]:
        """Post a message; return the attempt, and how long to wait in ms if the robot throttles."""
        endpoint, now = self._endpoint, self._now()
        secret = endpoint.secret.get_secret_value() if endpoint.secret is not None else ""
        request = self._robot.build(
            endpoint.url.get_secret_value(), secret, now, message, keyword=endpoint.keyword, mentions=endpoint.mentions
        )
        self.circuit.started(now)
        self.in_flight = 1
        try:
            answer = await self._client.post(request.url, request.body, {})
        finally:
            self.in_flight = 0
        found: Judgement = (
            Judgement(False, text=answer.error or "")
            if answer.status is None
            else self._robot.judge(answer.status, answer.body, answer.headers)
        )
        wait_ms = found.wait_ms or answer.retry_after_ms or THROTTLED_MS
        now = self._now()
        self._not_before = now + (wait_ms if found.throttled else self._robot.INTERVAL_MS)
        if found.accepted or found.throttled:
            self.circuit.succeeded()
        else:
            self.circuit.failed(now)
        if found.accepted:
            self._last_message_at = now
        error = None if found.accepted else found.text
        attempt = Attempt(
            answer.status, error, answer.text, answer.elapsed_ms, answer.retry_after_ms, found.fatal, found.throttled
        )
        return attempt, wait_ms

    async def stop(self, seconds: float) -> None:
        """Close the connections."""
        await self._client.close()


def _payload(delivery: Outgoing) -> Mapping[str, Any]:
    decoded: Mapping[str, Any] = msgspec.json.decode(delivery.payload)
    return decoded
