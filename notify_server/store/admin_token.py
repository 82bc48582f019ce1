"""Keeps the admin_token that the server makes for itself when none is configured.

It is kept with the record: in a file beside a database on SQLite, which the commands of this machine read, and in a
table on PostgreSQL, so that all servers that share the record have the same one.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path

import structlog

from notify_server.config import StoreConfig
from notify_server.errors import StoreRefusedError

log = structlog.get_logger("notify_server.store")

FILE_NAME = "admin_token"
PRIVATE = 0o600
TOKEN_BYTES = 24
# As [auth] admin_token may be, so that the text of the file can be put there.
_TOKEN = re.compile(rb"[!-~]{8,1000}")
MAX_FILE_BYTES = 1024


def token_file(database: Path) -> Path:
    """Return the path of the token's file: beside the database itself, whichever symbolic link it was named by."""
    return database.resolve().with_name(FILE_NAME)


def read_token(database: Path) -> str | None:
    """Return the token of the record at `database`, None when it has none. Raises StoreRefusedError when this user may
    not read it.
    """
    path = token_file(database)
    try:
        found = _read(path)
    except OSError as error:
        raise StoreRefusedError(
            f"{path}: cannot be read ({error.strerror}): use the server's user, or set [auth] admin_token"
        ) from error
    return found[0] if found is not None else None


async def own_token(store: StoreConfig) -> str | None:
    """Return the token of the record, None when it has none. Raises StoreRefusedError when it cannot be read."""
    if not store.is_postgres:
        return read_token(store.path)
    # The driver is only loaded where it is needed.
    from notify_server.store.postgres.secrets import read_secret

    return await read_secret(store.url, FILE_NAME)


async def make_token(store: StoreConfig) -> str:
    """Return the token of the record, which exists, and make it first if it has none. Raises StoreRefusedError."""
    if not store.is_postgres:
        return _make_file(token_file(store.path))
    # The driver is only loaded where it is needed.
    from notify_server.store.postgres.secrets import keep_secret

    return await keep_secret(store.url, FILE_NAME, secrets.token_urlsafe(TOKEN_BYTES))


def _make_file(path: Path) -> str:
    try:
        if (found := _read(path)) is not None:
            token, status = found
            if status.st_uid not in (os.geteuid(), 0):
                raise StoreRefusedError(
                    f"{path}: belongs to user {status.st_uid}: delete the file, or set [auth] admin_token"
                )
            if token is not None and not status.st_mode & 0o077:
                return token
            log.warning(
                "a new admin_token was created: the old file was readable by other users, or damaged", file=str(path)
            )
            path.unlink()
        return _write(path, secrets.token_urlsafe(TOKEN_BYTES))
    except OSError as error:
        raise StoreRefusedError(
            f"{path}: cannot be written ({error.strerror}): make the directory writable, or set [auth] admin_token"
        ) from error


def _read(path: Path) -> tuple[str | None, os.stat_result] | None:
    """Return the token (None when the file holds none) and the file's status; None when there is no file."""
    try:
        # A link could lead to another user's file, and a pipe would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        content = os.read(descriptor, MAX_FILE_BYTES).strip() if stat.S_ISREG(status.st_mode) else b""
    finally:
        os.close(descriptor)
    return content.decode("ascii") if _TOKEN.fullmatch(content) else None, status


def _write(path: Path, token: str) -> str:
    """Write the file at once and whole. Returns the token in it, that of a server that was faster if there is one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        draft.unlink()
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
    try:
        try:
            os.write(descriptor, f"{token}\n".encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.link(draft, path)
        except FileExistsError:
            found = _read(path)
            return (found[0] if found is not None else None) or token
    finally:
        draft.unlink()
    return token
