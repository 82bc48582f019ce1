"""`notify-server migrate`: updates the schema of a record; on SQLite while no daemon runs."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
from pathlib import Path

from notify_server.cli.common import EXIT_FAILED, read_config
from notify_server.config import LogConfig
from notify_server.errors import NotifyServerError
from notify_server.store.sql import load_migrations
from notify_server.store.sqlite.database import connect, refusal, schema_version
from notify_server.store.sqlite.lock import FileLock
from notify_server.telemetry.logging import set_up_logging


def run(config_path: Path | None) -> None:
    """Apply the missing migrations and print the versions. Exits 1 with one line when that fails."""
    store = read_config(config_path).store
    set_up_logging(LogConfig(level="warning"))
    try:
        if store.is_postgres:
            # Loaded only when used, because its driver takes time to load.
            from notify_server.store.postgres.schema import migrate_at

            dialect, (before, after) = "postgres", asyncio.run(migrate_at(store.url))
        elif store.path.exists():
            dialect, (before, after) = "sqlite", _migrate_file(store.path)
        else:
            print(f"{store.place}: there is no record yet, `notify-server serve` makes one with the latest schema")
            return
    except NotifyServerError as error:
        print(f"notify_server: {error}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None
    if before == after:
        print(f"{store.place}: has schema version {after}, the latest: nothing to do")
        return
    applied = ", ".join(step.name for step in load_migrations(dialect)[before:after])
    print(f"{store.place}: migrated from schema version {before} to {after} ({applied})")


def _migrate_file(path: Path) -> tuple[int, int]:
    lock = FileLock(path)
    try:
        before = _version(path)
        with contextlib.closing(connect(path)) as connection:
            return before, schema_version(connection)
    finally:
        lock.close()


def _version(path: Path) -> int:
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            return schema_version(connection)
    except sqlite3.DatabaseError as error:
        raise refusal(path, error) from error
