"""Plays the object store of the notifications, on loopback."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Self

from aiohttp import web

from notify_server.simulator.plan import CONTENT_TYPE, LARGEST, Kind, PlantedFile

PIXELS = bytes(LARGEST)


class ObjectStore:
    """An object store on loopback that behaves as planned; 404 for unknown objects. Use it as an async context
    manager.
    """

    def __init__(self, *, slow_seconds: float = 1.0) -> None:
        self.requests: Counter[str] = Counter()
        self._slow_seconds = slow_seconds
        self._files: dict[str, PlantedFile] = {}
        # A plain server without an application's routing and middleware: it must not be the bottleneck of a run.
        self._runner = web.ServerRunner(web.Server(self._answer, access_log=None), shutdown_timeout=1.0)

    def plant(self, files: Iterable[PlantedFile]) -> None:
        """Serve these objects from now on."""
        self._files.update((file.key, file) for file in files)

    async def start(self) -> None:
        """Listen on a free port of 127.0.0.1."""
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024).start()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def address(self) -> str:
        """Return the address to which an object's key is appended. There is none before the start."""
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}/"

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        key = request.path[1:]
        self.requests[key] += 1
        file = self._files.get(key)
        if file is None:
            return web.Response(status=404)
        match file.kind:
            case Kind.SLOW:
                await asyncio.sleep(self._slow_seconds)
            case Kind.MISSING:
                return web.Response(status=file.status)
            case Kind.FAILS_FIRST if self.requests[key] <= file.failures:
                return web.Response(status=file.status)
            case Kind.REFUSES_HEAD if request.method == "HEAD":
                return web.Response(status=file.status)
        return _object(request, file)


def _object(request: web.BaseRequest, file: PlantedFile) -> web.Response:
    """Return the object, or the requested range of it (RFC 9110 14.2: in answer to GET only)."""
    headers = {
        "Content-Type": CONTENT_TYPE,
        "ETag": f'"{file.key[-8:]}-{file.size:x}"',
        "Last-Modified": "Thu, 30 Dec 2021 08:10:07 GMT",
        "Accept-Ranges": "bytes",
    }
    if request.method == "HEAD":
        return web.Response(headers=headers | {"Content-Length": str(file.size)})
    if "Range" not in request.headers:
        return web.Response(headers=headers, body=PIXELS[: file.size])
    try:
        span = range(file.size)[request.http_range]
    except ValueError:
        span = range(0)
    if not span:
        return web.Response(status=416, headers={"Content-Range": f"bytes */{file.size}"})
    headers["Content-Range"] = f"bytes {span[0]}-{span[-1]}/{file.size}"
    return web.Response(status=206, headers=headers, body=PIXELS[: len(span)])
