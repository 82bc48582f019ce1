"""SQLite only: databases refused at the start, and durability."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from notify_server.errors import StoreRefusedError, StoreUnavailableError
from notify_server.store.sqlite import database, inbox
from notify_server.store.sqlite.store import SqliteStore
from tests.store.builders import (
    NOW,
    again,
    chunk,
    claim,
    delivery,
    finished,
    found,
    rejection,
    take_in,
)
from tests.support.sqlite_faults import (
    HOLD_LOCK,
    HOLD_STORE,
    child,
    connection_of,
    opened,
    select,
)


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    async with opened(path) as store:
        yield store


async def refusal(path: Path) -> str:
    """The one line with which the database is refused, without its path."""
    with pytest.raises(StoreRefusedError) as caught:
        await (await SqliteStore.open(path)).close()
    text = str(caught.value)
    assert "\n" not in text
    where, _, line = text.partition(": ")
    assert where.startswith(str(path)) or str(path).startswith(where)
    return line


# One daemon, one file


async def test_a_second_daemon_on_the_same_file_is_refused_and_names_the_first(store: SqliteStore, path: Path) -> None:
    assert await refusal(path) == (
        f"in use by another notify_server (process {os.getpid()}): "
        "stop that one, or give this one a file of its own in [store] url"
    )
    await store.accept(delivery())


async def test_a_second_daemon_in_another_process_is_refused_until_the_first_has_ended(path: Path) -> None:
    async with child(HOLD_STORE, path) as holder:
        await holder.says("open")
        assert f"in use by another notify_server (process {holder.process.pid})" in await refusal(path)
        await holder.finish("closed")
        async with opened(path) as store:
            await store.ping(NOW)


async def test_a_daemon_that_was_killed_leaves_no_lock_behind(path: Path) -> None:
    async with child(HOLD_STORE, path) as holder:
        await holder.says("open")
        holder.process.kill()
        await holder.process.wait()
        async with opened(path) as store:
            await store.ping(NOW)


@pytest.mark.usefixtures("store")
async def test_a_second_daemon_that_comes_by_another_name_of_the_file_is_refused(path: Path, tmp_path: Path) -> None:
    link, folder = tmp_path / "link.db", tmp_path / "folder"
    link.symlink_to(path)
    folder.symlink_to(path.parent)
    for other in (link, folder / path.name):
        with pytest.raises(StoreRefusedError, match="in use by another notify_server"):
            await (await SqliteStore.open(other)).close()


async def test_the_directory_of_the_database_is_created(tmp_path: Path) -> None:
    async with opened(tmp_path / "a" / "b" / "notify.db") as store:
        await store.ping(NOW)


# Files that are refused


def a_text_file(path: Path) -> None:
    path.write_text("Not a database, however long this line may be made.\n" * 100)


def a_database_whose_header_is_damaged(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * 50)


def a_database_whose_tables_are_damaged(path: Path) -> None:
    pages = select(path, "SELECT rootpage FROM sqlite_master WHERE name IN ('notification', 'batch')")
    with path.open("r+b") as file:
        for (page,) in pages:
            file.seek((page - 1) * 4096)
            file.write(b"\xff" * 4096)


def a_database_cut_short(path: Path) -> None:
    os.truncate(path, 4096)


def a_database_of_another_program(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE recipe (id INTEGER)")


def a_newer_schema(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 9999")


DAMAGED = (
    r"is damaged or not a SQLite database \(.*\): restore it from a backup, "
    r'or save what can be read with `sqlite3 .* "\.recover"`, and move the file away'
)
REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (a_text_file, DAMAGED),
    (a_database_whose_header_is_damaged, DAMAGED),
    (a_database_whose_tables_are_damaged, DAMAGED),
    (a_database_cut_short, DAMAGED),
    (a_database_of_another_program, r"is a SQLite database of another program: name another file in \[store\] url"),
    (
        a_newer_schema,
        r"has schema version 9999, this program knows \d+: "
        r"run the newer notify_server that wrote it, or restore a backup from before the upgrade",
    ),
]


@pytest.mark.parametrize(("make", "line"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
async def test_a_file_that_cannot_be_used_is_refused_with_its_own_line_and_left_as_it_is(
    path: Path, make: Callable[[Path], None], line: str
) -> None:
    async with opened(path) as store:
        await take_in(store, finished("a"), finished("b"))
    make(path)
    before = path.read_bytes()
    for _ in range(2):
        assert re.fullmatch(line, await refusal(path))
    assert path.read_bytes() == before
    path.unlink()
    async with opened(path) as store:
        await store.ping(NOW)


async def test_a_directory_in_the_place_of_the_database_is_refused(path: Path) -> None:
    path.mkdir(parents=True)
    assert "cannot be opened" in await refusal(path)


async def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    line = await refusal(tmp_path / "data" / "notify.db")
    assert re.fullmatch(r"cannot be created \(.*\): name another directory in \[store\] url", line)


async def test_a_new_database_locked_by_another_program_is_refused(impatient: None, path: Path) -> None:
    path.parent.mkdir()
    async with child(HOLD_LOCK, path) as holder:
        await holder.says("locked")
        line = "is locked by another program: close the program that has it open for writing, and start again"
        assert await refusal(path) == line
        await holder.finish("free")
    async with opened(path) as store:
        await store.ping(NOW)


async def test_a_database_locked_by_another_program_is_opened_and_used_once_it_is_free(
    impatient: None, path: Path
) -> None:
    async with opened(path) as store:
        id = await store.accept(delivery())
    async with child(HOLD_LOCK, path) as holder:
        await holder.says("locked")
        async with opened(path) as store:
            assert [item.id for item in await store.inbox(10)] == [id]
            with pytest.raises(StoreUnavailableError):
                await store.accept(delivery())
            await holder.finish("free")
            assert await store.accept(delivery())


@contextmanager
def as_plain_user(directory: Path) -> Iterator[None]:
    """Be a user whom permissions hold for, and who owns the directory."""
    root = os.geteuid() == 0
    if root:
        for entry in (directory, *directory.rglob("*")):
            os.chown(entry, 65534, 65534)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def plain_path() -> Iterator[Path]:
    """A path that a plain user may reach, unlike pytest's own when they belong to root."""
    directory = Path(tempfile.mkdtemp(prefix="notify-store-"))
    yield directory / "notify.db"
    directory.chmod(0o700)
    shutil.rmtree(directory)


async def test_a_read_only_directory_is_refused(plain_path: Path) -> None:
    plain_path.parent.chmod(0o555)
    with as_plain_user(plain_path.parent):
        line = await refusal(plain_path)
    assert line == "cannot be created (Permission denied): make the directory writable for this user"


async def test_a_directory_that_cannot_be_created_is_refused(plain_path: Path) -> None:
    plain_path.parent.chmod(0o555)
    with as_plain_user(plain_path.parent):
        line = await refusal(plain_path.parent / "data" / "notify.db")
    assert line == "cannot be created (Permission denied): name another directory in [store] url"


async def test_a_read_only_database_in_a_directory_become_read_only_is_refused(plain_path: Path) -> None:
    async with opened(plain_path):
        pass
    plain_path.parent.chmod(0o555)
    with as_plain_user(plain_path.parent):
        assert "make " in await refusal(plain_path)


@pytest.mark.parametrize("mode", [0o444, 0o000])
async def test_a_file_that_may_not_be_written_is_refused(plain_path: Path, mode: int) -> None:
    async with opened(plain_path):
        pass
    plain_path.chmod(mode)
    with as_plain_user(plain_path.parent):
        line = await refusal(plain_path)
    if mode:
        assert line == "is read-only: make the file and its directory writable for this user"
    else:
        assert "check the disk and the permissions of file and directory" in line


# What makes it durable


async def test_every_commit_is_synced_before_it_returns_and_readers_are_not_kept_waiting(
    store: SqliteStore, path: Path
) -> None:
    assert connection_of(store).execute("PRAGMA synchronous").fetchone() == (2,)
    assert select(path, "PRAGMA journal_mode") == [("wal",)]
    assert connection_of(store).execute("PRAGMA busy_timeout").fetchone() == (database.BUSY_TIMEOUT_MS,)


async def test_the_file_is_distinguishable_from_other_databases(store: SqliteStore, path: Path) -> None:
    assert select(path, "PRAGMA application_id") == [(0x6E746679,)]


async def test_the_database_is_sound_after_use_and_whole_in_its_one_file_after_closing(path: Path) -> None:
    async with opened(path) as store:
        for n in range(20):
            await take_in(store, *(finished(str(m)) for m in range(50)), batch_id=str(n))
            files = await claim(store, n=30)
            await store.record([found(file) if file.id % 2 else again(file, NOW + 5) for file in files], NOW)
            await asyncio.gather(*(store.reject(rejection()) for _ in range(10)))
        await store.prune(NOW + 1, NOW + 1, 100)
        assert select(path, "PRAGMA integrity_check") == [("ok",)]
        assert select(path, "PRAGMA foreign_key_check") == []
    assert {entry.name for entry in path.parent.iterdir()} == {"notify.db", "notify.db.lock"}
    assert select(path, "PRAGMA integrity_check") == [("ok",)]


async def test_deliveries_that_arrive_together_share_transactions(store: SqliteStore) -> None:
    commits: list[str] = []
    connection_of(store).set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)
    await asyncio.gather(*(store.accept(delivery()) for _ in range(500)))
    assert 1 <= len(commits) <= 5


@pytest.mark.parametrize("room", [0, 25, 55])
async def test_bodies_that_find_no_room_in_memory_are_read_from_the_file_in_their_order(
    path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(inbox, "MAX_BYTES", room)
    async with opened(path) as store:
        read: list[str] = []
        connection_of(store).set_trace_callback(lambda sql: read.append(sql) if "body" in sql[:20] else None)
        expected: list[tuple[int, bytes]] = []
        for n in range(40):
            body = f"body {n:05}".encode()
            expected.append((await store.accept(delivery(body=body)), body))
            if n % 3 == 2:
                taken = (await store.inbox(10))[:2]
                assert [(item.id, item.body) for item in taken] == expected[: len(taken)]
                await store.expand([chunk(item) for item in taken], NOW)
                expected = expected[len(taken) :]
        assert read
        while items := await store.inbox(10):
            assert [(item.id, item.body) for item in items] == expected[: len(items)]
            await store.expand([chunk(item) for item in items], NOW)
            expected = expected[len(items) :]
        assert expected == []
