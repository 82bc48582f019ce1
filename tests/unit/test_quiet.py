"""The rules of `[alert] quiet`: which limit is an api_code's, and which silences are reported."""

from __future__ import annotations

import pytest

from notify_server.expect.quiet import Arrival, QuietLimit, find_silences, limit_for

LIMITS = [
    QuietLimit("rent.*", 10),
    QuietLimit("rent.add.*", 20),
    QuietLimit("rent.add.one", 30),
    QuietLimit("a?[b]", 5),
]


@pytest.mark.parametrize(
    ("api_code", "limit"),
    [
        ("rent.x", 10),
        ("rent.add.x", 20),
        ("rent.add.one", 30),
        ("rent.", 10),
        ("rent", None),
        ("Rent.x", None),
        ("a?[b]", 5),
        ("axb", None),
    ],
)
def test_most_specific_pattern_is_the_limit(api_code: str, limit: int | None) -> None:
    for limits in (LIMITS, LIMITS[::-1]):
        found = limit_for(api_code, limits)
        assert (None if found is None else found.limit_ms) == limit


def silent(*arrivals: Arrival, inbox: tuple[str, ...] = (), at: int = 100) -> list[str]:
    return [each.arrival.api_code for each in find_silences(arrivals, LIMITS, inbox, at).silences]


def test_silence_is_reported_at_its_limit_and_not_before() -> None:
    assert silent(Arrival("rent.x", 1, 91, None)) == []
    assert silent(Arrival("rent.x", 1, 90, None)) == ["rent.x"]
    assert silent(Arrival("rent.x", 1, 90, 95)) == []
    assert silent(Arrival("sale.x", 1, 0, None)) == []
    assert silent(Arrival("rent.x", 1, 90, None), inbox=("rent.y",)) == ["rent.x"]
    assert silent(Arrival("rent.x", 1, 90, None), inbox=("rent.x",)) == []


def test_pattern_is_reported_only_while_none_of_its_api_codes_is_known() -> None:
    pattern = Arrival("rent.*", None, 0, None)
    assert silent(pattern) == ["rent.*"]
    assert silent(pattern, inbox=("rent.x",)) == []
    assert silent(pattern, Arrival("rent.x", 1, 99, None)) == []
    assert silent(Arrival("sale.*", None, 0, None)) == []


def test_patterns_without_a_row_and_without_a_notification_are_unknown() -> None:
    assert find_silences([], LIMITS, (), 0).unknown == ["rent.*", "rent.add.*", "rent.add.one", "a?[b]"]
    assert find_silences([Arrival("rent.add.one", 1, 1, None)], LIMITS, (), 0).unknown == ["a?[b]"]
    assert find_silences([Arrival("rent.*", None, 1, None)], LIMITS, (), 0).unknown == [
        "rent.add.*",
        "rent.add.one",
        "a?[b]",
    ]
