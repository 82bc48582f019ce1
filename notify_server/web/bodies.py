"""Reads bounded bodies, and writes answers of any length to clients that may be slow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog
from aiohttp import web

from notify_server.callbacks.errors import RefusedError

log = structlog.get_logger("notify_server.web")

# Idle timeout for reading a body and for writing a response.
STALLED_SECONDS = 30.0
MAX_BODY_BYTES = 64 * 1024
HEADERS = {
    "Cache-Control": "no-store",
    # A page of another site must not embed the answer.
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


async def read_body(
    request: web.Request, content_type: str, *, max_bytes: int = MAX_BODY_BYTES, seconds: float | None = None
) -> bytes:
    """Read a body of at most `max_bytes`. Raises RefusedError: 415 for another type, 413, and 408 after `seconds`."""
    if request.content_type != content_type or "Content-Encoding" in request.headers:
        # A page of another site cannot send JSON without a preflight request.
        raise RefusedError(415, "415", f"Content-Type: must be {content_type}")
    body = b""
    try:
        async with asyncio.timeout(STALLED_SECONDS if seconds is None else seconds):
            while part := await request.content.read(max_bytes + 1):
                body += part
                if len(body) > max_bytes:
                    raise RefusedError(413, "413", f"body: larger than {max_bytes} bytes")
    except TimeoutError:
        raise RefusedError(408, "408", "body: did not arrive in time", headers={"Connection": "close"}) from None
    return body


async def begin(request: web.Request, content_type: str, headers: Mapping[str, str]) -> web.StreamResponse:
    """Send the head of a streamed answer."""
    response = web.StreamResponse(headers={"Content-Type": content_type, **HEADERS, **headers})
    await response.prepare(request)
    return response


async def send(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Send a part of the body. Raises ConnectionError when the client is gone or reads nothing."""
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            await response.write(data)
    except TimeoutError:
        log.info("client stalled, disconnected", path=request.path, remote=request.remote)
        abort(request)
        raise ConnectionResetError("the client reads nothing") from None


def abort(request: web.Request) -> None:
    """Break the connection, so that the client does not take a part for the whole answer."""
    if request.transport is not None:
        request.transport.abort()
