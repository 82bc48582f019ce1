"""The queue of one endpoint: claims due deliveries, sends at most CONCURRENCY at a time, records the outcomes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Protocol

import structlog

from notify_server.errors import StoreUnavailableError
from notify_server.forward.circuit import Circuit
from notify_server.forward.outcome import Attempt
from notify_server.forward.recorder import Recorder
from notify_server.forward.schedule import after_attempt
from notify_server.forward.transport import Transport
from notify_server.model import CircuitState
from notify_server.store.outbox import DeliveryResult, DeliveryState, Outbox, Outgoing
from notify_server.supervise import log_task_failure

log = structlog.get_logger("notify_server.forward")

CONCURRENCY = 8
# Claimed ahead of their turn, so that a free slot need not wait for the store.
AHEAD = 24
# Other nodes, and a person with the command line, make deliveries due too.
POLL_SECONDS = 1.0
MIN_WAIT_SECONDS = 0.002


class Listener(Protocol):
    """Receives every attempt."""

    def on_attempt(self, endpoint: str, delivery: Outgoing, attempt: Attempt) -> None:
        """Note an attempt, before it is recorded."""


def to_result(delivery: Outgoing, attempt: Attempt, started_at: int, now: int, chance: float) -> DeliveryResult:
    """Decide what follows from an attempt."""
    attempts = delivery.attempts + 1
    outcome = after_attempt(
        delivered=attempt.delivered,
        status=attempt.status,
        attempts=attempts,
        now=now,
        chance=chance,
        retry_after_ms=attempt.retry_after_ms,
    )
    return DeliveryResult(
        delivery.id,
        delivery.endpoint,
        DeliveryState(outcome.state),
        attempts,
        outcome.next_attempt_at,
        attempt.status,
        attempt.error,
        attempt.response,
        started_at,
        attempt.elapsed_ms,
        stop=outcome.stop or attempt.fatal,
    )


class EndpointQueue:
    """Runs from `run` until that is cancelled; then `stop` waits for requests in progress."""

    def __init__(
        self,
        name: str,
        transport: Transport,
        outbox: Outbox,
        recorder: Recorder,
        *,
        now: Callable[[], int],
        chance: Callable[[], float],
        listener: Listener,
    ) -> None:
        self.name = name
        self.circuit = Circuit()
        self._transport = transport
        self._outbox = outbox
        self._recorder = recorder
        self._now = now
        self._chance = chance
        self._listener = listener
        self._queue: deque[Outgoing] = deque()
        # Claimed and not yet recorded: ids, and batches, each of which may have one at most.
        self._held: set[int] = set()
        self._batches: set[int] = set()
        self._sending: set[asyncio.Task[None]] = set()
        self._recording: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._next_at: int | None = None

    def wake(self) -> None:
        """Look for due deliveries now."""
        self._news.set()

    def try_now(self) -> None:
        """Let a trial through although the circuit is open."""
        self.circuit.try_now(self._now())
        self.wake()

    @property
    def in_flight(self) -> int:
        """The number of requests in progress."""
        return len(self._sending)

    async def run(self) -> None:
        """Send deliveries as they become due, until cancelled."""
        while True:
            self._news.clear()
            try:
                await self._claim()
            except StoreUnavailableError as error:
                log.debug("cannot claim deliveries, trying again", endpoint=self.name, error=str(error))
                self._next_at = None
            self._start()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait()):
                    await self._news.wait()

    def _wait(self) -> float:
        now = self._now()
        times = [self._next_at] if self._next_at is not None else []
        if self.circuit.state(now) is CircuitState.OPEN and self.circuit.open_until is not None:
            times = [self.circuit.open_until]
        soonest = min(((at - now) / 1000 for at in times), default=POLL_SECONDS)
        return max(MIN_WAIT_SECONDS, min(soonest, POLL_SECONDS))

    async def _claim(self) -> None:
        now = self._now()
        state = self.circuit.state(now)
        if state is CircuitState.CLOSED:
            room = CONCURRENCY + AHEAD - len(self._queue) - len(self._sending)
        else:
            # Deliveries claimed ahead are released for any node that reaches the endpoint.
            self._give_back()
            room = self.circuit.slots(now, 1) if not self._sending else 0
        if room <= 0:
            return
        claimed = await self._outbox.claim_deliveries([(self.name, room)], now)
        self._next_at = claimed.next_at.get(self.name)
        for delivery in claimed.deliveries:
            # A restarted store does not know which deliveries are in progress here.
            if delivery.id in self._held or delivery.batch in self._batches:
                self._outbox.release_deliveries([delivery.id])
                continue
            self._held.add(delivery.id)
            if delivery.batch is not None:
                self._batches.add(delivery.batch)
            self._queue.append(delivery)

    def _start(self) -> None:
        while self._queue and len(self._sending) < CONCURRENCY and self.circuit.slots(self._now(), 1):
            delivery = self._queue.popleft()
            self.circuit.started(self._now())
            task = asyncio.create_task(self._deliver(delivery), name=f"forward {self.name}")
            self._sending.add(task)
            task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        log_task_failure(task)
        self._start()
        if len(self._queue) < AHEAD // 2:
            self.wake()

    async def _deliver(self, delivery: Outgoing) -> None:
        started_at = self._now()
        attempt = await self._transport.send(delivery)
        now = self._now()
        if attempt.delivered:
            self.circuit.succeeded()
        else:
            self.circuit.failed(now)
        self._listener.on_attempt(self.name, delivery, attempt)
        result = to_result(delivery, attempt, started_at, now, self._chance())
        task = asyncio.create_task(self._record(delivery, result), name=f"record {self.name}")
        self._recording.add(task)
        task.add_done_callback(self._recording.discard)

    async def _record(self, delivery: Outgoing, result: DeliveryResult) -> None:
        await self._recorder.add([result])
        self._drop(delivery)
        # The next event of its batch may go now.
        self.wake()

    def _drop(self, delivery: Outgoing) -> None:
        self._held.discard(delivery.id)
        if delivery.batch is not None:
            self._batches.discard(delivery.batch)

    def _give_back(self) -> None:
        if self._queue:
            self._outbox.release_deliveries([delivery.id for delivery in self._queue])
        while self._queue:
            self._drop(self._queue.popleft())

    async def stop(self, seconds: float) -> None:
        """Release deliveries that have not started, and wait this long for the others; those cut off are sent again."""
        self._give_back()
        if self._sending:
            _, late = await asyncio.wait(self._sending, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._transport.close()
