"""The files of the record: taken away while it is in use, readable by others, or opened under another name."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from pathlib import Path

import pytest

from notify_server.errors import StoreRefusedError
from notify_server.store.sqlite.database import FileIdentity, connect
from notify_server.store.sqlite.lock import FileLock
from tests.support.daemon import Daemon
from tests.support.notification import batch_body

AWAY = "callbacks are refused: the database file was deleted, moved or replaced"


async def refused(daemon: Daemon) -> None:
    """Check that callbacks and readiness are refused, with the reason."""
    reply = await daemon.post(batch_body("lost", []))
    assert (reply.status, reply.code) == (503, "503")
    ready = await daemon.get("/readyz")
    assert ready.status == 503
    assert b"while it was in use" in ready.body


async def is_ready(daemon: Daemon) -> bool:
    return (await daemon.get("/readyz")).status == 200


async def ready_again(daemon: Daemon) -> None:
    """Wait until readiness says so."""
    async with asyncio.timeout(30):
        while not await is_ready(daemon):
            await asyncio.sleep(0.02)


async def test_moved_database_refuses_callbacks_until_it_is_back(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.deliver("before", [])
        elsewhere = tmp_path / "moved.db"
        daemon.database.rename(elsewhere)
        await refused(daemon)
        line = await daemon.line(AWAY)
        assert str(daemon.database) in line["error"]
        assert "was deleted or moved" in line["error"]
        elsewhere.rename(daemon.database)
        await ready_again(daemon)
        await daemon.line("the database file is usable again")
        assert daemon.count("the database file is usable again") == 1
        await daemon.deliver("after", [])
        assert daemon.value("SELECT count(*) FROM notification WHERE batch_id IN ('before', 'after')") == 2
        assert await daemon.terminate() == 0


@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_deleted_file_refuses_callbacks_until_the_restart(tmp_path: Path, suffix: str) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.deliver("before", [])
        daemon.database.with_name(daemon.database.name + suffix).unlink()
        await refused(daemon)
        assert await daemon.terminate() == 0
        await daemon.start()
        await daemon.deliver("after", [])
        assert daemon.value("SELECT count(*) FROM notification WHERE batch_id = 'after'") == 1
        assert daemon.value("PRAGMA integrity_check") == "ok"


async def test_replaced_database_refuses_callbacks_until_the_restart(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.deliver("before", [])
        backup = tmp_path / "backup.db"
        connect(backup).close()
        shutil.move(backup, daemon.database)
        await refused(daemon)
        assert "was replaced by another file" in (await daemon.line(AWAY))["error"]
        assert await daemon.terminate() == 0


def test_identity_accepts_files_that_are_written_and_a_wal_that_appears_later(tmp_path: Path) -> None:
    path = tmp_path / "notify.db"
    connection = connect(path)
    wal = path.with_name("notify.db-wal")
    identity = FileIdentity(path)
    connection.execute("CREATE TABLE more (n)")
    assert identity.problem() is None
    connection.close()
    assert not wal.exists()
    problem = identity.problem()
    assert problem is not None
    assert str(wal) in problem
    identity.forget_wal()
    assert identity.problem() is None
    wal.touch()
    assert identity.problem() is None
    wal.unlink()
    assert identity.problem() is not None


@pytest.mark.parametrize("mask", [0o000, 0o022])
async def test_files_of_the_record_are_private_whatever_the_umask_is(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        async with Daemon(tmp_path, {"store": {"url": f"sqlite:///{tmp_path}/data/notify.db"}}) as daemon:
            await daemon.deliver("b", [])
            assert await is_ready(daemon)
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "data").iterdir()}
            assert modes.keys() >= {"notify.db", "notify.db-wal", "notify.db-shm", "notify.db.lock"}
            assert {modes[f"notify.db{suffix}"] for suffix in ("", "-wal", "-shm", ".lock")} == {0o600}
            assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    finally:
        os.umask(before)


async def test_second_daemon_under_a_hard_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("notify_server.store.sqlite.lock.ORPHAN_SECONDS", 0.1)
    async with Daemon(tmp_path / "first") as daemon:
        await daemon.deliver("b", [])
        linked = tmp_path / "second" / "other.db"
        linked.parent.mkdir()
        os.link(daemon.database, linked)
        with pytest.raises(StoreRefusedError, match=r"in use by another notify_server .*hard link"):
            FileLock(linked)
        await daemon.deliver("c", [])
        assert await daemon.terminate() == 0
        FileLock(linked).close()
