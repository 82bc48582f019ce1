"""Writes the results of attempts to the store, in batches."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from notify_server.errors import StoreUnavailableError
from notify_server.model import BatchVerdict, FileResult
from notify_server.store.base import FileQueue

log = structlog.get_logger("notify_server.verify")

# Results per transaction. The smaller number applies while acks share the writer: the writer is busy for 1 to 2 ms.
RECORD_ROWS = 256
SMALL_RECORD_ROWS = 128
# How long a transaction waits for more results while attempts are in flight.
RECORD_LINGER = 0.02
# Back-pressure: no attempt starts while more results than these are unrecorded.
MAX_UNRECORDED = 4096
MAX_RETRY_SECONDS = 1.0


class Recorder:
    """Holds results until the store has committed them, and retries while it cannot.

    `on_recorded` gets the attempts of every batch (not postponements), `on_verdicts` the verdicts reached by them, and
    `on_written` is called at the end of each batch; `more_expected` says whether waiting may fill a batch.
    """

    def __init__(
        self,
        store: FileQueue,
        *,
        now: Callable[[], int],
        on_recorded: Callable[[Sequence[FileResult]], None],
        on_verdicts: Callable[[Sequence[BatchVerdict]], None],
        on_written: Callable[[Sequence[FileResult]], None],
        more_expected: Callable[[], bool],
    ) -> None:
        self._store = store
        self._now = now
        self._on_recorded = on_recorded
        self._on_verdicts = on_verdicts
        self._on_written = on_written
        self._more_expected = more_expected
        self._results: deque[FileResult] = deque()
        self._recording = 0
        self._recordable = asyncio.Event()
        self._last_added = asyncio.Event()

    @property
    def unrecorded(self) -> int:
        """The number of results that are not committed yet."""
        return len(self._results) + self._recording

    @property
    def has_room(self) -> bool:
        """True while more attempts may start."""
        return len(self._results) + self._recording < MAX_UNRECORDED

    def add(self, result: FileResult) -> None:
        """Queue a result."""
        self._results.append(result)
        self._recordable.set()

    def flush(self) -> None:
        """Record what is queued without waiting for more, unless more attempts are under way."""
        if self._results and not self._more_expected():
            self._last_added.set()

    async def run(self) -> None:
        """Record results until cancelled."""
        delay = RECORD_LINGER
        while True:
            await self._recordable.wait()
            rows = SMALL_RECORD_ROWS if self._store.prefers_small_batches else RECORD_ROWS
            if len(self._results) < rows and self._more_expected():
                await self._linger()
            batch = [self._results.popleft() for _ in range(min(rows, len(self._results)))]
            if not self._results:
                self._recordable.clear()
            if not batch:
                continue
            if await self._record(batch):
                delay = RECORD_LINGER
            else:
                delay = min(delay * 2, MAX_RETRY_SECONDS)
                await asyncio.sleep(delay)

    async def _linger(self) -> None:
        self._last_added.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECORD_LINGER):
                await self._last_added.wait()

    async def _record(self, batch: list[FileResult]) -> bool:
        """Return whether the store has committed the batch; otherwise it is queued again."""
        self._recording = len(batch)
        try:
            verdicts = await self._store.record(batch, self._now())
        except StoreUnavailableError as error:
            log.warning("cannot record results, trying again", files=len(batch), error=str(error))
            self._results.extendleft(reversed(batch))
            self._recordable.set()
            return False
        finally:
            self._recording = 0
        self._on_recorded([result for result in batch if result.attempts > result.file.attempts])
        if verdicts:
            self._on_verdicts(verdicts)
        self._on_written(batch)
        return True
