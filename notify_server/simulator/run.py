"""Plays the platform and its object store against a running server, and compares the server's record with the plan.

    Plan --seed--> Platform (batches, order of deliveries) --POST--> server --HEAD--> ObjectStore (planted objects)
                       |                                               |
                       +---- compare <- RecordViews <-- its record ----+
                       +---- compare <- Receivers <---- its events ----+

The content depends on the plan alone; only the port in the addresses is the object store's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import msgspec
from yarl import URL

from notify_server.model import Verdict
from notify_server.simulator.compare import Comparison, compare, only_missing_left
from notify_server.simulator.object_store import ObjectStore
from notify_server.simulator.plan import PlantedBatch
from notify_server.simulator.platform import Platform, SimulationError, describe
from notify_server.simulator.receiver import ForwardTally, Receivers, expected_verdicts
from notify_server.simulator.record import BatchRow, RecordViews

POLL_SECONDS = 0.2
# Longer than the second attempt of a delivery takes to come.
FORWARD_SECONDS = 20.0


class Report(msgspec.Struct, frozen=True):
    """The result of a run. Latencies are milliseconds, durations seconds; `busiest` is the most files verified within
    one second.
    """

    comparison: Comparison
    posted: int
    acked: int
    repeated: int
    ack_p50_ms: float
    ack_p99_ms: float
    ack_max_ms: float
    verified: int
    verified_per_second: float
    busiest: int
    seconds: float
    timed_out: bool
    forwarded: list[ForwardTally] = []


class Simulation:
    """One run against a daemon. `posted`, `acked` and `verified` are its progress."""

    def __init__(
        self,
        platform: Platform,
        *,
        url: str,
        record: Path,
        token: str | None = None,
        tls: ssl.SSLContext | bool = True,
        rate: float = 0.0,
        slow_seconds: float = 1.0,
        timeout: float = 120.0,
        settle: float = 10.0,
        receivers: Receivers | None = None,
    ) -> None:
        """`timeout` is the number of seconds to wait for verdicts after the last ack; `settle` the number to wait once
        only missing files are pending. `tls` is aiohttp's `ssl`. The daemon forwards to the `receivers`.
        """
        self.platform = platform
        self.verified = 0
        self._url = url
        self._record = record
        self._token = token
        self._tls = tls
        self._rate = rate
        self._slow_seconds = slow_seconds
        self._timeout = timeout
        self._settle = settle
        self._receivers = receivers

    async def run(self) -> Report:
        """Deliver everything, wait for the verdicts, compare. Raises SimulationError, StoreRefusedError,
        StoreUnavailableError.
        """
        clock = asyncio.get_running_loop().time
        await self._reach()
        async with ObjectStore(slow_seconds=self._slow_seconds) as objects:
            objects.plant(self.platform.files)
            async with await RecordViews.open(self._record) as record:
                before, event = await record.last_delivery(), await record.last_event()
                started = clock()
                await self._deliver(record, objects.address)
                last = await record.last_delivery()
                if last - before < self.platform.acked:
                    raise SimulationError(
                        f"{self._url} has acked {self.platform.acked} deliveries, {self._record} has "
                        f"{last - before} of them: name that daemon's database with --store"
                    )
                timed_out = not await self._verdicts(record, last)
                seconds = clock() - started
                comparison = await compare(self.platform.batches, record, objects.address, objects.requests)
                forwarded = await self._forwarded(record, event)
        return self._report(comparison, seconds, timed_out, forwarded)

    async def _forwarded(self, record: RecordViews, event: int) -> list[ForwardTally]:
        """Wait for the events of this run, which are those after `event`, and compare them with the plan."""
        if self._receivers is None:
            return []
        expected = expected_verdicts(self.platform.batches)
        if event:
            # A batch of an earlier run whose verdict is the same again has no event.
            since = await record.verdicts_since(event)
            expected = {batch_id: verdict for batch_id, verdict in expected.items() if batch_id in since}
        await self._receivers.settled(expected, FORWARD_SECONDS)
        return self._receivers.compare(expected, await record.stopped_endpoints())

    async def _reach(self) -> None:
        """Raise SimulationError when nothing listens at the address; the platform's retries would hide it."""
        url = URL(self._url)
        try:
            async with asyncio.timeout(5):
                _, writer = await asyncio.open_connection(url.host, url.port)
        except (OSError, TimeoutError) as error:
            raise SimulationError(
                f"{self._url}: cannot be reached ({describe(error)}): start the daemon, or name its address with --url"
            ) from None
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _deliver(self, record: RecordViews, objects: str) -> None:
        delivering = asyncio.create_task(
            self.platform.deliver(self._url, objects, token=self._token, tls=self._tls, rate=self._rate)
        )
        try:
            while not (await asyncio.wait([delivering], timeout=POLL_SECONDS))[0]:
                await self._look(record, self.platform.batches)
            await delivering
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)

    async def _look(self, record: RecordViews, batches: Sequence[PlantedBatch], settled: int = 0) -> list[BatchRow]:
        """Return the batches' rows, and the daemon's progress with them and `settled` files of others."""
        rows = await record.batches([(batch.batch_id, batch.api_code) for batch in batches])
        self.verified = settled + sum(row.files - row.pending for row in rows)
        return rows

    async def _verdicts(self, record: RecordViews, delivery: int) -> bool:
        """Wait for the verdicts on deliveries up to `delivery`; return whether all expected ones were reached."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._timeout
        # Before that, a verdict may be that of an earlier run of the same plan.
        while not await record.expanded(delivery):
            if clock() >= deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
        waiting = {(batch.batch_id, batch.api_code): batch for batch in self.platform.batches}
        settled = 0
        only_missing_since: float | None = None
        while True:
            rows = await self._look(record, list(waiting.values()), settled)
            only_missing = len(rows) == len(waiting)
            for row in rows:
                batch = waiting[row.batch_id, row.api_code]
                if row.verdict is not Verdict.PENDING:
                    settled += row.files
                    del waiting[row.batch_id, row.api_code]
                elif not only_missing_left(batch, row):
                    only_missing = False
            now = clock()
            if not waiting:
                return True
            only_missing_since = (only_missing_since or now) if only_missing else None
            if only_missing_since is not None and now >= only_missing_since + self._settle:
                return True
            if now >= deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)

    def _report(self, comparison: Comparison, seconds: float, timed_out: bool, forwarded: list[ForwardTally]) -> Report:
        latencies = sorted(self.platform.latencies_ms)
        moments = comparison.verified_at
        return Report(
            comparison,
            self.platform.posted,
            self.platform.acked,
            self.platform.repeated,
            percentile(latencies, 0.5),
            percentile(latencies, 0.99),
            percentile(latencies, 1.0),
            len(moments),
            len(moments) / seconds,
            busiest_second(moments),
            seconds,
            timed_out,
            forwarded,
        )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that this share of the values does not exceed (nearest rank), 0 if there is none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def busiest_second(ordered: Sequence[float]) -> int:
    """Return the largest number of these times (seconds, in order) that lie within one second."""
    return max((end - bisect_left(ordered, moment - 1) for end, moment in enumerate(ordered, start=1)), default=0)
