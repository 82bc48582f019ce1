"""What the timeline tells is what was counted: nothing twice, nothing lost, and no more kept than there is room for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notify_server.model import DueFile, FileResult, FileState, Verdict
from notify_server.telemetry.history import HISTORY_MINUTES, HISTORY_SECONDS, Timeline, quantile_ms
from notify_server.telemetry.host_rates import HostRate, HostRates
from notify_server.telemetry.metrics import ACCEPTED, Metrics
from notify_server.telemetry.series import BUCKETS

NOW = 1_760_000_000_000
BOUNDS = (0.0, *BUCKETS)


def result(host: str, *, available: bool = True, elapsed_ms: float | None = 1.0) -> FileResult:
    state = FileState.AVAILABLE if available else FileState.UNAVAILABLE
    nothing = (None,) * 8
    return FileResult(DueFile(1, 1, host, f"http://{host}/", 0), state, None, 1, *nothing, elapsed_ms, NOW)


# -- quantiles ---------------------------------------------------------------------------------------------------------

durations = st.floats(0, 40, allow_nan=False)


def histogram(seconds: list[float]) -> list[int]:
    series = Metrics().ack_seconds.series[""]
    for duration in seconds:
        series.observe(duration)
    return series.counts


def test_of_nothing_there_is_no_quantile() -> None:
    assert quantile_ms([0] * (len(BUCKETS) + 1), 0.5) is None


@given(st.lists(durations, min_size=1), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(seconds: list[float], share: float) -> None:
    estimate = quantile_ms(histogram(seconds), share)
    assert estimate is not None
    # The smallest duration that so many are not longer than.
    ordered = sorted(seconds)
    true = next(value for place, value in enumerate(ordered, 1) if place >= share * len(ordered))
    if true > BUCKETS[-1]:
        assert estimate == 1000 * BUCKETS[-1]
        return
    low, high = next((low, high) for low, high in pairwise(BOUNDS) if true <= high)
    assert 1000 * low <= estimate <= 1000 * high * (1 + 1e-9)


@given(st.lists(durations, min_size=1))
def test_a_higher_quantile_is_no_smaller(seconds: list[float]) -> None:
    counts = histogram(seconds)
    estimates = [quantile_ms(counts, share / 20) or 0.0 for share in range(1, 21)]
    assert estimates == sorted(estimates)


def test_a_bucket_is_taken_to_be_evenly_filled() -> None:
    assert quantile_ms(histogram([0.3] * 4), 0.5) == pytest.approx(250 + 250 / 2)


# -- samples -----------------------------------------------------------------------------------------------------------

CODES = (ACCEPTED, "400", "401001", "503")
REASONS = ("ok", "http_404", "timeout")
happenings = st.fixed_dictionaries(
    {
        "codes": st.lists(st.sampled_from(CODES), max_size=9),
        "reasons": st.lists(st.sampled_from(REASONS), max_size=9),
        "states": st.lists(st.sampled_from(list(FileState)), max_size=9),
        "verdicts": st.lists(st.sampled_from([Verdict.COMPLETE, Verdict.INCOMPLETE]), max_size=9),
        "acks": st.lists(durations, max_size=9),
        "seconds": st.floats(0.5, 90.0),
    }
)


@given(st.lists(happenings, max_size=12))
def test_every_happening_is_in_one_sample_and_in_one_minute(story: list[dict[str, list[str]]]) -> None:
    metrics = Metrics()
    waiting = iter(range(1, 1000))
    line = Timeline(metrics, now=lambda: NOW, backlog=lambda: next(waiting), in_flight=lambda: 7)
    at = 1000.0
    # A minute begins with the first sample.
    first = line.sample(at)
    assert (first.seconds, first.accepted, first.refused, first.requests) == (0.0, 0, 0, 0)
    for happened in story:
        for code in happened["codes"]:
            metrics.callbacks.add(code)
        for reason in happened["reasons"]:
            metrics.probes.add(reason)
        for state in happened["states"]:
            metrics.files.add(state)
        for verdict in happened["verdicts"]:
            metrics.verdicts.add(verdict)
        for ack in happened["acks"]:
            metrics.ack_seconds.series[""].observe(float(ack))
        at += (passed := float(happened["seconds"]))  # type: ignore[arg-type]
        sample = line.sample(at)
        assert sample.seconds == pytest.approx(passed, abs=0.001)
        assert sample.accepted == happened["codes"].count(ACCEPTED)
        assert sample.refused == len(happened["codes"]) - sample.accepted
        assert sample.requests == len(happened["reasons"])
        assert sample.failed_requests == sample.requests - happened["reasons"].count("ok")
        assert sample.available == happened["states"].count("available")
        assert sample.unavailable == happened["states"].count("unavailable") + happened["states"].count("blocked")
        assert sample.complete == happened["verdicts"].count("complete")
        assert sample.incomplete == happened["verdicts"].count("incomplete")
        assert (sample.ack_p50_ms is None) == (not happened["acks"])
        assert sample.probe_p50_ms is None
        assert sample.in_flight == 7
        assert line.seconds[-1] == sample
    for minute in line.minutes:
        assert 60.0 <= minute.seconds < 60.0 + 90.0
    # A minute ends with a sample, so the minutes hold what the seconds up to the last one's end hold.
    told = sum(minute.seconds for minute in line.minutes)
    passed = 0.0
    accepted = requests = 0
    for sample in line.seconds:
        if passed + sample.seconds > told + 0.05:
            break
        passed += sample.seconds
        accepted += sample.accepted
        requests += sample.requests
    assert sum(minute.accepted for minute in line.minutes) == accepted
    assert sum(minute.requests for minute in line.minutes) == requests


def test_a_code_or_reason_that_comes_up_late_is_counted() -> None:
    metrics = Metrics()
    line = Timeline(metrics, now=lambda: NOW, backlog=lambda: 0, in_flight=lambda: 0)
    line.sample(1.0)
    metrics.callbacks.add("429", 3)
    metrics.probes.add("dns_error", 2)
    sample = line.sample(2.0)
    assert (sample.refused, sample.requests, sample.failed_requests) == (3, 2, 2)


def test_no_more_is_kept_than_ten_minutes_of_seconds_and_a_day_of_minutes() -> None:
    line = Timeline(Metrics(), now=lambda: NOW, backlog=lambda: 0, in_flight=lambda: 0)
    for second in range(HISTORY_SECONDS + 5):
        line.sample(1.0 + second)
    assert len(line.seconds) == HISTORY_SECONDS
    assert len(line.minutes) == (HISTORY_SECONDS + 4) // 60
    for minute in range(HISTORY_MINUTES + 5):
        line.sample(10_000.0 + 60 * minute)
    assert len(line.minutes) == HISTORY_MINUTES


# -- hosts -------------------------------------------------------------------------------------------------------------

outcomes = st.tuples(st.floats(0, 30), st.sampled_from(["a", "b", "c"]), st.booleans(), st.none() | st.floats(0, 1000))


def times(story: list[tuple[float, str, bool, float | None]]) -> Iterator[tuple[float, str, bool, float]]:
    at = 500.0
    for pause, host, available, elapsed_ms in story:
        at += pause
        yield at, host, available, elapsed_ms or 0.0


@given(st.lists(outcomes, min_size=1, max_size=60), st.floats(0, 90))
def test_host_rates_cover_the_last_minute(story: list[tuple[float, str, bool, float | None]], pause: float) -> None:
    rates = HostRates()
    happened = list(times(story))
    for (at, host, available, _), (_, _, _, elapsed_ms) in zip(happened, story, strict=True):
        rates.recorded([result(host, available=available, elapsed_ms=elapsed_ms)], at)
    now = happened[-1][0] + pause
    told = rates.rates(now)
    for host in ("a", "b", "c"):
        mine = [(at, available, ms) for at, name, available, ms in happened if name == host]
        # To the ten seconds: all of the last 50, none from before the last 60.
        most = [outcome for outcome in mine if outcome[0] >= now - 60]
        least = [outcome for outcome in mine if outcome[0] >= now - 50]
        if host not in told:
            assert not least
            continue
        rate = told[host]
        assert len(least) <= rate.attempts <= len(most)
        counted = most[len(most) - rate.attempts :]
        assert rate.failed == sum(not available for _, available, _ in counted)
        assert rate.mean_ms == pytest.approx(sum(ms for _, _, ms in counted) / rate.attempts, abs=0.051)


def test_a_hosts_rates_are_what_its_attempts_were() -> None:
    rates = HostRates()
    rates.recorded([result("a", elapsed_ms=10.0), result("a", available=False, elapsed_ms=20.0), result("b")], 100.0)
    assert rates.rates(100.0) == {"a": HostRate(2, 1, 15.0), "b": HostRate(1, 0, 1.0)}
    assert rates.rates(161.0) == {}


def test_the_hosts_that_were_asked_last_are_the_ones_remembered() -> None:
    rates = HostRates(max_hosts=3)
    for host in ("a", "b", "c", "a", "d"):
        rates.recorded([result(host)], 100.0)
    assert set(rates.rates(100.0)) == {"a", "c", "d"}
