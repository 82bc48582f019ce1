"""Spans as the SDK gets to see them: which there are, what they hang on, what they tell, and what they keep to
themselves."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from notify_server.contract.trace_context import TraceParent, parse_traceparent
from notify_server.model import AttemptRow, Delivery, DueFile, FileResult, FileState
from notify_server.telemetry import tracing
from notify_server.telemetry.metrics import tracing_wanted
from notify_server.telemetry.tracing import Tracing

AT = 1_760_000_000_000
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traces(exporter: InMemorySpanExporter, plain: None) -> Iterator[Tracing]:
    yield Tracing(SimpleSpanProcessor(exporter), "1.2.3")


def parent(header: str = HEADER) -> TraceParent:
    read = parse_traceparent([header])
    assert read is not None
    return read


def request(method: str = "HEAD", **changes: object) -> AttemptRow:
    fields: dict[str, object] = {
        "started_at": AT,
        "method": method,
        "url": None,
        "http_status": 200,
        "reason": None,
        "dns_ms": 1.0,
        "connect_ms": 2.0,
        "tls_ms": None,
        "first_byte_ms": 4.0,
        "total_ms": 8.0,
        "remote_addr": "198.18.0.9",
    }
    return AttemptRow(**fields | changes)  # type: ignore[arg-type]


def result(*requests: AttemptRow, batch: int = 3, url: str = "https://files.example.com/a/b.jpg") -> FileResult:
    nothing = (None,) * 8
    file = DueFile(5, batch, "files.example.com", url, 0)
    return FileResult(file, FileState.AVAILABLE, None, 1, *nothing, 8.0, AT, requests)


async def tell(
    traces: Tracing, *results: FileResult, latest: Mapping[int, tuple[str, str | None]] | None = None
) -> list[int]:
    """Report the results; return the batches that were looked up."""
    asked = []

    async def find(batch: int) -> tuple[str, str | None] | None:
        asked.append(batch)
        return (latest or {}).get(batch)

    traces.probed(results)
    task = asyncio.create_task(traces.run(find))
    await traces.caught_up()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return asked


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def test_a_callback_is_a_server_span_that_hangs_on_its_callers(traces: Tracing, exporter: InMemorySpanExporter) -> None:
    with traces.callback("request-1", parent(), "POST", "/notify", "198.18.0.1") as callback:
        callback.accepted(Delivery("b1", "code", b"{}", 7, AT, "198.18.0.1", "none", "request-1"))
        callback.answered(200)
    assert callback.trace_id == TRACE
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.kind, trace_of(span)) == ("POST /notify", SpanKind.SERVER, TRACE)
    assert span.parent is not None
    assert (f"{span.parent.span_id:016x}", span.parent.is_remote) == (PARENT, True)
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/notify",
        "url.path": "/notify",
        "http.response.status_code": 200,
        "network.peer.address": "198.18.0.1",
        "notify_server.request_id": "request-1",
        "notify_server.batch_id": "b1",
        "notify_server.api_code": "code",
        "notify_server.files": 7,
    }
    assert span.status.status_code is StatusCode.UNSET
    assert span.resource.attributes["service.name"] == "notify_server"
    assert span.resource.attributes["service.version"] == "1.2.3"


@pytest.mark.parametrize(("status", "is_error"), [(400, False), (429, False), (500, True), (503, True)])
def test_only_faults_of_this_server_are_errors(
    traces: Tracing, exporter: InMemorySpanExporter, status: int, is_error: bool
) -> None:
    with traces.callback("request-1", None, "POST", "/notify", "") as callback:
        callback.answered(status)
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    assert (span.status.status_code is StatusCode.ERROR) == is_error
    assert (span.attributes or {}).get("error.type") == (str(status) if is_error else None)


def test_a_method_that_a_stranger_made_up_names_no_span(traces: Tracing, exporter: InMemorySpanExporter) -> None:
    with traces.callback("request-1", None, "BREW", "/notify", ""):
        pass
    (span,) = exporter.get_finished_spans()
    assert span.name == "HTTP /notify"
    assert (span.attributes or {})["http.request.method"] == "_OTHER"


def test_a_callback_that_is_cut_off_has_its_span_all_the_same(traces: Tracing, exporter: InMemorySpanExporter) -> None:
    with (
        pytest.raises(asyncio.CancelledError),
        traces.callback("request-1", None, "POST", "/notify", ""),
    ):
        raise asyncio.CancelledError
    assert len(exporter.get_finished_spans()) == 1


def test_a_caller_that_does_not_sample_is_followed(traces: Tracing, exporter: InMemorySpanExporter) -> None:
    with traces.callback("request-1", parent(HEADER[:-1] + "0"), "POST", "/notify", "") as callback:
        callback.answered(200)
    assert callback.trace_id == TRACE
    assert exporter.get_finished_spans() == ()


async def test_a_request_to_a_host_is_a_client_span_with_its_phases(
    traces: Tracing, exporter: InMemorySpanExporter
) -> None:
    await tell(traces, result(request()))
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.kind, span.parent) == ("HEAD", SpanKind.CLIENT, None)
    start = AT * 1_000_000
    assert (span.start_time, span.end_time) == (start, start + 8_000_000)
    assert [(event.name, event.timestamp - start) for event in span.events] == [
        ("dns", 1_000_000),
        ("connect", 3_000_000),
        ("first_byte", 7_000_000),
    ]
    assert dict(span.attributes or {}) == {
        "http.request.method": "HEAD",
        "url.full": "https://files.example.com/a/b.jpg",
        "server.address": "files.example.com",
        "server.port": 443,
        "network.peer.address": "198.18.0.9",
        "http.response.status_code": 200,
        "notify_server.batch": 3,
        "notify_server.file": 5,
        "notify_server.attempt": 1,
        "notify_server.state": "available",
    }
    assert span.status.status_code is StatusCode.UNSET


async def test_each_request_of_an_attempt_has_a_span_and_failures_their_reason(
    traces: Tracing, exporter: InMemorySpanExporter
) -> None:
    refused = request(http_status=403, reason="http_403")
    gone = request("GET", url="http://cdn.example.com:8080/x", http_status=None, reason="timeout", remote_addr=None)
    await tell(traces, result(refused, gone))
    head, get = exporter.get_finished_spans()
    assert head.attributes is not None
    assert get.attributes is not None
    assert (head.attributes["error.type"], head.status.status_code) == ("403", StatusCode.ERROR)
    assert "http.request.resend_count" not in head.attributes
    assert (get.attributes["error.type"], get.attributes["http.request.resend_count"]) == ("timeout", 1)
    assert (get.attributes["server.address"], get.attributes["server.port"]) == ("cdn.example.com", 8080)
    assert "http.response.status_code" not in get.attributes
    assert "network.peer.address" not in get.attributes


@pytest.mark.parametrize(
    "url",
    [
        "https://files.example.com/a?Signature=secret-1&Expires=5",
        "https://user:secret-1@files.example.com/a",
        "https://files.example.com/a#secret-1",
        "https://files.example.com/a?secret-1#secret-1",
    ],
)
async def test_no_query_and_no_user_gets_into_a_span(traces: Tracing, exporter: InMemorySpanExporter, url: str) -> None:
    await tell(traces, result(request(), request(url=url), url=url))
    spans = exporter.get_finished_spans()
    assert len(spans) == 2
    for span in spans:
        assert "secret-1" not in span.to_json()
        assert (span.attributes or {})["server.address"] == "files.example.com"


async def test_an_address_that_cannot_be_read_is_left_out(traces: Tracing, exporter: InMemorySpanExporter) -> None:
    await tell(traces, result(request(), url="http://[secret-1/"))
    (span,) = exporter.get_finished_spans()
    assert "url.full" not in (span.attributes or {})


async def test_requests_hang_on_the_callback_that_delivered_their_batch_last(
    traces: Tracing, exporter: InMemorySpanExporter
) -> None:
    with traces.callback("request-1", None, "POST", "/notify", ""):
        pass
    (callback,) = exporter.get_finished_spans()
    exporter.clear()
    asked = await tell(
        traces,
        result(request(), batch=1),
        result(request(), batch=1),
        result(request(), batch=2),
        result(request(), batch=3),
        result(request(), batch=4),
        latest={1: ("request-1", HEADER), 2: ("request-of-a-former-life", HEADER), 3: ("request-3", None)},
    )
    # Once for each.
    assert asked == [1, 2, 3, 4]
    own, again, remote, root, unknown = exporter.get_finished_spans()
    assert callback.context is not None
    for span in (own, again):
        assert span.parent is not None
        assert (trace_of(span), span.parent.span_id) == (trace_of(callback), callback.context.span_id)
    assert remote.parent is not None
    assert (trace_of(remote), f"{remote.parent.span_id:016x}") == (TRACE, PARENT)
    assert (root.parent, unknown.parent) == (None, None)


async def test_no_more_callbacks_are_remembered_than_there_is_room_for(
    traces: Tracing, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "MAX_CALLBACKS_KEPT", 2)
    for number in range(3):
        with traces.callback(f"request-{number}", None, "POST", "/notify", ""):
            pass
    exporter.clear()
    latest = {number: (f"request-{number}", None) for number in range(3)}
    await tell(traces, *(result(request(), batch=number) for number in range(3)), latest=latest)
    assert [span.parent is None for span in exporter.get_finished_spans()] == [True, False, False]


async def test_spans_that_cannot_be_exported_in_time_are_dropped(
    traces: Tracing, exporter: InMemorySpanExporter
) -> None:
    for _ in range(tracing.GROUPS_WAITING + 10):
        traces.probed([result(request())])
    await tell(traces)
    # The last one, an empty group, found no room either.
    assert len(exporter.get_finished_spans()) == tracing.GROUPS_WAITING


def test_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch, exporter: InMemorySpanExporter) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with Tracing(SimpleSpanProcessor(exporter), "1").callback("r", None, "POST", "/notify", ""):
        pass
    (span,) = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == "ours"
    assert span.resource.attributes["deployment.environment.name"] == "test"


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "TRUE"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "otlp"}, True),
    ],
)
def test_traces_are_wanted_where_the_environment_names_a_collector(environ: dict[str, str], wanted: bool) -> None:
    assert tracing_wanted(environ) == wanted


def test_nothing_of_opentelemetry_is_loaded_unless_it_is_wanted() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, notify_server.app; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.split()
    assert "notify_server.app" in loaded
    assert not [
        name for name in loaded if name.startswith(("opentelemetry", "notify_server.telemetry.tracing", "requests"))
    ]
