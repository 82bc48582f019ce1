"""Forwards events: one queue for each configured endpoint, one recorder for all of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import structlog

from notify_server.config import version
from notify_server.config.forward import BotEndpoint, CommandEndpoint, UrlEndpoint
from notify_server.events.payload import matching_types
from notify_server.forward.client import EndpointClient
from notify_server.forward.group import BotQueue
from notify_server.forward.outcome import Attempt
from notify_server.forward.queue import EndpointQueue
from notify_server.forward.recorder import Recorder
from notify_server.forward.script import Scripts
from notify_server.forward.transport import CommandTransport, Transport, UrlTransport
from notify_server.store.outbox import Notice, Outbox, Outgoing, Subscription
from notify_server.supervise import start_task, stop_tasks

log = structlog.get_logger("notify_server.forward")

Endpoint: TypeAlias = UrlEndpoint | BotEndpoint | CommandEndpoint
# Longer than a test takes for its turn: the request itself has the endpoint's own timeout.
TEST_SECONDS = 10.0


def subscription_of(endpoint: Endpoint) -> Subscription:
    """Return what an endpoint subscribes to."""
    types = [str(kind) for kind in matching_types(endpoint.events)]
    if isinstance(endpoint, BotEndpoint):
        return Subscription(endpoint.name, types, endpoint.api_codes, round(endpoint.group_wait * 1000), True)
    return Subscription(endpoint.name, types, endpoint.api_codes)


class Sender:
    """Runs from `start` to `stop`. Without endpoints it runs nothing."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        outbox: Outbox,
        *,
        now: Callable[[], int],
        on_attempt: Callable[[str, Outgoing, Attempt], None] = lambda endpoint, delivery, attempt: None,
        public_url: str | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.endpoints = {endpoint.name: endpoint for endpoint in endpoints}
        self._outbox = outbox
        self._now = now
        self._on_attempt = on_attempt
        self._public_url = public_url
        self._chance = chance
        self._recorder = Recorder(outbox, now, self._on_notice)
        self._queues: dict[str, EndpointQueue | BotQueue] = {}
        self._tests: dict[int, asyncio.Future[Attempt]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._different: set[str] = set()

    async def start(self) -> None:
        """Subscribe the endpoints, and send due deliveries from now on."""
        await self._outbox.subscribe(
            [subscription_of(endpoint) for endpoint in self.endpoints.values()], self._public_url, self._now()
        )
        if not self.endpoints:
            return
        scripts = Scripts()
        self._queues = {name: self._queue(endpoint, scripts) for name, endpoint in self.endpoints.items()}
        self._tasks = [start_task(self._recorder.run(), "record deliveries")]
        self._tasks += [start_task(queue.run(), f"forward to {name}") for name, queue in self._queues.items()]

    def _queue(self, endpoint: Endpoint, scripts: Scripts) -> EndpointQueue | BotQueue:
        if isinstance(endpoint, BotEndpoint):
            return BotQueue(
                endpoint, self._client(endpoint), self._outbox, self._recorder,
                now=self._now, chance=self._chance, listener=self, dashboard=self._public_url,
            )  # fmt: skip
        transport: Transport = (
            CommandTransport(endpoint, scripts)
            if isinstance(endpoint, CommandEndpoint)
            else UrlTransport(endpoint, self._client(endpoint), self._now)
        )
        return EndpointQueue(
            endpoint.name, transport, self._outbox, self._recorder,
            now=self._now, chance=self._chance, listener=self,
        )  # fmt: skip

    def _client(self, endpoint: UrlEndpoint | BotEndpoint) -> EndpointClient:
        return EndpointClient(
            timeout=endpoint.timeout,
            allowed_networks=endpoint.allowed_networks,
            ca_file=endpoint.ca_file,
            user_agent=f"notify-server/{version()}".removesuffix("/"),
            now=self._now,
            place=endpoint.place,
        )

    def compare(self, present: Iterable[str]) -> None:
        """Log a warning when the store has other endpoints than this process: another node has another configuration,
        or had it until a few minutes ago.
        """
        different = self.endpoints.keys() ^ set(present)
        if different - self._different:
            log.warning(
                "the nodes have different [[forward]] tables: an endpoint that not all of them have is served by those "
                "that do, and removed ten minutes after the last one; if this is no rolling restart, give all the same",
                endpoints=", ".join(sorted(different)),
            )
        self._different = set(different)

    def wake(self) -> None:
        """Look for due deliveries now: something has been committed."""
        for queue in self._queues.values():
            queue.wake()

    def queue(self, name: str) -> EndpointQueue | BotQueue | None:
        """Return the queue of an endpoint."""
        return self._queues.get(name)

    async def test(self, name: str) -> Attempt | None:
        """Send test.ping and return the attempt; None when there was none in time. The endpoint must be
        configured and started.
        """
        endpoint, queue = self.endpoints[name], self._queues[name]
        delivery = await self._outbox.ping_endpoint(name, self._now())
        if delivery is None:
            return None
        future: asyncio.Future[Attempt] = asyncio.get_running_loop().create_future()
        self._tests[delivery] = future
        queue.try_now()
        try:
            async with asyncio.timeout(endpoint.timeout + TEST_SECONDS):
                return await future
        except TimeoutError:
            return None
        finally:
            del self._tests[delivery]

    def on_attempt(self, endpoint: str, delivery: Outgoing, attempt: Attempt) -> None:
        """Note an attempt of a queue."""
        self._on_attempt(endpoint, delivery, attempt)
        test = self._tests.get(delivery.id)
        if test is not None and not test.done():
            test.set_result(attempt)
        write = log.debug if attempt.delivered else log.info
        write(
            "delivered" if attempt.delivered else "delivery failed",
            endpoint=endpoint,
            type=delivery.type,
            key=delivery.key,
            batch_id=delivery.subject,
            attempt=delivery.attempts + 1,
            status=attempt.status,
            error=attempt.error,
        )

    def _on_notice(self, notice: Notice) -> None:
        match notice.what:
            case "failing":
                log.warning("forwarding fails, retrying", endpoint=notice.endpoint, error=notice.error)
            case "stopped":
                log.error(
                    "forwarding is stopped: fix the receiver, then run `notify-server forward start`",
                    endpoint=notice.endpoint,
                    error=notice.error,
                )
            case _:
                log.info("forwarding works again", endpoint=notice.endpoint)
        # There is an event about it.
        self.wake()

    async def stop(self, seconds: float) -> None:
        """Stop within this time; interrupted deliveries are sent again after the next start."""
        if not self._tasks:
            return
        recorder, *loops = self._tasks
        await stop_tasks(*loops)
        await asyncio.gather(*(queue.stop(seconds) for queue in self._queues.values()))
        try:
            async with asyncio.timeout(max(seconds, 0.5)):
                await self._recorder.flush()
        except TimeoutError:
            log.warning("some deliveries could not be recorded, they are sent again after the next start")
        await stop_tasks(recorder)
