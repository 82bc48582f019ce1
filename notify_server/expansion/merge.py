"""What a delivery does to what is known of its batch: the decisions, apart from any engine."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from notify_server.model import FileResult, FileState, ReportedStatus
from notify_server.store.base import Expansion, NewFile


class Known(NamedTuple):
    """A file that its batch has already."""

    id: int
    oss_object_name: str
    target_url: str | None
    reported_status: ReportedStatus
    state: FileState


class Merge:
    """What an expansion does to its batch: the files it adds and replaces, by their ids, and the change of the counts.

    `restarted` are the pending ones among those replaced: what is in flight for them speaks of what was before.
    """

    def __init__(self, batch: int, expansion: Expansion) -> None:
        self.batch = batch
        self.expansion = expansion
        self.delta: Counter[FileState] = Counter()
        self.replaced: list[tuple[int, NewFile]] = []
        self.restarted: list[int] = []
        # A key that is listed twice: as if its later entry had been delivered later.
        self.files: dict[str, NewFile] = {}
        for file in expansion.files:
            listed = self.files.get(file.oss_object_name)
            if listed is None or starts_anew(listed.target_url, listed.reported_status, file):
                self.files[file.oss_object_name] = file

    def settle(self, existing: Iterable[Known]) -> list[NewFile]:
        """Decide, given those of `files` that the batch has; return those to be added."""
        added = dict(self.files)
        for known in existing:
            file = added.pop(known.oss_object_name)
            if not starts_anew(known.target_url, known.reported_status, file):
                continue
            self.replaced.append((known.id, file))
            self.delta[known.state] -= 1
            self.delta[file.state] += 1
            if known.state is FileState.PENDING:
                self.restarted.append(known.id)
        self.delta.update(file.state for file in added.values())
        return list(added.values())

    @property
    def pending(self) -> int:
        return self.delta[FileState.PENDING]

    @property
    def reopens(self) -> bool:
        # Files in other states bring about a verdict too: one that was complete may be incomplete with them.
        return any(self.delta.values())

    def batch_row(self) -> tuple[object, ...]:
        item, last = self.expansion.item, self.expansion.last
        counts = (self.delta[state] for state in FileState)
        return self.batch, *counts, None if last else item.id, last, item.received_at, self.reopens, item.id


def starts_anew(target_url: str | None, reported_status: ReportedStatus, file: NewFile) -> bool:
    """Whether a file known as this starts anew when it is reported as `file`."""
    if file.reported_status is ReportedStatus.FAILED:
        return False
    return reported_status is ReportedStatus.FAILED or target_url != file.target_url


def columns(file: NewFile, now: int) -> tuple[object, ...]:
    """What a file begins with: from `target_url` to `reason`, `next_attempt_at` and `verified_at`."""
    waits = file.state is FileState.PENDING
    return (
        file.target_url,
        file.host,
        file.reported_status,
        file.state,
        file.reason,
        now if waits else None,
        None if waits else now,
    )


def distinct_batches(expansions: Sequence[Expansion], most: int = sys.maxsize) -> Iterator[list[Expansion]]:
    """The expansions in their order, cut wherever a batch comes up again: each merges with what the last one left."""
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
    """One result of each file: when a claim was lost and made anew, what came of both may be here."""
    return list({result.file.id: result for result in reversed(list(results))}.values())[::-1]


def settled_by_batch(results: Iterable[FileResult]) -> dict[int, Counter[FileState]]:
    """How many files of each batch these results settle, and in which states."""
    settled: dict[int, Counter[FileState]] = {}
    for result in results:
        if result.state is not FileState.PENDING:
            settled.setdefault(result.file.batch, Counter())[result.state] += 1
    return settled


def by_batch(settled: Mapping[int, Counter[FileState]]) -> list[tuple[int, int, int, int]]:
    """Rows of a batch, and how many of its files are available, unavailable and blocked."""
    return [
        (batch, count[FileState.AVAILABLE], count[FileState.UNAVAILABLE], count[FileState.BLOCKED])
        for batch, count in settled.items()
    ]
