"""Which connection gives way when all are taken, with the time in the test's hands."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from notify_server.callbacks.connection_limit import IDLE_SECONDS, SILENT_SECONDS, ConnectionLimit


class Caller:
    """A connection of a source; `state` is "silent", "idle" or "busy"."""

    def __init__(self, peer: str, since: float = 0.0, state: str = "silent") -> None:
        self.peer = peer
        self.since = since
        self.state = state
        self.closed = False

    @property
    def awaits_request(self) -> bool:
        return self.state == "silent"

    @property
    def is_idle(self) -> bool:
        return self.state == "idle"

    def close(self) -> None:
        self.closed = True


class Door:
    """A limit of 8 connections, and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.limit = ConnectionLimit(8, [ip_network("10.0.0.0/8")], lambda: self.now)

    def enter(self, *callers: Caller) -> list[bool]:
        return [self.limit.join(caller) for caller in callers]


@pytest.fixture
def door() -> Door:
    return Door()


def test_one_source_may_have_every_connection_while_there_is_room(door: Door) -> None:
    assert door.enter(*(Caller("192.0.2.1") for _ in range(8))) == [True] * 8
    assert len(door.limit) == 8


def test_oldest_silent_connection_of_the_greediest_source_gives_way_to_another_source(door: Door) -> None:
    greedy = [Caller("192.0.2.1", since, "busy" if since < 2 else "silent") for since in range(5)]
    modest = [Caller("192.0.2.2", -1.0) for _ in range(3)]
    door.enter(*greedy, *modest)
    assert door.enter(Caller("192.0.2.3")) == [True]
    assert [caller.closed for caller in (*greedy, *modest)] == [False, False, True, False, False, False, False, False]
    assert len(door.limit) == 8


def test_addresses_of_one_ipv6_subscriber_are_one_source(door: Door) -> None:
    greedy = [Caller(f"2001:db8::{number:x}") for number in range(1, 9)]
    door.enter(*greedy)
    assert door.enter(Caller("2001:db8:0:1::1")) == [True]
    assert sum(caller.closed for caller in greedy) == 1


def test_trusted_proxy_keeps_its_connections_while_they_are_in_use(door: Door) -> None:
    proxied = [Caller("10.0.0.1", state="idle") for _ in range(8)]
    door.enter(*proxied)
    assert door.enter(Caller("192.0.2.3")) == [False]
    assert not any(caller.closed for caller in proxied)


def test_same_source_waits_until_one_of_its_connections_has_been_silent(door: Door) -> None:
    callers = [Caller("192.0.2.1") for _ in range(8)]
    door.enter(*callers)
    door.now = SILENT_SECONDS - 0.1
    assert door.enter(Caller("192.0.2.1")) == [False]
    door.now = SILENT_SECONDS
    assert door.enter(Caller("192.0.2.1")) == [True]


def test_kept_alive_connection_gives_way_later_than_a_silent_one(door: Door) -> None:
    idle = [Caller("192.0.2.1", state="idle") for _ in range(7)]
    silent = Caller("192.0.2.1", since=2.0)
    door.enter(*idle, silent)
    door.now = IDLE_SECONDS - 0.1
    assert door.enter(Caller("192.0.2.1", since=door.now)) == [True]
    assert silent.closed
    assert door.enter(Caller("192.0.2.1", since=door.now)) == [False]
    door.now = IDLE_SECONDS
    assert door.enter(Caller("192.0.2.1", since=door.now)) == [True]
    assert [caller.closed for caller in idle] == [True] + [False] * 6


def test_answers_under_way_never_give_way(door: Door) -> None:
    busy = [Caller("192.0.2.1", state="busy") for _ in range(8)]
    door.enter(*busy)
    door.now = 1000.0
    assert door.enter(Caller("192.0.2.3")) == [False]
    assert not any(caller.closed for caller in busy)


def test_connection_that_has_left_frees_its_place_once(door: Door) -> None:
    callers = [Caller("192.0.2.1") for _ in range(8)]
    door.enter(*callers)
    door.limit.leave(callers[0])
    door.limit.leave(callers[0])
    assert len(door.limit) == 7
    assert door.enter(Caller("192.0.2.1"), Caller("192.0.2.1")) == [True, False]


def test_replaced_member_counts_in_place_of_the_old_one(door: Door) -> None:
    old, new = Caller("192.0.2.1"), Caller("192.0.2.1")
    door.enter(old)
    door.limit.replace(old, new)
    assert len(door.limit) == 1
    door.limit.leave(old)
    assert len(door.limit) == 1
    door.limit.leave(new)
    assert len(door.limit) == 0
