"""How many requests are under way at a host, as its latency shows; hosts that queue are simulated without a clock."""

from __future__ import annotations

import pytest

from notify_server.verify.latency import SLOW_SECONDS, LatencyWindow

LIMIT = 32


def play(capacity: float, seconds: float, window: LatencyWindow, least: float = 0.02) -> list[int]:
    """Return the requests under way at each answer of a host that serves `capacity` requests a second in order."""
    now, under_way = 0.0, []
    begun = [0.0] * LIMIT
    while now < seconds:
        now += max(1 / capacity, least / len(begun))
        began = begun.pop(0)
        under_way.append(len(begun) + 1)
        window.answered(now, max(now - began, least), len(begun) + 1, LIMIT)
        allowed = LIMIT if window.size is None else int(window.size)
        begun += [now] * (allowed - len(begun))
    return under_way


def test_host_that_answers_in_time_is_not_limited() -> None:
    window = LatencyWindow()
    assert set(play(200, 60, window)) == {LIMIT}
    assert window.size is None


@pytest.mark.parametrize("capacity", [2, 5, 10])
def test_host_that_queues_gets_as_many_requests_as_it_answers_in_time(capacity: float) -> None:
    under_way = play(capacity, 300, LatencyWindow())[-100:]
    assert max(under_way) <= max(2, 2 * capacity * SLOW_SECONDS)
    # It is never without a request.
    assert min(under_way) >= 1


def test_host_that_is_slow_whatever_is_under_way_is_not_limited_for_ever() -> None:
    window = LatencyWindow()
    window.answered(0.0, 0.1, LIMIT, LIMIT)
    for second in range(1, 600):
        window.answered(3.0 * second, 3.0, max(1, int(window.size or LIMIT)), LIMIT)
    assert window.size is None


def test_host_that_has_always_been_slow_is_not_limited() -> None:
    window = LatencyWindow()
    for second in range(100):
        window.answered(float(second), 5.0, LIMIT, LIMIT)
    assert window.size is None


def test_answers_of_one_time_shrink_the_window_once() -> None:
    window = LatencyWindow()
    window.answered(0.0, 0.1, LIMIT, LIMIT)
    window.answered(10.0, 2.0, LIMIT, LIMIT)
    size = window.size
    for moment in (10.1, 10.5, 11.9):
        window.answered(moment, 2.0, LIMIT, LIMIT)
    assert window.size == size


def test_host_that_recovers_has_its_whole_limit_again() -> None:
    window = LatencyWindow()
    window.answered(0.0, 0.1, LIMIT, LIMIT)
    window.answered(10.0, 9.0, LIMIT, LIMIT)
    assert window.size is not None
    for number in range(LIMIT * LIMIT):
        window.answered(20.0 + number / 100, 0.1, LIMIT, LIMIT)
    assert window.size is None
