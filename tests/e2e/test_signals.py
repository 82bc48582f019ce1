"""What operators see of a daemon that works: its log, its metrics, its traces; the dashboard and the alerts that are
made of them; and that none of these tells a secret."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from tests.support.app import Signer
from tests.support.daemon import Daemon, clean_environment
from tests.support.notification import API_CODE, batch_body
from tests.support.origin import Answer, Origin
from tests.support.waiting import Bell

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "alert-rules.yml"
RULE_TESTS = DEPLOY / "alert-rules.test.yml"
DASHBOARD = DEPLOY / "grafana-dashboard.json"

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


def promtool(*arguments: str, stdin: str = "") -> None:
    """Run it; it must have nothing to say against what it was given."""
    program = shutil.which("promtool")
    assert program is not None, "promtool is missing: apt-get install prometheus"
    done = subprocess.run([program, *arguments], input=stdin, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


async def get(daemon: Daemon, path: str, **headers: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(daemon.callback.replace("/notify", path), headers=headers) as answer,
    ):
        return answer.status, await answer.text()


def read(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Samples by their name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def value(daemon: Daemon, name: str, **labels: str) -> float | None:
    """What /metrics says of this now."""
    _, text = await get(daemon, "/metrics")
    return read(text).get((name, frozenset(labels.items())))


async def value_becomes(daemon: Daemon, wanted: float, name: str, **labels: str) -> None:
    """Return once /metrics says so: for values that are counted in the background only."""
    async with asyncio.timeout(30):
        while await value(daemon, name, **labels) != wanted:
            await asyncio.sleep(0.02)


def request_id(body: bytes) -> str:
    return str(json.loads(body)["request_id"])


# -- Request ids and traces in the log ---------------------------------------------------------------------------------


async def test_one_request_id_leads_from_the_ack_to_the_verdict(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path, {"log": {"format": "json", "level": "debug"}}) as daemon:
        body = batch_body("b1", [origin.url("/a")])
        first = request_id((await daemon.post(body)).body)
        accepted = await daemon.line("accepted", request_id=first)
        verdict = await daemon.verdict("b1")
        assert (accepted["batch_id"], verdict["request_id"]) == ("b1", first)
        assert "trace_id" not in accepted
        assert "trace_id" not in verdict
        assert daemon.value("SELECT request_id FROM notification") == first
        # The next verdict belongs to the delivery that brought it about.
        again = batch_body("b1", [origin.url("/a"), origin.url("/b")])
        second = request_id((await daemon.post(again, traceparent=TRACEPARENT)).body)
        verdict = await daemon.verdict("b1", number=2)
        assert (verdict["request_id"], verdict["trace_id"]) == (second, TRACE)


async def test_a_refusal_is_logged_and_kept_under_the_request_id_of_its_answer(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        reply = await daemon.post(b"[]", traceparent=TRACEPARENT)
        assert reply.status == 400
        line = await daemon.line("refused", request_id=request_id(reply.body))
        assert (line["status"], line["trace_id"]) == (400, TRACE)
        assert daemon.value("SELECT request_id FROM rejection") == request_id(reply.body)


async def test_a_callers_trace_is_kept_when_it_is_valid_and_else_passed_over(tmp_path: Path) -> None:
    async with Daemon(tmp_path, {"log": {"format": "json", "level": "debug"}}) as daemon:
        for number, (sent, kept) in enumerate(
            [
                (TRACEPARENT, TRACEPARENT),
                (f"cc-{TRACE}-{CALLER}-01-what-will-be", f"cc-{TRACE}-{CALLER}-01"),
                (f"00-{'0' * 32}-{CALLER}-01", None),
                (TRACEPARENT.upper(), None),
            ]
        ):
            reply = await daemon.post(batch_body(f"b{number}", []), traceparent=sent)
            assert reply.status == 200
            line = await daemon.line("accepted", request_id=request_id(reply.body))
            assert line.get("trace_id") == (TRACE if kept else None)
            assert daemon.value("SELECT traceparent FROM notification WHERE batch_id = ?", f"b{number}") == kept


async def test_a_notification_that_cannot_be_expanded_is_logged_with_its_request_id(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.terminate()
        # As an older version might have let it in.
        subprocess.run(
            [
                "sqlite3",
                str(daemon.database),
                "INSERT INTO notification (batch_id, api_code, received_at, remote_addr, signature, request_id, files,"
                f" traceparent, body) VALUES ('b', 'a', 1, '', 'none', 'request-x', 1, '{TRACEPARENT}', 'nonsense')",
            ],
            check=True,
        )
        await daemon.start()
        line = await daemon.line("an acked notification cannot be expanded, it is kept in rejection")
        assert (line["request_id"], line["trace_id"]) == ("request-x", TRACE)


# -- Metrics -----------------------------------------------------------------------------------------------------------


async def busy(daemon: Daemon, origin: Origin) -> None:
    """Let the daemon do some of everything."""
    origin.on("/gone", Answer(410))
    await daemon.settle("good", [origin.url("/a"), origin.url("/b")])
    await daemon.settle("bad", [origin.url("/gone"), origin.url("/c")])
    assert (await daemon.post(b"[]")).status == 400


async def test_the_metrics_of_a_daemon_that_has_worked_are_clean(tmp_path: Path) -> None:
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        await busy(daemon, origin)
        status, text = await get(daemon, "/metrics")
        assert status == 200
        promtool("check", "metrics", stdin=text)
        families = list(text_string_to_metric_families(text))
        assert all(family.documentation.endswith(".") for family in families if family.name.startswith("notify_server"))


async def test_the_metrics_tell_of_the_record_and_of_its_files(tmp_path: Path) -> None:
    async with Origin() as origin:
        origin.on("/later", Answer(503, close=True))
        async with Daemon(tmp_path, {"verify": {"retry_schedule": ["1h"]}}) as daemon:
            await daemon.deliver("waits", [origin.url("/later")])
            assert (await daemon.post(b"[]")).status == 400
            await daemon.eventually("SELECT count(*) FROM file WHERE attempts = 1")
            await value_becomes(daemon, 1, "notify_server_rejections")
            waited = await value(daemon, "notify_server_oldest_pending_seconds")
            assert waited is not None
            assert 0 <= waited < 60
            assert await value(daemon, "notify_server_backlog_files") == 1
            database = await value(daemon, "notify_server_store_bytes", file="database")
            wal = await value(daemon, "notify_server_store_bytes", file="wal")
            assert database == daemon.database.stat().st_size
            assert wal == Path(f"{daemon.database}-wal").stat().st_size
            free = await value(daemon, "notify_server_store_free_bytes")
            volume = os.statvfs(tmp_path)
            assert free == pytest.approx(volume.f_bavail * volume.f_frsize, rel=0.05)


async def test_the_metrics_tell_when_retention_was_last_gone_through_and_what_it_deleted(tmp_path: Path) -> None:
    async with Daemon(tmp_path, {"retention": {"completed": "1s", "rejections": "1s"}}) as daemon:
        await daemon.settle("old", [])
        await daemon.eventually("SELECT (SELECT completed_at FROM batch) < unixepoch() * 1000 - 2000")
        await daemon.restart()
        await daemon.eventually("SELECT count(*) = 0 FROM batch")
        # The batch, its delivery and its event.
        await value_becomes(daemon, 3, "notify_server_pruned_rows_total")
        async with asyncio.timeout(30):
            while (at := await value(daemon, "notify_server_prune_last_run_timestamp_seconds")) is None:
                await asyncio.sleep(0.02)
        started_at = await value(daemon, "process_start_time_seconds")
        took = await value(daemon, "notify_server_prune_last_run_duration_seconds")
        assert started_at is not None
        assert took is not None
        assert started_at - 1 < at < started_at + 60
        assert 0 < took < 60


async def test_the_metrics_count_probers_that_had_to_be_replaced(tmp_path: Path) -> None:
    async with Daemon(tmp_path, {"verify": {"processes": 2, "allowed_ports": []}}) as daemon:
        assert await value(daemon, "notify_server_probers", state="up") == 2
        assert await value(daemon, "notify_server_prober_restarts_total") == 0
        os.kill(daemon.prober_pids()[0], signal.SIGKILL)
        await daemon.line("prober ended, starting another")
        await value_becomes(daemon, 1, "notify_server_prober_restarts_total")
        await value_becomes(daemon, 2, "notify_server_probers", state="up")
        assert await value(daemon, "notify_server_probers", state="down") == 0


async def test_the_metrics_count_connections_and_those_turned_away(tmp_path: Path) -> None:
    async with Daemon(tmp_path, {"server": {"host": "127.0.0.1", "port": 0, "max_connections": 2}}) as daemon:
        assert await value(daemon, "notify_server_connections") == 1
        url = daemon.callback.replace("/notify", "/metrics")
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            await answer.read()
            port = int(daemon.callback.split(":")[2].split("/")[0])
            _, held = await asyncio.open_connection("127.0.0.1", port)
            turned_away, writer = await asyncio.open_connection("127.0.0.1", port)
            assert (await turned_away.read()).startswith(b"HTTP/1.1 503")
            async with session.get(url) as answer:
                samples = read(await answer.text())
            for each in (held, writer):
                each.close()
            assert samples["notify_server_connections", frozenset()] == 2
            assert samples["notify_server_connections_refused_total", frozenset()] == 1


async def test_the_metrics_tell_the_versions_in_use(tmp_path: Path) -> None:
    async with Daemon(tmp_path, {"auth": {"admin_token": ADMIN_TOKEN}}) as daemon:
        _, text = await get(daemon, "/metrics", Authorization=f"Bearer {ADMIN_TOKEN}")
        ((labels, one),) = [(dict(labels), value) for (name, labels), value in read(text).items() if "build_" in name]
        assert one == 1
        assert labels.keys() == {"version", "python", "sqlite", "libcurl"}
        assert all(re.match(r"\d+\.\d+", version) for version in labels.values()), labels


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[trustme.CA, dict[str, Any]]:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    for blob in issued.cert_chain_pems:
        blob.write_to_path(chain, append=True)
    issued.private_key_pem.write_to_path(key)
    server = {"host": "127.0.0.1", "port": 0, "ssl_certificate": str(chain), "ssl_key": str(key)}
    return authority, {"server": server}


async def over_tls(daemon: Daemon, authority: trustme.CA) -> str:
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    url = daemon.callback.replace("/notify", "/metrics")
    async with aiohttp.ClientSession() as session, session.get(url, ssl=trusting) as answer:
        return await answer.text()


async def test_the_metrics_tell_when_the_certificate_ends(
    tmp_path: Path, certificate: tuple[trustme.CA, dict[str, Any]]
) -> None:
    authority, config = certificate
    async with Daemon(tmp_path, config) as daemon:
        samples = read(await over_tls(daemon, authority))
        shown = subprocess.run(
            ["openssl", "x509", "-enddate", "-noout", "-dateopt", "iso_8601", "-in", str(tmp_path / "chain.pem")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        ends_at = ssl.cert_time_to_seconds(_as_asn1(shown.strip().removeprefix("notAfter=")))
        assert samples["notify_server_certificate_expiry_timestamp_seconds", frozenset()] == ends_at


def _as_asn1(iso: str) -> str:
    """As in `Jan  5 09:34:43 2018 GMT`."""
    from datetime import datetime

    return datetime.fromisoformat(iso.removesuffix("Z")).strftime("%b %d %H:%M:%S %Y GMT")


# -- The dashboard and the alerts --------------------------------------------------------------------------------------

# In an expression: a metric, and its labels if there are any.
USED = re.compile(r"\b((?:notify_server|process)_\w+)(?:\{([^}]*)\})?")
# What Prometheus itself adds.
TARGET_LABELS = {"job", "instance"}
# Counted in the background, and not there before a notification has come.
LAST_NOTIFICATION = "notify_server_last_notification_timestamp_seconds"


def expressions_of_the_dashboard() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return found + [annotation["expr"] for annotation in dashboard["annotations"]["list"]]


def expressions_of_the_rules() -> list[str]:
    text = RULES.read_text("utf-8")
    folded = re.findall(r"expr: >-\n((?: {10}.*\n)+)", text)
    plain = re.findall(r"expr: ([^>\n].*)", text)
    assert len(folded) + len(plain) == text.count("- alert: ")
    return folded + plain


async def test_every_metric_and_label_that_the_dashboard_and_the_alerts_name_is_there(
    tmp_path: Path, certificate: tuple[trustme.CA, dict[str, Any]]
) -> None:
    authority, config = certificate
    config = config | {"forward": [{"name": "listings", "url": "http://127.0.0.1:9/hook"}]}
    async with Origin() as origin, Daemon(tmp_path / "plain") as daemon, Daemon(tmp_path / "tls", config) as other:
        await busy(daemon, origin)
        async with asyncio.timeout(30):
            while await value(daemon, LAST_NOTIFICATION, api_code=API_CODE) is None:
                await asyncio.sleep(0.02)
        _, text = await get(daemon, "/metrics")
        samples = [*read(text), *read(await over_tls(other, authority))]
    labels: dict[str, set[str]] = {}
    for name, pairs in samples:
        labels.setdefault(name, set()).update(key for key, _ in pairs)
    expressions = expressions_of_the_dashboard() + expressions_of_the_rules()
    used = [use for expression in expressions for use in USED.findall(expression)]
    assert len({name for name, _ in used}) > 20
    assert {name for name, _ in used} - labels.keys() == set()
    for name, selector in used:
        assert set(re.findall(r"(\w+)\s*[=!]", selector)) <= labels[name] | TARGET_LABELS, (name, selector)
    # And all that is ours is shown.
    shown = {name for expression in expressions_of_the_dashboard() for name, _ in USED.findall(expression)}
    ours = {re.sub(r"_(bucket|count|sum)$", "", name) for name in labels if name.startswith("notify_server_")}
    assert ours - {re.sub(r"_bucket$", "", name) for name in shown} == set()


def test_the_dashboards_expressions_can_be_read_by_prometheus(tmp_path: Path) -> None:
    rules = [
        {"record": f"dashboard:expression:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions_of_the_dashboard())
    ]
    path = tmp_path / "rules.yml"
    # JSON is YAML.
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), "utf-8")
    promtool("check", "rules", str(path))


def test_the_dashboard_can_be_imported_anywhere() -> None:
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    # Grafana gives it one.
    assert dashboard["id"] is None
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "job", "instance"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    wanted = ["Callbacks", "Latency", "Backlog", "Verification", "Hosts", "Forwarding", "Submissions", "Storage"]
    assert rows == ["At a glance", *wanted, "Process"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + column, place["y"] + line) for column in range(place["w"]) for line in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(column for column, _ in cells) < 24
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"], panel["title"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {source["uid"] for source in sources} == {"${datasource}"}
        for target in panel["targets"]:
            assert 'job=~"$job",instance=~"$instance"' in target["expr"]


def test_the_alerts_are_valid_and_fire_when_they_should() -> None:
    promtool("check", "rules", str(RULES))
    promtool("test", "rules", str(RULE_TESTS))


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    rules = RULES.read_text("utf-8")
    alerts = re.findall(r"- alert: (\w+)", rules)
    tested = RULE_TESTS.read_text("utf-8")
    assert len(alerts) == len(set(alerts)) > 10
    assert [alert for alert in alerts if f'"{alert}"' not in tested] == []
    for part in rules.split("- alert: ")[1:]:
        assert re.search(r"severity: (critical|warning)\n", part)
        assert re.search(r"summary: .+\n", part)
        assert len(part.partition("description: >-")[2].split()) >= 15, part


# -- Traces ------------------------------------------------------------------------------------------------------------


class Collector:
    """An OTLP/HTTP receiver for traces. With `gate` it keeps those waiting who export."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.service: set[str] = set()
        self.headers: list[Mapping[str, str]] = []
        self.gate: asyncio.Event | None = None
        self.bell = Bell()
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers)
        self.bell.ring()
        if self.gate is not None:
            await self.gate.wait()
        export = ExportTraceServiceRequest.FromString(await request.read())
        for resource in export.resource_spans:
            self.service |= {item.value.string_value for item in resource.resource.attributes if "name" in item.key}
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.bell.ring()
        content = ExportTraceServiceResponse().SerializeToString()
        return web.Response(body=content, content_type="application/x-protobuf")

    def of(self, kind: int) -> list[Span]:
        return [span for span in self.spans if span.kind == kind]


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield collector
    finally:
        await runner.cleanup()


def exporting(collector: Collector, **more: str) -> dict[str, str]:
    return clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY="50", **more)


def attributes(span: Span) -> dict[str, object]:
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


async def test_a_callback_and_the_requests_that_follow_are_one_trace_at_the_collector(tmp_path: Path) -> None:
    async with collecting() as collector, Origin() as origin:
        path = "/a?Signature=address-secret-7"
        origin.on(path, Answer(405), Answer())
        environ = exporting(collector, OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer%20collector-secret-7")
        async with Daemon(
            tmp_path, {"auth": {"callback_token": "callback-secret-7"}, "log": {"format": "json", "level": "debug"}},
            environ=environ,
        ) as daemon:  # fmt: skip
            daemon.callback += "?token=callback-secret-7"
            body = batch_body("b1", [origin.url(path)])
            reply = await daemon.post(body, traceparent=TRACEPARENT)
            assert reply.status == 200
            verdict = await daemon.verdict("b1")
            await collector.bell.until(lambda: len(collector.spans) >= 3)
            for pid in daemon.prober_pids():
                assert b"OTEL_" not in Path(f"/proc/{pid}/environ").read_bytes()
            assert await daemon.terminate() == 0
            log = daemon.text
        (server,) = collector.of(Span.SPAN_KIND_SERVER)
        head, retry = collector.of(Span.SPAN_KIND_CLIENT)
        assert {span.trace_id.hex() for span in (server, head, retry)} == {TRACE} == {verdict["trace_id"]}
        assert server.parent_span_id.hex() == CALLER
        assert head.parent_span_id == retry.parent_span_id == server.span_id
        assert attributes(server)["notify_server.request_id"] == request_id(reply.body) == verdict["request_id"]
        assert (head.name, retry.name) == ("HEAD", "GET")
        assert attributes(head)["http.response.status_code"] == 405
        assert [event.name for event in head.events] == ["dns", "connect", "first_byte"]
        assert collector.service >= {"notify_server"}
        assert {headers["authorization"] for headers in collector.headers} == {"Bearer collector-secret-7"}
        told = "".join(str(span) for span in collector.spans) + log
        assert "secret-7" not in told


async def test_traces_survive_a_collector_that_is_not_there(tmp_path: Path) -> None:
    environ = clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_BSP_SCHEDULE_DELAY="50")
    config = {"server": {"host": "127.0.0.1", "port": 0, "shutdown_grace": "2s"}}
    async with Origin() as origin, Daemon(tmp_path, config, environ=environ) as daemon:
        await daemon.settle("b1", [origin.url("/a")])
        assert await daemon.terminate() == 0


async def test_remaining_spans_are_exported_at_the_stop_within_the_grace(tmp_path: Path) -> None:
    config = {"server": {"host": "127.0.0.1", "port": 0, "shutdown_grace": "2s"}}
    async with collecting() as collector, Origin() as origin:
        # Nothing would be exported before the hour is over.
        environ = exporting(collector) | {"OTEL_BSP_SCHEDULE_DELAY": "3600000"}
        async with Daemon(tmp_path, config, environ=environ) as daemon:
            await daemon.settle("b1", [origin.url("/a")])
            assert collector.spans == []
            assert await daemon.terminate() == 0
            assert [span.name for span in collector.spans] == ["POST /notify", "HEAD"]
            await daemon.start()
            collector.gate = asyncio.Event()
            await daemon.settle("b2", [origin.url("/b")])
            assert await daemon.terminate() == 0
            await daemon.line("traces could not be exported in time, the last ones are lost")
            collector.gate.set()


async def test_without_a_collector_there_are_no_traces_and_no_word_of_them(tmp_path: Path) -> None:
    async with Daemon(tmp_path, {"log": {"format": "json", "level": "debug"}}) as daemon:
        await daemon.settle("b1", [])
        await daemon.terminate()
        assert "trace" not in daemon.text


async def test_without_the_extra_it_says_so_and_works(tmp_path: Path) -> None:
    # A package of that name that cannot be imported, in the way of the real one.
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("raise ImportError('not installed')")
    environ = clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", PYTHONPATH=str(tmp_path))
    async with Daemon(tmp_path, environ=environ) as daemon:
        await daemon.wait_for_line(lambda line: "notify-server[otel]" in line["event"])
        await daemon.settle("b1", [])


# -- Secrets -----------------------------------------------------------------------------------------------------------

TOKEN = "callback-SECRET-0123456789"
ADMIN_TOKEN = "admin-SECRET-0123456789"
# What callers present in vain may be a slip away from the right one.
WRONG = "wrong-SECRET-0123456789"
MARK = "SECRET"


@pytest.mark.parametrize("form", ["json", "console"])
async def test_no_secret_is_in_a_log_an_answer_or_a_metric(tmp_path: Path, form: str) -> None:
    """Row 87."""
    signer, other = Signer(), Signer()
    config: dict[str, dict[str, Any]] = {
        "auth": {
            "callback_token": TOKEN,
            "admin_token": ADMIN_TOKEN,
            "signature": "optional",
            "platform_keys": [signer.public],
        },
        "log": {"format": form, "level": "debug"},
    }
    environ = clean_environment(OTEL_EXPORTER_OTLP_HEADERS=f"authorization={MARK}")
    daemon = Daemon(tmp_path, config, environ=environ) if form == "json" else ConsoleDaemon(tmp_path, config, environ)
    parameters = {"batch_id": "signed", "api_code": API_CODE, "file_list": []}
    signed = signer.seal(parameters, nonce="SECRETnonce")
    expired = signer.seal(parameters, timestamp=1_700_000_000_000)
    forged = other.seal(parameters)
    signs = [envelope["sign"] for envelope in (signed, expired, forged)]
    answers: list[str] = []
    async with daemon, aiohttp.ClientSession() as session:
        home = daemon.callback.removesuffix("/notify")

        async def ask(method: str, path: str, status: int, body: bytes | None = None, **headers: str) -> None:
            headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): v for name, v in headers.items()}
            async with session.request(
                method, home + path, data=body, headers=headers, allow_redirects=False
            ) as answer:
                text = await answer.text()
                assert answer.status == status, (method, path, answer.status, text)
                answers.extend([text, str([item for item in answer.headers.items() if item[0] != "Set-Cookie"])])

        good, bearer, admin = f"/notify?token={TOKEN}", f"Bearer {TOKEN}", f"Bearer {ADMIN_TOKEN}"
        body = batch_body("b1", [])
        await ask("POST", good, 200, body)
        await ask("POST", "/notify", 200, body, Authorization=bearer)
        await ask("POST", good, 200, json.dumps(signed).encode())
        await ask("POST", good, 403, json.dumps(signed).encode())
        await ask("POST", good, 403, json.dumps(expired).encode())
        await ask("POST", good, 401, json.dumps(forged).encode())
        await ask("POST", good, 400, b"[]")
        await ask("POST", good, 400, batch_body("x" * 99, []))
        await ask("POST", good, 415, body, Content_Encoding="gzip")
        await ask("POST", good, 200, body, Content_Type="text/plain")
        await ask("GET", good, 405)
        await ask("POST", f"/notify?token={WRONG}", 401, body)
        await ask("POST", "/notify", 401, body, Authorization=f"Bearer {WRONG}")
        await ask("POST", "/notify", 401, body, Authorization=f"Basic {base64.b64encode(WRONG.encode()).decode()}")
        await ask("POST", f"/nothing?token={TOKEN}", 404, body, Authorization=bearer)
        await ask("GET", f"/readyz?token={TOKEN}", 200)
        for path in ("status", "totals", "batches", "rejections", "failures", "hosts", "search?q=b"):
            await ask("GET", f"/api/v1/{path}", 200, Authorization=admin)
            await ask("GET", f"/api/v1/{path}", 401, Authorization=f"Bearer {WRONG}")
            await ask("GET", f"/api/v1/{path}", 401, Cookie=f"notify_server_session=9.{MARK}")
        await ask("GET", f"/api/v1/batches?cursor={MARK.lower()}", 400, Authorization=admin)
        await ask("POST", "/api/v1/recheck", 400, b"{", Authorization=admin)
        await ask("POST", "/api/v1/rejections/1/replay", 400, b"{}", Authorization=admin)
        form_type = "application/x-www-form-urlencoded"
        await ask("POST", "/ui/login", 401, f"token={WRONG}".encode(), Content_Type=form_type)
        await ask("POST", "/ui/login", 303, f"token={ADMIN_TOKEN}".encode(), Content_Type=form_type)
        await ask("GET", "/metrics", 200, Authorization=admin)
        for malformed in (
            f"POST /notify?token={TOKEN}\x01 HTTP/1.1\r\nHost: h\r\n\r\n",
            f"POST /notify HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {TOKEN}\x01\r\n\r\n",
            f"POST /notify?token={TOKEN} HTTP/1.1\r\nHost: h\r\nContent-Length: {MARK}\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(home.rpartition(":")[2]))
            writer.write(malformed.encode())
            # It is quoted to its sender, and to no one else.
            assert (await reader.readline()).endswith(b" 400 Bad Request\r\n")
            writer.close()
        assert await daemon.terminate() == 0
        log = daemon.text
    # An answer's request_id leads to everything that is recorded of the request.
    without_an_id = {"asked", "request", "logged in", "log-in refused", "malformed request"}
    for line in daemon.lines:
        if form == "json" and "remote" in line and line["event"] not in without_an_id:
            assert line.get("request_id", "no request_id") in "".join(answers), line
    assert log.count("accepted") >= 3
    assert log.count("refused") > 10
    for text in (log, *answers):
        assert MARK not in text, text
        assert all(sign[:40] not in text for sign in signs)


class ConsoleDaemon(Daemon):
    """A daemon that logs for people: its first line of readiness is looked for in the text."""

    def __init__(self, folder: Path, config: Mapping[str, Mapping[str, Any]], environ: Mapping[str, str]) -> None:
        super().__init__(folder, config, environ=environ)

    async def line(self, event: str, seconds: float = 30.0, number: int = 1, **fields: object) -> Mapping[str, Any]:
        found = await self.wait_for_line(lambda line: event in str(line["event"]), seconds, number)
        return {**found, "url": next(iter(re.findall(r"url=(\S+)", str(found["event"]))), "")}
