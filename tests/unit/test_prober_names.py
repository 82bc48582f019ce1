"""Which name is looked up next, with the time in the test's hands; and the look-ups of a machine without threads."""

from __future__ import annotations

import select
import threading
import time

import pytest

from notify_server.model import Request
from notify_server.processes import prober_names
from notify_server.processes.prober_names import LATELY, Found, LookUps, Turns, zone_of
from notify_server.processes.prober_places import PATIENCE_SECONDS, Place, Places, Unsent


@pytest.mark.parametrize(
    ("name", "zone"),
    [
        ("files.example.com", "example.com"),
        ("a.b.c.example.com", "example.com"),
        ("bucket.oss.example.com.cn", "example.com.cn"),
        ("x.example.co.uk", "example.co.uk"),
        ("com.cn", "com.cn"),
        ("x.example.cn", "example.cn"),
        ("intranet", "intranet"),
    ],
)
def test_zone_is_the_domain_that_somebody_has_registered(name: str, zone: str) -> None:
    assert zone_of(name) == zone


def all_next(turns: Turns, now: float = 0.0) -> list[str]:
    found = []
    while (name := turns.next(now)) is not None:
        found.append(name)
    return found


def test_a_zone_has_its_share_of_the_look_ups_and_strangers_have_half() -> None:
    turns = Turns(threads=12, a_zone=3, strangers=6)
    for number in range(20):
        turns.add(f"n{number}.silent.test")
    assert len(all_next(turns)) == 3
    for number in range(20):
        turns.add(f"other{number}.test")
    # Zones that never answered share half of them.
    assert len(all_next(turns)) == 3
    assert turns.next(0.0) is None


def test_a_zone_that_has_answered_is_served_while_strangers_have_taken_their_half() -> None:
    turns = Turns(threads=4, a_zone=2, strangers=2)
    turns.add("a.good.test")
    assert all_next(turns) == ["a.good.test"]
    turns.end("a.good.test", 1.0, answered=True)
    for name in ("one.test", "two.test", "three.test", "b.good.test"):
        turns.add(name)
    begun = all_next(turns, 1.0 + LATELY / 2)
    assert "b.good.test" in begun
    assert len(begun) == 3
    turns.end("b.good.test", 2.0, answered=False)
    turns.add("c.good.test")
    # Its name server keeps silent now.
    assert turns.next(3.0) is None


def test_a_name_that_no_longer_waits_is_not_looked_up() -> None:
    turns = Turns(threads=1)
    turns.add("a.test")
    turns.add("b.test")
    assert turns.next(0.0) == "a.test"
    assert not turns.drop("a.test")
    assert turns.drop("b.test")
    turns.end("a.test", 0.0, answered=True)
    assert turns.next(0.0) is None


def test_entry_for_libcurl_names_every_address_in_its_order() -> None:
    entry = Place("https://files.example.com").entry(["203.0.113.7", "2001:db8::7", "fe80::1%eth0"])
    assert entry == "+files.example.com:443:203.0.113.7,[2001:db8::7],[fe80::1]"
    assert Place("http://files.example.com:8080").entry(["203.0.113.7"]) == "+files.example.com:8080:203.0.113.7"


def test_without_a_thread_a_look_up_is_a_shortage_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    look_ups = LookUps(time.monotonic)
    look_ups.add("a.test")
    assert look_ups.begin() == ["a.test"]
    (found,) = look_ups.ended()
    assert found.shortage
    # It can be tried again.
    look_ups.add("a.test")
    assert look_ups.begin() == ["a.test"]


def test_a_request_whose_look_up_does_not_begin_is_returned_and_a_literal_address_needs_none() -> None:
    now = 0.0
    begun: list[int] = []
    unsent: list[tuple[int, Unsent]] = []
    places = Places(
        lambda request, addresses, looked_up_ms: begun.append(request.id),
        lambda request, why, elapsed_ms: unsent.append((request.id, why)),
        lambda: now,
    )
    for number, host in enumerate(["203.0.113.7", "[2001:db8::7]:8000", "localhost"]):
        places.find(Request(number, "HEAD", f"http://{host}/x", 1000, 1000))
    assert begun == [0, 1, 2]
    assert not places.is_active
    places.find(Request(3, "HEAD", "http://files.example.test/x", 1000, 1000))
    assert places.patience() == PATIENCE_SECONDS
    now = PATIENCE_SECONDS
    # No turn has come: `advance` would give one first.
    places._give_up(now)
    assert unsent == [(3, Unsent.CROWDED)]
    assert not places.is_active


def test_failure_of_a_look_up_is_not_charged_to_a_request_that_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, answers = threading.Event(), threading.Event()

    def look_up(name: str) -> Found:
        # The first look-up fails when `silent` ends, the second finds the address.
        if not answers.is_set():
            silent.wait(10)
            answers.set()
            return Found(name, (), answered=False)
        return Found(name, ("203.0.113.7",), answered=True)

    monkeypatch.setattr(prober_names, "look_up", look_up)
    begun: list[int] = []
    unsent: list[tuple[int, Unsent]] = []
    places = Places(
        lambda request, addresses, looked_up_ms: begun.append(request.id),
        lambda request, why, elapsed_ms: unsent.append((request.id, why)),
        lambda: 0.0,
    )
    places.find(Request(1, "HEAD", "http://files.example.test/x", 1000, 1000))
    places.advance()
    places.find(Request(2, "HEAD", "http://files.example.test/y", 1000, 1000))
    silent.set()
    while places.is_active:
        select.select([places.descriptor], [], [], 10)
        places.advance()
    assert unsent == [(1, Unsent.FAILED)]
    assert begun == [2]
