"""Telling a host that does not answer from being cut off."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from notify_server.model import Evidence, Reason, Target
from notify_server.verify.connectivity import (
    ANY_TO_CUT_OFF,
    KNOWN_TO_CUT_OFF,
    MAX_KNOWN,
    Connectivity,
    Outages,
    ask_name_server,
    is_name,
)

HOSTS = [f"host{number}" for number in range(8)]


class Machine(RuleBasedStateMachine):
    """Beside a model that keeps the whole history."""

    def __init__(self) -> None:
        super().__init__()
        self.reach: Connectivity[int] = Connectivity()
        self.heard: list[tuple[str, bool]] = []
        self.doubted: list[tuple[str, int]] = []

    def expected(self) -> bool:
        """Whether those that failed since the last answer are enough."""
        last = max((place for place, (_, answered) in enumerate(self.heard) if answered), default=-1)
        failed = {host for host, _ in self.heard[last + 1 :]}
        known = {host for host, answered in self.heard if answered}
        many = len(failed) >= ANY_TO_CUT_OFF and (bool(failed & known) or not known)
        return len(failed & known) >= KNOWN_TO_CUT_OFF or many

    @rule(host=st.sampled_from(HOSTS))
    def fails(self, host: str) -> None:
        before = self.expected()
        self.heard.append((host, False))
        assert self.reach.failed(host) == (self.expected() and not before)

    @rule(host=st.sampled_from(HOSTS))
    def answers(self, host: str) -> None:
        before = self.expected()
        self.heard.append((host, True))
        assert self.reach.answered(host) == before

    @rule(host=st.sampled_from(HOSTS))
    def is_doubted(self, host: str) -> None:
        self.doubted.append((host, len(self.doubted)))
        self.reach.doubt(*self.doubted[-1])

    @rule()
    def is_settled(self) -> None:
        assert self.reach.take() == [number for _, number in self.doubted]
        self.doubted.clear()

    @invariant()
    def agrees(self) -> None:
        assert self.reach.lost == self.expected()
        assert self.reach.doubted == {host for host, _ in self.doubted}
        assert self.reach.unheard <= self.reach.doubted


TestReach = Machine.TestCase
TestReach.settings = settings(max_examples=30)


@given(st.lists(st.sampled_from(HOSTS)))
def test_one_host_alone_never_cuts_us_off(answers: list[str]) -> None:
    reach: Connectivity[int] = Connectivity()
    for host in answers:
        reach.answered(host)
    for _ in range(100):
        assert not reach.failed("dead")


def test_dead_unknown_hosts_are_no_outage_while_no_known_host_fails() -> None:
    reach: Connectivity[int] = Connectivity()
    assert [reach.failed(f"dead{number}") for number in range(ANY_TO_CUT_OFF)] == [False] * (ANY_TO_CUT_OFF - 1) + [
        True
    ]
    assert reach.answered("alive")
    assert not any(reach.failed(f"dead{number}") for number in range(100))
    assert reach.failed("alive")


def test_of_many_hosts_the_last_to_answer_are_remembered() -> None:
    reach: Connectivity[int] = Connectivity()
    for number in range(MAX_KNOWN + 1):
        reach.answered(f"host{number}")
    # Two of which one has been forgotten are not enough; with another that is remembered they are.
    assert not reach.failed("host0")
    assert not reach.failed("host1")
    assert reach.failed("host2")


@pytest.mark.parametrize(
    ("hostname", "name"), [("10.1.2.3", False), ("::1", False), ("files.test", True), ("1.2.3.4.test", True)]
)
def test_literal_addresses_are_no_names(hostname: str, name: bool) -> None:
    assert is_name(hostname) is name


async def test_what_needs_no_name_server_counts_as_answered() -> None:
    told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    ask_name_server("localhost", asyncio.get_running_loop(), told.set_result)
    assert await told is True


UNREACHED = Evidence(1, None, Reason.CONNECT_ERROR, False, None, None, None, None, None, 300.0)
ANSWER = Evidence(1, 200, None, False, "93.184.216.1", None, 1.0, None, 2.0, 3.0)


class Ledger:
    """Two kinds of outage, and what became of the attempts."""

    def __init__(self) -> None:
        self.counted: list[str] = []
        self.given_back: list[str] = []
        self.outages: Outages[str] = Outages(
            count=self.counted.append,
            give_back=self.given_back.extend,
            under_way=lambda: [target(n) for n in range(9)],
            on_connected=lambda: None,
            on_settled=lambda: None,
        )


def target(number: int) -> Target:
    host = f"93.184.216.{number}"
    return Target(f"http://{host}/", host, host)


def test_an_attempt_that_an_outage_fell_into_is_given_back_though_it_ends_after_the_outage() -> None:
    ledger = Ledger()
    outages = ledger.outages
    for number in (1, 2):
        outages.heard(target(number), ANSWER)
    before = outages.before(target(3).hostname)
    for number in (1, 2):
        assert outages.doubt(target(number), UNREACHED, f"cut off {number}", before=before)
    assert outages.ongoing
    during = outages.before(target(4).hostname)
    outages.heard(target(1), ANSWER)
    assert not outages.ongoing
    for mark in (before, during):
        assert outages.doubt(target(3), UNREACHED, "late", before=mark)
    outages.heard(target(2), ANSWER)
    assert (ledger.given_back, ledger.counted) == (["cut off 1", "cut off 2", "late", "late"], [])


def test_an_attempt_that_began_after_the_outage_counts() -> None:
    ledger = Ledger()
    outages = ledger.outages
    for number in (1, 2):
        outages.heard(target(number), ANSWER)
    for number in (1, 2):
        outages.doubt(target(number), UNREACHED, "cut off", before=outages.before(target(number).hostname))
    outages.heard(target(1), ANSWER)
    assert outages.doubt(target(3), UNREACHED, "dead", before=outages.before(target(3).hostname))
    outages.heard(target(1), ANSWER)
    assert ledger.counted == ["dead"]
