"""The decision on a callback: accepted once it is durable, or refused; the same whoever reads the request."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from random import getrandbits
from typing import TYPE_CHECKING

import structlog
from aiohttp import web
from multidict import CIMultiDictProxy
from yarl import URL

from notify_server.callbacks.access import SIGNATURE_MESSAGE, Access
from notify_server.callbacks.errors import RefusedError, busy, error_response, forget_frames
from notify_server.callbacks.response import AckForm, Answer
from notify_server.config import Config
from notify_server.contract import signature, wire
from notify_server.contract.envelope import open_envelope
from notify_server.contract.trace_context import TraceParent, parse_traceparent
from notify_server.errors import (
    ContractError,
    NonceReusedError,
    SignatureError,
    StoreUnavailableError,
)
from notify_server.model import UNSIGNED, Delivery, Rejection
from notify_server.store.base import Store
from notify_server.supervise import log_task_failure
from notify_server.telemetry.metrics import ACCEPTED, Metrics

if TYPE_CHECKING:
    from notify_server.telemetry.tracing import CallbackSpan, Tracing

log = structlog.get_logger("notify_server.web")


DETAIL_LIMIT = 500
# Codings that change the bytes of a body. A name such as "utf-8" in Content-Encoding is a sender's slip.
COMPRESSIONS = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"})
# Bodies that have begun to arrive and are not answered yet may take this much memory, all together.
MAX_UNANSWERED_BYTES = 256 * 1024**2
# A longer number than this is no length, and int() refuses thousands of digits.
MAX_LENGTH_DIGITS = 18


def new_request_id() -> str:
    """Return a UUID (RFC 9562 version 4) without the system call of `uuid.uuid4`: it need not be unguessable."""
    digits = f"{getrandbits(128) & ~(0xF << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def content_length(headers: CIMultiDictProxy[str]) -> int:
    """Return the Content-Length in bytes, 0 without one; a number that is too long counts as very large."""
    text = headers.get("Content-Length", "").strip()
    if not (text.isascii() and text.isdigit()):
        return 0
    digits = text.lstrip("0")
    return int(digits or "0") if len(digits) <= MAX_LENGTH_DIGITS else 10**MAX_LENGTH_DIGITS


class Callback:
    """Decides on each callback. Both clocks give Unix ms; what is signed is checked against `wall`.

    A reader calls `admit` with the head, then `receive` with the body, or `refuse`; `reply` is called once, later.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        metrics: Metrics,
        now: Callable[[], int],
        wall: Callable[[], int],
        tracing: Tracing | None = None,
    ) -> None:
        self._server, self._auth = config.server, config.auth
        self._access = Access(config.server, config.auth, asyncio.get_running_loop().time)
        self._max_files = config.contract.max_files
        self._backlog_limit = config.verify.backlog_limit
        self._store = store
        self._callbacks = metrics.callbacks
        (self._acks,) = metrics.ack_seconds.series.values()
        self._now = now
        self._wall = wall
        self._tracing = tracing
        # Bodies that aiohttp reads and that were not there with their headers.
        self._arriving = 0
        self._arrived = asyncio.Event()
        # Bytes of bodies that have begun to arrive and are not answered yet.
        self._unanswered = 0
        # Bound once: a request pays for its debug line only when it is written.
        self._debug = log.bind().debug
        self._ack = AckForm(config.ack)
        self._refusing: set[asyncio.Task[None]] = set()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request that aiohttp has read, whatever its method."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def reply(given: Answer) -> None:
            if not answer.done():
                answer.set_result(given)

        headers, remote = request.headers, request.remote or ""
        held = 0
        try:
            remote = self.admit(request.method, headers, request.rel_url, remote)
            body = await self._read(request)
            held = len(body)
        except ConnectionError:
            self.hung_up(remote)
            return error_response(new_request_id(), 400, "400", "the body is not complete")
        except RefusedError as refused:
            self.refuse(headers, remote, refused, reply)
        else:
            self.receive(headers, remote, body, reply)
            del body
        try:
            return (await answer).response()
        finally:
            self.release(held)

    def admit(self, method: str, headers: CIMultiDictProxy[str], url: URL, peer: str) -> str:
        """Return the caller's address when nothing in the head is a reason to refuse it before its body is read.

        Raises RefusedError.
        """
        caller = self._access.caller(headers, peer)
        if method != "POST":
            raise RefusedError(405, "405", "only POST is answered here", headers={"Allow": "POST"})
        if not self._server.takes_callbacks:
            raise busy("this server takes no callbacks ([server] roles), send it again to one that does")
        self._access.check(headers, url, caller)
        if self._store.backlog >= self._backlog_limit:
            raise busy("too much is waiting to be verified, send it again later")
        if content_length(headers) > self._server.body_limit_bytes:
            raise self._too_large()
        return caller

    def hold(self, size: int) -> None:
        """Count bytes of a body that has begun to arrive. Raise RefusedError when there are too many altogether."""
        if self._unanswered + size > MAX_UNANSWERED_BYTES:
            raise busy("too many large bodies are arriving, send it again later", close=True)
        self._unanswered += size

    def release(self, size: int) -> None:
        """Give back bytes that `hold` has counted."""
        self._unanswered -= size

    def receive(
        self, headers: CIMultiDictProxy[str], remote: str, body: bytes, reply: Callable[[Answer], object]
    ) -> None:
        """Take a request that has been admitted, with its body; `reply` is called when it is durable, or refused."""
        started = time.perf_counter()
        about, caller = self._about(headers)
        request_id = about["request_id"]
        span = None
        if self._tracing is not None:
            span, reply = self._traced(self._tracing, about, caller, "POST", remote, reply)
        try:
            delivery = self._check(headers, body, request_id, remote, caller)
        except Exception as error:
            self._refuse(about, remote, body, _refusal(about, remote, error), reply)
            return

        def committed(accepted: asyncio.Future[int]) -> None:
            if (error := accepted.exception()) is not None:
                self._refuse(about, remote, body, _refusal(about, remote, error), reply)
                return
            self._acks.observe(time.perf_counter() - started)
            self._callbacks.add(ACCEPTED)
            self._debug("accepted", **about, remote=remote, batch_id=delivery.batch_id, files=delivery.files)
            if span is not None:
                span.accepted(delivery)
            reply(self._ack.answer(request_id))

        asyncio.ensure_future(self._store.accept(delivery)).add_done_callback(committed)

    def refuse(
        self,
        headers: CIMultiDictProxy[str],
        remote: str,
        refused: RefusedError | None,
        reply: Callable[[Answer], object],
        method: str = "POST",
    ) -> None:
        """Refuse a request that has not been admitted, or (None) whose body did not arrive in time."""
        about, caller = self._about(headers)
        if self._tracing is not None:
            _, reply = self._traced(self._tracing, about, caller, method, remote, reply)
        refused = refused or _late()
        forget_frames(refused)
        self._refuse(about, remote, b"", refused, reply)

    def hung_up(self, remote: str) -> None:
        """Note that the caller has hung up half-way through its body."""
        self._debug("hung up", remote=remote)

    def _traced(
        self,
        tracing: Tracing,
        about: dict[str, str],
        caller: TraceParent | None,
        method: str,
        remote: str,
        reply: Callable[[Answer], object],
    ) -> tuple[CallbackSpan, Callable[[Answer], object]]:
        """Start the request's span, which ends with its answer."""
        span = tracing.callback(about["request_id"], caller, method, self._server.callback_path, remote)
        about["trace_id"] = span.trace_id

        def reply_and_end(answer: Answer) -> None:
            span.answered(answer.status)
            span.end()
            reply(answer)

        return span, reply_and_end

    def _about(self, headers: CIMultiDictProxy[str]) -> tuple[dict[str, str], TraceParent | None]:
        """Return the fields of every log line that concerns a request, and the caller's place in a trace."""
        about = {"request_id": new_request_id()}
        caller = None
        if "traceparent" in headers:
            caller = parse_traceparent(headers.getall("traceparent"))
            if caller is not None:
                about["trace_id"] = caller.trace_id
        return about, caller

    def _refuse(
        self,
        about: dict[str, str],
        remote: str,
        body: bytes,
        refused: RefusedError,
        reply: Callable[[Answer], object],
    ) -> None:
        # Where a signature is required, anything that comes before its proof may be anybody's.
        if refused.keep and (refused.proven or self._auth.signature != "required"):
            task = asyncio.create_task(self._keep_and_refuse(about, remote, body, refused, reply), name="refuse")
            self._refusing.add(task)
            task.add_done_callback(self._refusing.discard)
            task.add_done_callback(log_task_failure)
        else:
            # Not at once: pipelined requests would be answered one inside the other.
            asyncio.get_running_loop().call_soon(reply, self._refused(about, remote, refused))

    async def _keep_and_refuse(
        self,
        about: dict[str, str],
        remote: str,
        body: bytes,
        refused: RefusedError,
        reply: Callable[[Answer], object],
    ) -> None:
        detail = refused.message[:DETAIL_LIMIT]
        rejection = Rejection(self._now(), remote, refused.code, detail, body, about["request_id"])
        try:
            await self._store.reject(rejection)
        except StoreUnavailableError as error:
            # Not kept, so the sender must not give it up either.
            log.error("not kept, the store cannot commit", **about, error=str(error))
            refused = busy("the store cannot commit, send it again")
        except Exception as error:
            refused = _failed(about, error)
        reply(self._refused(about, remote, refused))

    def _refused(self, about: dict[str, str], remote: str, refused: RefusedError) -> Answer:
        self._callbacks.add(refused.code)
        # A line for each refusal of a flood would be a flood itself.
        write = self._debug if refused.status == 429 else log.info
        if refused.why:
            about["why"] = refused.why
            write = log.error if refused.status == 503 else log.warning
        write("refused", **about, remote=remote, status=refused.status, detail=refused.message)
        return Answer.of(about["request_id"], refused)

    async def drain(self, seconds: float) -> None:
        """Wait until no body is on its way, but no longer than `seconds`: once aiohttp shuts down it reads nothing
        more, and the request could not be answered."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._arriving:
                    self._arrived.clear()
                    await self._arrived.wait()

    async def _read(self, request: web.BaseRequest) -> bytes:
        if request.content.is_eof():
            return await self._read_bounded(request)
        self._arriving += 1
        try:
            async with asyncio.timeout(self._server.body_timeout):
                return await self._read_bounded(request)
        except TimeoutError:
            raise _late() from None
        finally:
            self._arriving -= 1
            self._arrived.set()

    async def _read_bounded(self, request: web.BaseRequest) -> bytes:
        limit = self._server.body_limit_bytes
        parts: list[bytes] = []
        size = 0
        try:
            while part := await request.content.readany():
                self.hold(len(part))
                size += len(part)
                if size > limit:
                    raise self._too_large()
                parts.append(part)
        except BaseException:
            self.release(size)
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413,
            "413",
            f"body: larger than {self._server.body_limit_bytes} bytes",
            headers={"Connection": "close"},
            keep=True,
        )

    def _check(
        self,
        headers: CIMultiDictProxy[str],
        body: bytes,
        request_id: str,
        remote: str,
        caller: TraceParent | None,
    ) -> Delivery:
        """Return the body as a delivery. Raises RefusedError, ContractError, SignatureError.

        Content-Type is not looked at: the platform's document promises none, and what parses as a notification is one.
        """
        codings = {coding.strip().lower() for coding in headers.get("Content-Encoding", "").split(",")}
        if codings & COMPRESSIONS:
            raise RefusedError(415, "415", "Content-Encoding: send the body as it is, not compressed", keep=True)
        now = self._now()
        nonce = None
        proven_by = UNSIGNED
        envelope = None
        problem = None
        try:
            # Nearly every body is bare; what has a file_list of its own is no envelope.
            notification = wire.parse_notification(body, max_files=self._max_files)
        except ContractError as error:
            # The frames hold the body and, in a variable, the error itself.
            problem = error
            forget_frames(problem)
            envelope = open_envelope(body)
        if self._auth.signature != "off" and (envelope is not None or self._auth.signature == "required"):
            if envelope is None:
                raise SignatureError(signature.SIGNATURE_WRONG, "the body is not signed")
            wall = self._wall()
            window_ms = round(self._auth.timestamp_window * 1000)
            key = signature.verify(envelope, self._auth.platform_keys, now_ms=wall, window_ms=window_ms)
            proven_by = key.fingerprint
            # Never forgotten while its timestamp is good.
            good_ms = envelope.timestamp + window_ms - wall
            expires_at = now + max(math.ceil(self._auth.nonce_ttl * 1000), good_ms)
            nonce = (signature.nonce_key(envelope), expires_at)
        if envelope is not None:
            try:
                notification = wire.parse_notification(envelope.notification, max_files=self._max_files)
                problem = None
            except ContractError as error:
                problem = error
                forget_frames(problem)
        if problem is not None:
            raise RefusedError(400, "400", str(problem), keep=True, proven=proven_by != UNSIGNED) from None
        return Delivery(
            notification.batch_id,
            notification.api_code,
            body,
            len(notification.file_list),
            now,
            remote,
            proven_by,
            request_id,
            nonce,
            caller.text if caller is not None else None,
        )


def _refusal(about: dict[str, str], remote: str, error: BaseException) -> RefusedError:
    """Return how to answer an error. The tracebacks of those that are expected are dropped."""
    if isinstance(error, RefusedError | ContractError | SignatureError | NonceReusedError | StoreUnavailableError):
        forget_frames(error)
    match error:
        case RefusedError():
            return error
        case ContractError():
            # An envelope that cannot be opened.
            return RefusedError(400, "400", str(error), keep=True)
        case SignatureError():
            if error.code == signature.TIMESTAMP_EXPIRED:
                message = "请求时间非法或已过期 timestamp invalid or expired"
                return RefusedError(403, "403001", message, why=str(error))
            return RefusedError(401, "401001", SIGNATURE_MESSAGE, why=str(error))
        case NonceReusedError():
            return RefusedError(403, "403002", "请勿重复请求 duplicate request", why=str(error))
        case StoreUnavailableError():
            return busy("the store cannot commit, send it again", why=str(error))
        case _:
            return _failed(about, error)


def _late() -> RefusedError:
    return RefusedError(408, "408", "the body did not arrive in time", headers={"Connection": "close"})


def _failed(about: dict[str, str], error: BaseException) -> RefusedError:
    log.error("a request failed, please report this", **about, exc_info=error)
    forget_frames(error)
    return RefusedError(500, "500", "系统异常 system error, try again")
