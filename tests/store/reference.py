"""What a store must know, worked out in plain Python from the docstrings of store/base.py: slow and obvious."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Self

from notify_server.model import AttemptRow, DueFile, FileResult, FileState, ReportedStatus, Restart, Verdict
from notify_server.store.base import NewFile

MAX_ATTEMPT_ROWS = 50
Row = tuple[object, ...]


TEN_MINUTES = 600_000


@dataclass
class File:
    """A file of a batch. `generation` counts how often it has started over."""

    name: str
    reported: NewFile
    state: FileState
    reason: str | None
    next_attempt_at: int | None
    verified_at: int | None
    attempts: int = 0
    outcome: FileResult | None = None
    requests: list[AttemptRow] = field(default_factory=list)
    generation: int = 0

    @classmethod
    def new(cls, file: NewFile, now: int) -> Self:
        pending = file.state is FileState.PENDING
        return cls(
            file.oss_object_name, file, file.state, file.reason, now if pending else None, None if pending else now
        )

    def merge(self, file: NewFile, now: int, again: bool = False) -> bool:
        """Merge a report; return True if the file is reset. `again`: even if it is unavailable and nothing changed."""
        was, reported = self.reported.reported_status, file.reported_status
        if reported is ReportedStatus.FAILED:
            return False
        same = was is ReportedStatus.FINISHED and self.reported.target_url == file.target_url
        if same and not (again and self.state is FileState.UNAVAILABLE):
            return False
        fresh = File.new(file, now)
        fresh.requests, fresh.generation = self.requests, self.generation + 1
        self.__dict__.update(fresh.__dict__)
        return True

    def row(self, batch_id: str) -> Row:
        o = self.outcome
        evidence = (
            (o.http_status, o.content_length, o.content_type, o.etag, o.last_modified, o.final_url, o.remote_addr,
             o.elapsed_ms, o.vendor_request_id, o.vendor_code, o.headers,
             o.flags)
            if o is not None
            else (None,) * 12
        )  # fmt: skip
        return (
            batch_id, self.name, self.reported.target_url, self.reported.host, str(self.reported.reported_status),
            str(self.state), self.reason, self.attempts, self.next_attempt_at, *evidence, self.verified_at,
            self.reported.expires_at,
        )  # fmt: skip


@dataclass
class Batch:
    batch_id: str
    first_received_at: int
    last_received_at: int
    deliveries: int = 0
    verdict: Verdict = Verdict.PENDING
    completed_at: int | None = None
    probed_again_at: int | None = None
    # The item of which more is to come, and no verdict before.
    half_expanded: int | None = None
    files: dict[str, File] = field(default_factory=dict)

    @property
    def counts(self) -> Counter[FileState]:
        return Counter(file.state for file in self.files.values())

    def row(self) -> Row:
        return (
            self.batch_id, self.first_received_at, self.last_received_at, self.deliveries, str(self.verdict),
            self.completed_at, len(self.files), *(self.counts[state] for state in FileState),
        )  # fmt: skip


@dataclass
class Item:
    """A delivery in the inbox, its files in chunks. `expanded` of them have been merged at least once."""

    id: int
    batch_id: str
    chunks: list[list[NewFile]]
    received_at: int
    expanded: int = 0

    @property
    def files(self) -> int:
        return sum(map(len, self.chunks))


@dataclass
class Claim:
    file: DueFile
    batch_id: str
    name: str
    generation: int


class Reference:
    def __init__(self) -> None:
        self.inbox: list[Item] = []
        self.expanded: list[tuple[int, int]] = []
        self.batches: dict[str, Batch] = {}
        self.claims: list[Claim] = []
        # Their ids. None is given twice.
        self.rejections: list[int] = []
        self.rejected = 0

    def copy(self) -> Reference:
        return deepcopy(self)

    # Verbs; those that may bring about verdicts return (batch_id, verdict, files, available).

    def expand(self, chunks: Sequence[tuple[Item, int]], now: int) -> list[Row]:
        """Merge chunk n of each item."""
        touched = []
        for item, n in chunks:
            at = item.received_at
            batch = self.batches.setdefault(item.batch_id, Batch(item.batch_id, at, at))
            touched.append(batch)
            before = batch.counts
            listed: dict[str, NewFile] = {}
            for file in item.chunks[n]:
                if file.reported_status is ReportedStatus.FINISHED or file.oss_object_name not in listed:
                    listed[file.oss_object_name] = file
            lost = {name for name in listed.keys() & batch.files if batch.files[name].state is FileState.UNAVAILABLE}
            if any(listed[name].reported_status is ReportedStatus.FAILED for name in lost):
                batch.probed_again_at = None
            last = batch.probed_again_at
            again = last is None or last == at or abs(at - last) >= TEN_MINUTES
            for name, file in listed.items():
                if name in batch.files:
                    same = batch.files[name].reported.target_url == file.target_url
                    if name in lost and again and same and file.reported_status is ReportedStatus.FINISHED:
                        batch.probed_again_at = at
                    batch.files[name].merge(file, now, again)
                else:
                    batch.files[name] = File.new(file, now)
            if batch.counts != before:
                batch.verdict, batch.completed_at = Verdict.PENDING, None
            batch.first_received_at = min(batch.first_received_at, at)
            batch.last_received_at = max(batch.last_received_at, at)
            item.expanded = max(item.expanded, n + 1)
            batch.half_expanded = item.id if n + 1 < len(item.chunks) else None
            if batch.half_expanded is None:
                batch.deliveries += 1
                self.inbox = [other for other in self.inbox if other.id != item.id]
                self.expanded.append((item.id, item.received_at))
        return self._verdicts(touched, now)

    def discard(self, item: Item, now: int) -> list[Row]:
        self.inbox.remove(item)
        self.expanded.append((item.id, item.received_at))
        self.reject()
        batch = self.batches.get(item.batch_id)
        if batch is None or batch.half_expanded != item.id:
            return []
        batch.half_expanded = None
        return self._verdicts([batch], now)

    def reject(self) -> None:
        self.rejected += 1
        self.rejections.append(self.rejected)

    def recheck(self, files: Sequence[tuple[str, str]], now: int) -> Restart:
        """Recheck these files, by batch and name."""
        hosts = []
        for batch_id, name in set(files):
            batch = self.batches[batch_id]
            file = batch.files[name]
            if file.state is FileState.UPLOAD_FAILED:
                continue
            hosts.append(file.reported.host)
            file.state, file.reason, file.attempts, file.outcome = FileState.PENDING, None, 0, None
            file.next_attempt_at, file.verified_at, file.generation = now, None, file.generation + 1
            batch.verdict, batch.completed_at = Verdict.PENDING, None
        return Restart(len(hosts), frozenset(hosts))

    def claimable(self, host: str, now: int) -> dict[tuple[str, str], int]:
        """When each file became due that may be claimed, by batch and name."""
        held = {(claim.batch_id, claim.name) for claim in self.claims}
        return {
            (batch.batch_id, file.name): file.next_attempt_at
            for batch in self.batches.values()
            for file in batch.files.values()
            if file.state is FileState.PENDING
            and file.reported.host == host
            and file.next_attempt_at is not None
            and file.next_attempt_at <= now
            and (batch.batch_id, file.name) not in held
        }

    def record(self, results: Sequence[tuple[Claim, FileResult]], now: int) -> list[Row]:
        touched = []
        for claim, result in results:
            batch = self.batches[claim.batch_id]
            file = batch.files[claim.name]
            if file.generation != claim.generation:
                continue
            touched.append(batch)
            file.state, file.reason, file.attempts = result.state, result.reason, result.attempts
            file.next_attempt_at, file.verified_at = result.next_attempt_at, result.verified_at
            file.outcome = result
            file.requests = [*file.requests, *result.requests][-MAX_ATTEMPT_ROWS:]
        self.release([claim for claim, _ in results])
        return self._verdicts(touched, now)

    def release(self, claims: Sequence[Claim]) -> None:
        ended = {claim.file.id for claim in claims}
        self.claims = [claim for claim in self.claims if claim.file.id not in ended]

    def reopen(self) -> None:
        self.claims = []
        for item in self.inbox:
            item.expanded = 0

    def prune(self, before: int) -> None:
        self.batches = {
            name: batch
            for name, batch in self.batches.items()
            if batch.half_expanded is not None or batch.completed_at is None or batch.completed_at >= before
        }
        self.expanded = [(id, at) for id, at in self.expanded if at >= before]

    def _verdicts(self, batches: Sequence[Batch], now: int) -> list[Row]:
        reached: list[Row] = []
        for batch in {batch.batch_id: batch for batch in batches}.values():
            counts = batch.counts
            if batch.verdict is not Verdict.PENDING or counts[FileState.PENDING] or batch.half_expanded is not None:
                continue
            available = counts[FileState.AVAILABLE]
            batch.verdict = Verdict.COMPLETE if available == len(batch.files) else Verdict.INCOMPLETE
            batch.completed_at = now
            reached.append((batch.batch_id, batch.verdict, len(batch.files), available))
        return sorted(reached, key=repr)

    # What it knows

    @property
    def pending(self) -> int:
        return sum(batch.counts[FileState.PENDING] for batch in self.batches.values())

    def due_hosts(self) -> dict[str, int]:
        due: dict[str, int] = {}
        for batch in self.batches.values():
            for file in batch.files.values():
                if file.state is FileState.PENDING and file.next_attempt_at is not None:
                    host = file.reported.host
                    due[host] = min(due.get(host, file.next_attempt_at), file.next_attempt_at)
        return dict(sorted(due.items()))

    def tables(self) -> dict[str, list[Row]]:
        """What the tables hold, sorted."""
        batches = self.batches.values()
        files = [(batch, file) for batch in batches for file in batch.files.values()]
        return {
            "batch": sorted((batch.row() for batch in batches), key=repr),
            "file": sorted((file.row(batch.batch_id) for batch, file in files), key=repr),
            "attempt": sorted(
                ((batch.batch_id, file.name, row.total_ms) for batch, file in files for row in file.requests), key=repr
            ),
            "inbox": [(item.id, item.files) for item in self.inbox],
            "expanded": [(id,) for id, _ in sorted(self.expanded)],
            "rejection": [(id,) for id in self.rejections],
        }


TABLES = {
    "batch": "SELECT batch_id, first_received_at, last_received_at, deliveries, verdict, completed_at, files, pending,"
    " available, unavailable, blocked, upload_failed FROM batch",
    "file": "SELECT batch.batch_id, oss_object_name, target_url, host, reported_status, state, reason, attempts,"
    " next_attempt_at, http_status, content_length, content_type, etag, last_modified, final_url, remote_addr,"
    " elapsed_ms, vendor_request_id, vendor_code, headers, flags, verified_at, expires_at FROM file"
    " JOIN batch ON batch.id = file.batch",
    "attempt": "SELECT batch.batch_id, oss_object_name, total_ms FROM attempt JOIN file ON file.id = attempt.file"
    " JOIN batch ON batch.id = file.batch",
    "inbox": "SELECT id, files FROM notification WHERE expanded_at IS NULL ORDER BY id",
    "expanded": "SELECT id FROM notification WHERE expanded_at IS NOT NULL ORDER BY id",
    "rejection": "SELECT id FROM rejection ORDER BY id",
}
SORTED = ("batch", "file", "attempt")
