"""Plays the object store of the notifications, on loopback."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from aiohttp import web

from notify_server.simulator.answers import RecordedAnswer
from notify_server.simulator.loopback_server import LoopbackServer
from notify_server.simulator.plan import CONTENT_TYPE, LARGEST, Kind, PlantedFile

PIXELS = bytes(LARGEST)


class ObjectStore(LoopbackServer):
    """An object store on loopback that behaves as planned; 404 for unknown objects."""

    def __init__(self, *, slow_seconds: float = 1.0) -> None:
        super().__init__(self._answer)
        self.requests: Counter[str] = Counter()
        self._slow_seconds = slow_seconds
        self._files: dict[str, PlantedFile] = {}

    def plant(self, files: Iterable[PlantedFile]) -> None:
        """Serve these objects from now on."""
        self._files.update((file.key, file) for file in files)

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        key = request.path[1:]
        self.requests[key] += 1
        file = self._files.get(key)
        if file is None:
            return web.Response(status=404)
        if file.answer is not None:
            return _recorded(request, file.answer)
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


def _recorded(request: web.BaseRequest, answer: RecordedAnswer) -> web.Response:
    """Send the recorded answer byte for byte, without the fields that aiohttp would add, and end the connection."""
    if request.transport is not None:
        request.transport.write(answer.reply(request.method).payload(request.method))
        request.transport.close()
    return web.Response()


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
