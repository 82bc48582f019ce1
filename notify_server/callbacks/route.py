"""Adapts requests that aiohttp has read to the handler of callbacks."""

from __future__ import annotations

import asyncio
import contextlib

import structlog
from aiohttp import web

from notify_server.callbacks.aiohttp_parser import length_of
from notify_server.callbacks.errors import RefusedError, forget_frames, too_large
from notify_server.callbacks.handler import Callback, Exchange
from notify_server.callbacks.response import Answer
from notify_server.config import ServerConfig

log = structlog.get_logger("notify_server")


class CallbackRoute:
    """Reads the bodies of callbacks that aiohttp serves, and counts those that are still arriving."""

    def __init__(self, config: ServerConfig, callback: Callback) -> None:
        self.callback = callback
        self._config = config
        self._path = _segments(config.callback_path)
        self._arriving = 0
        self._arrived = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request to the callback path, whatever its method."""
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def reply(answer: Answer) -> None:
            # aiohttp cancels the handler of a caller that is gone.
            if not answered.done():
                answered.set_result(answer)

        digits = request.headers.get("Content-Length", "")
        length = length_of(digits) if digits.isascii() and digits.isdigit() else 0
        exchange, admitted = self.callback.open(
            request.method, request.headers, request.rel_url, length, request.remote or "", reply
        )
        if admitted and not await self._read(request, exchange):
            return web.Response(status=400)
        return (await answered).response()

    def serves(self, path: str) -> bool:
        """Return True for the callback path, also with a slash more or less than configured."""
        return _segments(path) == self._path

    def missed(self, request: web.Request, request_id: str) -> None:
        """Count and log a POST to a path that is not served: perhaps a callback registered with a wrong address."""
        self.callback.count("404")
        log.info(
            "a POST to a path that is not served; callbacks belong at callback_path",
            request_id=request_id,
            path=request.path,
            callback_path=self._config.callback_path,
            remote=request.remote,
        )

    async def drain(self, seconds: float) -> None:
        """Wait until no body is arriving, at most `seconds`: when aiohttp shuts down it stops reading."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._arriving:
                    self._arrived.clear()
                    await self._arrived.wait()

    async def _read(self, request: web.BaseRequest, exchange: Exchange) -> bool:
        """Read the body and hand it over; False when the caller has hung up, and reads no answer."""
        self._arriving += 1
        try:
            async with asyncio.timeout(self._config.body_timeout):
                body = await self._read_bounded(request, exchange)
        except TimeoutError:
            self.callback.late(exchange)
        except RefusedError as refused:
            forget_frames(refused)
            self.callback.refuse(exchange, refused)
        except ConnectionError:
            self.callback.hung_up(exchange)
            return False
        except BaseException:
            self.callback.hung_up(exchange)
            raise
        else:
            if body is not None:
                self.callback.receive(exchange, body)
        finally:
            self._arriving -= 1
            self._arrived.set()
        return True

    async def _read_part(self, request: web.BaseRequest) -> bytes:
        """Return the next part of the body, b"" at its end. Raises RefusedError when it is malformed."""
        try:
            return await request.content.readany()
        except ConnectionError:
            raise
        except Exception as error:
            # The parsers of aiohttp raise errors of several kinds. It would read on to the end of the body, and log
            # the error with its traceback.
            request.content.feed_eof()
            close = {"Connection": "close"}
            raise RefusedError(400, "400", "the body is malformed", headers=close, why=type(error).__name__) from None

    async def _read_bounded(self, request: web.BaseRequest, exchange: Exchange) -> bytes | None:
        """Return the body, or None when it has been refused."""
        limit = self._config.body_limit_bytes
        parts: list[bytes] = []
        size = 0
        while part := await self._read_part(request):
            size += len(part)
            if size > limit:
                self.callback.refuse(exchange, too_large(limit))
                return None
            if not self.callback.hold(exchange, len(part), whole=request.content.is_eof() and not parts):
                return None
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _segments(path: str) -> list[str]:
    return [segment for segment in path.split("/") if segment]
