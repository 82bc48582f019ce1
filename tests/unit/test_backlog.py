"""The count of files that are not settled, on a database that other nodes change too."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from notify_server.store.postgres.backlog import COUNTING_SHARE, MAX_SKIPPED_CORRECTIONS, Backlog


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backlog(clock: Clock) -> Backlog:
    made = Backlog(clock)
    made.files = 10
    return made


def counting(number: int, *, meanwhile: Callable[[], object] = lambda: None) -> Callable[[], Awaitable[int]]:
    """A count of the database; `meanwhile` happens while it runs."""

    async def count() -> int:
        meanwhile()
        return number

    return count


def change(backlog: Backlog, files: int) -> None:
    with backlog.changing():
        backlog.files += files


async def test_count_replaces_the_number_while_no_change_is_in_flight(backlog: Backlog) -> None:
    await backlog.correct(counting(7))
    assert backlog.files == 7


async def test_count_is_dropped_if_a_change_was_in_flight_at_its_start(backlog: Backlog) -> None:
    with backlog.changing():
        await backlog.correct(counting(7))
        backlog.files += 1
    assert backlog.files == 11


async def test_count_is_dropped_if_a_change_began_and_ended_meanwhile(backlog: Backlog) -> None:
    await backlog.correct(counting(7, meanwhile=lambda: change(backlog, 2)))
    assert backlog.files == 12


async def test_change_that_fails_no_longer_counts_as_in_flight(backlog: Backlog) -> None:
    with pytest.raises(OSError, match="gone"), backlog.changing():
        raise OSError("gone")
    await backlog.correct(counting(7))
    assert backlog.files == 7


async def test_count_of_a_node_that_always_changes_is_taken_after_the_last_skip(backlog: Backlog) -> None:
    def meanwhile() -> None:
        change(backlog, 1)

    for _ in range(MAX_SKIPPED_CORRECTIONS):
        await backlog.correct(counting(500, meanwhile=meanwhile))
    assert backlog.files == 10 + MAX_SKIPPED_CORRECTIONS
    # What changed during the count is added: it may be in the count or not.
    await backlog.correct(counting(500, meanwhile=meanwhile))
    assert backlog.files == 501
    # Then skipping starts over.
    await backlog.correct(counting(600, meanwhile=meanwhile))
    assert backlog.files == 502


async def test_taken_count_resets_the_number_of_skips(backlog: Backlog) -> None:
    for _ in range(MAX_SKIPPED_CORRECTIONS):
        await backlog.correct(counting(500, meanwhile=lambda: change(backlog, 1)))
    await backlog.correct(counting(20))
    await backlog.correct(counting(500, meanwhile=lambda: change(backlog, 1)))
    assert backlog.files == 21


async def test_slow_counts_are_rare(backlog: Backlog, clock: Clock) -> None:
    def two_seconds() -> None:
        clock.now += 2.0

    await backlog.correct(counting(7, meanwhile=two_seconds))
    # It began at 100 and took 2 s.
    clock.now = 100.0 + 2.0 / COUNTING_SHARE - 0.001
    await backlog.correct(counting(8))
    assert backlog.files == 7
    clock.now += 0.002
    await backlog.correct(counting(8))
    assert backlog.files == 8
