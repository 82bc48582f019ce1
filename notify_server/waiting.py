"""Waits for the database before the daemon is built, and answers on its address meanwhile.

A service manager starts the daemon when it likes, often before PostgreSQL. Ending would make it give up after a few
attempts, so the daemon stays: /healthz is 200, /readyz says what it waits for, and callers get 503 with Retry-After.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from uuid import uuid4

import msgspec
import structlog
from aiohttp import web

from notify_server.callbacks.errors import RETRY_AFTER_SECONDS, error_response
from notify_server.config import Config
from notify_server.errors import StoreNotReachedError
from notify_server.listening import Listener
from notify_server.service_manager import ServiceManager

log = structlog.get_logger("notify_server")

RETRY_SECONDS = 1.0

Listen = Callable[[Callable[[], asyncio.Protocol]], Awaitable[Listener]]


async def wait_for_store(config: Config, stop: asyncio.Event, listen: Listen, manager: ServiceManager) -> bool:
    """Return True once the database accepts connections, at once for a record on SQLite; False when `stop` was set.

    Raises StoreRefusedError when waiting does not help, such as for a wrong password.
    """
    if not config.store.is_postgres:
        return True
    # The driver is only loaded where it is needed.
    from notify_server.store.postgres.session import reach

    url = config.store.url
    try:
        await reach(url)
    except StoreNotReachedError as error:
        reason = str(error)
    else:
        return True
    placeholder = Placeholder(reason)
    server = web.Server(placeholder.handle, access_log=None, auto_decompress=False)
    listener = await listen(server)
    log.warning("waiting for the database", error=reason, port=listener.sockets[0].getsockname()[1])
    manager.ready(f"waiting for the database: {reason}")
    try:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS):
                    await stop.wait()
                manager.stopping()
                return False
            try:
                await reach(url)
            except StoreNotReachedError as error:
                placeholder.reason = str(error)
                manager.status(f"waiting for the database: {error}")
            else:
                log.info("the database accepts connections")
                return True
    finally:
        listener.close()
        await server.shutdown(RETRY_SECONDS)


class Placeholder:
    """Answers every request while there is no store, with `reason`."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    async def handle(self, request: web.BaseRequest) -> web.Response:
        match request.path:
            case "/healthz":
                response = web.Response(text="ok\n")
            case "/readyz":
                state = {"ready": False, "store": self.reason, "server": "waiting for the database"}
                response = web.Response(body=msgspec.json.encode(state), status=503, content_type="application/json")
            case _:
                retry = {"Retry-After": str(RETRY_AFTER_SECONDS)}
                response = error_response(str(uuid4()), 503, "503", "the server waits for its database", retry)
        response.force_close()
        return response
