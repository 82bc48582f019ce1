"""Decides which files of a batch end soon: the signature of their address, or the object itself. Pure.

The column `batch.ends_at` is a lower bound, kept as files come and are verified; the files decide once it is near.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from notify_server.contract.expiry import DELETED_ON, deletion
from notify_server.events.payload import BatchRow, Ending
from notify_server.model import FileResult

# Batches, and their files, that one transaction takes.
MAX_BATCHES = 100
MAX_FILES = 10_000

# A file that is pending or available: its key, when its address ends, and its flags (a JSON list).
FileRow: TypeAlias = tuple[str, int | None, str | None]

decode_files = msgspec.json.Decoder(list[FileRow]).decode
_decode_flags = msgspec.json.Decoder(list[str]).decode


class Judgement(NamedTuple):
    """The files that end soon, the first to end first; and when to look again if there are none."""

    ending: list[Ending]
    next_at: int | None


def judge(files: Iterable[FileRow], until: int, now: int) -> Judgement:
    """Return which files end after `now` and by `until`. What has ended already is a matter of its verdict."""
    found = (end_of(name, expires_at, _flags(flags), now) for name, expires_at, flags in files)
    ends = sorted(end for end in found if end is not None)
    ending = [end for end in ends if end.at <= until]
    return Judgement(ending, None if ending or not ends else ends[0].at)


def end_of(name: str, expires_at: int | None, flags: Sequence[str], now: int) -> Ending | None:
    """Return when a file ends after `now`: its address or its object, whichever is first."""
    deleted_at = deletion(flags)
    ends = []
    if expires_at is not None and expires_at > now:
        ends.append(Ending(expires_at, name, "address"))
    if deleted_at is not None and deleted_at > now:
        ends.append(Ending(deleted_at, name, "object"))
    return min(ends, default=None)


def deletions(results: Iterable[FileResult]) -> dict[int, int]:
    """Return for each batch of which an object will be deleted when the first one is."""
    ends: dict[int, int] = {}
    for result in results:
        if (at := deletion(_flags(result.flags))) is not None:
            ends[result.file.batch] = min(at, ends.get(result.file.batch, at))
    return ends


def _flags(flags: str | None) -> list[str]:
    # Nearly no file has this one, and decoding costs a microsecond.
    return _decode_flags(flags) if flags is not None and DELETED_ON in flags else []


def of_one_transaction(rows: Sequence[BatchRow]) -> Sequence[BatchRow]:
    """Return the first of these batches, as many as one transaction takes: at least one."""
    files = 0
    for count, row in enumerate(rows):
        files += row.files
        if count and files > MAX_FILES:
            return rows[:count]
    return rows
