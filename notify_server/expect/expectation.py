"""Expectations: what was submitted to the platform, and the rules by which a notification meets it. Pure.

The states::

    waiting --(notify_within has passed, no notification)--> late
    waiting, late --(verdict, every submitted file listed)--> met
    waiting, late --(verdict, files missing from the list)--> short
    short --(verdict after a redelivery that lists the rest)--> met
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

import msgspec

from notify_server.contract.object_key import decode_object_key
from notify_server.expect.clock import ReadyClock

# An expectation without a batch_id is matched with a batch that came before the registration if the batch is not older
# than this time or notify_within, whichever is longer. An older batch belongs to no expectation.
MIN_LOOK_BACK_MS = 3_600_000
# Bytes of the source file's path that an object's name holds.
NAME_BYTES = 24


class ExpectationState(StrEnum):
    """The state of an expectation."""

    WAITING = "waiting"
    LATE = "late"
    SHORT = "short"
    MET = "met"


class MatchedBy(StrEnum):
    """How a batch was found for an expectation: by its batch_id, or as the oldest of its api_code."""

    BATCH_ID = "batch_id"
    ORDER = "order"


class NewExpectation(msgspec.Struct, frozen=True, array_like=True):
    """A submission as it is registered. `files` is the number of submitted files, that of `keys` when they are given;
    None when it is not known. Durations are milliseconds.
    """

    reference: str
    api_code: str
    batch_id: str | None
    files: int | None
    keys: tuple[str, ...] | None
    notify_within_ms: int
    verdict_within_ms: int

    def limits(self, now: int) -> tuple[int, int]:
        """Return the two limits of a registration at `now`."""
        return now + self.notify_within_ms, now + self.verdict_within_ms

    def look_back(self, now: int) -> int:
        """Return the time of arrival before which a batch is too old to be matched by a registration at `now`."""
        return now - max(MIN_LOOK_BACK_MS, self.notify_within_ms)


class Expectation(msgspec.Struct, frozen=True, array_like=True):
    """An expectation as it is kept. `notify_by` and `verdict_by` are its limits without outages, `away_ms` the outages
    before it was registered, and `due_at` its next limit on the ReadyClock, None when none is left.
    """

    id: int
    reference: str
    api_code: str
    batch_id: str | None
    files: int | None
    keys: tuple[str, ...] | None
    notify_by: int
    verdict_by: int
    state: ExpectationState
    matched_by: MatchedBy | None
    batch: int | None
    created_at: int
    away_ms: int
    due_at: int | None


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """A batch for which expectations are looked up. `is_first` is True with its first notification: a redelivery takes
    no expectation that does not name it.
    """

    batch: int
    batch_id: str
    api_code: str
    is_first: bool


class Match(NamedTuple):
    """An expectation, its batch, and how they found each other."""

    expectation: Expectation
    batch: int
    by: MatchedBy


class Outcome(NamedTuple):
    """The state that a verdict brings, and the number of expected files that the batch lists."""

    state: ExpectationState
    files: int


def differing_field(known: Expectation, new: NewExpectation) -> str | None:
    """Return the first field in which a registration differs from the known one; None when it is the same again."""
    pairs = {
        "batch_id": (known.batch_id, new.batch_id),
        "files": ((known.files, known.keys), (new.files, new.keys)),
        "notify_within": (known.notify_by - known.created_at, new.notify_within_ms),
        "verdict_within": (known.verdict_by - known.created_at, new.verdict_within_ms),
    }
    return next((name for name, (old, fresh) in pairs.items() if old != fresh), None)


def match_arrivals(
    arrivals: Sequence[Arrival], named: Iterable[Expectation], unnamed: Iterable[Expectation], matched: Collection[int]
) -> list[Match]:
    """Return the matches of batches that have arrived. `named` are the unmatched expectations of these batch_ids,
    `unnamed` the oldest unmatched ones without a batch_id, `matched` the batches that have expectations already.
    """
    by_name: defaultdict[tuple[str | None, str], list[Expectation]] = defaultdict(list)
    for each in named:
        by_name[each.batch_id, each.api_code].append(each)
    in_order: defaultdict[str, list[Expectation]] = defaultdict(list)
    for each in sorted(unnamed, key=lambda each: each.id, reverse=True):
        in_order[each.api_code].append(each)
    matches = []
    for arrival in arrivals:
        found = by_name[arrival.batch_id, arrival.api_code]
        if found:
            matches += [Match(each, arrival.batch, MatchedBy.BATCH_ID) for each in found]
        elif arrival.is_first and arrival.batch not in matched and in_order[arrival.api_code]:
            matches.append(Match(in_order[arrival.api_code].pop(), arrival.batch, MatchedBy.ORDER))
    return matches


def due_when_waiting(expectation: Expectation) -> int:
    """Return when notify_within passes, on the ReadyClock."""
    return expectation.notify_by - expectation.away_ms


def due_when_matched(expectation: Expectation) -> int:
    """Return when verdict_within passes, on the ReadyClock."""
    return expectation.verdict_by - expectation.away_ms


def limit_at(limit: int, expectation: Expectation, clock: ReadyClock) -> int:
    """Return when a limit passes (or has passed) in Unix ms, later by the outages since the registration."""
    return limit + clock.away_ms - expectation.away_ms


def expected_files(expectation: Expectation) -> int | None:
    """Return the number of files that a batch must list; None when it is not known, or not certain to be this batch."""
    return expectation.files if expectation.matched_by is MatchedBy.BATCH_ID else None


def needs_names(expectation: Expectation) -> bool:
    """Return True if the names of the batch's files decide, and not their number."""
    return expectation.keys is not None and expectation.matched_by is MatchedBy.BATCH_ID


def after_verdict(expectation: Expectation, files: int, names: Iterable[str] = ()) -> Outcome:
    """Return the outcome for a batch with a verdict. It lists `files` files; `names` are their oss_object_names, if
    `needs_names`. A key is listed as such, or as the source file's path, of which a name holds the first 24 bytes.
    """
    expected = expected_files(expectation)
    if expected is None:
        return Outcome(ExpectationState.MET, files)
    if needs_names(expectation):
        files = _listed(expectation.keys or (), names)
    # Files that were not submitted are no fault, and make up for none that was.
    return Outcome(ExpectationState.SHORT if files < expected else ExpectationState.MET, files)


def _listed(keys: Sequence[str], names: Iterable[str]) -> int:
    """Count the keys that are listed. A name is counted for one key only: of keys that begin with the same 24 bytes as
    many are listed as there are names for them.
    """
    wanted = set(keys)
    listed = 0
    beginnings: Counter[str] = Counter()
    for name in names:
        if name in wanted:
            wanted.discard(name)
            listed += 1
        elif (key := decode_object_key(name)) is not None:
            beginnings[key.source_path] += 1
    needed = Counter(key.encode()[:NAME_BYTES].decode(errors="ignore") for key in wanted)
    return listed + (needed & beginnings).total()
