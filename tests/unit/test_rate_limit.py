"""The rate limit of a source, with the time in the test's hands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notify_server.callbacks import access as rate_limit
from notify_server.callbacks.access import RateLimit, source_of

SOURCE = "192.0.2.7"


def admitted(limit: RateLimit, times: list[float], source: str = SOURCE) -> list[float]:
    return [time for time in times if limit.wait(source, time) == 0.0]


def test_a_second_s_worth_is_admitted_at_once_and_then_one_an_interval() -> None:
    limit = RateLimit(4)
    assert [limit.wait(SOURCE, 0.0) for _ in range(5)] == [0, 0, 0, 0, pytest.approx(0.25)]
    assert limit.wait(SOURCE, 0.24) == pytest.approx(0.01)
    assert limit.wait(SOURCE, 0.25) == 0
    assert limit.wait(SOURCE, 0.25) == pytest.approx(0.25)


def test_a_refused_request_costs_nothing_so_that_the_stated_wait_is_enough() -> None:
    limit = RateLimit(1)
    assert limit.wait(SOURCE, 0.0) == 0
    waits = [limit.wait(SOURCE, 0.5) for _ in range(100)]
    assert waits == [pytest.approx(0.5)] * 100
    assert limit.wait(SOURCE, 0.5 + waits[-1]) == 0


def test_sources_do_not_share_a_limit() -> None:
    limit = RateLimit(1)
    assert [limit.wait(f"192.0.2.{n}", 0.0) for n in range(50)] == [0] * 50


@given(st.integers(1, 50), st.lists(st.floats(0, 10), max_size=200))
def test_never_more_than_twice_the_rate_in_any_second_nor_more_than_the_rate_in_the_long_run(
    rate: int, times: list[float]
) -> None:
    times.sort()
    passed = admitted(RateLimit(rate), times)
    for start in passed:
        assert sum(start <= time < start + 1 for time in passed) <= 2 * rate
    if passed:
        assert len(passed) <= rate * (passed[-1] - passed[0] + 1) + 1


@given(st.integers(1, 50), st.lists(st.floats(0, 10), min_size=1, max_size=200))
def test_who_keeps_to_the_rate_is_never_refused(rate: int, gaps: list[float]) -> None:
    limit, now = RateLimit(rate), 1e6
    for gap in gaps:
        now += 1 / rate + gap
        assert limit.wait(SOURCE, now) == 0


def test_memory_is_bounded_and_the_one_silent_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "MAX_SOURCES", 3)
    limit = RateLimit(2)
    for source in ("a", "b", "c", "a", "d"):
        assert limit.wait(source, 0.0) == 0
    assert limit.wait("a", 0.0) > 0
    assert [limit.wait("b", 0.0) for _ in range(3)] == [0, 0, pytest.approx(0.5)]


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("/run/notify.sock", "/run/notify.sock"),
    ],
)
def test_an_ipv6_source_is_its_64_and_a_mapped_one_is_ipv4(address: str, source: str) -> None:
    assert source_of(address) == source
