"""The rules of expectations: matching, outcomes, conflicts, and the clock that stands still during outages."""

from __future__ import annotations

from itertools import combinations, permutations, product
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notify_server.expect.clock import MAX_SILENCE_MS, MAX_SKEW_MS, ReadyClock
from notify_server.expect.expectation import (
    Arrival,
    Expectation,
    ExpectationState,
    MatchedBy,
    NewExpectation,
    after_verdict,
    differing_field,
    due_when_matched,
    due_when_waiting,
    expected_files,
    limit_at,
    match_arrivals,
)

NOW = 1_760_000_000_000
HOUR = 3_600_000


def known(id: int = 1, **changes: Any) -> Expectation:
    fields: dict[str, Any] = {
        "reference": f"r{id}", "api_code": "a", "batch_id": None, "files": None, "keys": None, "notify_by": NOW + HOUR,
        "verdict_by": NOW + 2 * HOUR, "state": ExpectationState.WAITING, "matched_by": None, "batch": None,
        "created_at": NOW, "away_ms": 0, "due_at": None,
    }  # fmt: skip
    return Expectation(id, **fields | changes)


def matched(by: MatchedBy = MatchedBy.BATCH_ID, **changes: Any) -> Expectation:
    return known(batch=1, matched_by=by, **changes)


# Matching


def test_batches_are_matched_by_name_whichever_delivery_it_is() -> None:
    named = [known(batch_id="x")]
    for is_first in (True, False):
        (match,) = match_arrivals([Arrival(7, "x", "a", is_first)], named, [], set())
        assert (match.expectation.id, match.batch, match.by) == (1, 7, MatchedBy.BATCH_ID)


@pytest.mark.parametrize("arrival", [Arrival(7, "y", "a", True), Arrival(7, "x", "b", True)])
def test_neither_another_name_nor_another_api_code_matches(arrival: Arrival) -> None:
    assert match_arrivals([arrival], [known(batch_id="x")], [], set()) == []


def test_in_order_the_oldest_goes_to_the_first_whatever_order_they_are_given_in() -> None:
    waiting = [known(id) for id in (1, 2, 3)]
    for unnamed in permutations(waiting):
        matches = match_arrivals([Arrival(n, f"b{n}", "a", True) for n in (7, 8)], [], unnamed, set())
        assert [(match.expectation.id, match.batch, match.by) for match in matches] == [
            (1, 7, MatchedBy.ORDER), (2, 8, MatchedBy.ORDER),
        ]  # fmt: skip


@pytest.mark.parametrize(("is_first", "taken"), [(False, set()), (True, {7}), (False, {7})])
def test_in_order_no_redelivery_and_no_matched_batch_takes_an_expectation(is_first: bool, taken: set[int]) -> None:
    assert match_arrivals([Arrival(7, "x", "a", is_first)], [], [known()], taken) == []


def test_order_stays_within_an_api_code() -> None:
    unnamed = [known(1, api_code="b"), known(2)]
    (match,) = match_arrivals([Arrival(7, "x", "a", True)], [], unnamed, set())
    assert match.expectation.id == 2


# Outcomes


@pytest.mark.parametrize(("submitted", "listed"), list(product((None, 0, 1, 2, 3), (0, 1, 2, 3))))
def test_number_of_files_decides(submitted: int | None, listed: int) -> None:
    outcome = after_verdict(matched(files=submitted), listed)
    is_short = submitted is not None and listed < submitted
    assert outcome == (ExpectationState.SHORT if is_short else ExpectationState.MET, listed)
    # By order it is not certain to be this batch.
    assert after_verdict(matched(MatchedBy.ORDER, files=submitted), listed).state is ExpectationState.MET
    assert expected_files(matched(MatchedBy.ORDER, files=submitted)) is None


def test_keys_decide_in_place_of_the_number() -> None:
    keys = ("a", "b", "c")
    for size in range(4):
        for listed in combinations((*keys, "extra"), size):
            outcome = after_verdict(matched(files=3, keys=keys), len(listed) + 9, listed)
            assert outcome.files == len(set(listed) & set(keys))
            assert (outcome.state is ExpectationState.MET) == (set(listed) >= set(keys))


# Both have a name for the first 24 bytes of their path, the second with a character that the cut divides.
PLAIN = "0123456789abcdef/IMAGE/-5/L3Bob3Rvcy9yb29tLTEvYS1sb25nLW5h"
CUT = "0123456789abcdef/FILE/7/5Zu+54mHL+aIv+a6kC/kuIDlj7fmpbwv"


def test_source_paths_with_the_same_beginning_are_counted_as_often_as_names_have_it() -> None:
    first, second = "/photos/room-1/a-long-name.jpg", "/photos/room-1/a-long-nature.jpg"
    pair = matched(files=2, keys=(first, second))
    assert after_verdict(pair, 1, [PLAIN]).files == 1
    assert after_verdict(pair, 2, [PLAIN, PLAIN.replace("-5", "-6")]).files == 2
    assert after_verdict(pair, 1, ["0123456789abcdef/IMAGE/-5/" + "A" * 32]).files == 0


def test_source_path_of_several_bytes_a_character_is_found() -> None:
    assert after_verdict(matched(files=1, keys=("图片/房源/一号楼/客厅.jpg",)), 1, [CUT]).files == 1


# Conflicts


CONTENT = {
    "batch_id": (None, "x"), "files": (None, 2), "keys": (None, ("k", "l")), "notify_within_ms": (HOUR, 5),
    "verdict_within_ms": (2 * HOUR, 6),
}  # fmt: skip
NAMES = {"keys": "files", "notify_within_ms": "notify_within", "verdict_within_ms": "verdict_within"}


@pytest.mark.parametrize("changed", [subset for n in range(3) for subset in combinations(CONTENT, n)])
def test_first_differing_field_is_named(changed: tuple[str, ...]) -> None:
    wanted: dict[str, Any] = {name: values[name in changed] for name, values in CONTENT.items()}
    expected = {NAMES.get(name, name) for name in changed}
    assert differing_field(known(), NewExpectation("r1", "a", **wanted)) in (expected or (None,))


# The clock


def test_clock_runs_while_a_server_is_ready_and_stands_still_while_none_is() -> None:
    clock = ReadyClock(NOW, 0)
    for second in range(1, 11):
        clock = clock.ready(NOW + second * 1000)
        assert clock.at(NOW + second * 1000) == NOW + second * 1000
    # Away for an hour: it stands still, and goes on from where it was.
    back = NOW + 10_000 + HOUR
    assert clock.at(back) == NOW + 10_000
    clock = clock.ready(back)
    assert (clock.at(back), clock.at(back + 500), clock.away_ms) == (NOW + 10_000, NOW + 10_500, HOUR)


@pytest.mark.parametrize(
    ("silence", "is_away"),
    [(0, False), (MAX_SILENCE_MS, False), (MAX_SILENCE_MS + 1, True), (-MAX_SKEW_MS, False), (-MAX_SKEW_MS - 1, True)],
)
def test_short_silence_and_small_skew_are_no_outage(silence: int, is_away: bool) -> None:
    clock = ReadyClock(NOW, 7).ready(NOW + silence)
    assert clock.away_ms == 7 + (silence if is_away else 0)
    assert clock.ready_at == (NOW + silence if is_away else max(NOW, NOW + silence))


@given(st.lists(st.integers(-10 * HOUR, 10 * HOUR), max_size=20))
def test_clock_never_leaps_however_the_wall_clock_is_set(steps: list[int]) -> None:
    clock, now = ReadyClock(NOW, 0), NOW
    for step in steps:
        before = clock.at(clock.ready_at)
        now += step
        clock = clock.ready(now)
        assert 0 <= clock.at(clock.ready_at) - before <= MAX_SILENCE_MS


def test_time_without_limits_is_no_outage() -> None:
    clock = ReadyClock(NOW, 5).started(NOW + HOUR)
    assert (clock.at(NOW + HOUR), clock.away_ms) == (NOW + HOUR - 5, 5)


def test_limits_are_later_by_the_outages_since_the_registration() -> None:
    expectation = known(away_ms=1_000)
    assert due_when_waiting(expectation) == NOW + HOUR - 1_000
    assert due_when_matched(expectation) == NOW + 2 * HOUR - 1_000
    clock = ReadyClock(NOW, 61_000)
    assert limit_at(expectation.notify_by, expectation, clock) == NOW + HOUR + 60_000
    # Both say the same: the limit passes when the clock is there.
    assert clock.at(NOW) < due_when_waiting(expectation) == limit_at(expectation.notify_by, expectation, clock) - 61_000


def test_expectation_is_the_same_after_its_way_through_a_row() -> None:
    from notify_server.store.expectations import from_row, to_row

    for each in (known(keys=("k",), files=1), matched(), msgspec.structs.replace(known(), state=ExpectationState.LATE)):
        assert from_row((each.id, *to_row(each))) == each
