"""Keeps secrets that all servers on a database share."""

from __future__ import annotations

from notify_server.config import without_secrets
from notify_server.store.postgres.session import close, connect, refuse_on_error, translate_errors
from notify_server.store.sql import load_queries

SQL = load_queries("postgres")


async def keep_secret(url: str, name: str, value: str) -> str:
    """Keep the value under the name unless there is one already. Returns the one that is kept. Raises
    StoreRefusedError.
    """

    async def kept() -> str:
        with translate_errors(without_secrets(url)):
            connection = await connect(url)
            try:
                await connection.execute(SQL["secret_keep"], name, value)
                return str(await connection.fetchval(SQL["secret"], name))
            finally:
                await close(connection)

    return await refuse_on_error(url, kept())


async def read_secret(url: str, name: str) -> str | None:
    """Return the secret of this name, None when there is none. Raises StoreRefusedError."""

    async def found() -> str | None:
        with translate_errors(without_secrets(url)):
            connection = await connect(url)
            try:
                value = await connection.fetchval(SQL["secret"], name)
                return None if value is None else str(value)
            finally:
                await close(connection)

    return await refuse_on_error(url, found())
