"""Divides a host's capacity among the daemons that share the work.

A host with a limit of N files in flight has N units. Each unit belongs to the node that draws the highest number for it
(rendezvous hashing): all nodes come to the same result without communication, and when one joins or leaves, only its
own units change hands. Until nodes notice, about a second, the host may get more requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b

from notify_server.config import HostSettings


def limit_of(host: str, settings: HostSettings, me: int, nodes: Iterable[int]) -> int:
    """Return how many files of the host the node `me` may have in flight, given all nodes alive, itself included.

    0 leaves the host to others. A host with an interval between requests belongs to one node alone.
    """
    everybody = tuple(sorted({me, *nodes}))
    if settings.per_host_interval:
        return settings.per_host_concurrency if _units(host, 1, everybody)[me] else 0
    return _units(host, settings.per_host_concurrency, everybody)[me]


@lru_cache(maxsize=20_000)
def _units(host: str, units: int, nodes: tuple[int, ...]) -> dict[int, int]:
    """Return how many of the host's units each node has; together they have all of them."""
    if len(nodes) == 1:
        return {nodes[0]: units}
    won = dict.fromkeys(nodes, 0)
    for unit in range(units):
        won[max(nodes, key=lambda node: _draw(host, unit, node))] += 1
    return won


def _draw(host: str, unit: int, node: int) -> bytes:
    # The same in every process, unlike hash().
    return blake2b(f"{unit} {node} {host}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
