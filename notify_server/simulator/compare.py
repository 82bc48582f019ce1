"""Compares a server's record with the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterable, Iterable, Mapping
from datetime import datetime

import msgspec

from notify_server.model import FileState, Reason, Verdict, http_reason
from notify_server.simulator.answers import RecordedAnswer
from notify_server.simulator.plan import CONTENT_TYPE, Kind, PlantedBatch, PlantedFile
from notify_server.simulator.record import BatchRow, FileRow, RecordViews

MAX_DIFFERENCES = 10
ABSENT = "not in the record"


class Tally(msgspec.Struct):
    """Counts of one kind: planted, as expected, still being retried, different."""

    planted: int = 0
    as_expected: int = 0
    retried: int = 0
    different: int = 0


class Difference(msgspec.Struct, frozen=True):
    """A difference from the plan. `key` is a file's key, or a batch's id when `planted` is `batch`."""

    key: str
    planted: str
    expected: str
    state: str
    reason: str


class Comparison(msgspec.Struct):
    """The plan compared with the record. All differences are counted and the first few are kept; a batch's own only
    when its files do not explain it. `verified_at` has the time of every file's last answer, in Unix seconds, in order.
    """

    files: dict[Kind, Tally]
    batches: Tally
    differences: list[Difference]
    refused_loopback: bool = False
    verified_at: list[float] = msgspec.field(default_factory=list)

    @property
    def different_files(self) -> int:
        return sum(tally.different for tally in self.files.values())

    @property
    def different(self) -> bool:
        """Return whether anything differs."""
        return bool(self.different_files or self.batches.different)

    def note(self, difference: Difference) -> None:
        """Keep the difference if it is one of the first."""
        if len(self.differences) < MAX_DIFFERENCES:
            self.differences.append(difference)


async def compare(
    batches: Iterable[PlantedBatch], record: RecordViews, objects: str, requests: Mapping[str, int]
) -> Comparison:
    """Compare the record with the plan. `objects` is the object store's address, `requests` its request counts."""
    result = Comparison({kind: Tally() for kind in Kind}, Tally(), [])
    for batch in batches:
        before = result.different_files
        rows = record.files(batch.batch_id, batch.api_code)
        states = await _compare_files(result, batch, rows, objects, requests)
        # Read after its files: a verdict reached meanwhile then appears as such, not as missing.
        found = await record.batches([(batch.batch_id, batch.api_code)])
        tally = result.batches
        tally.planted += 1
        fault = _batch_fault(batch, found[0], states) if found else ("in the record", ABSENT, "")
        if fault is None:
            tally.as_expected += 1
        elif fault[1] == Verdict.PENDING and only_missing_left(batch, found[0]):
            tally.retried += 1
        else:
            tally.different += 1
            if result.different_files == before:
                result.note(Difference(batch.batch_id, "batch", *fault))
    result.verified_at.sort()
    return result


async def _compare_files(
    result: Comparison, batch: PlantedBatch, rows: AsyncIterable[FileRow], objects: str, requests: Mapping[str, int]
) -> Counter[str]:
    """Compare one batch's files; return the counts of the states found."""
    states: Counter[str] = Counter()
    unseen = dict(batch.files)
    async for row in rows:
        states[row.state] += 1
        if row.state in (FileState.AVAILABLE, FileState.UNAVAILABLE) and row.verified_at is not None:
            result.verified_at.append(datetime.fromisoformat(row.verified_at).timestamp())
        file = unseen.pop(row.oss_object_name, None)
        if file is None:
            # Not planned: the batch then has too many.
            continue
        tally = result.files[file.kind]
        tally.planted += 1
        if row.state is FileState.BLOCKED and row.reason in (Reason.PRIVATE_ADDRESS, Reason.PORT_NOT_ALLOWED):
            result.refused_loopback = True
        fault = _file_fault(file, row, objects, requests)
        if fault is None:
            tally.as_expected += 1
        elif row.state is FileState.PENDING and file.expected is FileState.UNAVAILABLE and row.reason == _reason(file):
            tally.retried += 1
        else:
            tally.different += 1
            result.note(Difference(file.key, file.kind, file.expected, row.state, fault))
    for file in unseen.values():
        tally = result.files[file.kind]
        tally.planted += 1
        tally.different += 1
        result.note(Difference(file.key, file.kind, file.expected, ABSENT, ""))
    return states


def _file_fault(file: PlantedFile, row: FileRow, objects: str, requests: Mapping[str, int]) -> str | None:
    """Return the fault of a file's row: its reason when its state is wrong, else the wrong column; None when
    correct.
    """
    if row.state is not file.expected:
        return row.reason or "no reason given"
    if file.kind is Kind.FAILED:
        return f"reported FAILED, yet requested {requests[file.key]} times" if requests.get(file.key) else None
    if row.target_url != objects + file.path:
        return f"target_url {row.target_url}"
    if file.kind is Kind.MISSING:
        return None if row.reason == _reason(file) else f"reason {row.reason}"
    if file.answer is not None:
        return _recorded_fault(file.answer, row)
    for column, found, planted in (
        ("reason", row.reason, None),
        ("content_length", row.content_length, file.size),
        ("content_type", row.content_type, CONTENT_TYPE),
    ):
        if found != planted:
            return f"{column} {found}, planted {planted}"
    return None if requests.get(file.key) else "never requested"


def _reason(file: PlantedFile) -> str | None:
    """Return the reason that an unavailable file should have."""
    return http_reason(file.status) if file.answer is None else file.answer.expect.reason


def _recorded_fault(answer: RecordedAnswer, row: FileRow) -> str | None:
    expect = answer.expect
    for column, found, planted in (
        ("reason", row.reason, expect.reason),
        ("vendor_code", row.vendor_code, expect.vendor_code or row.vendor_code),
        ("vendor_request_id", row.vendor_request_id, expect.vendor_request_id or row.vendor_request_id),
    ):
        if found != planted:
            return f"{answer.vendor}, {answer.name}: {column} {found}, planted {planted}"
    return None


def _batch_fault(batch: PlantedBatch, row: BatchRow, states: Mapping[str, int]) -> tuple[str, str, str] | None:
    """Return (expected, found, fault) of a batch's row, None when it is correct."""
    if row.files != len(batch.files):
        return f"{len(batch.files)} files", f"{row.files} files", "not as planted"
    expected = Verdict.COMPLETE if batch.count(FileState.AVAILABLE) == len(batch.files) else Verdict.INCOMPLETE
    if row.verdict is not expected:
        return expected, row.verdict, f"{row.pending} files pending" if row.pending else "wrong verdict"
    for state in FileState:
        if (says := getattr(row, state)) != states.get(state, 0):
            return expected, row.verdict, f"says {says} {state}, its files say {states.get(state, 0)}"
    return None


def only_missing_left(batch: PlantedBatch, row: BatchRow) -> bool:
    """Return whether only missing files can be pending in the batch."""
    return row.available == batch.count(FileState.AVAILABLE) and row.upload_failed == batch.count(
        FileState.UPLOAD_FAILED
    )
