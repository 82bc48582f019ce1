"""The one shape of every error answer: the platform's response convention."""

from __future__ import annotations

import msgspec
from aiohttp import web

_encode = msgspec.json.Encoder().encode


class RefusedError(Exception):
    """A callback that is not accepted. `keep` says whether its body is kept in `rejection`, `proven` whether a
    signature has proven its sender, and `why` is for the operator, not for the sender.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        headers: dict[str, str] | None = None,
        keep: bool = False,
        proven: bool = False,
        why: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        # Headers are decoded with surrogates for bytes that are not UTF-8, which neither JSON nor a store can hold.
        self.message = message.encode(errors="backslashreplace").decode()
        self.headers = headers or {}
        self.keep = keep
        self.proven = proven
        self.why = why


RETRY_AFTER_SECONDS = 5


def busy(message: str, *, close: bool = False, why: str = "") -> RefusedError:
    """Return a 503: the same request may succeed later."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} | ({"Connection": "close"} if close else {})
    return RefusedError(503, "503", message, headers=headers, why=why)


def error_body(request_id: str, code: str, message: str) -> bytes:
    """Return `{"request_id", "code", "msg", "data": null}` as JSON."""
    return _encode({"request_id": request_id, "code": code, "msg": message, "data": None})


def forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of an exception and of those that led to it.

    They hold the frames that it passed through, and with them the request's body; where such a frame has the exception
    in a variable the two keep each other alive until the garbage collector comes, which it rarely does here.
    """
    pending = [error]
    while pending:
        if (found := pending.pop()) is not None:
            found.__traceback__ = None
            pending += [found.__cause__, found.__context__]


def error_response(
    request_id: str, status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> web.Response:
    """Return `{"request_id", "code", "msg", "data": null}` with the corresponding HTTP status."""
    body = error_body(request_id, code, message)
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)
