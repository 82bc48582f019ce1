"""The scheduler of the SQLite writer, without a clock: every branch of when a background job may run."""

from __future__ import annotations

import pytest

from notify_server.store.sqlite.scheduler import (
    CROWD,
    CROWD_SECONDS,
    IDLE_SHARE,
    JOB_SHARE,
    RECENT_SECONDS,
    JobScheduler,
)

T = 1000.0
LITTLE = CROWD_SECONDS / 10


def in_debt(seconds: float, now: float = T) -> JobScheduler:
    """Return a scheduler whose jobs have taken so much more than their share, while a crowd comes."""
    scheduler = JobScheduler()
    scheduler.may_run_job(now)
    scheduler.ran_job(JOB_SHARE * CROWD_SECONDS + seconds)
    scheduler.acked(CROWD, now)
    return scheduler


def test_jobs_run_at_once_while_no_ack_waits() -> None:
    scheduler = JobScheduler()
    for number in range(5):
        assert scheduler.may_run_job(T + number * LITTLE)
        scheduler.ran_job(1.0)


@pytest.mark.parametrize(
    ("acks", "crowd"),
    [
        ([(CROWD, 0.0)], True),
        ([(CROWD - 1, 0.0)], False),
        ([(1, n * LITTLE) for n in range(CROWD)], True),
        ([(1, n * CROWD_SECONDS) for n in range(CROWD)], False),
        ([(CROWD - 1, 0.0), (1, CROWD_SECONDS)], True),
        ([(CROWD - 1, 0.0), (1, CROWD_SECONDS * 1.01)], False),
        ([(CROWD * 5, 0.0)], True),
    ],
)
def test_a_crowd_is_so_many_acks_within_its_time(acks: list[tuple[int, float]], crowd: bool) -> None:
    scheduler = in_debt(1.0, T - 1)
    for callers, after in acks:
        scheduler.acked(callers, T + after)
    assert scheduler.may_run_job(T + acks[-1][1]) is not crowd


def test_a_job_waits_for_a_crowd_no_longer_than_the_crowd_is_expected() -> None:
    scheduler = in_debt(10.0)
    assert not scheduler.may_run_job(T)
    assert scheduler.wait_until(T) == pytest.approx(T + CROWD_SECONDS)
    assert not scheduler.may_run_job(T + CROWD_SECONDS * 0.99)
    assert scheduler.may_run_job(T + CROWD_SECONDS)


def test_a_job_with_budget_runs_though_a_crowd_is_expected() -> None:
    scheduler = JobScheduler()
    scheduler.acked(CROWD, T)
    assert scheduler.may_run_job(T)


def test_budget_does_not_grow_beyond_a_crowds_time_however_long_no_job_runs() -> None:
    scheduler = JobScheduler()
    scheduler.may_run_job(T)
    scheduler.may_run_job(T + 3600)
    scheduler.ran_job(JOB_SHARE * CROWD_SECONDS * 1.01)
    scheduler.acked(CROWD, T + 3600)
    assert not scheduler.may_run_job(T + 3600)


def test_debt_is_paid_by_time_and_faster_by_waiting() -> None:
    debt = JOB_SHARE * CROWD_SECONDS / 2
    by_time = in_debt(debt)
    by_time.acked(CROWD, T + debt / JOB_SHARE * 0.99)
    assert not by_time.may_run_job(T + debt / JOB_SHARE * 0.99)
    assert by_time.may_run_job(T + debt / JOB_SHARE * 1.01)

    by_waiting = in_debt(debt)
    assert not by_waiting.may_run_job(T)
    waited = by_waiting.wait_until(T) - T
    assert waited == pytest.approx(debt / IDLE_SHARE)
    by_waiting.waited(waited * 1.01)
    assert by_waiting.may_run_job(T + waited * 1.01)


def test_jobs_have_their_share_of_the_time_of_a_crowd_that_never_ceases() -> None:
    scheduler, now, jobs = JobScheduler(), T, 0.0
    scheduler.may_run_job(now)
    while now < T + 10:
        # A transaction of acks takes a millisecond, and the next ones arrive during it.
        now += 0.001
        scheduler.acked(CROWD, now)
        if scheduler.may_run_job(now):
            scheduler.ran_job(0.002)
            jobs += 0.002
            now += 0.002
    assert jobs / 10 == pytest.approx(JOB_SHARE, abs=0.01)


def test_jobs_have_their_share_of_the_time_that_a_crowd_leaves() -> None:
    scheduler, now, jobs, waited = JobScheduler(), T, 0.0, 0.0
    scheduler.may_run_job(now)
    while now < T + 10:
        scheduler.acked(CROWD, now)
        if not scheduler.may_run_job(now):
            until = scheduler.wait_until(now)
            scheduler.waited(until - now)
            waited += until - now
            now = until
        scheduler.ran_job(0.002)
        jobs += 0.002
        now += 0.002
    assert jobs > waited * IDLE_SHARE * 0.9


@pytest.mark.parametrize(("after", "recently"), [(0.0, True), (RECENT_SECONDS * 0.99, True), (RECENT_SECONDS, False)])
def test_acks_are_recent_for_a_time(after: float, recently: bool) -> None:
    scheduler = JobScheduler()
    assert not scheduler.acked_recently(T)
    scheduler.acked(1, T)
    assert scheduler.acked_recently(T + after) is recently
