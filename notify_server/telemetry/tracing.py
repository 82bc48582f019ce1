"""Traces for OpenTelemetry: a span for each callback, and one for each request to a host.

Imported only when the environment names a collector (`metrics.tracing_wanted`): it needs the extra `otel`. The SDK
reads its own settings (sampler, batches, headers) from the environment.

A request to a host belongs to the callback that last delivered its batch: to our span of that while it is remembered,
else to its caller's. Spans hold neither the queries of addresses nor headers: they may be secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Self

import structlog
import yarl
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from notify_server.contract.trace_context import TraceParent, parse_traceparent
from notify_server.model import AttemptRow, Delivery, FileResult

log = structlog.get_logger("notify_server")

SERVICE = "notify_server"
# Methods that may name a span (HTTP semantic conventions); others may be invented.
METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
# The number of callbacks whose spans are remembered, for the requests that follow from them.
MAX_CALLBACKS_KEPT = 10_000
# How often the last delivery of a batch is read.
FRESH_SECONDS = 1.0
# Groups of results that wait for export; more are dropped. Between groups the event loop gets its turn.
GROUPS_WAITING = 64
TOGETHER = 16
CATCH_UP_SECONDS = 1.0

# For a batch's id: request_id and traceparent of its latest delivery, None when unknown.
LatestDelivery = Callable[[int], Awaitable[tuple[str, str | None] | None]]


class CallbackSpan:
    """A callback in progress. `trace_id` is lower-case hex."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def accepted(self, delivery: Delivery) -> None:
        """Note the notification's contents."""
        self._span.set_attribute("notify_server.batch_id", delivery.batch_id)
        self._span.set_attribute("notify_server.api_code", delivery.api_code)
        self._span.set_attribute("notify_server.files", delivery.files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the span."""
        self._span.end()

    def answered(self, status: int) -> None:
        """Note the status of the answer."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(Status(StatusCode.ERROR))


class Tracing:
    """Records spans. For the event loop's thread alone; the processor exports in a thread of its own."""

    def __init__(self, processor: SpanProcessor, version: str) -> None:
        named = {"service.name": SERVICE, "service.version": version}
        resource = Resource.create({**named, **OTELResourceDetector().detect().attributes})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(SERVICE, version)
        self._callbacks: OrderedDict[str, SpanContext] = OrderedDict()
        self._results: asyncio.Queue[Sequence[FileResult]] = asyncio.Queue(GROUPS_WAITING)
        # The daemon's deadline for its stop, in the event loop's time.
        self.deadline: float | None = None

    @classmethod
    def to_collector(cls, version: str) -> Tracing:
        """Export in batches to the collector that the environment names, over OTLP/HTTP."""
        return cls(BatchSpanProcessor(OTLPSpanExporter()), version)

    def callback(self, request_id: str, parent: TraceParent | None, method: str, route: str, peer: str) -> CallbackSpan:
        """Start the span of a callback; it lasts until its `end`."""
        known = method in METHODS
        attributes: dict[str, str | int] = {
            "http.request.method": method if known else "_OTHER",
            "http.route": route,
            "url.path": route,
            "network.peer.address": peer,
            "notify_server.request_id": request_id,
        }
        name = f"{method if known else 'HTTP'} {route}"
        context = _context(_remote(parent) if parent is not None else None)
        span = self._tracer.start_span(name, context, SpanKind.SERVER, attributes)
        self._callbacks[request_id] = span.get_span_context()
        if len(self._callbacks) > MAX_CALLBACKS_KEPT:
            self._callbacks.popitem(last=False)
        return CallbackSpan(span)

    def probed(self, results: Sequence[FileResult]) -> None:
        """Queue requests to hosts for export; they are dropped if the exporter cannot keep up."""
        with contextlib.suppress(asyncio.QueueFull):
            self._results.put_nowait(results)

    async def run(self, latest: LatestDelivery) -> None:
        """Export queued requests until cancelled."""
        parents: dict[int, Context] = {}
        asked_at = 0.0
        while True:
            results = await self._results.get()
            if time.monotonic() - asked_at > FRESH_SECONDS:
                parents.clear()
                asked_at = time.monotonic()
            for place, result in enumerate(results):
                batch = result.file.batch
                if batch not in parents:
                    parents[batch] = self._following(await latest(batch))
                self._tell(result, parents[batch])
                if place % TOGETHER == TOGETHER - 1:
                    await asyncio.sleep(0)
            self._results.task_done()

    async def caught_up(self) -> None:
        """Return once `run` has exported everything queued so far, or after CATCH_UP_SECONDS."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CATCH_UP_SECONDS):
                await self._results.join()

    async def close(self, seconds: float) -> None:
        """Export finished spans until the deadline, or for CLOSE_SECONDS without one; a collector that does not answer
        delays nothing longer.
        """
        loop = asyncio.get_running_loop()
        until = self.deadline or loop.time() + seconds
        exported = asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(exported.set)

        # A daemon thread: the interpreter does not wait for it.
        threading.Thread(target=shut_down, name="tracing-shutdown", daemon=True).start()
        try:
            async with asyncio.timeout_at(until):
                await exported.wait()
        except TimeoutError:
            log.warning("traces could not be exported in time, the last ones are lost")

    def _following(self, delivery: tuple[str, str | None] | None) -> Context:
        if delivery is None:
            return _context(None)
        request_id, traceparent = delivery
        own = self._callbacks.get(request_id)
        if own is None and traceparent is not None and (parent := parse_traceparent([traceparent])) is not None:
            own = _remote(parent)
        return _context(own)

    def _tell(self, result: FileResult, parent: Context) -> None:
        for resent, request in enumerate(result.requests):
            # Nanoseconds.
            start = request.started_at * 1_000_000
            span = self._tracer.start_span(
                request.method, parent, SpanKind.CLIENT, _attributes(result, request, resent), start_time=start
            )
            at = start
            for phase, duration_ms in (
                ("dns", request.dns_ms),
                ("connect", request.connect_ms),
                ("tls", request.tls_ms),
                ("first_byte", request.first_byte_ms),
            ):
                if duration_ms is not None:
                    at += round(duration_ms * 1e6)
                    span.add_event(phase, {"duration_ms": duration_ms}, at)
            if request.reason is not None:
                span.set_status(Status(StatusCode.ERROR))
            span.end(start + round(request.total_ms * 1e6))


def _attributes(result: FileResult, request: AttemptRow, resent: int) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "http.request.method": request.method,
        "notify_server.batch": result.file.batch,
        "notify_server.file": result.file.id,
        "notify_server.attempt": result.attempts,
        "notify_server.state": result.state,
    }
    with contextlib.suppress(ValueError):
        url = yarl.URL(request.url or result.file.target_url)
        bare = url.with_user(None).with_query(None).with_fragment(None)
        attributes["url.full"] = f"{bare}?REDACTED" if url.raw_query_string else str(bare)
        attributes["server.address"] = url.host or ""
        attributes["server.port"] = url.port or 0
    if resent:
        attributes["http.request.resend_count"] = resent
    if request.remote_addr is not None:
        attributes["network.peer.address"] = request.remote_addr
    if request.http_status is not None:
        attributes["http.response.status_code"] = request.http_status
    if request.reason is not None:
        attributes["error.type"] = request.reason.removeprefix("http_")
    return attributes


def _remote(parent: TraceParent) -> SpanContext:
    return SpanContext(int(parent.trace_id, 16), int(parent.parent_id, 16), True, TraceFlags(parent.flags))


def _context(parent: SpanContext | None) -> Context:
    return Context() if parent is None else set_span_in_context(NonRecordingSpan(parent), Context())
