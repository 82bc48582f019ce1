"""Plays the platform: posts a plan's notifications, and repeats those that are not acked."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Iterator, Sequence
from random import Random

import aiohttp

from notify_server.errors import NotifyServerError
from notify_server.simulator.plan import Plan, PlantedBatch, PlantedFile, plant_batches

# The platform's waits between deliveries of the same notification, in seconds; then it gives up.
RETRY_WAITS = (0.2, 0.5, 1.0, 2.0, 4.0)
MAX_RETRY_AFTER = 5.0
RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
ACK_TIMEOUT = 30.0


class SimulationError(NotifyServerError):
    """The simulation cannot be finished. One line, with what to do."""


class Platform:
    """Makes a plan's batches and delivers them. `batches` and `deliveries`, in the order of their first post, are the
    same for the same plan.
    """

    def __init__(self, plan: Plan, *, retry_waits: Sequence[float] = RETRY_WAITS) -> None:
        self._retry_waits = retry_waits
        self.plan = plan
        random = Random(plan.seed)  # noqa: S311 - to be repeatable, not to be secret
        self.batches = list(plant_batches(plan, random))
        self.deliveries = list(self.batches)
        for batch in random.sample(self.batches, round(plan.redelivered * plan.batches)):
            self.deliveries.insert(random.randrange(len(self.deliveries) + 1), batch)
        self.posted = 0
        self.repeated = 0
        # One per delivery acked: milliseconds from the request to the whole answer, of the post that was acked.
        self.latencies_ms: list[float] = []

    @property
    def acked(self) -> int:
        return len(self.latencies_ms)

    @property
    def files(self) -> Iterator[PlantedFile]:
        """Return every file of every batch."""
        return (file for batch in self.batches for file in batch.files.values())

    async def deliver(
        self,
        url: str,
        objects: str,
        *,
        token: str | None = None,
        tls: ssl.SSLContext | bool = True,
        rate: float = 0.0,
        concurrency: int = 16,
    ) -> None:
        """Post every delivery and return when the last is acked. `rate` is posts per second, 0 as fast as they are
        acked; at most `concurrency` are in flight.

        Posts answered 5xx, 408 or 429, or not at all, are repeated a few times. Raises SimulationError when that does
        not help, or at any other refusal.
        """
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        clock = asyncio.get_running_loop().time
        started = clock()
        turns = iter(enumerate(self.deliveries))

        async def work(session: aiohttp.ClientSession) -> None:
            for turn, batch in turns:
                if rate and (early := started + turn / rate - clock()) > 0:
                    await asyncio.sleep(early)
                await self._deliver(session, url, batch, batch.body(objects))

        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=concurrency, ssl=tls),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=ACK_TIMEOUT),
        ) as session:
            workers = [asyncio.create_task(work(session)) for _ in range(min(concurrency, len(self.deliveries)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _deliver(self, session: aiohttp.ClientSession, url: str, batch: PlantedBatch, body: bytes) -> None:
        self.posted += 1
        for wait in (*self._retry_waits, None):
            # The event loop's clock ticks in whole milliseconds.
            started = time.perf_counter()
            asked = 0.0
            try:
                async with session.post(url, data=body, allow_redirects=False) as response:
                    answer = await response.text(errors="replace")
            except (aiohttp.ClientError, TimeoutError) as error:
                trouble = f"does not answer ({describe(error)})"
            else:
                if 200 <= response.status < 300:
                    self.latencies_ms.append((time.perf_counter() - started) * 1000)
                    return
                trouble = f"answers {response.status}: {' '.join(answer.split())[:200]}"
                if response.status not in RETRIED_STATUS:
                    raise SimulationError(f"{url} {trouble}")
                with contextlib.suppress(ValueError):
                    asked = min(float(response.headers.get("Retry-After", "0")), MAX_RETRY_AFTER)
            if wait is None:
                raise SimulationError(f"{url} {trouble}: gave up on batch {batch.batch_id}")
            self.repeated += 1
            await asyncio.sleep(max(wait, asked))


def describe(error: BaseException) -> str:
    """Describe an error in a few words: aiohttp wraps socket errors, and a time-out has no text."""
    if isinstance(error, TimeoutError):
        return "timed out"
    cause = getattr(error, "os_error", None) or error
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
