"""What bounds bytes in memory: the budget of unanswered callbacks, and the gate to the keeper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from notify_server.callbacks.budget import Budget
from notify_server.store.batching import ByteGate


def test_whole_bodies_find_room_when_parts_have_used_up_the_budget() -> None:
    budget = Budget(limit=10, reserve=4)
    assert budget.take(8, whole=False)
    assert not budget.take(3, whole=False)
    assert budget.take(6, whole=True)
    assert not budget.take(1, whole=True)
    assert budget.used == 14
    budget.give_back(8)
    assert budget.take(4, whole=False)
    assert budget.used == 10


class Started:
    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str) -> Callable[[], None]:
        return partial(self.names.append, name)


def test_gate_lets_in_what_fits_and_the_rest_in_order() -> None:
    gate, started = ByteGate(10), Started()
    for name, size in (("a", 6), ("b", 4), ("c", 5), ("d", 1)):
        gate.enter(size, started(name))
    assert started.names == ["a", "b"]
    gate.leave(4)
    # Later waiters do not overtake.
    assert started.names == ["a", "b"]
    gate.leave(6)
    assert started.names == ["a", "b", "c", "d"]


def test_gate_lets_in_one_that_is_too_large_alone() -> None:
    gate, started = ByteGate(10), Started()
    gate.enter(1, started("small"))
    gate.enter(99, started("large"))
    gate.enter(1, started("next"))
    assert started.names == ["small"]
    gate.leave(1)
    assert started.names == ["small", "large"]
    gate.leave(99)
    assert started.names == ["small", "large", "next"]


def test_gate_goes_on_when_one_leaves_as_it_is_let_in() -> None:
    gate, started = ByteGate(10), Started()
    gate.enter(10, started("first"))
    gate.enter(10, partial(gate.leave, 10))
    gate.enter(10, started("third"))
    gate.leave(10)
    assert started.names == ["first", "third"]
