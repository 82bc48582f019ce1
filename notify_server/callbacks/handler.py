"""The callback endpoint: who asks, what they send, and an answer once it is durable."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import ip_address
from random import getrandbits
from typing import TYPE_CHECKING

import structlog
from aiohttp import web
from multidict import CIMultiDictProxy
from yarl import URL

from notify_server.callbacks.errors import RefusedError, busy, error_response
from notify_server.callbacks.rate_limit import RateLimit, source_of
from notify_server.callbacks.response import AckForm, Answer
from notify_server.config import Config, IPNetwork
from notify_server.contract import signature, wire
from notify_server.contract.envelope import open_envelope
from notify_server.contract.trace_context import TraceParent, parse_traceparent
from notify_server.errors import (
    ContractError,
    NonceReusedError,
    SignatureError,
    StoreUnavailableError,
)
from notify_server.model import Delivery, Rejection
from notify_server.store.base import Store
from notify_server.supervise import log_task_failure
from notify_server.telemetry.metrics import ACCEPTED, Metrics

if TYPE_CHECKING:
    from notify_server.telemetry.tracing import CallbackSpan, Tracing

log = structlog.get_logger("notify_server.web")

UNSIGNED = "none"
# The same words for every failed check, so that a caller learns nothing about which one it was.
SIGNATURE_MESSAGE = "验证签名失败 signature verification failed"
DETAIL_LIMIT = 500
# A flood is told of once in so long.
LOUD_SECONDS = 60.0


def new_request_id() -> str:
    """A UUID (RFC 9562 version 4). It need not be unguessable, so it is spared the system call of `uuid.uuid4`."""
    digits = f"{getrandbits(128) & ~(0xF << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def within(address: str, networks: Sequence[IPNetwork]) -> bool:
    """Whether the text of an address, IPv4-mapped or not, lies in one of the networks."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if parsed.version == 6 else None
    return any(parsed in network or (mapped is not None and mapped in network) for network in networks)


def client_address(peer: str, forwarded_for: Sequence[str], trusted: Sequence[IPNetwork]) -> str:
    """Who called: the peer, or the last address in X-Forwarded-For that no trusted proxy stands behind.

    `forwarded_for` has the field's lines in order. A proxy appends the address that called it, so the list is believed
    from its end, as far as the addresses are trusted proxies; the first other one is the caller, and all before it is
    what that caller claims.
    """
    if not trusted or not within(peer, trusted):
        return peer
    address = peer
    for entry in reversed([part.strip() for line in forwarded_for for part in line.split(",")]):
        try:
            # A zone says nothing away from its own machine, and may hold anything.
            address = str(ip_address(entry.strip("[]").partition("%")[0]))
        except ValueError:
            break
        if not within(address, trusted):
            break
    return address


@lru_cache(256)
def _is_json(content_type: str) -> bool:
    """Whether a Content-Type allows for JSON in UTF-8 (RFC 8259 8.1). A missing one does."""
    media_type, *parameters = [part.strip().lower() for part in content_type.split(";")]
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8", "us-ascii"):
            return False
    return media_type in ("", "application/json", "text/json") or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )


class Callback:
    """The handler of the callback path. Both clocks give Unix ms; what is signed is checked against `wall`."""

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
        self._max_files = config.contract.max_files
        self._backlog_limit = config.verify.backlog_limit
        self._store = store
        self._callbacks = metrics.callbacks
        (self._acks,) = metrics.ack_seconds.series.values()
        self._rate_limit = RateLimit(self._server.rate_limit) if self._server.rate_limit else None
        self._loud_at = 0.0
        self._now = now
        self._wall = wall
        self._tracing = tracing
        # Bodies that were not there with their headers, and are being waited for.
        self._arriving = 0
        self._arrived = asyncio.Event()
        # Bound once: a request pays for its line of debug only when it is written.
        self._debug = log.bind().debug
        self._token = config.auth.callback_token.get_secret_value().encode() if config.auth.callback_token else None
        self._ack = AckForm(config.ack)
        self._refusing: set[asyncio.Task[None]] = set()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request to the callback path, whatever its method."""
        about, caller = self._about(request.headers)
        if self._tracing is None:
            return await self._answer(request, about, caller, None)
        path = self._server.callback_path
        with self._tracing.callback(about["request_id"], caller, request.method, path, request.remote or "") as span:
            about["trace_id"] = span.trace_id
            response = await self._answer(request, about, caller, span)
            span.answered(response.status)
            return response

    async def _answer(
        self, request: web.BaseRequest, about: dict[str, str], caller: TraceParent | None, span: CallbackSpan | None
    ) -> web.StreamResponse:
        started = time.perf_counter()
        body = b""
        remote = request.remote or ""
        try:
            remote = self.admit(request.method, request.headers, request.rel_url, remote)
            body = await self._read(request)
            delivery = self._check(request.headers, body, about["request_id"], remote, caller)
            await self._store.accept(delivery)
        except ConnectionError:
            # Nobody reads this.
            self.hung_up(remote)
            return error_response(about["request_id"], 400, "400", "the body is not complete")
        except Exception as error:
            return await self._refuse(about, remote, body, error)
        self._accepted(about, remote, delivery, started)
        if span is not None:
            span.accepted(delivery)
        return self._ack.response(about["request_id"])

    def receive(
        self, headers: CIMultiDictProxy[str], remote: str, body: bytes, reply: Callable[[Answer], object]
    ) -> None:
        """Take a request that has been admitted, once its body is there; `reply` is called when it is durable, or
        refused.
        """
        started = time.perf_counter()
        about, caller = self._about(headers)
        request_id = about["request_id"]
        try:
            delivery = self._check(headers, body, request_id, remote, caller)
        except Exception as error:
            self._refuse_later(about, remote, body, error, reply)
            return

        def committed(accepted: asyncio.Future[int]) -> None:
            if (error := accepted.exception()) is not None:
                self._refuse_later(about, remote, body, error, reply)
            else:
                self._accepted(about, remote, delivery, started)
                reply(self._ack.answer(request_id))

        asyncio.ensure_future(self._store.accept(delivery)).add_done_callback(committed)

    def refuse(
        self,
        headers: CIMultiDictProxy[str],
        remote: str,
        refused: RefusedError | None,
        reply: Callable[[Answer], object],
    ) -> None:
        """Refuse a request that has not been admitted, or (None) whose body is not there in time."""
        about, _ = self._about(headers)
        self._refuse_later(about, remote, b"", refused or _late(), reply)

    def hung_up(self, remote: str) -> None:
        """The caller has hung up half-way through its body."""
        self._debug("hung up", remote=remote)

    def _about(self, headers: CIMultiDictProxy[str]) -> tuple[dict[str, str], TraceParent | None]:
        """What every line of the log has that concerns a request, and the caller's place in a trace."""
        about = {"request_id": new_request_id()}
        caller = None
        if "traceparent" in headers:
            caller = parse_traceparent(headers.getall("traceparent"))
            if caller is not None:
                about["trace_id"] = caller.trace_id
        return about, caller

    def _accepted(self, about: dict[str, str], remote: str, delivery: Delivery, started: float) -> None:
        self._acks.observe(time.perf_counter() - started)
        self._callbacks.add(ACCEPTED)
        self._debug("accepted", **about, remote=remote, batch_id=delivery.batch_id, files=delivery.files)

    def _refuse_later(
        self,
        about: dict[str, str],
        remote: str,
        body: bytes,
        error: BaseException,
        reply: Callable[[Answer], object],
    ) -> None:
        async def refuse() -> None:
            reply(Answer.of(await self._refuse(about, remote, body, error)))

        task = asyncio.create_task(refuse(), name="refuse")
        self._refusing.add(task)
        task.add_done_callback(self._refusing.discard)
        task.add_done_callback(log_task_failure)

    async def drain(self, seconds: float) -> None:
        """Wait until no body is on its way, but no longer than `seconds`: once aiohttp shuts down it reads nothing
        more, and the request could not be answered."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._arriving:
                    self._arrived.clear()
                    await self._arrived.wait()

    def admit(self, method: str, headers: CIMultiDictProxy[str], url: URL, peer: str) -> str:
        """The caller's address, when nothing of the head is a reason to refuse it before its body is read.

        Raises RefusedError. Only a request that is admitted counts for the rate limit.
        """
        server, auth = self._server, self._auth
        if server.trusted_proxies:
            peer = client_address(peer, headers.getall("X-Forwarded-For", ()), server.trusted_proxies)
        if self._rate_limit is not None:
            self._check_rate(self._rate_limit, peer)
        if method != "POST":
            raise RefusedError(405, "405", "only POST is answered here", headers={"Allow": "POST"})
        if not server.takes_callbacks:
            raise busy("this server takes no callbacks ([server] roles), send it again to one that does")
        if auth.callback_networks and not within(peer, auth.callback_networks):
            raise RefusedError(403, "401002", "无权限访问当前接口 not permitted from this address")
        if self._token is not None and not hmac.compare_digest(_token_of(headers, url), self._token):
            raise RefusedError(401, "401001", SIGNATURE_MESSAGE)
        if self._store.backlog >= self._backlog_limit:
            raise busy("too much is waiting to be verified, send it again later")
        if int(headers.get("Content-Length", 0)) > server.body_limit_bytes:
            raise self._too_large()
        return peer

    def _check_rate(self, limit: RateLimit, peer: str) -> None:
        now = asyncio.get_running_loop().time()
        if not (wait := limit.wait(source_of(peer), now)):
            return
        if now >= self._loud_at:
            self._loud_at = now + LOUD_SECONDS
            log.warning("callbacks beyond [server] rate_limit are answered 429", remote=peer)
        retry_after = {"Retry-After": str(math.ceil(wait))}
        raise RefusedError(429, "429", "请求过于频繁 too many requests, send it again later", headers=retry_after)

    async def _read(self, request: web.BaseRequest) -> bytes:
        if "Content-Encoding" in request.headers:
            raise RefusedError(415, "415", "Content-Encoding: send the body as it is, not compressed")
        if request.content.is_eof():
            body = await self._read_bounded(request)
        else:
            self._arriving += 1
            try:
                async with asyncio.timeout(self._server.body_timeout):
                    body = await self._read_bounded(request)
            except TimeoutError:
                raise _late() from None
            finally:
                self._arriving -= 1
                self._arrived.set()
        return body

    async def _read_bounded(self, request: web.BaseRequest) -> bytes:
        limit = self._server.body_limit_bytes
        parts: list[bytes] = []
        size = 0
        while part := await request.content.readany():
            size += len(part)
            if size > limit:
                raise self._too_large()
            parts.append(part)
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
        """The body as a delivery. Raises RefusedError, ContractError, SignatureError."""
        if not _is_json(content_type := headers.get("Content-Type", "")):
            raise RefusedError(
                415, "415", f"Content-Type: must be application/json, not {content_type[:80]}", keep=True
            )
        now = self._now()
        nonce = None
        proven_by = UNSIGNED
        envelope = None
        problem = None
        try:
            # Nearly every body is bare; what has a file_list of its own is no envelope.
            notification = wire.parse_notification(body, max_files=self._max_files)
        except ContractError as error:
            problem = error
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
        if problem is not None:
            raise RefusedError(400, "400", str(problem), keep=True, proven=proven_by != UNSIGNED) from problem
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

    async def _refuse(self, about: dict[str, str], remote: str, body: bytes, error: BaseException) -> web.Response:
        request_id = about["request_id"]
        refused = _refusal(about, remote, error)
        # Where a signature is required, whatever comes before its proof may be anybody's.
        if refused.keep and (refused.proven or self._auth.signature != "required"):
            detail = refused.message[:DETAIL_LIMIT]
            try:
                await self._store.reject(Rejection(self._now(), remote, refused.code, detail, body, request_id))
            except StoreUnavailableError as error:
                # Not kept, so not to be given up by the sender either.
                log.error("not kept, the store cannot commit", **about, error=str(error))
                refused = busy("the store cannot commit, send it again")
            except Exception as error:
                refused = _failed(about, error)
        self._callbacks.add(refused.code)
        # One of a flood that is kept out is no news.
        tell = self._debug if refused.status == 429 else log.info
        tell("refused", **about, remote=remote, status=refused.status, detail=refused.message)
        return error_response(request_id, refused.status, refused.code, refused.message, refused.headers)


def _refusal(about: dict[str, str], remote: str, error: BaseException) -> RefusedError:
    """How to answer what went wrong; what the operator has to know of it is logged."""
    match error:
        case RefusedError():
            return error
        case ContractError():
            # An envelope that cannot be opened.
            return RefusedError(400, "400", str(error), keep=True)
        case SignatureError():
            log.warning("signature refused", **about, remote=remote, error=str(error))
            if error.code == signature.TIMESTAMP_EXPIRED:
                return RefusedError(403, "403001", "请求时间非法或已过期 timestamp invalid or expired")
            return RefusedError(401, "401001", SIGNATURE_MESSAGE)
        case NonceReusedError():
            log.warning("nonce refused", **about, remote=remote, error=str(error))
            return RefusedError(403, "403002", "请勿重复请求 duplicate request")
        case StoreUnavailableError():
            log.error("not accepted, the store cannot commit", **about, error=str(error))
            return busy("the store cannot commit, send it again")
        case _:
            return _failed(about, error)


def _late() -> RefusedError:
    return RefusedError(408, "408", "the body did not arrive in time", headers={"Connection": "close"})


def _failed(about: dict[str, str], error: BaseException) -> RefusedError:
    log.error("a request failed, please report this", **about, exc_info=error)
    return RefusedError(500, "500", "系统异常 system error, try again")


def _token_of(headers: CIMultiDictProxy[str], url: URL) -> bytes:
    scheme, _, credentials = headers.get("Authorization", "").partition(" ")
    presented = credentials.strip() if scheme.lower() == "bearer" else url.query.get("token", "")
    return presented.encode("utf-8", "surrogatepass")
