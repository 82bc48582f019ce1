"""Decides the changes that a delivery makes to its batch, independent of the engine."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from notify_server.model import FileResult, FileState, ReportedStatus
from notify_server.store.base import Expansion, NewFile

# How often identical deliveries may have the unavailable files of a batch probed again.
PROBE_AGAIN_MS = 10 * 60 * 1000


class Known(NamedTuple):
    """A file that the batch has already."""

    id: int
    oss_object_name: str
    target_url: str | None
    reported_status: ReportedStatus
    state: FileState


class Merge:
    """The changes that an expansion makes to its batch: files added, files replaced (by id), and counts by state.

    `restarted` are the replaced files that were pending: results in flight for them are out of date.
    `probed_again_at` is when the delivery arrived that last had unavailable files probed again although it changed
    nothing; None if none did, or if a FAILED report has come since.
    """

    def __init__(self, batch: int, expansion: Expansion, probed_again_at: int | None = None) -> None:
        self.batch = batch
        self.expansion = expansion
        self.probed_again_at = probed_again_at
        self.delta: Counter[FileState] = Counter()
        self.replaced: list[tuple[int, NewFile]] = []
        self.restarted: list[int] = []
        # When the first of the addresses that were added or replaced ends.
        self.ends_at: int | None = None
        # The later entry of a key counts, as if it had been delivered later.
        self.files: dict[str, NewFile] = {}
        for file in expansion.files:
            listed = self.files.get(file.oss_object_name)
            if listed is None or resets(listed.target_url, listed.reported_status, file):
                self.files[file.oss_object_name] = file

    def settle(self, existing: Iterable[Known]) -> list[NewFile]:
        """Decide about the files that the batch has already; return the files to be added."""
        added = dict(self.files)
        pairs = [(known, added.pop(known.oss_object_name)) for known in existing]
        if any(
            known.state is FileState.UNAVAILABLE and file.reported_status is ReportedStatus.FAILED
            for known, file in pairs
        ):
            # The platform uploads it once more: its next report is worth another look, however soon it comes.
            self.probed_again_at = None
        for known, file in pairs:
            if not resets(known.target_url, known.reported_status, file) and not self._probes_again(known, file):
                continue
            self.replaced.append((known.id, file))
            self.delta[known.state] -= 1
            self.delta[file.state] += 1
            if known.state is FileState.PENDING:
                self.restarted.append(known.id)
        self.delta.update(file.state for file in added.values())
        touched = chain(added.values(), (file for _, file in self.replaced))
        self.ends_at = min((file.expires_at for file in touched if file.expires_at is not None), default=None)
        return list(added.values())

    def _probes_again(self, known: Known, file: NewFile) -> bool:
        """Return True if an unchanged report resets an unavailable file: a sender that repeats a notification requests
        another check.
        """
        if known.state is not FileState.UNAVAILABLE or file.reported_status is ReportedStatus.FAILED:
            return False
        received_at = self.expansion.item.received_at
        # All files of one delivery, however many expansions it takes, may be probed again.
        if self.probed_again_at is not None and 0 < abs(received_at - self.probed_again_at) < PROBE_AGAIN_MS:
            return False
        self.probed_again_at = received_at
        return True

    @property
    def pending(self) -> int:
        """The change of the number of pending files."""
        return self.delta[FileState.PENDING]

    @property
    def reopens(self) -> bool:
        """True if the batch needs a new verdict: one that was complete may be incomplete with files in other states."""
        return any(self.delta.values())

    def batch_row(self) -> tuple[object, ...]:
        """Return the parameters of the `batch_expanded` query."""
        item, last = self.expansion.item, self.expansion.last
        counts = (self.delta[state] for state in FileState)
        return (
            *(self.batch, *counts, None if last else item.id, last, item.received_at, self.reopens, item.id),
            self.probed_again_at,
            self.ends_at,
        )


def resets(target_url: str | None, reported_status: ReportedStatus, file: NewFile) -> bool:
    """Return True if a report resets a file that is known with this address and status."""
    if file.reported_status is ReportedStatus.FAILED:
        return False
    return reported_status is ReportedStatus.FAILED or target_url != file.target_url


def columns(file: NewFile, now: int) -> tuple[object, ...]:
    """Return the columns of a file that was added or reset: `target_url` to `reason`, `next_attempt_at`, `verified_at`
    and `expires_at`.
    """
    waits = file.state is FileState.PENDING
    return (
        file.target_url,
        file.host,
        file.reported_status,
        file.state,
        file.reason,
        now if waits else None,
        None if waits else now,
        file.expires_at,
    )


def distinct_batches(expansions: Sequence[Expansion], most: int = sys.maxsize) -> Iterator[list[Expansion]]:
    """Split the expansions, in order, wherever a batch repeats: each merges with the result of the last one."""
    part: dict[tuple[str, str], Expansion] = {}
    for expansion in expansions:
        key = (expansion.batch_id, expansion.api_code)
        if key in part or len(part) == most:
            yield list(part.values())
            part = {}
        part[key] = expansion
    if part:
        yield list(part.values())


def first_of_each(results: Iterable[FileResult]) -> list[FileResult]:
    """Return one result per file: when a claim was lost and the file was claimed again, there may be two."""
    return list({result.file.id: result for result in reversed(list(results))}.values())[::-1]


def settled_by_batch(results: Iterable[FileResult]) -> dict[int, Counter[FileState]]:
    """Count the files that these results settle, by batch and state."""
    settled: dict[int, Counter[FileState]] = {}
    for result in results:
        if result.state is not FileState.PENDING:
            settled.setdefault(result.file.batch, Counter())[result.state] += 1
    return settled


def by_batch(settled: Mapping[int, Counter[FileState]]) -> list[tuple[int, int, int, int]]:
    """Return rows of a batch and its numbers of available, unavailable and blocked files."""
    return [
        (batch, count[FileState.AVAILABLE], count[FileState.UNAVAILABLE], count[FileState.BLOCKED])
        for batch, count in settled.items()
    ]


def latest_arrivals(expansions: Iterable[Expansion]) -> dict[str, int]:
    """Return when the latest notification of each api_code was received."""
    latest: dict[str, int] = {}
    for each in expansions:
        latest[each.api_code] = max(each.item.received_at, latest.get(each.api_code, 0))
    return latest
