"""What a team would write for the same promise: FastAPI, one aiosqlite connection, a commit for each request.

The same durability as the daemon's: WAL and synchronous = FULL. It keeps the body and expands nothing.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import aiosqlite
import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel, Field


class Entry(BaseModel):
    """One file."""

    oss_object_name: str = Field(min_length=1, max_length=1024)
    status: Literal["FINISHED", "FAILED"]
    target_url: str | None = Field(default=None, max_length=300)


class Notification(BaseModel):
    """The body of a callback."""

    batch_id: str = Field(min_length=1, max_length=80)
    api_code: str = Field(min_length=1, max_length=50)
    file_list: list[Entry] = Field(max_length=10_000)


def _make_app(store: Path) -> FastAPI:
    connections: list[aiosqlite.Connection] = []
    # The connection's transaction is everybody's: without this, one request would commit another's half.
    turn = asyncio.Lock()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with aiosqlite.connect(store) as connection:
            await connection.execute("PRAGMA journal_mode = WAL")
            await connection.execute("PRAGMA synchronous = FULL")
            await connection.execute("CREATE TABLE notification (id INTEGER PRIMARY KEY, batch_id TEXT, body BLOB)")
            connections.append(connection)
            yield

    async def callback(notification: Notification, request: Request) -> dict[str, str | None]:
        body = await request.body()
        async with turn:
            await connections[0].execute(
                "INSERT INTO notification (batch_id, body) VALUES (?, ?)", (notification.batch_id, body)
            )
            await connections[0].commit()
        return {"request_id": "0", "code": "000", "msg": "成功", "data": None}

    app = FastAPI(lifespan=lifespan)
    app.add_api_route("/notify", callback, methods=["POST"])
    return app


def main(port: int, work: Path) -> None:
    """Serve on 127.0.0.1, with a new store in `work`."""
    store = work / f"fastapi-{port}.db"
    uvicorn.run(
        _make_app(store), host="127.0.0.1", port=port, loop="uvloop", http="httptools", access_log=False,
        log_level="error", backlog=1024,
    )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
