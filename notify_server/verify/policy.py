"""What an answer means, and what follows from it. Pure: time and chance are passed in.

An attempt on a file is a chain of requests: `first`, then whatever `judge` asks for (a redirect's next hop, GET where
HEAD is refused, the same again on a fresh connection), until it comes to a conclusion. `conclude` then says what
becomes of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime

import msgspec

from notify_server.config import HostSettings
from notify_server.model import Evidence, FileState, Reason, Target, http_reason
from notify_server.verify.guard import printable_url

REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Servers that refuse HEAD, or addresses signed for GET only, answer HEAD with these; the same file may well be there.
HEAD_REFUSED = frozenset({400, 403, 405, 501})
# RFC 9110 15.5.11: gone, and likely to stay so.
FINAL = frozenset({410})
REFUSALS = frozenset(
    {Reason.PRIVATE_ADDRESS, Reason.PORT_NOT_ALLOWED, Reason.HOST_NOT_ALLOWED, Reason.INVALID_URL, Reason.BAD_REDIRECT}
)
# Failures that speak of the host rather than of the file. They feed the host's circuit.
CONNECTION_FAILURES = frozenset({Reason.TIMEOUT, Reason.DNS_ERROR, Reason.CONNECT_ERROR, Reason.TLS_ERROR})


class NextRequest(msgspec.Struct, frozen=True, gc=False):
    """The next request of an attempt. `hops` counts the redirects that led here; `fresh` wants a connection of its
    own.
    """

    target: Target
    method: str
    hops: int = 0
    fresh: bool = False


class Conclusion(msgspec.Struct, frozen=True, gc=False):
    """What an attempt showed: `state` available or blocked, or pending when the schedule is to decide; `final` when
    not.

    `led_to` is the address that a redirect led to and that was refused, in a form that is safe to show.
    """

    state: FileState
    reason: str | None = None
    final: bool = False
    led_to: str | None = None


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """What becomes of the file: settled in `state`, or pending again in `wait_ms`."""

    state: FileState
    wait_ms: int | None = None


AVAILABLE = Conclusion(FileState.AVAILABLE)


def first(target: Target, settings: HostSettings) -> NextRequest:
    """The request an attempt begins with."""
    return NextRequest(target, settings.methods[0])


def judge(
    ask: NextRequest, evidence: Evidence, settings: HostSettings, follow: Callable[[str, str], Target]
) -> NextRequest | Conclusion:
    """What one request's evidence comes to. `follow` is `Guard.follow`.

    A bad answer counts only when it came on a fresh connection: what a server sends late after a reply would otherwise
    be taken for the answer to the next request on that connection.
    """
    status = evidence.status
    if status is not None and (settings.accepts(status) or _empty_range(ask, evidence)):
        return AVAILABLE
    if evidence.reused and not ask.fresh:
        return msgspec.structs.replace(ask, fresh=True)
    if status is None:
        failure = evidence.failure or Reason.PROTOCOL_ERROR
        return Conclusion(FileState.BLOCKED if failure in REFUSALS else FileState.PENDING, failure)
    if status in REDIRECTS:
        return _redirect(ask, evidence.location, settings, follow)
    if status in HEAD_REFUSED and (fallback := _next_method(ask.method, settings.methods)):
        return NextRequest(ask.target, fallback, ask.hops)
    return Conclusion(FileState.PENDING, http_reason(status), final=status in FINAL)


def was_anothers(doubted: Evidence, confirmed: Evidence) -> bool:
    """Whether an answer on a reused connection was not the answer to its request, as the same request on a fresh one
    shows.

    A passing trouble of the server (5xx, 408, 429) is no proof: it may have been true when it was said.
    """
    passing = doubted.status is None or doubted.status in (408, 429) or doubted.status >= 500
    return not passing and doubted.status != confirmed.status


def _empty_range(ask: NextRequest, evidence: Evidence) -> bool:
    # RFC 9110 14.1.2: the first byte of an empty object cannot be had, and `Content-Range: bytes */0` says that it is
    # empty.
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
    return NextRequest(target, ask.method, ask.hops + 1)


def _next_method(method: str, methods: Sequence[str]) -> str | None:
    later = methods[methods.index(method) + 1 :]
    return later[0] if method == "HEAD" and later else None


def conclude(
    conclusion: Conclusion,
    attempts: int,
    schedule: Sequence[float],
    jitter: float,
    chance: float,
    asked_wait_ms: int | None,
) -> Outcome:
    """What becomes of a file after its attempt number `attempts` (from 1).

    `schedule` has the waits after the first, second, … attempt in seconds. `chance` in [0, 1) spreads the wait by ±
    `jitter`; `asked_wait_ms` (see `retry_after_ms`) takes its place, kept between 1 and 2 times the scheduled wait.
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


def retry_after_ms(value: str | None, now: int) -> int | None:
    """The wait that a Retry-After field asks for (RFC 9110 10.2.3: seconds or a date), None when it is absent or junk.

    A date in the past asks for no wait at all. Not bounded: `conclude` does that.
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
