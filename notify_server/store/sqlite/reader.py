"""Opens a read-only connection for the copying of records, whose reads are not asynchronous yet."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from notify_server.errors import StoreRefusedError
from notify_server.store.sqlite.database import APPLICATION_ID, BUSY_TIMEOUT_MS


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Open a connection that cannot write. Raises StoreRefusedError when the file does not exist, or is no record."""
    if not path.is_file():
        raise StoreRefusedError(f"{path}: there is no record: start the daemon, or name its database")
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro",
            uri=True,
            timeout=BUSY_TIMEOUT_MS / 1000,
            isolation_level=None,
            check_same_thread=False,
        )
    except sqlite3.Error as error:
        raise StoreRefusedError(f"{path}: cannot be opened ({error})") from error
    try:
        connection.execute("PRAGMA query_only = 1")
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    except sqlite3.Error as error:
        connection.close()
        raise StoreRefusedError(f"{path}: cannot be read ({error})") from error
    if application_id != APPLICATION_ID:
        connection.close()
        raise StoreRefusedError(f"{path}: is not a record of notify_server: name the daemon's database")
    return connection
