"""The refusals of callbacks, and the one shape of every error answer: the platform's response convention."""

from __future__ import annotations

import msgspec
import structlog
from aiohttp import web

from notify_server.contract import signature
from notify_server.errors import ContractError, NonceReusedError, SignatureError, StoreUnavailableError

log = structlog.get_logger("notify_server.web")

# The same words for every failed check, so that a caller learns nothing about which one it was.
SIGNATURE_MESSAGE = "验证签名失败 signature verification failed"
RETRY_AFTER_SECONDS = 5

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


def busy(message: str, *, close: bool = False, why: str = "") -> RefusedError:
    """Return a 503: the same request may succeed later."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} | ({"Connection": "close"} if close else {})
    return RefusedError(503, "503", message, headers=headers, why=why)


def late() -> RefusedError:
    """Return a 408: the body did not arrive within `body_timeout`."""
    return RefusedError(408, "408", "the body did not arrive in time", headers={"Connection": "close"})


def too_large(limit: int) -> RefusedError:
    """Return a 413: the body is larger than `body_limit_bytes`."""
    close = {"Connection": "close"}
    return RefusedError(413, "413", f"body: larger than {limit} bytes", headers=close, keep=True)


def refusal_of(error: BaseException, about: dict[str, str]) -> RefusedError:
    """Return how to answer an error. Its frames are dropped; an unexpected one is logged with the fields `about`."""
    match error:
        case RefusedError():
            refused = error
        case ContractError():
            # An envelope that cannot be opened.
            refused = RefusedError(400, "400", str(error), keep=True)
        case SignatureError(code=signature.TIMESTAMP_EXPIRED):
            message = "请求时间非法或已过期 timestamp invalid or expired"
            refused = RefusedError(403, "403001", message, why=str(error))
        case SignatureError():
            refused = RefusedError(401, "401001", SIGNATURE_MESSAGE, why=str(error))
        case NonceReusedError():
            refused = RefusedError(403, "403002", "请勿重复请求 duplicate request", why=str(error))
        case StoreUnavailableError():
            refused = busy("the store cannot commit, send it again", why=str(error))
        case _:
            log.error("a request failed, please report this", **about, exc_info=error)
            refused = RefusedError(500, "500", "系统异常 system error, try again")
    forget_frames(error)
    return refused


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
