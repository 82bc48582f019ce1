"""Decides about every callback, whichever reader brings it: admission, checks, the durable commit, the answer.

A reader opens an `Exchange` with the head of a request, hands over the body when all of it is there, and is called back
with the answer. `connection.py` reads most callbacks; `route.py` adapts aiohttp's requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from random import getrandbits
from typing import TYPE_CHECKING

import structlog
from yarl import URL

from notify_server.callbacks.access import Access, Headers
from notify_server.callbacks.budget import Budget
from notify_server.callbacks.delivery import DeliveryReader
from notify_server.callbacks.errors import RefusedError, busy, forget_frames, late, refusal_of, too_large
from notify_server.callbacks.response import AckForm, Answer
from notify_server.config import Config
from notify_server.contract.probe_body import Seen, genuine_check, proof
from notify_server.contract.trace_context import TraceParent, parse_traceparent
from notify_server.model import Delivery, Rejection
from notify_server.store.base import Store
from notify_server.supervise import log_task_failure
from notify_server.telemetry.metrics import ACCEPTED, Metrics

if TYPE_CHECKING:
    from notify_server.telemetry.tracing import CallbackSpan, Tracing

log = structlog.get_logger("notify_server.web")

DETAIL_LIMIT = 500

Reply = Callable[[Answer], object]


def new_request_id() -> str:
    """Return a UUID (RFC 9562 version 4) without the system call of `uuid.uuid4`: it need not be unguessable."""
    digits = f"{getrandbits(128) & ~(0xF << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


class Exchange:
    """One request to the callback path, from its head to its answer.

    `about` has the fields that every log line about the request carries; `held` counts its bytes in the budget.
    """

    __slots__ = ("about", "caller", "headers", "held", "parent", "reply", "span", "started")

    def __init__(self, headers: Headers, peer: str, reply: Reply) -> None:
        self.about = {"request_id": new_request_id()}
        self.headers = headers
        self.caller = peer
        self.reply = reply
        self.parent: TraceParent | None = None
        self.span: CallbackSpan | None = None
        self.held = 0
        self.started = 0.0


class Callback:
    """Answers callbacks. Both clocks give Unix ms; timestamps of signatures are checked against `wall`.

    An exchange that `open` has admitted is ended by one of `receive`, `refuse`, `late` and `hung_up`. Its `reply` is
    called once, later and never from within these calls.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        metrics: Metrics,
        now: Callable[[], int],
        wall: Callable[[], int],
        tracing: Tracing | None = None,
        admin_token: bytes | None = None,
    ) -> None:
        self._admin_token, self._wall = admin_token, wall
        self._server, self._auth = config.server, config.auth
        self._loop = asyncio.get_running_loop()
        self._access = Access(config.server, config.auth, self._loop.time)
        self._reader = DeliveryReader(config, now, wall)
        self._backlog_limit = config.verify.backlog_limit
        self._store = store
        self._callbacks = metrics.callbacks
        (self._acks,) = metrics.ack_seconds.series.values()
        self._now = now
        self._tracing = tracing
        # Bound once: a request pays for its debug line only when it is written.
        self._debug = log.bind().debug
        self._ack = AckForm(config.ack)
        self._refusing: set[asyncio.Task[None]] = set()
        self.budget = Budget()

    def open(
        self, method: str, headers: Headers, url: URL, length: int, peer: str, reply: Reply
    ) -> tuple[Exchange, bool]:
        """Begin an exchange with the head of a request. `length` is the size of its body in bytes, 0 if unknown. Return
        False if the head alone is a reason to refuse the request; the refusal is then sent. The rate limit counts each
        request once, here.
        """
        exchange = Exchange(headers, peer, reply)
        if "traceparent" in headers:
            exchange.parent = parse_traceparent(headers.getall("traceparent"))
            if exchange.parent is not None:
                exchange.about["trace_id"] = exchange.parent.trace_id
        if self._tracing is not None:
            path, request_id = self._server.callback_path, exchange.about["request_id"]
            exchange.span = self._tracing.callback(request_id, exchange.parent, method, path, peer)
            exchange.about["trace_id"] = exchange.span.trace_id
        try:
            self._admit(method, exchange, url, length, peer)
        except RefusedError as refused:
            forget_frames(refused)
            self.refuse(exchange, refused)
            return exchange, False
        return exchange, True

    def hold(self, exchange: Exchange, size: int, *, whole: bool) -> bool:
        """Count bytes of a body, or a `whole` one, against the budget of all callers; False when there is no room, and
        it is refused.
        """
        if not self.budget.take(size, whole=whole):
            self.refuse(exchange, busy("too many large bodies are arriving, send it again later", close=True))
            return False
        exchange.held += size
        return True

    def receive(self, exchange: Exchange, body: bytes) -> None:
        """Take the whole body of an admitted request, and answer once it is durable or refused."""
        exchange.started = time.perf_counter()
        request_id = exchange.about["request_id"]
        try:
            delivery = self._reader.read(exchange.headers, body, request_id, exchange.caller, exchange.parent)
        except Exception as error:
            if not self._answer_check(exchange, body):
                self.refuse(exchange, refusal_of(error, exchange.about), body)
            return
        accepted = asyncio.ensure_future(self._store.accept(delivery))
        accepted.add_done_callback(partial(self._committed, exchange, delivery))

    def refuse(self, exchange: Exchange, refused: RefusedError, body: bytes = b"") -> None:
        """Answer with a refusal; a body worth keeping is kept first."""
        # If a signature is required, a body that is refused before it is verified may come from any sender.
        if refused.keep and (refused.proven or self._auth.signature != "required"):
            task = asyncio.create_task(self._keep(exchange, refused, body), name="keep a refused body")
            self._refusing.add(task)
            task.add_done_callback(self._refusing.discard)
            task.add_done_callback(log_task_failure)
        else:
            self._loop.call_soon(self._answer_refusal, exchange, refused)

    def late(self, exchange: Exchange) -> None:
        """Refuse a request whose body did not arrive within `body_timeout`."""
        self.refuse(exchange, late())

    def hung_up(self, exchange: Exchange) -> None:
        """End the exchange of a caller that hung up before the end of its body."""
        self._release(exchange)
        self._debug("hung up", remote=exchange.caller)
        if exchange.span is not None:
            exchange.span.end()

    def count(self, code: str) -> None:
        """Count an answer that is given elsewhere."""
        self._callbacks.add(code)

    def _admit(self, method: str, exchange: Exchange, url: URL, length: int, peer: str) -> None:
        """Raise RefusedError if the head is a reason to refuse the request before its body is read."""
        server, headers = self._server, exchange.headers
        caller = exchange.caller = self._access.caller(headers, peer)
        if method != "POST":
            raise RefusedError(405, "405", "only POST is answered here", headers={"Allow": "POST"})
        if not server.takes_callbacks:
            raise busy("this server takes no callbacks ([server] roles), send it again to one that does")
        self._access.check(headers, url, caller)
        if self._store.backlog >= self._backlog_limit:
            raise busy("too much is waiting to be verified, send it again later")
        if length > server.body_limit_bytes:
            raise too_large(server.body_limit_bytes)

    def _answer_check(self, exchange: Exchange, body: bytes) -> bool:
        """Answer a check of `doctor --from` with what this server saw of it; False for any other body. Only bodies that
        are no notification come here, so notifications do not pay for it.
        """
        if self._admin_token is None or (check := genuine_check(body, self._admin_token, self._wall())) is None:
            return False
        headers = exchange.headers
        forwarded_for, forwarded = (", ".join(headers.getall(name, ())) for name in ("X-Forwarded-For", "Forwarded"))
        seen = Seen(
            proof(self._admin_token, check.nonce),
            exchange.caller,
            forwarded_for,
            forwarded,
            headers.get("X-Forwarded-Proto", ""),
        )
        log.info("answered a check by doctor", **exchange.about, remote=exchange.caller)
        self._loop.call_soon(self._answer, exchange, Answer.with_data(exchange.about["request_id"], seen))
        return True

    def _committed(self, exchange: Exchange, delivery: Delivery, accepted: asyncio.Future[int]) -> None:
        if (error := accepted.exception()) is not None:
            self.refuse(exchange, refusal_of(error, exchange.about), delivery.body)
            return
        about = exchange.about
        self._acks.observe(time.perf_counter() - exchange.started)
        self._callbacks.add(ACCEPTED)
        self._debug("accepted", **about, remote=exchange.caller, batch_id=delivery.batch_id, files=delivery.files)
        if exchange.span is not None:
            exchange.span.accepted(delivery)
        self._answer(exchange, self._ack.answer(about["request_id"]))

    async def _keep(self, exchange: Exchange, refused: RefusedError, body: bytes) -> None:
        detail = refused.message[:DETAIL_LIMIT]
        request_id = exchange.about["request_id"]
        rejection = Rejection(self._now(), exchange.caller, refused.code, detail, body, request_id)
        try:
            await self._store.reject(rejection)
        except Exception as error:
            # It was not kept, so the sender has to send it again.
            refused = refusal_of(error, exchange.about)
        self._answer_refusal(exchange, refused)

    def _answer_refusal(self, exchange: Exchange, refused: RefusedError) -> None:
        self._callbacks.add(refused.code)
        about = exchange.about
        # A line for each refusal of a flood would be a flood itself.
        write = self._debug if refused.status == 429 else log.info
        if refused.why:
            about["why"] = refused.why
            write = log.error if refused.status == 503 else log.warning
        write("refused", **about, remote=exchange.caller, status=refused.status, detail=refused.message)
        self._answer(exchange, Answer.of(about["request_id"], refused))

    def _answer(self, exchange: Exchange, answer: Answer) -> None:
        self._release(exchange)
        if exchange.span is not None:
            exchange.span.answered(answer.status)
            exchange.span.end()
        exchange.reply(answer)

    def _release(self, exchange: Exchange) -> None:
        self.budget.give_back(exchange.held)
        exchange.held = 0
