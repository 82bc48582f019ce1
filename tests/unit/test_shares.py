"""Nodes share a host's limit: exactly, alike wherever it is worked out, and with little to move."""

from __future__ import annotations

import random

import pytest

from notify_server.config import HostSettings
from notify_server.verify.shares import limit_of

HOSTS = [f"h{n}.example" for n in range(50)]


def shares(host: str, nodes: list[int], settings: HostSettings) -> dict[int, int]:
    """What each node works out for itself, from what it has heard in an order of its own."""
    heard = list(nodes)
    answer = {}
    for node in nodes:
        random.Random(node).shuffle(heard)
        answer[node] = limit_of(host, settings, node, heard)
    return answer


@pytest.mark.parametrize("limit", [1, 2, 7, 32])
def test_the_shares_of_all_nodes_are_the_limit_exactly(limit: int) -> None:
    settings = HostSettings(per_host_concurrency=limit)
    for nodes in ([7], [3, 9], [1, 2, 3], list(range(20, 40))):
        assert {sum(shares(host, nodes, settings).values()) for host in HOSTS} == {limit}


def test_a_node_alone_has_the_whole_limit_whether_it_has_heard_of_itself_or_not() -> None:
    assert limit_of("h", HostSettings(), 5, []) == limit_of("h", HostSettings(), 5, [5]) == 32


def test_nodes_have_about_the_same() -> None:
    nodes = [1, 2, 3, 4]
    totals = dict.fromkeys(nodes, 0)
    for host in HOSTS:
        for node, units in shares(host, nodes, HostSettings()).items():
            totals[node] += units
    assert all(300 < total < 500 for total in totals.values()), totals


def test_only_the_units_of_a_node_that_joins_or_leaves_change_hands() -> None:
    for host in HOSTS:
        before = shares(host, [1, 2, 3], HostSettings())
        after = shares(host, [1, 2, 3, 4], HostSettings())
        assert all(after[node] <= before[node] for node in before)
        assert sum(before[node] - after[node] for node in before) == after[4]


def test_a_host_with_an_interval_belongs_to_one_node_alone() -> None:
    settings = HostSettings(per_host_interval=0.5)
    for host in HOSTS:
        assert sorted(shares(host, [1, 2, 3], settings).values()) == [0, 0, 32]
    assert {max(node for node, units in shares(host, [1, 2, 3], settings).items() if units) for host in HOSTS} == {
        1, 2, 3,
    }  # fmt: skip


def test_every_process_and_version_draws_the_same() -> None:
    assert shares("files.example.com", [1, 2, 3], HostSettings()) == {1: 10, 2: 10, 3: 12}
