"""The claims of the SQLite store, over a list instead of a database."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from notify_server.model import DueFile
from notify_server.store.sqlite import claims as claims_module
from notify_server.store.sqlite.claims import Claims, Due, Position

NOW = 1000


class Disk:
    """The pending files of a database, and how often they were read."""

    def __init__(self, *hosts: str, files: int = 10) -> None:
        self.rows = [
            (NOW - files + n, DueFile(10 * n + place, 1, host, f"https://{host}/{n}", 0))
            for place, host in enumerate(hosts)
            for n in range(files)
        ]
        self.reads: list[tuple[str, Position, int]] = []
        self.fails = False

    def read(self, host: str, after: Position, most: int) -> Sequence[Due]:
        if self.fails:
            raise OSError
        self.reads.append((host, after, most))
        rows = sorted((at, file.id, file) for at, file in self.rows if file.host == host and (at, file.id) > after)
        return [(at, file) for at, _, file in rows if at <= NOW][:most]

    def remove(self, files: Sequence[DueFile]) -> None:
        self.rows = [(at, file) for at, file in self.rows if file not in files]


def ids(files: Sequence[DueFile]) -> list[int]:
    return [file.id for file in files]


def test_files_are_claimed_once_the_longest_due_first() -> None:
    disk, claims = Disk("h"), Claims()
    assert ids(claims.take([("h", 3)], NOW, disk.read)) == [0, 10, 20]
    assert ids(claims.take([("h", 100)], NOW, disk.read)) == [30, 40, 50, 60, 70, 80, 90]
    assert claims.take([("h", 1)], NOW, disk.read) == []
    assert claims.holds(0)
    assert not claims.holds(1)


def test_a_host_named_twice_gets_the_sum() -> None:
    disk, claims = Disk("a", "b"), Claims()
    assert ids(claims.take([("a", 1), ("b", 1), ("a", 2)], NOW, disk.read)) == [0, 10, 20, 1]


def test_small_claims_are_served_from_what_was_read_ahead() -> None:
    disk, claims = Disk("h"), Claims()
    for n in range(10):
        assert ids(claims.take([("h", 1)], NOW, disk.read)) == [10 * n]
    assert len(disk.reads) == 1


def test_reading_goes_on_behind_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "READ_AHEAD", 4)
    disk, claims = Disk("h"), Claims()
    assert len(claims.take([("h", 3)], NOW, disk.read)) == 3
    assert ids(claims.take([("h", 3)], NOW, disk.read)) == [30, 40, 50]
    assert [after for _, after, _ in disk.reads] == [(-1, -1), (NOW - 7, 30)]


def test_a_file_that_became_due_before_what_was_read_is_found_once_the_rest_is_short() -> None:
    disk, claims = Disk("h", files=2), Claims()
    assert len(claims.take([("h", 2)], NOW, disk.read)) == 2
    disk.rows.append((0, DueFile(5, 1, "h", "https://h/early", 0)))
    assert ids(claims.take([("h", 2)], NOW, disk.read)) == [5]


def test_held_files_do_not_hide_those_behind_them() -> None:
    disk, claims = Disk("h", files=600), Claims()
    assert len(claims.take([("h", 550)], NOW, disk.read)) == 550
    claims.release([])
    assert len(claims.take([("h", 100)], NOW, disk.read)) == 50


def test_released_files_are_claimed_again_and_recorded_ones_are_not() -> None:
    disk, claims = Disk("h"), Claims()
    taken = claims.take([("h", 4)], NOW, disk.read)
    disk.remove(taken[:2])
    claims.end(taken[:2])
    claims.release(taken[2:])
    assert ids(claims.take([("h", 3)], NOW, disk.read)) == [20, 30, 40]
    assert not claims.holds(0)


def test_a_reset_file_is_held_but_its_result_is_not_recorded() -> None:
    disk, claims = Disk("h"), Claims()
    first, second = claims.take([("h", 2)], NOW, disk.read)
    claims.reset({first.id, 12345})
    assert not claims.holds(first.id)
    assert claims.holds(second.id)
    assert first.id not in ids(claims.take([("h", 100)], NOW, disk.read))
    claims.end([first])
    assert ids(claims.take([("h", 1)], NOW, disk.read)) == [first.id]
    assert claims.holds(first.id)


def test_a_read_that_fails_claims_nothing() -> None:
    disk, claims = Disk("a", "b"), Claims()
    disk.fails = True
    with pytest.raises(OSError):
        claims.take([("a", 1), ("b", 1)], NOW, disk.read)
    disk.fails = False
    assert ids(claims.take([("a", 1), ("b", 1)], NOW, disk.read)) == [0, 1]


def test_files_read_ahead_are_not_claimed_before_they_are_due() -> None:
    disk, claims = Disk("h"), Claims()
    assert ids(claims.take([("h", 9)], NOW - 9, disk.read)) == [0, 10]


def test_files_read_ahead_over_all_hosts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "MAX_AHEAD", 15)
    hosts = [f"h{n}" for n in range(4)]
    disk, claims = Disk(*hosts), Claims()
    for host in hosts:
        assert len(claims.take([(host, 1)], NOW, disk.read)) == 1
    reads = len(disk.reads)
    for host in hosts:
        claims.take([(host, 1)], NOW, disk.read)
    # Beyond the bound everything is read again.
    assert len(disk.reads) > reads
