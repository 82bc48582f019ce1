"""`notify-server migrate`: bring the record's schema up to date while no daemon runs."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from pathlib import Path

from notify_server.cli.common import EXIT_FAILED, read_config
from notify_server.config import LogConfig
from notify_server.errors import ConfigError, StoreRefusedError
from notify_server.observe import set_up_logging
from notify_server.store.queries import load_migrations
from notify_server.store.sqlite_writer import FileLock, connect, refusal, schema_version


def run(config_path: Path | None) -> None:
    """Apply what is missing and say from which version to which. Exits 1 with one line when that cannot be done."""
    config = read_config(config_path)
    set_up_logging(LogConfig(level="warning"))
    try:
        path = config.store.path
    except ConfigError as error:
        print(f"notify_server: {error}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None
    if not path.exists():
        print(f"{path}: there is no record yet, `notify-server serve` makes one with the latest schema")
        return
    try:
        lock = FileLock(path)
        try:
            before = _version(path)
            connection = connect(path)
            after = schema_version(connection)
            connection.close()
        finally:
            lock.close()
    except StoreRefusedError as error:
        print(f"notify_server: {error}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None
    if before == after:
        print(f"{path}: has schema version {after}, the latest: nothing to do")
        return
    applied = ", ".join(step.name for step in load_migrations("sqlite")[before:after])
    print(f"{path}: migrated from schema version {before} to {after} ({applied})")


def _version(path: Path) -> int:
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            return schema_version(connection)
    except sqlite3.DatabaseError as error:
        raise refusal(path, error) from error
