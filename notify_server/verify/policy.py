"""Decides what an answer means and what follows from it. Pure: time and chance are passed in.

An attempt on a file is a chain of requests: `first`, then those that `judge` returns (a redirect's next hop, GET where
HEAD is refused, the same again on a fresh connection), until it returns a conclusion. `conclude` then decides the
file's state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime

import msgspec

from notify_server.config import HostSettings, UsableConfig
from notify_server.model import Evidence, FileState, Reason, Target, http_reason
from notify_server.verify.guard import printable_url
from notify_server.verify.usable import is_plain, problem, wants_look

REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Servers that refuse HEAD, or addresses signed for GET only, answer HEAD with these; the file may well be there.
HEAD_REFUSED = frozenset({400, 401, 403, 405, 406, 422, 501})
# Servers that cannot serve a range, or refuse to, answer a ranged GET with these.
RANGE_REFUSED = frozenset({400, 403, 416, 501})
# RFC 9110 15.5.11: gone, and likely to stay so.
FINAL = frozenset({410})
REFUSALS = frozenset(
    {Reason.PRIVATE_ADDRESS, Reason.PORT_NOT_ALLOWED, Reason.HOST_NOT_ALLOWED, Reason.INVALID_URL, Reason.BAD_REDIRECT}
)
# A signed address that has expired is refused with these.
EXPIRED_STATUS = frozenset({401, 403})
# The last attempt at a signed address is made this long before the address expires: requests take time, clocks differ.
BEFORE_EXPIRY_MS = 30_000
# Failures of the host rather than of the file. They count for the host's circuit.
CONNECTION_FAILURES = frozenset({Reason.TIMEOUT, Reason.DNS_ERROR, Reason.CONNECT_ERROR, Reason.TLS_ERROR})


class NextRequest(msgspec.Struct, frozen=True, gc=False):
    """The next request of an attempt. `hops` counts the redirects so far; `fresh` requires a new connection; `origin`
    is the address that redirects led away from (None: `target`); `ranged` limits a GET to one byte.
    """

    target: Target
    method: str
    hops: int = 0
    fresh: bool = False
    origin: Target | None = None
    ranged: bool = True


class Conclusion(msgspec.Struct, frozen=True, gc=False):
    """The result of an attempt: `state` available or blocked, or pending when the schedule decides; `final` when it
    does not.

    `led_to` is the refused address of a redirect, in a form that is safe to show. `busy` means that the host asked for
    fewer requests: no attempt is charged to the file. `plain` is that of PLAIN.
    """

    state: FileState
    reason: str | None = None
    final: bool = False
    led_to: str | None = None
    busy: bool = False
    plain: bool = False


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """The decision about the file: settled in `state`, or pending again after `wait_ms`."""

    state: FileState
    wait_ms: int | None = None


AVAILABLE = Conclusion(FileState.AVAILABLE)
# The same of an answer about which no rule of `usable` has anything to say: it is not judged again for its flags.
PLAIN = Conclusion(FileState.AVAILABLE, plain=True)


def first(target: Target, settings: HostSettings) -> NextRequest:
    """Return the first request of an attempt."""
    return NextRequest(target, settings.methods[0])


def judge(
    ask: NextRequest,
    evidence: Evidence,
    settings: HostSettings,
    follow: Callable[[str, str], Target],
    *,
    last: bool = False,
    key: str = "",
    usable: UsableConfig | None = None,
) -> NextRequest | Conclusion:
    """Return what follows from the evidence of one request. `follow` is `Guard.follow`; `last` marks the last attempt
    of the schedule. With `usable` an accepted answer must also show a file that can be used; `key` is the file's.

    A bad answer counts only on a fresh connection: data that a server sends late would otherwise be taken for the
    answer to the next request on that connection. Servers treat HEAD differently from GET more often than files are
    missing, so the last attempt of the schedule ends with a GET whatever HEAD showed, unless no request can have
    reached the server.
    """
    status = evidence.status
    accepted = is_accepted(ask, evidence, settings)
    if accepted and usable is not None and usable.sniff != "all" and is_plain(key, evidence, usable):
        return PLAIN
    wrong = (
        problem(key, evidence, usable, accepted=accepted, method=ask.method)
        if usable is not None and status is not None
        else None
    )
    if accepted and (wrong is None or wrong.undecided):
        look = wrong is not None or (usable is not None and wants_look(key, evidence, usable))
        return _get(ask) if look and ask.method == "HEAD" and _may_get(settings) else AVAILABLE
    if evidence.reused and not ask.fresh:
        return msgspec.structs.replace(ask, fresh=True)
    if status == 429 or (status == 503 and evidence.retry_after):
        return Conclusion(FileState.PENDING, http_reason(status), busy=True)
    if wrong is not None:
        found: NextRequest | Conclusion = Conclusion(FileState.PENDING, wrong.reason, final=wrong.final)
    elif status in REDIRECTS:
        found = _redirect(ask, evidence.location, settings, follow)
    elif status is None:
        failure = evidence.failure or Reason.PROTOCOL_ERROR
        found = Conclusion(FileState.BLOCKED if failure in REFUSALS else FileState.PENDING, failure)
    else:
        found = Conclusion(FileState.PENDING, http_reason(status), final=status in FINAL)
    if isinstance(found, Conclusion) and found.state is FileState.PENDING and not found.final:
        return _fall_back(ask, evidence, settings, last=last) or found
    return found


def _fall_back(ask: NextRequest, evidence: Evidence, settings: HostSettings, *, last: bool) -> NextRequest | None:
    """Return the GET that replaces a request which the server may have refused because of its form."""
    status = evidence.status
    if ask.method == "GET":
        if ask.ranged and status in RANGE_REFUSED:
            return msgspec.structs.replace(ask, ranged=False, fresh=False)
        return None
    if not _may_get(settings):
        return None
    # A redirect may have led HEAD, and HEAD alone, to an error page.
    refused = status in HEAD_REFUSED or (status == 404 and ask.hops > 0)
    closed = status is None and evidence.failure in (None, Reason.PROTOCOL_ERROR)
    # There was a connection, or an answer came: the server has seen the request.
    seen = status is not None or closed or (evidence.failure is Reason.TIMEOUT and evidence.connect_ms is not None)
    if refused or closed or (last and seen):
        return _get(ask)
    return None


def _get(ask: NextRequest) -> NextRequest:
    return NextRequest(ask.origin or ask.target, "GET")


def _may_get(settings: HostSettings) -> bool:
    return "HEAD" in settings.methods and "GET" in settings.methods[settings.methods.index("HEAD") + 1 :]


def is_accepted(ask: NextRequest, evidence: Evidence, settings: HostSettings) -> bool:
    """Return True if the answer shows that the file is there."""
    return evidence.status is not None and (settings.accepts(evidence.status) or _empty_range(ask, evidence))


def was_anothers(doubted: Evidence, confirmed: Evidence) -> bool:
    """Return whether an answer on a reused connection was not the answer to its request, as the same request on a fresh
    one shows.

    A passing fault of the server (5xx, 408, 429) proves nothing: it may have been true at the time.
    """
    passing = doubted.status is None or doubted.status in (408, 429) or doubted.status >= 500
    return not passing and doubted.status != confirmed.status


def _empty_range(ask: NextRequest, evidence: Evidence) -> bool:
    # RFC 9110 14.1.2: an empty object has no first byte, and `Content-Range: bytes */0` says that it is empty.
    return evidence.status == 416 and ask.method == "GET" and evidence.content_length == 0


def _redirect(
    ask: NextRequest, location: str | None, settings: HostSettings, follow: Callable[[str, str], Target]
) -> NextRequest | Conclusion:
    if location is None:
        return Conclusion(FileState.PENDING, Reason.BAD_REDIRECT)
    if ask.hops >= settings.max_redirects:
        return Conclusion(FileState.PENDING, Reason.TOO_MANY_REDIRECTS)
    target = follow(ask.target.url, location)
    if target.refusal is not None:
        return Conclusion(FileState.BLOCKED, target.refusal, led_to=printable_url(location))
    return msgspec.structs.replace(
        ask, target=target, hops=ask.hops + 1, fresh=False, origin=ask.origin or ask.target, ranged=True
    )


def conclude(
    conclusion: Conclusion,
    attempts: int,
    schedule: Sequence[float],
    jitter: float,
    chance: float,
    asked_wait_ms: int | None,
) -> Outcome:
    """Return the decision about a file after its attempt number `attempts` (from 1).

    `schedule` has the waits after the first, second, … attempt in seconds. `chance` in [0, 1) spreads the wait by ±
    `jitter`; `asked_wait_ms` (see `retry_after_ms`) replaces it, kept between 1 and 2 times the scheduled wait.
    """
    if conclusion.state is not FileState.PENDING:
        return Outcome(conclusion.state)
    if conclusion.final or attempts > len(schedule):
        return Outcome(FileState.UNAVAILABLE)
    scheduled_ms = schedule[attempts - 1] * 1000
    if asked_wait_ms is not None:
        wait_ms = min(max(asked_wait_ms, scheduled_ms), 2 * scheduled_ms)
    else:
        wait_ms = scheduled_ms * (1 + jitter * (2 * chance - 1))
    return Outcome(FileState.PENDING, round(wait_ms))


def is_last(attempts: int, schedule: Sequence[float], now: int, expires_at: int | None) -> bool:
    """Return True if the attempt that is made now, after `attempts` others, is the last."""
    return attempts >= len(schedule) or (expires_at is not None and now >= expires_at - BEFORE_EXPIRY_MS)


def squeeze(outcome: Outcome, now: int, expires_at: int | None) -> Outcome:
    """Bring the next attempt forward to the last moment before a signed address ends; after it there is none."""
    if outcome.wait_ms is None or expires_at is None:
        return outcome
    left_ms = expires_at - BEFORE_EXPIRY_MS - now
    if left_ms <= 0:
        return Outcome(FileState.UNAVAILABLE)
    return Outcome(outcome.state, min(outcome.wait_ms, left_ms))


def retry_after_ms(value: str | None, now: int) -> int | None:
    """Return the wait that a Retry-After field requests (RFC 9110 10.2.3: seconds or a date), None when it is absent or
    invalid. A date in the past means no wait. Not bounded: `conclude` does that.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return int(text[:15]) * 1000
    try:
        moment = parsedate_to_datetime(text)
        if moment.tzinfo is None:
            # RFC 9110 5.6.7: the asctime format has no zone and means UTC.
            moment = moment.replace(tzinfo=UTC)
        return max(0, round(moment.timestamp() * 1000) - now)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
