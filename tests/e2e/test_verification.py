"""Verdicts of files by the real daemon: posted as the platform does, probed at origins that behave as configured."""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import trustme

from tests.support.daemon import Config, Daemon, clean_environment
from tests.support.notification import API_CODE, batch_body, failed, finished
from tests.support.origin import SILENCE, Answer, Hit, Limited, Origin

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEDULE_MS = [150, 300]
TIMEOUT_MS = 1000
# 127.0.0.2 and all other private addresses stay closed: that is where traps listen.
OPEN = ["127.0.0.1/32"]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def daemon(tmp_path_factory: pytest.TempPathFactory, authority: trustme.CA) -> AsyncIterator[Daemon]:
    """One for all tests that need no settings of their own. Retries come soon, and there are two."""
    folder = tmp_path_factory.mktemp("daemon")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    settings = {
        "retry_schedule": [f"{wait}ms" for wait in SCHEDULE_MS],
        "timeout": f"{TIMEOUT_MS}ms",
        "connect_timeout": f"{TIMEOUT_MS}ms",
        "allowed_networks": OPEN,
        "max_redirects": 3,
        "ca_file": str(folder / "ca.pem"),
    }
    # A proxy would do the dialling unguarded: that nothing here fails shows that these are not obeyed.
    environ = clean_environment(http_proxy=NOWHERE, https_proxy=NOWHERE, ALL_PROXY=NOWHERE)
    async with Daemon(folder, {"verify": settings}, environ=environ) as running:
        yield running
        assert await running.terminate() == 0


@pytest_asyncio.fixture(loop_scope="module")
async def origin() -> AsyncIterator[Origin]:
    async with Origin() as serving:
        yield serving


@pytest_asyncio.fixture(loop_scope="module")
async def trap() -> AsyncIterator[Origin]:
    async with Origin("127.0.0.2") as listening:
        yield listening
        assert listening.connections == 0


_batches = (f"batch-{number}" for number in itertools.count(1))


@pytest.fixture
def batch() -> str:
    return next(_batches)


async def settle_one(daemon: Daemon, batch: str, url: str) -> tuple[Any, list[Any]]:
    """The file, and its attempts, of a batch with this file alone."""
    (file,) = (await daemon.settle(batch, [url])).values()
    return file, daemon.attempts(file)


def only(verify: dict[str, Any]) -> Config:
    return {"verify": {"allowed_networks": OPEN, **verify}}


# --- Files that exist ---


async def test_an_available_file_has_every_column_of_evidence(daemon: Daemon, origin: Origin, batch: str) -> None:
    headers = {
        "Content-Length": "123456",
        "Content-Type": "image/jpeg",
        "ETag": '"5f3c"',
        "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT",
        "Server": "AliyunOSS",
        "x-oss-request-id": "5F7C0A1B",
    }
    origin.on("/APPID/IMAGE/-1/a.jpg", Answer(headers=headers, delay=0.02))
    before = time.time_ns() // 1_000_000
    file, attempts = await settle_one(daemon, batch, origin.url("/APPID/IMAGE/-1/a.jpg"))
    after = time.time_ns() // 1_000_000

    assert dict(file) | {"id": 0, "batch": 0, "elapsed_ms": 0, "verified_at": 0} == {
        "id": 0,
        "batch": 0,
        "oss_object_name": origin.url("/APPID/IMAGE/-1/a.jpg"),
        "target_url": origin.url("/APPID/IMAGE/-1/a.jpg"),
        "host": f"127.0.0.1:{origin.port}",
        "reported_status": "FINISHED",
        "state": "available",
        "reason": None,
        "attempts": 1,
        "next_attempt_at": None,
        "http_status": 200,
        "content_length": 123456,
        "content_type": "image/jpeg",
        "etag": '"5f3c"',
        "last_modified": "Wed, 21 Oct 2015 07:28:00 GMT",
        "final_url": None,
        "remote_addr": "127.0.0.1",
        "elapsed_ms": 0,
        "verified_at": 0,
        "vendor_request_id": "5F7C0A1B",
        "vendor_code": None,
        "expires_at": None,
        "headers": '{"server":"AliyunOSS"}',
        "flags": '["plain_http"]',
    }
    assert 20 <= file["elapsed_ms"] <= after - before
    assert before <= file["verified_at"] <= after

    (attempt,) = attempts
    assert dict(attempt) | {"id": 0, "started_at": 0} | dict.fromkeys(_PHASES, 0) == {
        "id": 0,
        "file": file["id"],
        "started_at": 0,
        "method": "HEAD",
        "url": None,
        "http_status": 200,
        "reason": None,
        "remote_addr": "127.0.0.1",
        "vendor_request_id": "5F7C0A1B",
        "vendor_code": None,
    } | dict.fromkeys(_PHASES, 0)
    assert before <= attempt["started_at"] <= after
    assert attempt["tls_ms"] is None
    assert 0 < attempt["connect_ms"] < attempt["total_ms"]
    assert 20 <= attempt["first_byte_ms"] <= attempt["total_ms"] == file["elapsed_ms"]


_PHASES = ("dns_ms", "connect_ms", "tls_ms", "first_byte_ms", "total_ms")


async def test_the_views_show_a_batch_and_its_files_with_times_as_text(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    origin.on("/b", Answer(410))
    await daemon.settle(batch, [origin.url("/a"), origin.url("/b"), finished("http://10.0.0.1/", "c"), failed("d")])
    (summary,) = daemon.sql("SELECT * FROM batch_summary WHERE batch_id = ?", batch)
    assert dict(summary) | {"first_received_at": "", "completed_at": ""} == {
        "batch_id": batch,
        "api_code": API_CODE,
        "verdict": "incomplete",
        "files": 4,
        "pending": 0,
        "available": 1,
        "unavailable": 1,
        "blocked": 1,
        "upload_failed": 1,
        "first_received_at": "",
        "completed_at": "",
    }
    received, completed = (datetime.fromisoformat(summary[f"{name}_at"]) for name in ("first_received", "completed"))
    assert timedelta(0) <= completed - received < timedelta(seconds=20)
    assert datetime.now(UTC) - completed < timedelta(seconds=20)
    results = daemon.sql("SELECT * FROM file_result WHERE batch_id = ? ORDER BY state", batch)
    assert [(row["state"], row["reason"], row["attempts"]) for row in results] == [
        ("available", None, 1),
        ("blocked", "private_address", 0),
        ("unavailable", "http_410", 1),
        ("upload_failed", None, 0),
    ]
    assert datetime.fromisoformat(results[0]["verified_at"]) <= completed


async def test_the_verdict_is_logged_at_info_with_what_a_person_needs(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    origin.on("/gone", Answer(410))
    await daemon.settle(batch, [origin.url("/a"), origin.url("/b"), origin.url("/gone")])
    line = await daemon.verdict(batch)
    wanted = {"level": "info", "api_code": API_CODE, "verdict": "incomplete", "files": 3, "available": 2}
    assert wanted.items() <= line.items()


async def test_an_https_file_is_available_and_its_handshake_is_timed(
    daemon: Daemon, authority: trustme.CA, batch: str
) -> None:
    async with Origin(tls=tls_context(authority.issue_cert("127.0.0.1"))) as origin:
        file, (attempt,) = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["http_status"]) == ("available", 200)
    assert 0 < attempt["tls_ms"] < attempt["total_ms"]


def tls_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.mark.parametrize("flaw", ["expired", "another host's", "self-signed"])
async def test_a_file_behind_a_bad_certificate_is_unavailable_with_tls_error(
    daemon: Daemon, authority: trustme.CA, batch: str, flaw: str
) -> None:
    certificate = {
        "expired": lambda: authority.issue_cert("127.0.0.1", not_after=datetime.now(UTC) - timedelta(days=1)),
        "another host's": lambda: authority.issue_cert("files.example.com"),
        "self-signed": lambda: trustme.CA().issue_cert("127.0.0.1"),
    }[flaw]()
    async with Origin(tls=tls_context(certificate)) as origin:
        file, attempts = await settle_one(daemon, batch, origin.url("/a"))
        assert not origin.hits
    assert (file["state"], file["reason"], file["attempts"]) == ("unavailable", "tls_error", 3)
    assert {attempt["reason"] for attempt in attempts} == {"tls_error"}


# --- Files that do not exist, yet or at all ---


async def test_a_file_not_found_is_retried_on_the_schedule_and_then_unavailable(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    origin.on("/a", Answer(404, close=True))
    file, attempts = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["reason"], file["http_status"]) == ("unavailable", "http_404", 404)
    assert file["attempts"] == len(SCHEDULE_MS) + 1
    assert [row["method"] for row in attempts] == ["HEAD"] * file["attempts"] + ["GET"]
    assert [hit.method for hit in origin.hits] == [row["method"] for row in attempts]
    assert file["next_attempt_at"] is None
    assert file["verified_at"] is not None
    assert {(row["http_status"], row["reason"]) for row in attempts} == {(404, "http_404")}
    assert all(wait <= gap for gap, wait in zip(gaps_ms(origin), SCHEDULE_MS, strict=False))


def gaps_ms(origin: Origin) -> list[float]:
    return [(later.at - earlier.at) * 1000 for earlier, later in itertools.pairwise(origin.hits)]


@pytest.mark.parametrize("status", [403, 408, 500, 503])
async def test_a_file_that_answers_late_is_available_in_the_end(
    daemon: Daemon, origin: Origin, batch: str, status: int
) -> None:
    # HEAD answered 403 is followed at once by a ranged GET, and that by a plain one.
    refused = [Answer(status, close=True)] * (3 if status == 403 else 1)
    origin.on("/a", *refused, Answer(headers={"ETag": '"new"'}))
    file, attempts = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["reason"], file["attempts"], file["etag"]) == ("available", None, 2, '"new"')
    assert [row["http_status"] for row in attempts] == [status] * len(refused) + [200]
    assert (await daemon.verdict(batch))["verdict"] == "complete"


async def test_a_file_that_is_gone_is_unavailable_at_once(daemon: Daemon, origin: Origin, batch: str) -> None:
    origin.on("/a", Answer(410))
    file, attempts = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["reason"], file["attempts"]) == ("unavailable", "http_410", 1)
    assert len(attempts) == len(origin.hits) == 1


@pytest.mark.parametrize("status", [400, 403, 405, 501])
async def test_a_file_that_refuses_head_is_requested_by_get_of_one_byte(
    daemon: Daemon, origin: Origin, batch: str, status: int
) -> None:
    part = Answer(206, {"Content-Range": "bytes 0-0/5000", "Content-Type": "image/png"}, body=b"x")
    origin.on("/a", Answer(status), part)
    file, attempts = await settle_one(daemon, batch, origin.url("/a"))
    assert [hit.method for hit in origin.hits] == ["HEAD", "GET"]
    assert origin.hits[1].headers["range"] == "bytes=0-0"
    assert (file["state"], file["reason"], file["attempts"], file["http_status"]) == ("available", None, 1, 206)
    assert (file["content_length"], file["content_type"]) == (5000, "image/png")
    assert [(row["method"], row["http_status"], row["reason"]) for row in attempts] == [
        ("HEAD", status, f"http_{status}"),
        ("GET", 206, None),
    ]


async def test_a_body_that_ignores_the_range_is_cut_off(daemon: Daemon, origin: Origin, batch: str) -> None:
    chunk = b"x" * 65_536
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"
    origin.on("/a", Answer(403), Answer(raw=whole, later=[(0.002, chunk)] * 500, close=True))
    file, _ = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["http_status"], file["content_length"]) == ("available", 200, 1_000_000_000)
    assert file["elapsed_ms"] < 900
    await origin.bell.until(lambda: not origin.live)
    assert origin.bytes_sent < 8_000_000


async def test_a_silent_host_times_out_within_the_total_deadline(daemon: Daemon, origin: Origin, batch: str) -> None:
    origin.default = SILENCE
    file, attempts = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["reason"], file["attempts"]) == ("unavailable", "timeout", 3)
    # The last attempt ends with a GET, which has the time of an attempt of its own.
    assert (file["http_status"], [row["http_status"] for row in attempts]) == (None, [None] * 4)
    assert all(row["total_ms"] >= TIMEOUT_MS for row in attempts)


async def test_a_host_that_refuses_connections_is_a_connect_error(daemon: Daemon, batch: str) -> None:
    async with Origin() as closed:
        url = closed.url("/a")
    file, attempts = await settle_one(daemon, batch, url)
    assert (file["state"], file["reason"], file["attempts"]) == ("unavailable", "connect_error", 3)
    assert [row["reason"] for row in attempts] == ["connect_error"] * 3


async def test_a_name_that_does_not_resolve_is_retried(daemon: Daemon, batch: str) -> None:
    file, attempts = await settle_one(daemon, batch, "http://no-such-host.invalid/a")
    assert file["state"] == "unavailable"
    # A resolver without an answer is a time-out.
    assert file["reason"] in ("dns_error", "timeout")
    assert file["attempts"] == len(attempts) == 3


@pytest.mark.parametrize("status", [401, 404, 406, 422, 500, 502])
async def test_file_that_head_misses_and_get_finds_is_available(
    daemon: Daemon, origin: Origin, batch: str, status: int
) -> None:
    origin.default = lambda hit: Answer(status, close=True) if hit.method == "HEAD" else Answer(body=b"picture")
    file, attempts = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["reason"]) == ("available", None)
    assert attempts[-1]["method"] == "GET"


async def test_file_whose_host_hangs_up_on_head_is_found_by_get_in_the_same_attempt(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    origin.default = lambda hit: Answer(raw=b"", close=True) if hit.method == "HEAD" else Answer(body=b"picture")
    file, _ = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["attempts"]) == ("available", 1)


async def test_get_starts_at_the_original_address_after_a_redirected_head(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    origin.on("/error", Answer(404, close=True))
    origin.default = lambda hit: (
        Answer(302, {"Location": "/error"}, close=True) if hit.method == "HEAD" else Answer(body=b"picture")
    )
    file, _ = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["attempts"], file["final_url"]) == ("available", 1, None)
    assert [(hit.method, hit.path) for hit in origin.hits] == [("HEAD", "/a"), ("HEAD", "/error"), ("GET", "/a")]


@pytest.mark.parametrize("status", [400, 403, 416, 501])
@pytest.mark.parametrize("body", [b"", b"picture" * 100_000])
async def test_file_whose_range_is_refused_is_found_by_a_plain_get_that_is_cut_off(
    daemon: Daemon, origin: Origin, batch: str, status: int, body: bytes
) -> None:
    def answer(hit: Hit) -> Answer:
        refused = hit.method == "HEAD" or "range" in hit.headers
        return Answer(403 if hit.method == "HEAD" else status, close=True) if refused else Answer(body=body)

    origin.default = answer
    file, attempts = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["attempts"], file["content_length"]) == ("available", 1, len(body))
    assert [row["method"] for row in attempts] == ["HEAD", "GET", "GET"]


async def test_file_that_head_finds_costs_one_request(daemon: Daemon, origin: Origin, batch: str) -> None:
    file, _ = await settle_one(daemon, batch, origin.url("/a"))
    assert file["state"] == "available"
    assert [hit.method for hit in origin.hits] == ["HEAD"]


@pytest.mark.parametrize(
    "refusal",
    [Answer(429), Answer(429, {"Retry-After": "1"}), Answer(503, {"Retry-After": "1"})],
    ids=["429", "429 with Retry-After", "503 with Retry-After"],
)
async def test_host_that_serves_a_limited_number_a_second_is_paced_and_all_its_files_are_found(
    tmp_path: Path, origin: Origin, refusal: Answer
) -> None:
    limited = origin.default = Limited(100, refusal)
    async with Daemon(tmp_path, only({"retry_schedule": ["1h"]})) as daemon:
        await daemon.deliver("b", [origin.url(f"/{number}") for number in range(300)])
        assert (await daemon.verdict("b", seconds=60))["verdict"] == "complete"
        assert daemon.value("SELECT count(*) FROM file WHERE attempts = 1 AND state = 'available'") == 300
        assert daemon.count("host asks for fewer requests, it is paced") == 1
    assert limited.refused > 0


async def test_rest_that_a_host_asks_for_is_kept_and_costs_no_attempt(tmp_path: Path, origin: Origin) -> None:
    origin.on("/a", Answer(503, {"Retry-After": "2"}), Answer())
    async with Daemon(tmp_path, only({"retry_schedule": ["1h"]})) as daemon:
        file, attempts = await settle_one(daemon, "b", origin.url("/a"))
    assert (file["state"], file["attempts"], len(attempts)) == ("available", 1, 1)
    (gap,) = gaps_ms(origin)
    assert gap >= 2000


# --- Redirects ---


async def test_redirects_are_followed_and_every_hop_is_recorded(daemon: Daemon, origin: Origin, batch: str) -> None:
    async with Origin() as elsewhere:
        origin.on("/a", Answer(302, {"Location": "b?x=%2F"}))
        origin.on("/b?x=%2F", Answer(307, {"Location": elsewhere.url("/c")}))
        elsewhere.on("/c", Answer(headers={"ETag": '"c"'}))
        file, attempts = await settle_one(daemon, batch, origin.url("/a"))
        final = elsewhere.url("/c")
    assert (file["state"], file["reason"], file["attempts"], file["etag"]) == ("available", None, 1, '"c"')
    assert (file["target_url"], file["final_url"]) == (origin.url("/a"), final)
    assert [(row["url"], row["http_status"], row["reason"]) for row in attempts] == [
        (None, 302, None),
        (origin.url("/b?x=%2F"), 307, None),
        (final, 200, None),
    ]
    assert file["elapsed_ms"] == pytest.approx(sum(row["total_ms"] for row in attempts))


@pytest.mark.parametrize("hops", [0, 2])
@pytest.mark.parametrize(
    "spelling", ["http://127.0.0.2:{port}/x", "//0x7f000002:{port}/x", "http://[::ffff:127.0.0.2]:{port}/x"]
)
async def test_a_redirect_to_a_private_address_is_blocked_and_recorded(
    daemon: Daemon, origin: Origin, trap: Origin, batch: str, hops: int, spelling: str
) -> None:
    location = spelling.format(port=trap.port)
    for hop in range(hops):
        origin.on(f"/{hop}", Answer(302, {"Location": f"/{hop + 1}"}, close=True))
    origin.on(f"/{hops}", Answer(301, {"Location": location}, close=True))
    file, attempts = await settle_one(daemon, batch, origin.url("/0"))
    assert (file["state"], file["reason"], file["attempts"]) == ("blocked", "private_address", 1)
    assert file["final_url"] == location
    assert [row["http_status"] for row in attempts] == [302] * hops + [301]
    assert len(origin.hits) == hops + 1


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.2/x", "gopher://127.0.0.2:70/_x", "javascript:alert(1)"]
)
async def test_a_redirect_to_another_scheme_is_blocked(
    daemon: Daemon, origin: Origin, batch: str, location: str
) -> None:
    origin.on("/a", Answer(302, {"Location": location}))
    file, attempts = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["reason"], file["attempts"]) == ("blocked", "bad_redirect", 1)
    assert file["final_url"] == location
    assert [row["http_status"] for row in attempts] == [302]


async def test_a_redirect_loop_is_too_many_redirects(daemon: Daemon, origin: Origin, batch: str) -> None:
    origin.on("/a", Answer(302, {"Location": "/b"}, close=True))
    origin.on("/b", Answer(302, {"Location": "/a"}, close=True))
    file, attempts = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["reason"]) == ("unavailable", "too_many_redirects")
    # The limit is three redirects followed: four requests an attempt, and four by GET at the end of the last one.
    assert len(origin.hits) == len(attempts) == 4 * file["attempts"] + 4


async def test_as_many_redirects_as_the_limit_are_followed(daemon: Daemon, origin: Origin, batch: str) -> None:
    for hop in range(3):
        origin.on(f"/{hop}", Answer(303, {"Location": f"/{hop + 1}"}))
    file, attempts = await settle_one(daemon, batch, origin.url("/0"))
    assert (file["state"], file["final_url"], len(attempts)) == ("available", origin.url("/3"), 4)


async def test_a_redirect_with_userinfo_is_blocked_and_its_password_is_nowhere(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    origin.on("/a", Answer(302, {"Location": origin.url("/b").replace("//", "//someone:hunter-two@")}))
    file, _ = await settle_one(daemon, batch, origin.url("/a"))
    assert (file["state"], file["reason"]) == ("blocked", "invalid_url")
    assert places_of(daemon, "hunter-two") == []


# --- The guard ---

PRIVATE = [
    "http://127.0.0.2:{port}/",
    "http://127.255.255.254:{port}/",
    "http://2130706434:{port}/",
    "http://0x7f000002:{port}/",
    "http://0177.0.0.2:{port}/",
    "http://127.2:{port}/",
    "http://127.0.0.2.:{port}/",
    "http://①②⑦.⓪.⓪.②:{port}/",
    "http://127。0。0。2:{port}/",
    "http://%31%32%37.0.0.2:{port}/",
    "http://[::ffff:127.0.0.2]:{port}/",
    "http://[::ffff:7f00:2]:{port}/",
    "http://[64:ff9b::7f00:2]:{port}/",
    "http://[::1]:{port}/",
    "http://0.0.0.0:{port}/",
    "http://0:{port}/",
    "http://10.0.0.1/",
    "http://172.31.255.255/",
    "http://192.168.0.1/",
    "http://100.64.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fd00:ec2::254]/",
    "http://[fe80::1]/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
]


async def test_private_addresses_are_refused_in_every_spelling_and_never_dialled(
    daemon: Daemon, trap: Origin, batch: str
) -> None:
    async with Origin("::1", trap.port) as other, Origin("127.255.255.254", trap.port) as last:
        urls = [spelling.format(port=trap.port) for spelling in PRIVATE]
        files = await daemon.settle(batch, urls)
        assert other.connections == last.connections == 0
    for url in urls:
        file = files[url]
        assert (file["state"], file["reason"], file["attempts"]) == ("blocked", "private_address", 0), url
        assert daemon.attempts(file) == []


async def test_loopback_is_refused_when_nothing_is_allowed(tmp_path: Path) -> None:
    async with Origin() as trap, Origin("::1", trap.port) as other:
        names = ["127.0.0.1", "localhost", "LOCALHOST.", "a.localhost", "[::1]", "0.0.0.0", "[::]"]
        urls = [f"http://{name}:{trap.port}/" for name in names]
        async with Daemon(tmp_path, {"verify": {"allowed_networks": []}}) as daemon:
            files = await daemon.settle("b", urls)
            assert daemon.value("SELECT count(*) FROM attempt") == 0
        assert {(file["state"], file["reason"]) for file in files.values()} == {("blocked", "private_address")}
        assert trap.connections == other.connections == 0


async def test_of_a_name_with_two_addresses_only_the_allowed_one_is_dialled(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    # libcurl itself resolves names under localhost, to ::1 and 127.0.0.1; only the latter is allowed.
    async with Origin("::1", origin.port) as trap:
        file, _ = await settle_one(daemon, batch, origin.url("/a", "files.localhost"))
        assert trap.connections == 0
    assert (file["state"], file["remote_addr"]) == ("available", "127.0.0.1")
    assert file["host"] == f"files.localhost:{origin.port}"


INVALID = [
    "http://127.0.0.1\\@{trap}/",
    "http://{trap}\\.example.com/",
    "http://a b.example.com/",
    "http://a%00.example.com/",
    "http://a\r\nHost: x/",
    "http://a\t.example.com/",
    "http://example.com:0/",
    "http://example.com:65536/",
    "http://example.com:port/",
    "http://[::1/",
    "http://[fe80::1%25eth0]/",
    "http://1.2.3.4.5/",
    "http://256.1.1.1/",
    "http://-.-.example..com/",
    f"http://{'a' * 64}.com/",
    "http:// /",
]


async def test_addresses_that_cannot_be_read_are_blocked_as_invalid(daemon: Daemon, trap: Origin, batch: str) -> None:
    urls = [spelling.format(trap=f"127.0.0.2:{trap.port}") for spelling in INVALID]
    files = await daemon.settle(batch, [finished(url, str(number)) for number, url in enumerate(urls)])
    for number, url in enumerate(urls):
        file = files[str(number)]
        assert (file["state"], file["reason"], file["attempts"]) == ("blocked", "invalid_url", 0), url
        assert file["target_url"].isprintable()


async def test_userinfo_is_refused_and_the_password_is_only_in_the_raw_body(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    secret = "correct-horse-battery"
    urls = [
        origin.url("/a").replace("//", f"//someone:{secret}@"),
        origin.url("/b").replace("//", f"//{secret}@"),
        origin.url("/c").replace("//", f"//someone:{secret}%40@"),
    ]
    files = await daemon.settle(batch, [finished(url, str(number)) for number, url in enumerate(urls)])
    assert {(file["state"], file["reason"], file["attempts"]) for file in files.values()} == {
        ("blocked", "invalid_url", 0)
    }
    assert origin.connections == 0
    assert places_of(daemon, secret) == ["notification.body"]


def places_of(daemon: Daemon, text: str) -> list[str]:
    """Where the text stands: columns of the database, and the log."""
    places = ["log"] if text in daemon.text else []
    for (table,) in daemon.sql("SELECT name FROM sqlite_master WHERE type = 'table'"):
        for (column,) in daemon.sql("SELECT name FROM pragma_table_info(?)", table):
            if daemon.value(f"SELECT count(*) FROM {table} WHERE instr({column}, ?)", text):
                places.append(f"{table}.{column}")
    return places


async def test_only_allowed_hosts_and_ports_are_dialled(tmp_path: Path, trap: Origin) -> None:
    async with Origin() as origin, Origin("127.0.0.2", origin.port) as stranger, Origin() as side:
        fence = {
            "allowed_networks": ["127.0.0.0/8"],
            "allowed_ports": [origin.port],
            "allowed_hosts": ["127.0.0.1", "*.files.localhost"],
            "retry_schedule": [],
        }
        port = origin.port
        wanted = {
            origin.url("/a"): ("available", None),
            origin.url("/a", "x.y.files.localhost"): ("available", None),
            origin.url("/a", "files.localhost"): ("blocked", "host_not_allowed"),
            origin.url("/a", "xfiles.localhost"): ("blocked", "host_not_allowed"),
            origin.url("/a", "127.0.0.1.example.com"): ("blocked", "host_not_allowed"),
            stranger.url("/a"): ("blocked", "host_not_allowed"),
            side.url("/a"): ("blocked", "port_not_allowed"),
            "http://127.0.0.1:22/": ("blocked", "port_not_allowed"),
            "http://127.0.0.1/": ("blocked", "port_not_allowed"),
            "https://127.0.0.1/": ("blocked", "port_not_allowed"),
            origin.url("/to-host"): ("blocked", "host_not_allowed"),
            origin.url("/to-port"): ("blocked", "port_not_allowed"),
        }
        origin.on("/to-host", Answer(302, {"Location": f"http://127.0.0.2:{port}/"}))
        origin.on("/to-port", Answer(302, {"Location": side.url("/")}))
        async with Daemon(tmp_path, only(fence)) as daemon:
            files = await daemon.settle("b", wanted)
        assert {url: (file["state"], file["reason"]) for url, file in files.items()} == wanted
        assert stranger.connections == side.connections == 0


async def test_the_default_ports_are_80_and_443(tmp_path: Path, origin: Origin) -> None:
    async with Daemon(tmp_path, {"verify": {"allowed_networks": OPEN, "allowed_ports": [80, 443]}}) as daemon:
        file, _ = await settle_one(daemon, "b", origin.url("/a"))
        assert (file["state"], file["reason"]) == ("blocked", "port_not_allowed")
    assert origin.connections == 0


# --- Hostile origins ---

FILLER = b"X-Filler: " + b"y" * 80 + b"\r\n"
HOSTILE: dict[str, tuple[Answer, set[str]]] = {
    "silence after the status line": (Answer(raw=b"HTTP/1.1 200 OK\r\n"), {"timeout"}),
    "headers that drip": (Answer(raw=b"HTTP/1.1 200 OK\r\n", later=[(0.1, b"X-A: b\r\n")] * 100), {"timeout"}),
    "bytes that drip": (Answer(raw=b"H", later=[(0.1, bytes([b])) for b in b"TTP/1.1 200 OK" * 3]), {"timeout"}),
    "1xx without end": (
        Answer(raw=b"HTTP/1.1 100 Continue\r\n\r\n" * 20, later=[(0.05, b"HTTP/1.1 100 Continue\r\n\r\n")] * 100),
        {"timeout", "protocol_error"},
    ),
    "a flood of 1xx": (Answer(raw=b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 50_000), {"protocol_error"}),
    "a header of 1 MB": (Answer(raw=b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 1_000_000 + b"\r\n\r\n"), {"protocol_error"}),
    "100,000 headers": (Answer(raw=b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 100_000 + b"\r\n"), {"protocol_error"}),
    "status 0": (Answer(raw=b"HTTP/1.1 000 No\r\n\r\n"), {"protocol_error"}),
    "status 101": (Answer(raw=b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"), {"protocol_error", "timeout"}),
    "status 999": (Answer(raw=b"HTTP/1.1 999 No\r\nContent-Length: 0\r\n\r\n"), {"protocol_error", "http_999"}),
    "no HTTP": (Answer(raw=b"SSH-2.0-OpenSSH_9.2p1\r\n", close=True), {"protocol_error"}),
    "HTTP/0.9": (Answer(raw=b"<html>hello</html>", close=True), {"protocol_error"}),
    "half a header and the end": (Answer(raw=b"HTTP/1.1 200 OK\r\nContent-", close=True), {"protocol_error"}),
    "half a header and a reset": (
        Answer(raw=b"HTTP/1.1 200 OK\r\nContent-", later=[(0.05, b"")], reset=True),
        {"protocol_error", "connect_error"},
    ),
    "the end at once": (Answer(raw=b"", close=True), {"protocol_error"}),
    "a reset at once": (Answer(raw=b"", reset=True), {"protocol_error", "connect_error"}),
}


async def test_a_hostile_answer_ends_in_a_stable_code_and_leaves_the_next_file_alone(
    daemon: Daemon, batch: str
) -> None:
    async with asyncio.TaskGroup() as group:
        for number, name in enumerate(HOSTILE):
            group.create_task(_meet_hostile(daemon, f"{batch}-{number}", name))


async def _meet_hostile(daemon: Daemon, batch: str, name: str) -> None:
    answer, reasons = HOSTILE[name]
    async with Origin() as origin:
        origin.on("/bad", answer)
        files = await daemon.settle(batch, [origin.url("/bad"), *(origin.url(f"/{n}") for n in range(5))])
        bad = files.pop(origin.url("/bad"))
        attempts = daemon.attempts(bad)
        assert (bad["state"], bad["attempts"]) == ("unavailable", 3), name
        assert bad["reason"] in reasons, name
        assert all(row["total_ms"] < TIMEOUT_MS + 1500 for row in attempts), name
        assert {(file["state"], file["http_status"], file["attempts"]) for file in files.values()} == {
            ("available", 200, 1)
        }, name


async def test_what_strangers_write_is_kept_sanitised_or_not_at_all(daemon: Daemon, origin: Origin, batch: str) -> None:
    def raw(lines: bytes) -> Answer:
        return Answer(raw=b"HTTP/1.1 200 \x1b[31mfine\xff\r\n" + lines + b"\r\n", close=True)

    origin.on("/type", raw(b"Content-Type: a\x1b[2Jb\xff\x07c\r\nETag: \x80\x9b31m\r\n"))
    origin.on("/long", raw(b"Content-Type: " + b"t" * 5000 + b"\r\nETag: " + b"e" * 5000 + b"\r\n"))
    lengths = {
        "/negative": b"Content-Length: -5\r\n",
        "/huge": b"Content-Length: 99999999999999999999999\r\n",
        "/twice": b"Content-Length: 5\r\nContent-Length: 6\r\n",
        "/word": b"Content-Length: five\r\n",
    }
    for path, lines in lengths.items():
        origin.on(path, raw(lines))
    files = await daemon.settle(batch, [origin.url(path) for path in ("/type", "/long", *lengths)])
    for path in ("/type", "/long"):
        file = files[origin.url(path)]
        assert file["state"] == "available"
        assert file["content_type"].isprintable()
        assert file["etag"].isprintable()
        assert len(file["content_type"]) <= 255
    for path in lengths:
        assert files[origin.url(path)]["content_length"] is None, path
    for column in ("content_type", "etag", "reason"):
        assert not daemon.value(f"SELECT count(*) FROM file WHERE instr({column}, char(27))")


def own_answers(late_status: int) -> Iterator[tuple[str, Answer, tuple[str, int, str]]]:
    """Files whose HEAD is followed by a body, late, on the connection that stays open: a whole answer of its own, with
    another status and another file's mark. Path, answer, and what alone may be stored of it."""
    lie = f'HTTP/1.1 {late_status} Late\r\nContent-Length: 0\r\nETag: "a lie"\r\n\r\n'.encode()
    for number in range(100):
        status = (200, 410)[number % 2]
        mark = f'"{number}"'
        truth = f"HTTP/1.1 {status} X\r\nContent-Length: {len(lie)}\r\nETag: {mark}\r\n\r\n".encode()
        state = "available" if status == 200 else "unavailable"
        pause = (0.0, 0.0005, 0.001, 0.002, 0.005)[number % 5]
        yield f"/{number}", Answer(raw=truth, later=[(pause, lie)]), (state, status, mark)


@pytest.mark.parametrize("late_status", [404, 410])
async def test_a_late_body_never_becomes_another_files_answer(
    daemon: Daemon, origin: Origin, batch: str, late_status: int
) -> None:
    wanted = {}
    for path, answer, stored in own_answers(late_status):
        origin.on(path, answer)
        wanted[origin.url(path)] = stored
    files = await daemon.settle(batch, wanted)
    found = {url: (file["state"], file["http_status"], file["etag"]) for url, file in files.items()}
    assert {url: (found[url], stored) for url, stored in wanted.items() if found[url] != stored} == {}


async def test_a_late_body_that_is_no_answer_harms_nothing(daemon: Daemon, origin: Origin, batch: str) -> None:
    for number in range(100):
        truth = f'HTTP/1.1 200 X\r\nContent-Length: 4000\r\nETag: "{number}"\r\n\r\n'.encode()
        origin.on(f"/{number}", Answer(raw=truth, later=[((number % 5) / 1000, b"\xff\xd8\xff\xe0JFIF" * 500)]))
    files = await daemon.settle(batch, [origin.url(f"/{number}") for number in range(100)])
    for number in range(100):
        file = files[origin.url(f"/{number}")]
        assert (file["state"], file["attempts"], file["etag"]) == ("available", 1, f'"{number}"')


# --- Size, order, repetition ---


async def test_a_batch_of_10000_files_is_acked_at_once_and_delays_no_other(daemon: Daemon, origin: Origin) -> None:
    urls = [origin.url(f"/{number:05}") for number in range(10_000)]
    body = batch_body("large", urls)
    assert (await daemon.post(body)).status == 200
    await daemon.deliver("small", [origin.url("/small")])
    # Both are acked before the large one has been worked off.
    assert daemon.count("verdict", batch_id="large") == 0
    line = await daemon.verdict("large", seconds=60)
    assert (line["verdict"], line["files"], line["available"]) == ("complete", 10_000, 10_000)
    assert daemon.value("SELECT count(*) FROM file_result WHERE batch_id = 'large' AND attempts = 1") == 10_000
    assert len(origin.hits) == 10_001
    await daemon.verdict("small")


async def test_an_identical_redelivery_is_acked_and_has_no_second_verdict(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    entries = [finished(origin.url("/a")), finished(origin.url("/b")), failed("c")]
    before = await daemon.settle(batch, entries)
    for _ in range(3):
        await daemon.deliver(batch, entries)
    # Deliveries are expanded in the order of their arrival: when this one is through, so are those.
    await daemon.settle(f"{batch}-after", [origin.url("/after")])
    assert daemon.count("verdict", batch_id=batch) == 1
    assert [dict(row) for row in daemon.files(batch).values()] == [dict(row) for row in before.values()]
    assert dict(origin.count) == {"/a": 1, "/b": 1, "/after": 1}
    (row,) = daemon.sql("SELECT * FROM batch WHERE batch_id = ?", batch)
    assert (row["deliveries"], row["verdict"], row["files"]) == (4, "incomplete", 3)
    assert daemon.value("SELECT count(*) FROM notification WHERE batch_id = ?", batch) == 4


async def test_a_redelivery_with_new_files_adds_them_and_brings_another_verdict(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    await daemon.settle(batch, [origin.url("/a")])
    files = await daemon.settle(batch, [origin.url("/a"), origin.url("/b")])
    assert {name: file["state"] for name, file in files.items()} == {
        origin.url("/a"): "available",
        origin.url("/b"): "available",
    }
    line = await daemon.verdict(batch, number=2)
    assert (line["verdict"], line["files"]) == ("complete", 2)
    assert dict(origin.count) == {"/a": 1, "/b": 1}
    # A part that leaves files out takes nothing away.
    files = await daemon.settle(batch, [origin.url("/c")])
    assert len(files) == 3


async def test_a_redelivery_with_another_address_probes_that_file_again(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    origin.on("/old", Answer(410, {"ETag": '"old"'}))
    origin.on("/new", Answer(200, {"ETag": '"new"'}))
    before = await daemon.settle(batch, [finished(origin.url("/old"), "f"), finished(origin.url("/same"), "g")])
    assert before["f"]["state"] == "unavailable"
    after = await daemon.settle(batch, [finished(origin.url("/new"), "f"), finished(origin.url("/same"), "g")])
    file = after["f"]
    assert (file["state"], file["reason"], file["attempts"], file["etag"]) == ("available", None, 1, '"new"')
    assert file["target_url"] == origin.url("/new")
    assert (await daemon.verdict(batch, number=2))["verdict"] == "complete"
    assert dict(origin.count) == {"/old": 1, "/same": 1, "/new": 1}


async def test_a_file_reported_failed_is_not_probed_until_it_is_reported_finished(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    url = origin.url("/a")
    files = await daemon.settle(batch, [failed("f", url), failed("g")])
    assert {(file["state"], file["reason"], file["attempts"]) for file in files.values()} == {
        ("upload_failed", None, 0)
    }
    assert (await daemon.verdict(batch))["verdict"] == "incomplete"
    assert origin.connections == 0
    files = await daemon.settle(batch, [finished(url, "f"), finished(origin.url("/g"), "g")])
    assert {(file["state"], file["reported_status"]) for file in files.values()} == {("available", "FINISHED")}
    assert (await daemon.verdict(batch, number=2))["verdict"] == "complete"
    # What comes late does not undo it.
    await daemon.deliver(batch, [failed("f", url)])
    await daemon.settle(f"{batch}-after", [origin.url("/after")])
    assert daemon.count("verdict", batch_id=batch) == 2
    assert daemon.files(batch)["f"]["state"] == "available"


async def test_an_address_that_changes_while_the_old_one_is_probed_starts_over(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    gate = asyncio.Event()
    origin.on("/old", Answer(410, gate=gate))
    await daemon.deliver(batch, [finished(origin.url("/old"), "f")])
    await origin.reached(1, "/old")
    await daemon.deliver(batch, [finished(origin.url("/new"), "f")])
    await daemon.eventually("SELECT target_url = ? FROM file WHERE oss_object_name = 'f' AND batch = "
                            "(SELECT id FROM batch WHERE batch_id = ?)", origin.url("/new"), batch)  # fmt: skip
    gate.set()
    line = await daemon.verdict(batch)
    assert line["verdict"] == "complete"
    assert daemon.files(batch)["f"]["attempts"] == 1
    assert daemon.count("verdict", batch_id=batch) == 1


async def test_a_batch_without_files_is_complete(daemon: Daemon, batch: str) -> None:
    await daemon.settle(batch, [])
    line = await daemon.verdict(batch)
    assert (line["verdict"], line["files"]) == ("complete", 0)


async def test_the_same_batch_id_of_two_interfaces_is_two_batches(daemon: Daemon, origin: Origin, batch: str) -> None:
    for api_code in ("one", "two"):
        body = json.loads(batch_body(batch, [origin.url(f"/{api_code}")])) | {"api_code": api_code}
        assert (await daemon.post(json.dumps(body).encode())).status == 200
        await daemon.line("verdict", batch_id=batch, api_code=api_code)
    assert daemon.value("SELECT count(*) FROM batch WHERE batch_id = ? AND files = 1", batch) == 2


# --- Hosts, one beside the other ---


@pytest.mark.parametrize("kind", ["silent", "refusing"])
async def test_a_dead_host_does_not_keep_other_hosts_files_waiting(tmp_path: Path, origin: Origin, kind: str) -> None:
    settings = {"timeout": "500ms", "connect_timeout": "500ms", "retry_schedule": ["1h", "1h"]}
    async with Origin("127.0.0.2") as dead:
        dead.default = SILENCE
        port = dead.port
        silent = kind == "silent"
        async with Daemon(tmp_path, {"verify": settings}) as daemon:
            where = f"http://127.0.0.2:{port}" if silent else "http://127.0.0.3:9"
            await daemon.deliver("dead", [f"{where}/{number}" for number in range(2000)])
            # Its circuit is about to open, or open.
            await daemon.line("host does not answer, its files wait")
            await daemon.settle("healthy", [origin.url(f"/{number}") for number in range(200)])
            # The dead host's queue takes 31 s at its own speed.
            assert (await daemon.verdict("healthy"))["verdict"] == "complete"
            assert daemon.count("verdict", batch_id="dead") == 0

            (row,) = daemon.sql(
                "SELECT count(*) AS files, sum(attempts) AS spent, sum(attempts = 0) AS untouched,"
                " max(attempts) AS most,"
                " (SELECT count(*) FROM attempt WHERE attempt.file IN (SELECT id FROM file WHERE host = ?)) AS tried"
                " FROM file WHERE host = ? AND state = 'pending'",
                *[where.removeprefix("http://")] * 2,
            )
            # Only requested files have spent an attempt; waiting ones have not.
            assert row["files"] == 2000
            assert row["most"] == 1
            assert row["spent"] == row["tried"]
            assert row["untouched"] == 2000 - row["spent"] > 0
            if silent:
                assert row["spent"] <= len(dead.hits)
                assert row["untouched"] > 1500


async def test_a_host_that_comes_back_has_all_its_files_verified(tmp_path: Path, batch: str) -> None:
    settings = {"timeout": "300ms", "connect_timeout": "300ms", "retry_schedule": ["100ms"] * 20}
    async with Daemon(tmp_path, {"verify": settings}) as daemon:
        async with Origin() as before:
            port = before.port
        urls = [f"http://127.0.0.1:{port}/{number}" for number in range(300)]
        await daemon.deliver("b", urls)
        await daemon.line("host does not answer, its files wait")
        async with Origin(port=port):
            line = await daemon.verdict("b")
        assert (line["verdict"], line["available"]) == ("complete", 300)


async def test_the_limit_of_requests_to_one_host_is_kept_and_used(tmp_path: Path, origin: Origin) -> None:
    origin.default = Answer(delay=0.03)
    settings = {"per_host_concurrency": 4, "hosts": {"*.narrow.localhost": {"per_host_concurrency": 1}}}
    async with Daemon(tmp_path, only(settings)) as daemon, Origin() as narrow, Origin() as second:
        narrow.default = second.default = origin.default
        urls = [origin.url(f"/{number}") for number in range(40)]
        urls += [narrow.url(f"/{number}", "a.narrow.localhost") for number in range(10)]
        urls += [second.url(f"/{number}", "narrow.localhost") for number in range(20)]
        await daemon.settle("b", urls)
        assert (origin.busiest, narrow.busiest, second.busiest) == (4, 1, 4)


async def test_the_interval_between_requests_to_one_host_is_kept(tmp_path: Path, origin: Origin) -> None:
    settings = {"per_host_interval": "60ms", "hosts": {"127.0.0.2": {"per_host_interval": 0}}}
    async with Origin("127.0.0.2") as quick, Daemon(tmp_path, {"verify": settings}) as daemon:
        urls = [origin.url(f"/{number}") for number in range(12)] + [quick.url(f"/{number}") for number in range(50)]
        await daemon.settle("b", urls)
        moments = [hit.at for hit in origin.hits]
        assert moments[-1] - moments[0] >= 0.060 * 8
        # On their way two of them may draw together, so each one's start counts; it is rounded to a millisecond.
        starts = [
            row["started_at"]
            for row in daemon.sql(
                "SELECT started_at FROM attempt JOIN file ON file.id = attempt.file WHERE host = ? ORDER BY started_at",
                f"127.0.0.1:{origin.port}",
            )
        ]
        assert len(starts) == 12
        assert all(later - earlier >= 59 for earlier, later in itertools.pairwise(starts))
        assert quick.hits[-1].at - quick.hits[0].at < moments[-1] - moments[0]


async def test_settings_of_one_host_apply_to_it_alone(tmp_path: Path, origin: Origin) -> None:
    settings = {
        "retry_schedule": [],
        "hosts": {"127.0.0.2": {"methods": ["GET"], "accept_status": ["200", "404"], "max_redirects": 0}},
    }
    async with Origin("127.0.0.2") as other, Daemon(tmp_path, {"verify": settings}) as daemon:
        for server in (origin, other):
            server.on("/missing", Answer(404))
            server.on("/moved", Answer(302, {"Location": "/there"}))
        paths = ("/missing", "/moved")
        files = await daemon.settle("b", [server.url(path) for server in (origin, other) for path in paths])
        states = {url: (file["state"], file["reason"]) for url, file in files.items()}
        assert states == {
            origin.url("/missing"): ("unavailable", "http_404"),
            origin.url("/moved"): ("available", None),
            other.url("/missing"): ("available", None),
            other.url("/moved"): ("unavailable", "too_many_redirects"),
        }
        assert {hit.method for hit in other.hits} == {"GET"}
