"""Health checks, metrics and the log, and that none of them shows secrets or untruths."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import platform
import signal
import sqlite3
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import aiohttp
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from notify_server import supervise
from notify_server.config import LogConfig
from notify_server.supervise import start_task
from notify_server.telemetry.logging import set_up_logging
from notify_server.web import health
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.app import AppServer, Start
    from tests.web.conftest import Locked

TOKEN = "callback-secret-5f2c"
ADMIN_TOKEN = "admin-secret-93ab"


async def measures(daemon: AppServer) -> dict[str, float]:
    """What /metrics says: name and labels, and the value."""
    answer = await daemon.get("/metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


# Alive and ready


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_it_says_that_it_is_alive(daemon: AppServer, method: str) -> None:
    answer = await daemon.ask(method, "/healthz")
    assert (answer.status, answer.body) == (200, b"ok\n" if method == "GET" else b"")


async def test_it_is_ready_when_a_callback_would_be_taken_and_its_files_probed(daemon: AppServer) -> None:
    answer = await daemon.get("/readyz")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.json == {"ready": True, "store": "ok", "probers": "ok", "server": "ok"}


async def test_health_needs_no_token(start: Start) -> None:
    daemon = await start(auth={"callback_token": TOKEN, "callback_networks": ["192.0.2.0/24"]})
    for path in ("/healthz", "/readyz"):
        assert (await daemon.get(path)).status == 200


async def test_it_is_not_ready_while_a_prober_is_down_and_takes_callbacks_all_the_same(start: Start) -> None:
    daemon = await start(verify={"processes": 2, "allowed_networks": ["127.0.0.1"], "allowed_ports": [1]})
    assert (await daemon.get("/readyz")).status == 200
    pid = [event["pid"] for event in daemon.events.all if event["event"] == "prober ready"][-1]
    since = len(daemon.events.all)
    os.kill(pid, signal.SIGKILL)
    await daemon.events.seen("prober ended, starting another", since, pid=pid)
    answer = await daemon.get("/readyz")
    assert answer.status == 503
    assert answer.json == {"ready": False, "store": "ok", "probers": "down, restarting", "server": "ok"}
    assert (await daemon.get("/healthz")).status == 200
    await daemon.serves()
    await daemon.events.seen("prober ready", since)
    answer = await daemon.get("/readyz")
    assert (answer.status, answer.json["ready"]) == (200, True)
    # And what was up again probes.
    (await daemon.post(daemon.notification(daemon.entry(target_url="http://127.0.0.1:1/")))).accepted()
    await eventually(lambda: daemon.count("attempt") == 1)


async def test_it_is_not_ready_while_the_store_cannot_commit(
    start: Start, locked: Locked, impatient_store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FRESH_SECONDS", 0)
    daemon = await start()
    assert (await daemon.get("/readyz")).status == 200
    with locked(daemon):
        answer = await daemon.get("/readyz")
        assert answer.status == 503
        assert answer.json["ready"] is False
        assert answer.json["store"].startswith("cannot commit")
        assert (answer.json["probers"], answer.json["server"]) == ("ok", "ok")
        assert (await daemon.get("/healthz")).status == 200
        assert (await daemon.get("/metrics")).status == 200
    answer = await daemon.get("/readyz")
    assert (answer.status, answer.json["store"]) == (200, "ok")


async def test_readiness_names_a_long_task_that_has_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    # The loop, and with it what has ended on it, is shared with other tests.
    monkeypatch.setattr(supervise, "_ended", WeakKeyDictionary())
    daemon = await start()
    assert (await daemon.get("/readyz")).status == 200

    async def returns() -> None:
        pass

    await asyncio.wait([start_task(returns(), "lease of this node")])
    answer = await daemon.get("/readyz")
    assert answer.status == 503
    assert answer.json["tasks"] == "ended, restart the server: lease of this node"


async def test_asking_often_whether_it_is_ready_costs_one_write(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "FRESH_SECONDS", 60.0)
    daemon = await start()
    answers = await asyncio.gather(*(daemon.get("/readyz") for _ in range(20)))
    # A disk that is slow for a moment is "not ready" until its write is done.
    await eventually(lambda: daemon.count("heartbeat") == 1)
    answers += await asyncio.gather(*(daemon.get("/readyz") for _ in range(20)))
    assert {answer.status for answer in answers[20:]} == {200}
    ((first,),) = daemon.rows("SELECT checked_at FROM heartbeat")
    assert (await daemon.get("/readyz")).status == 200
    assert daemon.rows("SELECT checked_at FROM heartbeat") == [(first,)]


# Metrics


async def test_the_metrics_count_acks_and_refusals_by_their_code(start: Start) -> None:
    daemon = await start(auth={"callback_token": TOKEN})
    token = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    assert (await measures(daemon))["notify_server_ack_seconds_count"] == 0
    for _ in range(3):
        (await daemon.post(daemon.notification(), token)).accepted()
    for body in (b"[]", b""):
        (await daemon.post(body, token)).refusal(400, "400")
    (await daemon.post(b"[]", {**token, "Content-Encoding": "gzip"})).refusal(415, "415")
    (await daemon.post(b"[]")).refusal(401, "401001")
    (await daemon.get("/notify")).refusal(405, "405")
    after = await measures(daemon)
    answered = {name: value for name, value in after.items() if name.startswith("notify_server_callbacks_total")}
    assert answered == {
        "notify_server_callbacks_total code=000": 3,
        "notify_server_callbacks_total code=400": 2,
        "notify_server_callbacks_total code=415": 1,
        "notify_server_callbacks_total code=401001": 1,
        "notify_server_callbacks_total code=405": 1,
    }
    assert after["notify_server_commit_seconds_count"] >= 1
    assert 0 < after["notify_server_commit_seconds_sum"] < after["notify_server_ack_seconds_sum"] + 30
    assert after["notify_server_ack_seconds_count"] == 3
    assert 0 < after["notify_server_ack_seconds_sum"] < 30
    assert after["notify_server_ack_seconds_bucket le=+Inf"] == 3


async def test_the_metrics_count_unknown_fields_and_verdicts(start: Start) -> None:
    daemon = await start()
    failed = daemon.entry(target_url=None, status="FAILED", size=2)
    body = daemon.notification(daemon.entry(size=1, etag="x"), failed, extra={"not": "counted"}, more=1)
    assert (await measures(daemon))["notify_server_files_reported_failed_total"] == 0
    (await daemon.post(body)).accepted()
    await daemon.settled(body["batch_id"])
    await daemon.serves()
    after = await measures(daemon)
    assert after["notify_server_unknown_fields_total"] == 5
    assert after["notify_server_files_reported_failed_total"] == 1
    assert after["notify_server_verdicts_total verdict=incomplete"] == 2
    assert after["notify_server_backlog_files"] == 0
    assert after["notify_server_in_flight_files"] == 0


async def test_the_metrics_show_the_backlog(start: Start) -> None:
    daemon = await start(verify={"allowed_networks": ["127.0.0.1"], "allowed_ports": [1]})
    entries = [daemon.entry(target_url=f"http://127.0.0.1:1/{n}") for n in range(5)]
    (await daemon.post(daemon.notification(*entries, daemon.entry()))).accepted()
    await eventually(lambda: daemon.count("attempt") == 5)
    after = await measures(daemon)
    assert after["notify_server_backlog_files"] == 5
    assert after["notify_server_in_flight_files"] == 0


async def test_the_metrics_count_requests_by_reason_files_by_state_and_time_their_phases(start: Start) -> None:
    daemon = await start(verify={"allowed_networks": ["127.0.0.1"], "allowed_ports": [1], "retry_schedule": []})
    entries = [daemon.entry(target_url=f"http://127.0.0.1:1/{n}") for n in range(3)]
    body = daemon.notification(*entries)
    (await daemon.post(body)).accepted()
    await daemon.settled(body["batch_id"])
    await daemon.serves()
    after = await measures(daemon)
    assert after["notify_server_probes_total reason=connect_error"] == 3
    assert after["notify_server_probes_total reason=ok"] == 0
    assert after["notify_server_files_settled_total state=unavailable"] == 3
    assert after["notify_server_files_settled_total state=available"] == 0
    assert after["notify_server_probe_seconds_count phase=total"] == 3
    assert after["notify_server_probe_seconds_count phase=tls"] == 0


async def test_the_metrics_show_the_hosts_by_their_circuit(start: Start) -> None:
    daemon = await start(
        verify={"allowed_networks": ["127.0.0.1"], "allowed_ports": [1], "circuit_failures": 2, "circuit_rest": "1h"}
    )
    before = await measures(daemon)
    states = ("closed", "open", "half_open")
    assert [before[f"notify_server_hosts circuit={state}"] for state in states] == [0, 0, 0]
    (
        await daemon.post(daemon.notification(*(daemon.entry(target_url=f"http://127.0.0.1:1/{n}") for n in range(2))))
    ).accepted()
    await eventually(lambda: daemon.count("attempt") == 2)
    after = await measures(daemon)
    assert sum(after[f"notify_server_hosts circuit={state}"] for state in states) == 1
    assert after["notify_server_paced_hosts"] == 0
    assert after["notify_server_hosts circuit=closed"] == 0


async def test_strangers_cannot_add_series_to_the_metrics(daemon: AppServer) -> None:
    await daemon.post(b"[]")
    before = set(await measures(daemon))
    for n in range(20):
        await daemon.post(daemon.notification(batch_id=f"label-{n}", api_code=f"label-{n}", unknown=n))
        await daemon.ask(f"METHOD{n}", "/notify")
        await daemon.post(b"[]", path=f"/path-{n}")
    await daemon.serves()
    added = set(await measures(daemon)) - before
    assert all("label" not in name and "path" not in name for name in added)
    assert len({name for name in added if "_bucket" not in name}) <= 8


# Logs


class Log:
    """What goes to standard error."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        self._handlers: list[logging.Handler] = []

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def set_up(self, form: str, level: str = "debug") -> None:
        """Log as the daemon does."""
        root = logging.getLogger()
        # Kept out of the way, because they are pytest's.
        others, root.handlers = root.handlers, []
        with contextlib.redirect_stderr(self._stream):
            set_up_logging(LogConfig.model_validate({"format": form, "level": level}))
        self._handlers += root.handlers
        root.handlers = [*others, *root.handlers]

    def tear_down(self) -> None:
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)


@pytest.fixture
def log() -> Iterator[Log]:
    """Logging can be set up, and is as before afterwards."""
    log = Log()
    settings, level = structlog.get_config(), logging.getLogger().level
    yield log
    log.tear_down()
    logging.getLogger().setLevel(level)
    structlog.configure(**settings)


FORMS = pytest.mark.parametrize("form", ["console", "json"])
HOSTILE = [
    "\r\n2026-01-01T00:00:00Z [info] forged",
    "\x1b[2J\x1b]0;title\x07",
    "a\x1b[31mb",
    "\nforged",
    "forged\rforged",
    "\x85\u2028\u2029forged",
    "\x9b31m",
    "\x00\x08\x7f",
    "'\"\\\n",
]


def assert_inert(text: str) -> None:
    """Whatever reads this sees only lines that this program wrote, and no terminal obeys any of it."""
    for line in text.removesuffix("\n").split("\n"):
        assert line.isprintable(), line


@FORMS
@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_whatever_a_logged_value_holds_it_is_escaped_on_one_line(log: Log, form: str, value: str) -> None:
    log.set_up(form)
    structlog.get_logger("test").info("an event", batch_id=value, other=[value], number=1)
    assert log.text.count("\n") == 1
    assert_inert(log.text)
    if form == "json":
        event = json.loads(log.text)
        assert (event["event"], event["batch_id"], event["other"]) == ("an event", value, [value])


@FORMS
def test_a_value_that_is_not_text_can_be_logged(log: Log, form: str) -> None:
    log.set_up(form)
    structlog.get_logger("test").info("an event", detail="\udcff", raw=b"\xff\n")
    assert log.text.count("\n") == 1
    assert_inert(log.text.encode("utf-8", "backslashreplace").decode())


@FORMS
def test_what_a_library_logs_is_one_line_too(log: Log, form: str) -> None:
    log.set_up(form)
    logging.getLogger("some.library").warning("bad line from %s", "peer\r\n\x1b[31mforged")
    assert log.text.count("\n") == 1
    assert_inert(log.text)
    assert "forged" in log.text


def test_an_exception_is_one_line_of_json(log: Log) -> None:
    log.set_up("json")
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        structlog.get_logger("test").error("ours", exc_info=error)
        logging.getLogger("some.library").exception("theirs")
    ours, theirs = (json.loads(line) for line in log.text.splitlines())
    assert (ours["event"], theirs["event"]) == ("ours", "theirs")
    for event in (ours, theirs):
        assert "ValueError: first\nsecond" in json.dumps(event).replace("\\n", "\n")
        assert "Traceback" in json.dumps(event)


@FORMS
async def test_what_strangers_send_comes_out_as_escaped_lines(daemon: AppServer, log: Log, form: str) -> None:
    log.set_up(form)
    batch_id = "\r\n2026-01-01 [info] forged\x1b[31m"
    (await daemon.post(daemon.notification(batch_id=batch_id, api_code="a\x1b[31mb"))).accepted()
    await eventually(lambda: "verdict" in log.text)
    bare = "a\x1b[31mb"
    (await daemon.post(daemon.notification(batch_id=bare))).accepted()
    await eventually(lambda: log.text.count("verdict=") == 2 or log.text.count('"verdict":') == 2)
    headers = {"X-Forwarded-For": "forged", "User-Agent": "a\tforged"}
    (await daemon.post(b"[]", {"Content-Type": "text/a\tforged", **headers})).refusal(400, "400")
    (await daemon.post(b"[]", headers, path="/notify?token=%0D%0Aforged%1B")).refusal(400, "400")
    assert_inert(log.text)
    lines = log.text.splitlines()
    if form == "json":
        events = [json.loads(line) for line in lines]
        assert {event["batch_id"] for event in events if event["event"] == "verdict"} == {batch_id, bare}
    else:
        assert all(line.startswith("20") and "T" in line[:12] for line in lines)


@FORMS
async def test_a_malformed_request_leaves_no_line_of_its_own_in_the_log(served: AppServer, log: Log, form: str) -> None:
    log.set_up(form)
    for request in (
        b"GET / HTTP/1.1\r\nHost: h\r\nX: \x1b[31m\x01forged\r\n\r\n",
        b"GET /\x1b[31mforged HTTP/1.1\r\n\r\n",
        b"POST /notify HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nforged\r\n",
        b"forged\r\n\r\n",
    ):
        connection = await served.connect()
        await connection.send(request)
        assert (await connection.answer()).status == 400
    assert_inert(log.text)
    if form == "json":
        for line in log.text.splitlines():
            json.loads(line)
    else:
        assert all(line.startswith("20") for line in log.text.splitlines())


# Secrets


@FORMS
async def test_secrets_are_in_no_answer_and_no_log(start: Start, log: Log, form: str) -> None:
    log.set_up(form)
    daemon = await start(
        auth={"callback_token": TOKEN, "admin_token": ADMIN_TOKEN, "callback_networks": ["::/0", "0.0.0.0/0"]}
    )
    answers = [
        await daemon.post(daemon.notification(), path=f"/notify?token={TOKEN}"),
        await daemon.post(b"[]", path=f"/notify?token={TOKEN}"),
        await daemon.post(b"[]", {"Authorization": f"Bearer {TOKEN}", "Content-Type": "text/plain"}),
        await daemon.post(b"[]", {"Authorization": f"Bearer {ADMIN_TOKEN}"}),
        await daemon.post(b"[]", {"Authorization": f"Bearer {TOKEN}x"}),
        await daemon.get(f"/notify?token={TOKEN}"),
        await daemon.get(f"/nothing?token={TOKEN}", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}),
        await daemon.get("/readyz"),
        await daemon.get("/healthz"),
        await daemon.get("/metrics", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}),
    ]
    assert [answer.status for answer in answers] == [200, 400, 400, 401, 401, 405, 404, 200, 200, 200]
    await daemon.stop()
    shown: list[Any] = [log.text.encode(), *(answer.body for answer in answers)]
    shown += [str(dict(answer.headers)).encode() for answer in answers]
    assert "accepted" in log.text
    for secret in (TOKEN, ADMIN_TOKEN):
        assert all(secret.encode() not in each for each in shown)
    assert TOKEN not in repr(daemon.config)
    assert ADMIN_TOKEN not in repr(daemon.config)


async def test_the_parts_of_a_malformed_request_that_hold_a_token_are_not_logged(served: AppServer, log: Log) -> None:
    log.set_up("console")
    connection = await served.connect()
    await connection.send(f"POST /notify HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\x01\r\n\r\n".encode())
    assert (await connection.answer()).status == 400
    connection = await served.connect()
    await connection.send(f"POST /notify?token={TOKEN}\x01 HTTP/1.1\r\n\r\n".encode())
    assert (await connection.answer()).status == 400
    assert TOKEN not in log.text


async def test_metrics_want_the_admin_token_when_one_is_configured(start: Start) -> None:
    daemon = await start(auth={"admin_token": "an-admin-token"})
    assert (await daemon.get("/metrics")).status == 401
    assert (await daemon.get("/metrics", headers={"Authorization": "Bearer another-token"})).status == 401
    reply = await daemon.get("/metrics", headers={"Authorization": "Bearer an-admin-token"})
    assert reply.status == 200
    assert b'notify_server_build_info{libcurl="' in reply.body


async def test_strangers_learn_no_versions(start: Start) -> None:
    daemon = await start()
    exposition = (await daemon.get("/metrics")).body.decode()
    assert "notify_server_build_info 1.0" in exposition
    for version in (platform.python_version(), sqlite3.sqlite_version, aiohttp.__version__):
        assert version not in exposition
    for method, path in (("GET", "/healthz"), ("GET", "/"), ("GET", "/nothing"), ("POST", "/notify")):
        reply = await daemon.ask(method, path)
        assert reply.headers["Server"] == "notify_server", (method, path)
