"""The one shape of every error answer: the platform's response convention."""

from __future__ import annotations

import msgspec
from aiohttp import web

_encode = msgspec.json.Encoder().encode


class RefusedError(Exception):
    """A callback that is not accepted. `keep` tells whether its body is worth keeping in `rejection`, and `proven`
    whether a signature has shown who sent it.
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
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        # Headers are decoded so that what is not UTF-8 comes as surrogates, which neither JSON nor a store can hold.
        self.message = message.encode(errors="backslashreplace").decode()
        self.headers = headers or {}
        self.keep = keep
        self.proven = proven


RETRY_AFTER_SECONDS = 5


def busy(message: str) -> RefusedError:
    """503: the same request may succeed later."""
    return RefusedError(503, "503", message, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def error_response(
    request_id: str, status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> web.Response:
    """`{"request_id", "code", "msg", "data": null}` with an HTTP status that says the same."""
    body = _encode({"request_id": request_id, "code": code, "msg": message, "data": None})
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)
