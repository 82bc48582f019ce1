"""Parses the caller's `traceparent` header (W3C Trace Context, 3.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

# Version, trace-id, parent-id and flags. A later version may have more, behind another dash.
_TRACEPARENT = re.compile(
    r"(?P<known>(?P<version>[0-9a-f]{2})-(?P<trace_id>[0-9a-f]{32})-(?P<parent_id>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2}))"
    r"(?P<more>-[\x21-\x7e]*)?"
)
# Much longer than any version will be.
_LONGEST = 512


class TraceParent(msgspec.Struct, frozen=True):
    """A valid header: `text` is the part of it that every version has, `trace_id` and `parent_id` are lower-case hex,
    and `flags` the flags that version 00 knows, 1 for sampled.
    """

    text: str
    trace_id: str
    parent_id: str
    flags: int


def parse_traceparent(values: Sequence[str]) -> TraceParent | None:
    """Parse the header's values, one for each time it was sent. Return None when it is missing, repeated or invalid:
    then it counts as missing (3.2.2.3, 4.3).
    """
    if len(values) != 1 or len(values[0]) > _LONGEST or (found := _TRACEPARENT.fullmatch(values[0])) is None:
        return None
    version, trace_id, parent_id = found["version"], found["trace_id"], found["parent_id"]
    if version == "ff" or (version == "00" and found["more"] is not None):
        return None
    if not trace_id.strip("0") or not parent_id.strip("0"):
        return None
    return TraceParent(found["known"], trace_id, parent_id, int(found["flags"], 16) & 1)


def trace_fields(traceparent: str | None) -> dict[str, str]:
    """Return `trace_id` for a log line, from a kept header; nothing without one."""
    parent = parse_traceparent([traceparent]) if traceparent is not None else None
    return {"trace_id": parent.trace_id} if parent is not None else {}
