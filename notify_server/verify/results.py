"""Converts the evidence of an attempt into the rows that are recorded. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from notify_server.config import HostSettings, UsableConfig
from notify_server.model import AttemptRow, DueFile, Evidence, FileResult, FileState, Reason, http_reason
from notify_server.verify import policy
from notify_server.verify.usable import flags

_ABOUT_THE_FILE = frozenset({Reason.EMPTY, Reason.NOT_MEDIA, Reason.ARCHIVED, Reason.HOTLINK, Reason.EXPIRED})


def attempt_row(
    ask: policy.NextRequest,
    item: Evidence,
    outcome: policy.NextRequest | policy.Conclusion,
    settings: HostSettings,
    sent_at: int,
) -> AttemptRow:
    """Return the row of one request."""
    if isinstance(outcome, policy.Conclusion) and outcome.state is FileState.AVAILABLE:
        reason: str | None = None
    elif item.failure is not None:
        reason = item.failure
    elif isinstance(outcome, policy.Conclusion) and outcome.reason in _ABOUT_THE_FILE:
        reason = outcome.reason
    elif item.status in policy.REDIRECTS or policy.is_accepted(ask, item, settings):
        reason = None
    else:
        reason = http_reason(item.status or 0)
    return AttemptRow(
        sent_at,
        ask.method,
        ask.target.url if ask.hops else None,
        item.status,
        reason,
        item.dns_ms,
        item.connect_ms,
        item.tls_ms,
        item.first_byte_ms,
        item.total_ms,
        item.remote_addr,
        item.vendor_request_id,
        item.vendor_code,
    )


def file_result(
    file: DueFile,
    attempts: int,
    conclusion: policy.Conclusion,
    outcome: policy.Outcome,
    now: int,
    *,
    ask: policy.NextRequest,
    item: Evidence | None,
    requests: Sequence[AttemptRow],
    flags: str | None,
) -> FileResult:
    """Return the result of an attempt; `item` is the evidence of its last request, None when nothing was sent."""
    return FileResult(
        file,
        outcome.state,
        conclusion.reason,
        attempts,
        None if outcome.wait_ms is None else now + outcome.wait_ms,
        item.status if item is not None else None,
        item.content_length if item is not None else None,
        item.content_type if item is not None else None,
        item.etag if item is not None else None,
        item.last_modified if item is not None else None,
        conclusion.led_to or (ask.target.url if ask.hops else None),
        item.remote_addr if item is not None else None,
        sum(request.total_ms for request in requests) if item is not None else None,
        None if outcome.state is FileState.PENDING else now,
        tuple(requests),
        item.vendor_request_id if item is not None else None,
        item.vendor_code if item is not None else None,
        _headers(item),
        flags,
    )


def flags_of(
    file: DueFile,
    ask: policy.NextRequest,
    item: Evidence | None,
    conclusion: policy.Conclusion,
    settings: HostSettings,
    usable: UsableConfig,
    now: int,
) -> str | None:
    """Return the flags of a file as a JSON list, None without any."""
    if item is None or item.status is None:
        return None
    accepted = conclusion.state is FileState.AVAILABLE or policy.is_accepted(ask, item, settings)
    found = flags(file, item, usable, accepted=accepted, method=ask.method, plain=conclusion.plain)
    if usable.expired == "flag" and file.expires_at is not None and now >= file.expires_at:
        found = (Reason.EXPIRED.value, *found)
    return msgspec.json.encode(found).decode() if found else None


def _headers(item: Evidence | None) -> str | None:
    if item is None or not (item.headers or item.sniffed):
        return None
    sniffed = {} if item.sniffed is None else {"sniffed": item.sniffed}
    return msgspec.json.encode({**sniffed, **(item.headers or {})}).decode()
