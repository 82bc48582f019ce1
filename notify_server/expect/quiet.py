"""The silence of an api_code, for `[alert] quiet`. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import msgspec


class QuietLimit(msgspec.Struct, frozen=True, array_like=True):
    """How long an api_code that matches `pattern` may be silent. Only `*` is special in a pattern."""

    pattern: str
    limit_ms: int

    def matches(self, api_code: str) -> bool:
        """Return True if the limit is for this api_code, unless a more specific one is."""
        return fnmatchcase(api_code, self.pattern.replace("[", "[[]").replace("?", "[?]"))


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """The latest notification of an api_code: its time in Unix ms, the same on the clock of silence, and when its
    silence was reported since. `received_at` is None for a pattern of which none has come: then `quiet_since` is when
    the watch began.
    """

    api_code: str
    received_at: int | None
    quiet_since: int
    told_at: int | None


class Silence(NamedTuple):
    """An api_code, or a pattern, that has been silent for `silent_ms`, which is longer than its limit."""

    arrival: Arrival
    limit_ms: int
    silent_ms: int


class Watched(NamedTuple):
    """The silences to be reported, and the patterns of which nothing is known yet."""

    silences: list[Silence]
    unknown: list[str]


def limit_for(api_code: str, limits: Sequence[QuietLimit]) -> QuietLimit | None:
    """Return the most specific limit: that of the api_code itself, else the longest pattern that matches."""
    exact = (each for each in limits if each.pattern == api_code)
    matching = (each for each in limits if each.matches(api_code))
    return next(exact, None) or max(matching, key=lambda each: len(each.pattern), default=None)


def find_silences(
    arrivals: Sequence[Arrival], limits: Sequence[QuietLimit], inbox: Collection[str], at: int
) -> Watched:
    """Return the silences that have not been reported, at the time `at` of the clock. `inbox` has the api_codes of
    notifications that are accepted and not merged yet: they are not silent.
    """
    silences = []
    for arrival in arrivals:
        if arrival.told_at is None and (limit := _limit_of(arrival, arrivals, limits)) is not None:
            silent_ms = at - arrival.quiet_since
            if silent_ms >= limit.limit_ms and not any(_is_about(arrival, limit, each) for each in inbox):
                silences.append(Silence(arrival, limit.limit_ms, silent_ms))
    known = {arrival.api_code for arrival in arrivals}
    unknown = [each.pattern for each in limits if each.pattern not in known and not _is_seen(each, arrivals)]
    return Watched(silences, unknown)


def _limit_of(arrival: Arrival, arrivals: Sequence[Arrival], limits: Sequence[QuietLimit]) -> QuietLimit | None:
    if arrival.received_at is not None:
        return limit_for(arrival.api_code, limits)
    # A pattern is watched until a notification of it has come.
    own = next((each for each in limits if each.pattern == arrival.api_code), None)
    return None if own is None or _is_seen(own, arrivals) else own


def _is_seen(limit: QuietLimit, arrivals: Sequence[Arrival]) -> bool:
    return any(each.received_at is not None and limit.matches(each.api_code) for each in arrivals)


def _is_about(arrival: Arrival, limit: QuietLimit, api_code: str) -> bool:
    return arrival.api_code == api_code or (arrival.received_at is None and limit.matches(api_code))
