"""How many attempts may be in flight while this machine is short of ports or descriptors."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from notify_server.verify.capacity import CALM_SECONDS, LOWER_SECONDS, Capacity

NOW = 1_000.0


def test_shortage_halves_the_requests_in_flight_and_is_reported_once() -> None:
    capacity = Capacity(128)
    assert capacity.lower(NOW, 100)
    assert (capacity.limit, capacity.is_short) == (50, True)
    assert not capacity.lower(NOW + LOWER_SECONDS / 2, 50)
    assert capacity.limit == 50
    assert not capacity.lower(NOW + LOWER_SECONDS, 50)
    assert capacity.limit == 25


def test_capacity_never_falls_below_one() -> None:
    capacity = Capacity(3)
    for second in range(5):
        capacity.lower(NOW + second, 1)
    assert capacity.limit == 1


def test_capacity_recovers_after_a_calm_time_and_the_shortage_is_over_once() -> None:
    capacity = Capacity(20)
    capacity.lower(NOW, 20)
    assert not capacity.recover(NOW + CALM_SECONDS)
    assert capacity.limit == 10
    over = [capacity.recover(NOW + CALM_SECONDS + second) for second in range(1, 10)]
    assert over.count(True) == 1
    assert (capacity.limit, capacity.is_short) == (20, False)
    assert capacity.lower(NOW + 100, 20)


def test_without_a_shortage_nothing_changes() -> None:
    capacity = Capacity(7)
    assert not capacity.recover(NOW)
    assert (capacity.limit, capacity.is_short) == (7, False)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 200) | st.none())), st.integers(1, 200))
def test_limit_stays_between_one_and_the_slots(events: list[tuple[float, int | None]], slots: int) -> None:
    capacity, now = Capacity(slots), NOW
    for seconds, in_flight in events:
        now += seconds
        if in_flight is None:
            capacity.recover(now)
        else:
            capacity.lower(now, in_flight)
        assert 1 <= capacity.limit <= slots
        assert capacity.is_short or capacity.limit == slots
