"""The host as an object: what it lets start, and when its circuit opens and closes. Times are monotonic seconds."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notify_server.config import HostSettings
from notify_server.model import CircuitState, DueFile
from notify_server.verify.guard import Guard
from notify_server.verify.hosts import REST_FACTOR, REST_SHORTEST, Host, hostname_of

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
    host.answered()
    assert fail(host, FAILURES_TO_OPEN) == [False] * (FAILURES_TO_OPEN - 1) + [True]


@pytest.mark.parametrize(
    ("seconds", "rest"),
    [
        (0.0, REST_SHORTEST),
        (REST_SHORTEST / REST_FACTOR / 2, REST_SHORTEST),
        (REST_SHORTEST / REST_FACTOR, REST_SHORTEST),
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
    assert REST_SHORTEST <= host.open_until <= REST_LONGEST


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
    host.answered()
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
    host.answered()
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
    assert host.rests(later + 19.9)
    assert host.open_until == later + 20


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
    host.timer = asyncio.get_running_loop().call_later(3600, host.answered)
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
