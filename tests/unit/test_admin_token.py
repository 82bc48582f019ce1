"""The file in which the server keeps the admin_token that it makes."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from notify_server.config import StoreConfig
from notify_server.errors import StoreRefusedError
from notify_server.store.admin_token import make_token, read_token

MAKE = """
import asyncio, sys
from notify_server.config import StoreConfig
from notify_server.store.admin_token import make_token
print(asyncio.run(make_token(StoreConfig(url=sys.argv[1]))))
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "notify.db"
    path.touch()
    return path


async def make(database: Path) -> str:
    return await make_token(StoreConfig(url=f"sqlite:///{database}"))


async def test_token_is_made_once(database: Path) -> None:
    assert read_token(database) is None
    token = await make(database)
    assert len(token) >= 32
    assert (await make(database), read_token(database)) == (token, token)
    assert [path.name for path in sorted(database.parent.iterdir())] == ["admin_token", "notify.db"]


async def test_servers_that_start_at_once_make_one_token(database: Path) -> None:
    command = [sys.executable, "-c", MAKE, f"sqlite:///{database}"]
    processes = [await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE) for _ in range(3)]
    made = {(await process.communicate())[0].strip().decode() for process in processes}
    assert made == {read_token(database)}


async def test_token_lies_beside_the_database_and_not_beside_a_link_to_it(database: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "linked.db"
    link.symlink_to(database)
    assert await make(link) == read_token(database)
    assert not (tmp_path / "elsewhere" / "admin_token").exists()


@pytest.mark.parametrize(
    ("content", "mode"), [("a-token-of-this-test", 0o644), ("a-token-of-this-test", 0o660), ("", 0o600), ("a b", 0o600)]
)
async def test_token_that_others_could_read_or_that_is_damaged_is_replaced(
    database: Path, content: str, mode: int
) -> None:
    file = database.with_name("admin_token")
    file.write_text(content)
    file.chmod(mode)
    token = await make(database)
    assert token != content
    assert (file.read_text().strip(), file.stat().st_mode & 0o777) == (token, 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_file_of_another_user_is_refused(database: Path) -> None:
    file = database.with_name("admin_token")
    file.write_text("a-token-of-this-test")
    file.chmod(0o600)
    os.chown(file, 12_345, -1)
    with pytest.raises(StoreRefusedError, match="belongs to user 12345: delete the file, or set"):
        await make(database)


async def test_link_to_another_file_is_refused(database: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("a-token-of-this-test")
    database.with_name("admin_token").symlink_to(tmp_path / "other")
    with pytest.raises(StoreRefusedError, match="admin_token: cannot be written"):
        await make(database)
    with pytest.raises(StoreRefusedError, match="admin_token: cannot be read"):
        read_token(database)
    assert (tmp_path / "other").read_text() == "a-token-of-this-test"


async def test_directory_that_cannot_be_written_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreRefusedError, match=r"missing/admin_token: cannot be written .* or set .auth. admin_token"):
        await make(tmp_path / "missing" / "notify.db")
