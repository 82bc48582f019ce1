"""The host as an object: what it lets start, and when its circuit opens and closes. Times are monotonic seconds."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notify_server.config import HostSettings
from notify_server.model import CircuitState, DueFile
from notify_server.verify.guard import Guard
from notify_server.verify.hosts import (
    BUSY_SECONDS,
    MAX_BUSY_REST,
    MAX_RATE,
    MIN_RATE,
    MIN_REST,
    REST_FACTOR,
    Host,
    hostname_of,
)

FAILURES_TO_OPEN = HostSettings().circuit_failures
REST_LONGEST = HostSettings().circuit_rest
NOW = 1_000_000.0
FILE = DueFile(1, 1, "files.example.com", "http://files.example.com/x", 0)


def a_host(**some: object) -> Host:
    return Host("files.example.com", HostSettings.model_validate(some))


def fail(host: Host, times: int, *, now: float = NOW, seconds: float = 1.0) -> list[bool]:
    return [host.failed(now, seconds) for _ in range(times)]


# -- limit and interval ------------------------------------------------------------------------------------------------


def test_a_new_host_may_start_at_once_and_its_connections_may_be_reused() -> None:
    host = a_host()
    ready = host.ready_at()
    assert ready is not None
    assert ready <= 0.0
    assert host.reuse
    assert not host.on_trial


@pytest.mark.parametrize("limit", [1, 2, 32])
def test_a_host_never_has_more_in_flight_than_its_limit(limit: int) -> None:
    host = a_host(per_host_concurrency=limit)
    for _ in range(limit):
        assert host.ready_at() is not None
        host.start(NOW)
    assert host.in_flight == limit
    assert host.ready_at() is None
    host.end()
    assert host.ready_at() is not None
    host.start(NOW)
    assert host.ready_at() is None


def test_starts_are_an_interval_apart_whether_or_not_the_one_before_has_ended() -> None:
    host = a_host(per_host_interval="2s")
    host.start(NOW)
    assert host.ready_at() == NOW + 2
    host.end()
    assert host.ready_at() == NOW + 2
    host.start(NOW + 5)
    assert host.ready_at() == NOW + 7


def test_without_an_interval_the_next_file_may_start_at_once() -> None:
    host = a_host()
    host.start(NOW)
    ready = host.ready_at()
    assert ready is not None
    assert ready <= NOW


def test_a_host_at_its_limit_is_not_ready_even_after_its_interval() -> None:
    host = a_host(per_host_concurrency=1, per_host_interval="2s")
    host.start(NOW)
    assert host.ready_at() is None


# -- the circuit -------------------------------------------------------------------------------------------------------


def test_the_circuit_opens_with_exactly_the_last_of_so_many_failures() -> None:
    host = a_host()
    assert fail(host, FAILURES_TO_OPEN - 1) == [False] * (FAILURES_TO_OPEN - 1)
    assert not host.on_trial
    assert not host.rests(NOW)
    assert host.failed(NOW, 1.0) is True
    assert host.on_trial
    assert host.rests(NOW)


def test_an_answer_in_between_starts_the_count_again() -> None:
    host = a_host()
    fail(host, FAILURES_TO_OPEN - 1)
    host.answered(NOW)
    assert fail(host, FAILURES_TO_OPEN) == [False] * (FAILURES_TO_OPEN - 1) + [True]


@pytest.mark.parametrize(
    ("seconds", "rest"),
    [
        (0.0, MIN_REST),
        (MIN_REST / REST_FACTOR / 2, MIN_REST),
        (MIN_REST / REST_FACTOR, MIN_REST),
        (0.1, 1.0),
        (2.5, 25.0),
        (REST_LONGEST / REST_FACTOR, REST_LONGEST),
        (20.0, REST_LONGEST),
        (1e9, REST_LONGEST),
    ],
)
def test_the_rest_is_ten_times_what_the_failure_took_within_its_bounds(seconds: float, rest: float) -> None:
    host = a_host()
    fail(host, FAILURES_TO_OPEN, seconds=seconds)
    assert host.open_until == pytest.approx(NOW + rest)
    assert host.ready_at() == host.open_until
    assert host.rests(NOW + rest * 0.99)
    assert not host.rests(host.open_until)


@given(st.floats(0, 1e6))
def test_a_rest_is_never_shorter_or_longer_than_its_bounds(seconds: float) -> None:
    host = a_host()
    fail(host, FAILURES_TO_OPEN, now=0.0, seconds=seconds)
    assert MIN_REST <= host.open_until <= REST_LONGEST


def test_its_thresholds_are_those_of_the_host() -> None:
    host = a_host(circuit_failures=2, circuit_rest="3s")
    assert fail(host, 2, seconds=20.0) == [False, True]
    assert host.open_until == NOW + 3.0


def test_a_circuit_says_which_state_it_is_in() -> None:
    host = a_host(circuit_failures=1, circuit_rest="3s")
    assert host.circuit(NOW) is CircuitState.CLOSED
    host.failed(NOW, 20.0)
    assert host.circuit(NOW + 2.9) is CircuitState.OPEN
    assert host.circuit(NOW + 3.0) is CircuitState.HALF_OPEN
    host.answered(NOW)
    assert host.circuit(NOW + 3.0) is CircuitState.CLOSED


def test_a_failure_before_the_circuit_opens_delays_nothing() -> None:
    host = a_host()
    fail(host, FAILURES_TO_OPEN - 1, seconds=1e9)
    ready = host.ready_at()
    assert ready is not None
    assert ready <= NOW


def test_one_answer_closes_the_circuit_at_once() -> None:
    host = a_host()
    fail(host, FAILURES_TO_OPEN * 3)
    host.answered(NOW)
    assert not host.on_trial
    assert not host.rests(NOW)
    ready = host.ready_at()
    assert ready is not None
    assert ready <= NOW


def test_after_its_rest_a_host_is_on_trial_and_one_failure_opens_the_circuit_again() -> None:
    host = a_host()
    fail(host, FAILURES_TO_OPEN)
    later = host.open_until
    assert host.on_trial
    assert not host.rests(later)
    assert host.failed(later, 2.0) is True
    assert host.rests(later + 39.9)
    assert host.open_until == later + 40


def test_each_rest_without_an_answer_in_between_is_twice_as_long_up_to_the_longest() -> None:
    host = a_host()
    now, rests = NOW, []
    fail(host, FAILURES_TO_OPEN - 1, now=now, seconds=0.0)
    for _ in range(8):
        host.failed(now, 0.0)
        rests.append(host.open_until - now)
        now = host.open_until
    assert rests == pytest.approx([1, 2, 4, 8, 16, 32, REST_LONGEST, REST_LONGEST])
    host.answered(NOW)
    fail(host, FAILURES_TO_OPEN, now=now, seconds=0.0)
    assert host.open_until == pytest.approx(now + MIN_REST)


def test_a_host_on_trial_may_start_as_many_as_its_limit_allows() -> None:
    host = a_host(per_host_concurrency=3)
    fail(host, FAILURES_TO_OPEN)
    for _ in range(3):
        assert host.ready_at() == host.open_until
        host.start(host.open_until)
    assert host.ready_at() is None


def test_a_quick_failure_never_shortens_a_rest() -> None:
    host = a_host()
    fail(host, FAILURES_TO_OPEN, seconds=5.0)
    until = host.open_until
    host.failed(NOW, 0.0)
    assert host.open_until == until


def test_the_later_of_rest_and_interval_counts() -> None:
    host = a_host(per_host_interval="100s")
    host.start(NOW)
    fail(host, FAILURES_TO_OPEN, seconds=1.0)
    assert host.ready_at() == NOW + 100
    fail(host, 1, now=NOW + 99, seconds=6.0)
    assert host.ready_at() == NOW + 159


# -- pacing ------------------------------------------------------------------------------------------------------------


def test_host_that_refuses_is_paced_below_the_rate_it_served_and_rests_as_long_as_it_asked() -> None:
    host = a_host()
    for n in range(50):
        host.served(NOW + n / 100)
    assert host.rate is None
    assert host.too_busy(NOW + 0.5, 2.0)
    assert host.rate == pytest.approx(0.85 * 50)
    assert host.rests(NOW + 2.4)
    assert not host.rests(NOW + 2.5)
    assert host.ready_at() == NOW + 2.5


def test_refusals_of_requests_that_were_under_way_together_slow_it_down_once() -> None:
    host = a_host()
    for _ in range(50):
        host.served(NOW)
    for n in range(32):
        assert host.too_busy(NOW + n / 1000, 1.0)
    assert host.rate == pytest.approx(0.85 * 50)


def test_rate_grows_while_nothing_is_refused_until_it_does_not_matter() -> None:
    host = a_host()
    for _ in range(50):
        host.served(NOW)
    host.too_busy(NOW, 1.0)
    before, now, rates = host.rate, NOW, []
    while host.rate is not None:
        rates.append(host.rate)
        assert host.rate < MAX_RATE
        now += 0.5
        host.served(now)
    assert before == rates[0]
    assert rates == sorted(rates)
    assert rates[2] == pytest.approx(rates[0] * 1.05, rel=0.01)


def test_paced_requests_start_at_the_rate() -> None:
    host = a_host(per_host_concurrency=1000)
    for _ in range(100):
        host.served(NOW)
    host.too_busy(NOW, 0.0)
    now, started = NOW + 1, 0
    while (ready := host.ready_at()) is not None and ready < NOW + 2:
        now = max(now, ready)
        if now >= NOW + 2:
            break
        host.start(now)
        started += 1
    assert started == pytest.approx(85, abs=2)


@pytest.mark.parametrize(("asked", "rest"), [(0.0, 0.0), (30.0, 30.0), (1e9, MAX_BUSY_REST), (-5.0, 0.0)])
def test_rest_that_it_asks_for_is_an_hour_at_most(asked: float, rest: float) -> None:
    host = a_host()
    host.too_busy(NOW, asked)
    assert host.rest_until == NOW + rest


def test_without_a_time_each_rest_is_twice_as_long_up_to_a_minute() -> None:
    host = a_host()
    now, rests = NOW, []
    for _ in range(8):
        host.too_busy(now, None)
        rests.append(host.rest_until - now)
        now = host.rest_until
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60]
    host.served(now)
    host.too_busy(now + 1, None)
    assert host.rest_until == now + 2


def test_host_that_refuses_everything_for_a_day_is_charged() -> None:
    host = a_host()
    assert host.too_busy(NOW, 3600.0)
    assert host.too_busy(NOW + BUSY_SECONDS, 3600.0)
    assert not host.too_busy(NOW + BUSY_SECONDS + 1, 3600.0)
    host.served(NOW + BUSY_SECONDS + 2)
    assert host.too_busy(NOW + BUSY_SECONDS + 3, 3600.0)


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=60))
def test_rate_stays_within_its_bounds_whatever_comes(steps: list[tuple[float, bool]]) -> None:
    host, now = a_host(), NOW
    for seconds, refused in steps:
        now += seconds
        if refused:
            before = host.rate
            host.too_busy(now, None)
            assert host.rate is not None
            assert before is None or host.rate <= before
        else:
            host.served(now)
        assert host.rate is None or MIN_RATE <= host.rate < MAX_RATE


# -- when it may be forgotten ------------------------------------------------------------------------------------------


def test_a_host_with_nothing_to_do_and_nothing_to_remember_is_idle() -> None:
    assert a_host().idle(NOW)


def test_a_host_with_files_waiting_or_in_flight_is_not_idle() -> None:
    host = a_host()
    host.queue.append(FILE)
    assert not host.idle(NOW)
    host.queue.clear()
    host.start(NOW)
    assert not host.idle(NOW)
    host.end()
    assert host.idle(NOW)


async def test_a_host_with_a_timer_is_not_idle() -> None:
    host = a_host()
    host.timer = asyncio.get_running_loop().call_later(3600, host.end)
    assert not host.idle(NOW)
    host.timer.cancel()
    host.timer = None
    assert host.idle(NOW)


def test_an_open_circuit_is_remembered_for_a_while_after_its_rest() -> None:
    host = a_host()
    fail(host, FAILURES_TO_OPEN, seconds=1.0)
    assert not host.idle(NOW)
    assert not host.idle(host.open_until)
    assert not host.idle(host.open_until + REST_LONGEST - 0.1)
    assert host.idle(host.open_until + REST_LONGEST)


def test_a_host_is_not_idle_before_its_interval_is_over() -> None:
    # Forgotten earlier, it would be asked again too early.
    host = a_host(per_host_interval="5m")
    host.start(NOW)
    host.end()
    assert not host.idle(NOW + 299)
    assert host.idle(NOW + 300)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "hostname"),
    [
        ("example.com", "example.com"),
        ("example.com:8080", "example.com"),
        ("a_b.xn--fiqs8s:1", "a_b.xn--fiqs8s"),
        ("localhost", "localhost"),
        ("93.184.216.34", "93.184.216.34"),
        ("93.184.216.34:8443", "93.184.216.34"),
        ("2606:4700::1111", "2606:4700::1111"),
        ("[2606:4700::1111]:8080", "2606:4700::1111"),
        ("::1", "::1"),
        ("[::1]:81", "::1"),
        ("[::ffff:8.8.8.8]:81", "::ffff:8.8.8.8"),
        ("", ""),
    ],
)
def test_the_host_name_is_without_port_and_brackets(host: str, hostname: str) -> None:
    assert hostname_of(host) == hostname


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("port", ["", ":80", ":443", ":8080"])
@pytest.mark.parametrize(
    "name",
    ["example.com", "EXAMPLE.com.", "例子.中国", "8.8.8.8", "0x08080808", "[2606:4700::1111]", "[::ffff:8.8.8.8]"],
)
def test_what_the_guard_paces_by_leads_back_to_its_host_name(scheme: str, port: str, name: str) -> None:
    target = Guard().examine(f"{scheme}://{name}{port}/x")
    assert target.refusal is None
    assert hostname_of(target.host) == target.hostname


def test_host_that_answers_slowly_has_fewer_requests_under_way_and_shows_it() -> None:
    host = Host("h", HostSettings())
    for _ in range(host.limit):
        host.start(0.0)
    assert not host.is_paced
    host.took(0.1, 0.1)
    host.took(5.0, 4.9)
    assert host.is_paced
    limit = host.view(5.0).limit
    assert limit < host.limit
    while host.in_flight >= limit:
        assert host.ready_at() is None
        host.end()
    assert host.ready_at() is not None
