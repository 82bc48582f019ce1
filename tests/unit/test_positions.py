"""The positions from which a node seeks due files on PostgreSQL."""

from __future__ import annotations

import pytest

from notify_server.model import DueFile
from notify_server.store.postgres.claims import Positions


def found(*files: tuple[int, int, str]) -> list[tuple[int, DueFile]]:
    """Files as (due at, id, host)."""
    return [(at, DueFile(id, 1, host, f"http://{host}/{id}", 0)) for at, id, host in files]


BEGINNING = Positions().after("any")


@pytest.mark.parametrize(
    ("wanted", "files", "after"),
    [
        ({"a": 2}, [(5, 1, "a"), (6, 2, "a")], (6, 2)),
        # Fewer than wanted: there is nothing behind them, and files before them may become free.
        ({"a": 3}, [(5, 1, "a"), (6, 2, "a")], BEGINNING),
        ({"a": 1}, [], BEGINNING),
        # The order of the host decides, not the greatest id.
        ({"a": 2}, [(5, 9, "a"), (6, 2, "a")], (6, 2)),
    ],
)
def test_position_moves_behind_the_files_of_a_full_claim(
    wanted: dict[str, int], files: list[tuple[int, int, str]], after: tuple[int, int]
) -> None:
    positions = Positions()
    positions.advance(wanted, found(*files))
    assert positions.after("a") == after


def test_hosts_have_positions_of_their_own() -> None:
    positions = Positions()
    positions.advance({"a": 1, "b": 2}, found((5, 1, "a"), (7, 3, "b")))
    assert (positions.after("a"), positions.after("b")) == ((5, 1), BEGINNING)


def test_beginning_sorts_before_every_due_time() -> None:
    assert BEGINNING <= (-(2**63 - 1), 0)
    assert BEGINNING < (0, 1)


@pytest.mark.parametrize(
    ("wanted", "files", "lacking", "after"),
    [
        ({"a": 3}, [(7, 3, "a")], {"a": 2}, BEGINNING),
        ({"a": 1}, [(7, 3, "a")], {}, (6, 2)),
        # A host that was sought from its beginning has no more files.
        ({"b": 3}, [(7, 3, "b")], {}, (6, 2)),
        ({"a": 2, "b": 1}, [], {"a": 2}, BEGINNING),
    ],
)
def test_hosts_with_too_few_files_behind_their_position_restart(
    wanted: dict[str, int], files: list[tuple[int, int, str]], lacking: dict[str, int], after: tuple[int, int]
) -> None:
    positions = Positions()
    positions.advance({"a": 2}, found((5, 1, "a"), (6, 2, "a")))
    assert positions.restart_short(wanted, found(*files)) == lacking
    assert positions.after("a") == after
    # A second time nothing is lacking: the host has restarted.
    assert positions.restart_short(wanted, found(*files)) == {}


def test_clear_restarts_all_hosts() -> None:
    positions = Positions()
    positions.advance({"a": 1, "b": 1}, found((5, 1, "a"), (6, 2, "b")))
    positions.clear()
    assert (positions.after("a"), positions.after("b")) == (BEGINNING, BEGINNING)
