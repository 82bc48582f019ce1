"""The clock of the record and the schedule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from notify_server.clock import SteadyClock

START = 1_800_000_000_000
HOUR = 3_600_000
DAY = 24 * HOUR


class Times:
    """A wall clock, in ms, and a clock that is never set, in ns."""

    def __init__(self) -> None:
        self.wall = START
        self.elapsed = 5_000_000_000

    def clock(self) -> SteadyClock:
        return SteadyClock(lambda: self.wall, lambda: self.elapsed)

    def pass_(self, ms: int) -> None:
        self.wall += ms
        self.elapsed += ms * 1_000_000


@given(st.lists(st.integers(0, 10 * DAY)))
def test_it_is_the_wall_clock_when_that_is_never_set(waits: list[int]) -> None:
    times = Times()
    clock = times.clock()
    for wait in waits:
        times.pass_(wait)
        assert clock() == times.wall


@given(st.lists(st.tuples(st.integers(0, HOUR), st.integers(-2 * HOUR, 2 * HOUR)), max_size=10))
def test_however_the_wall_clock_is_set_it_runs_on_at_nearly_its_pace(steps: list[tuple[int, int]]) -> None:
    """Row 79."""
    times = Times()
    clock = times.clock()
    before = clock()
    for wait, step in steps:
        times.pass_(wait)
        times.wall += step
        after = clock()
        assert wait * 0.9 - 1 <= after - before <= wait * 1.1 + 1
        before = after


@given(st.integers(-2 * HOUR, 2 * HOUR), st.integers(1, HOUR))
def test_after_a_step_it_comes_to_agree_with_the_wall_clock_and_stays_there(step: int, every: int) -> None:
    times = Times()
    clock = times.clock()
    times.wall += step
    needed = abs(step) * 10
    for wait in (*[every] * min(50, needed // every), needed, every):
        times.pass_(wait)
        clock()
    assert clock() == times.wall


def test_a_wall_clock_that_had_never_been_set_is_followed_at_once() -> None:
    times = Times()
    times.wall = 0
    clock = times.clock()
    times.pass_(1000)
    times.wall += START
    assert clock() == START + 1000
