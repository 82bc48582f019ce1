"""The JSON API over real sockets: reads, actions, and errors."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from openapi_spec_validator import OpenAPIV31SpecValidator

from notify_server import operations as actions
from notify_server.app import API
from notify_server.clock import unix_ms
from notify_server.operations import Pruned, Rechecked, Replayed
from notify_server.store.export import csv_lines
from notify_server.store.reading.types import (
    BatchDetail,
    BatchItem,
    FailureGroup,
    FileDetail,
    FileItem,
    Found,
    Page,
    RejectionDetail,
    RejectionItem,
    Totals,
)
from notify_server.store.sqlite.database import connect
from notify_server.store.sqlite.records import SqliteRecords
from notify_server.telemetry.history import Sample
from notify_server.web import bodies
from notify_server.web.api.cache import MAX_AGE_SECONDS, MIN_AGE_SECONDS, TimedCache, max_age
from notify_server.web.api.endpoints import ENDPOINTS
from notify_server.web.api.handlers import EXPORT_ROWS, Api
from notify_server.web.api.types import Host, Status
from notify_server.web.openapi import Endpoint
from tests.support.app import JSON, AppServer, Clock, Start
from tests.support.http import Reply
from tests.support.notification import entry, notification
from tests.support.waiting import SECONDS, eventually

PROBING: Mapping[str, Any] = {"allowed_networks": ["127.0.0.0/8"], "allowed_ports": [], "retry_schedule": ["1h"]}


class Origin:
    """A server whose files answer 200, unless another status is set for the path; a path's `gate` holds it back. Use it
    with `async with`.
    """

    def __init__(self) -> None:
        self.statuses: dict[str, int] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.reached: Counter[str] = Counter()
        app = web.Application()
        app.router.add_get("/{path}", self._answer)
        self._server = TestServer(app)

    async def __aenter__(self) -> Self:
        await self._server.start_server()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.close()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    async def _answer(self, request: web.Request) -> web.Response:
        self.reached[request.path] += 1
        status = self.statuses.get(request.path, 200)
        if gate := self.gates.get(request.path):
            await gate.wait()
        # A bad answer counts only on a fresh connection.
        return web.Response(status=status, headers={"Connection": "close"})


class Filled:
    """A daemon whose record has something of everything, and the origin of its files."""

    def __init__(self, daemon: AppServer, origin: Origin) -> None:
        self.daemon = daemon
        self.origin = origin
        self.complete = notification(*(self.file("/good") for _ in range(3)), api_code="alpha")
        self.incomplete = notification(
            self.file("/good"),
            self.file("/gone"),
            entry(target_url="http://elsewhere.test/x"),
            entry(status="FAILED", target_url=...),
            api_code="alpha",
        )
        self.pending = notification(self.file("/missing"), self.file("/missing"), api_code="beta")

    def file(self, path: str) -> dict[str, Any]:
        return entry(target_url=self.origin.url(path))

    async def get(self, path: str, kind: type[Any], **parameters: Any) -> Any:
        answer = await self.daemon.get(f"/api/v1/{path}", params=parameters)
        assert answer.status == 200, answer
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Cache-Control"] == "no-store"
        return msgspec.json.decode(answer.body, type=kind)

    async def refusal(self, path: str, status: int = 400, **parameters: Any) -> str:
        return (await self.daemon.get(f"/api/v1/{path}", params=parameters)).refusal(status, str(status))

    def id_of(self, body: Mapping[str, Any]) -> int:
        return id_of(self.daemon, body)


def bearer(daemon: AppServer) -> str:
    """The header line of a request that is written by hand."""
    return f"Authorization: Bearer {daemon.token}"


def id_of(daemon: AppServer, body: Mapping[str, Any]) -> int:
    """The id of this notification's batch."""
    ((id,),) = daemon.rows("SELECT id FROM batch WHERE batch_id = ?", body["batch_id"])
    return int(id)


async def act(daemon: AppServer, path: str, body: object = None) -> Reply:
    return await daemon.post(json.dumps(body if body is not None else {}).encode(), path=f"/api/v1/{path}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def filled(start_shared: Start) -> AsyncIterator[Filled]:
    async with Origin() as origin:
        origin.statuses = {"/gone": 410, "/missing": 404}
        it = Filled(await start_shared(verify={**PROBING, "allowed_hosts": ["127.0.0.1"]}), origin)
        for body in (it.complete, it.incomplete, it.pending):
            (await it.daemon.post(body)).accepted()
        for number in range(3):
            (await it.daemon.post({"batch_id": f"refused-{number}"})).refusal(400, "400")
        for body in (it.complete, it.incomplete):
            await it.daemon.settled(body["batch_id"])
        await eventually(lambda: it.daemon.rows("SELECT 1 FROM file WHERE reason = 'http_404' LIMIT 1 OFFSET 1"))
        await eventually(lambda: it.daemon.count("rejection") == 3)
        yield it


# --- What it tells ---


async def test_the_process_tells_what_it_is_at(filled: Filled) -> None:
    status = await filled.get("status", Status)
    assert (status.backlog, status.in_flight) == (2, 0)
    assert re.fullmatch(r"\d+\.\d+\.\d+", status.version)
    assert status.last is not None and status.last.backlog <= 9


async def test_status_counts_the_record(filled: Filled) -> None:
    totals = await filled.get("totals", Totals)
    assert (totals.batches, totals.batches_complete, totals.batches_incomplete, totals.batches_pending) == (3, 1, 1, 1)
    assert (totals.files, totals.available, totals.unavailable, totals.blocked, totals.upload_failed) == (9, 4, 1, 1, 1)
    assert (totals.pending, totals.rejections) == (2, 3)
    assert totals.oldest_pending_at is not None


async def test_activity_is_given_by_the_second_and_by_the_minute(filled: Filled) -> None:
    async with asyncio.timeout(SECONDS):
        while sum(sample.refused for sample in (await filled.get("series", Page[Sample])).items) < 3:
            await asyncio.sleep(0.05)
    seconds = (await filled.get("series", Page[Sample])).items
    assert sum(sample.accepted for sample in seconds) == 3
    assert sum(sample.requests for sample in seconds) >= 7
    assert await filled.get("series", Page[Sample], step="minute") == Page([])


async def test_batches_are_found_by_each_filter_and_the_latest_comes_first(filled: Filled) -> None:
    async def found(**parameters: Any) -> list[str]:
        page = await filled.get("batches", Page[BatchItem], **parameters)
        assert page.next is None
        return [batch.batch_id for batch in page.items]

    complete, incomplete, pending = (body["batch_id"] for body in (filled.complete, filled.incomplete, filled.pending))
    assert set(await found()) == {complete, incomplete, pending}
    assert (await found(api_code="alpha"))[::-1] == [complete, incomplete]
    assert await found(verdict="complete") == [complete]
    assert await found(verdict="incomplete", api_code="alpha") == [incomplete]
    assert await found(verdict="pending", api_code="alpha") == []
    assert await found(batch_id=pending) == [pending]
    first = (await filled.get("batches", Page[BatchItem], batch_id=complete)).items[0].first_received_at
    assert complete in await found(received_from=first.isoformat())
    assert await found(received_before=first.isoformat()) == []
    assert await found(received_from="9999-12-31T23:59:59Z") == []


async def test_pages_of_batches_follow_each_other_without_a_gap(filled: Filled) -> None:
    everything = (await filled.get("batches", Page[BatchItem])).items
    pieces: list[BatchItem] = []
    cursor: dict[str, str] = {}
    while True:
        page = await filled.get("batches", Page[BatchItem], limit=1, **cursor)
        pieces += page.items
        if page.next is None:
            break
        cursor = {"cursor": page.next}
    assert pieces == everything


async def test_a_batch_has_its_latest_delivery_and_its_files(filled: Filled) -> None:
    id = filled.id_of(filled.incomplete)
    batch = await filled.get(f"batches/{id}", BatchDetail)
    assert (batch.files, batch.available, batch.unavailable, batch.blocked, batch.upload_failed) == (4, 1, 1, 1, 1)
    assert batch.last_delivery is not None and batch.last_delivery.files == 4
    files = (await filled.get(f"batches/{id}/files", Page[FileItem])).items
    assert [file.oss_object_name for file in files] == sorted(
        file["oss_object_name"] for file in filled.incomplete["file_list"]
    )
    (gone,) = (await filled.get(f"batches/{id}/files", Page[FileItem], state="unavailable")).items
    assert (gone.reason, gone.http_status, gone.attempts) == ("http_410", 410, 1)
    (blocked,) = (await filled.get(f"batches/{id}/files", Page[FileItem], reason="host_not_allowed")).items
    assert (blocked.state, blocked.host) == ("blocked", "elsewhere.test")
    first = await filled.get(f"batches/{id}/files", Page[FileItem], limit=3)
    rest = await filled.get(f"batches/{id}/files", Page[FileItem], limit=3, cursor=first.next)
    assert first.items + rest.items == files


async def test_a_file_has_its_requests(filled: Filled) -> None:
    page = await filled.get("files", Page[FileItem], reason="http_404", host=filled.origin.host, state="pending")
    assert len(page.items) == 2
    file = await filled.get(f"files/{page.items[0].id}", FileDetail)
    assert {"HEAD"} == {request.method for request in file.requests}
    assert file.requests[-1].http_status == 404
    assert file.next_attempt_at is not None
    assert (await filled.get("files", Page[FileItem], reason="http_404", state="available")).items == []


async def test_failures_and_pending_files_are_grouped_by_reason_and_host(filled: Filled) -> None:
    groups = (await filled.get("failures", Page[FailureGroup])).items
    assert {(group.reason, group.host, group.state, group.files) for group in groups} == {
        ("http_404", filled.origin.host, "pending", 2),
        ("http_410", filled.origin.host, "unavailable", 1),
        ("host_not_allowed", "elsewhere.test", "blocked", 1),
        (None, "", "upload_failed", 1),
    }
    (host,) = (await filled.get("hosts", Page[Host])).items
    assert (host.host, host.pending, host.circuit, host.in_flight) == (filled.origin.host, 2, "closed", 0)
    assert (host.last_minute.attempts, host.last_minute.failed) == (7, 3)


async def test_refused_bodies_are_listed_and_shown(filled: Filled) -> None:
    first = await filled.get("rejections", Page[RejectionItem], limit=2)
    rest = await filled.get("rejections", Page[RejectionItem], limit=2, cursor=first.next)
    ids = [item.id for item in first.items + rest.items]
    assert ids == sorted(ids, reverse=True) and len(ids) == 3 and rest.next is None
    shown = await filled.get(f"rejections/{ids[0]}", RejectionDetail)
    assert re.fullmatch(r'{"batch_id": "refused-\d"}', shown.body)
    assert shown.code == "400" and shown.detail.startswith("api_code")


async def test_a_search_finds_batches_by_their_beginning_and_files_by_their_key(filled: Filled) -> None:
    found = await filled.get("search", Found, q=filled.complete["batch_id"][:-1])
    assert filled.complete["batch_id"] in [batch.batch_id for batch in found.batches]
    key = filled.pending["file_list"][0]["oss_object_name"]
    assert [file.oss_object_name for file in (await filled.get("search", Found, q=key)).files] == [key]


@pytest.mark.parametrize("text", ["%", "_", "*", "' OR 1=1 --", '"; DROP TABLE file; --', "\0", "\udcff", "😀", "null"])
async def test_search_and_filter_texts_are_taken_literally(filled: Filled, text: str) -> None:
    """Threat row 88."""
    if not text.isascii() and not text.isprintable():
        text = "%FF"
    assert await filled.get("search", Found, q=text) == Found([], [])
    assert (await filled.get("files", Page[FileItem], host=text)).items == []
    assert (await filled.get("batches", Page[BatchItem], batch_id=text)).items == []
    assert (await filled.get("batches", Page[BatchItem], api_code=text)).items == []
    assert filled.daemon.count("file") == 9


# --- Errors ---


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("batches?limit=0", "limit: must be a whole number from 1 to 1000"),
        ("batches?limit=1001", "limit: must be a whole number from 1 to 1000"),
        ("batches?limit=" + "9" * 5000, "limit: must be a whole number from 1 to 1000"),
        ("batches?limit=1e2", "limit: must be a whole number from 1 to 1000"),
        ("batches?limit=%EF%BC%91", "limit: must be a whole number from 1 to 1000"),
        ("batches?limit=", "limit: must be a whole number from 1 to 1000"),
        ("batches?limit=1&limit=2", "limit: may be given only once"),
        ("batches?limti=1", "limti: is not a parameter here, did you mean limit?"),
        ("batches?order=id", "order: is not a parameter here, there are verdict, api_code, batch_id, received_from, "
         "received_before, acknowledged, cursor, limit"),
        ("batches?verdict=good", "verdict: must be one of complete, incomplete, pending"),
        ("batches?verdict=null", "verdict: must be one of complete, incomplete, pending"),
        ("batches?api_code=", "api_code: must be text of 1 to 2000 characters"),
        ("batches?received_from=yesterday",
         "received_from: must be a time like 2026-11-23T08:00:00Z (+ is written %2B in an address)"),
        ("batches?received_from=2026-11-23T08:00:00",
         "received_from: must be a time like 2026-11-23T08:00:00Z (+ is written %2B in an address)"),
        ("batches?received_before=1700000000",
         "received_before: must be a time like 2026-11-23T08:00:00Z (+ is written %2B in an address)"),
        ("batches/1/files?state=gone", "state: must be one of available, blocked, pending, unavailable, upload_failed"),
        ("files?reason=dns_erorr", "reason: dns_erorr is not a reason, did you mean dns_error?"),
        ("files?reason=http_40", "reason: http_40 is not a reason: http_ is followed by the three "
         "digits of a status, like http_404"),
        ("batches/1/files?reason=%EF%BC%91", "reason: １ is not a reason: there are timeout, dns_error, connect_error, "
         "tls_error, too_many_redirects, bad_redirect, protocol_error, private_address, port_not_allowed, "
         "host_not_allowed, invalid_url, empty, not_media, archived, hotlink, expired, and http_404, http_500 and so "
         "on"),
        ("export?reason=gone", "reason: gone is not a reason: there are timeout, dns_error, connect_error, "
         "tls_error, too_many_redirects, bad_redirect, protocol_error, private_address, port_not_allowed, "
         "host_not_allowed, invalid_url, empty, not_media, archived, hotlink, expired, and http_404, http_500 and so "
         "on"),
        ("search", "q: is needed"),
        ("series?step=hour", "step: must be one of minute, second"),
        ("export?batch=0", "batch: must be a whole number, 1 or more"),
        ("export?batch=99999999999999999999", "batch: must be a whole number, 1 or more"),
        ("export?format=xml", "format: must be one of csv, ndjson"),
        ("totals?fresh=1", "fresh: is not a parameter here, there are none"),
    ],
)  # fmt: skip
async def test_a_wrong_parameter_is_named_in_plain_words(filled: Filled, asked: str, said: str) -> None:
    answer = await filled.daemon.get(f"/api/v1/{asked}")
    assert answer.refusal(400, "400") == said
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("recheck", b"", "body: is needed, {} at least"),
        ("recheck", b"{", "body: is not JSON (Input data was truncated)"),
        ("recheck", b"[]", "body: must be an object"),
        ("recheck", b'"\xff"', "body: is not JSON"),
        ("recheck", b"[" * 60_000, "body: is not JSON"),
        ("recheck", b'{"reason": "\\ud800"}', "body: is not JSON"),
        ("recheck", b"{}", "file, batch, reason, host, api_code or states: name one, to say which files"),
        ("recheck", b'{"file": 1, "batch": 1}', "file: name it alone, without batch, reason or host"),
        ("recheck", b'{"file": 0}', "file: must be a whole number, 1 or more or null"),
        ("recheck", b'{"file": 18446744073709551616}', "file: must be a whole number, 1 or more or null"),
        ("recheck", b'{"batch": "1"}', "batch: must be a whole number, 1 or more or null"),
        ("recheck", b'{"batch": 1, "dry_run": 1}', "dry_run: must be true or false"),
        ("recheck", b'{"bacth": 1}', "bacth: is not a parameter here, did you mean batch?"),
        ("recheck", b'{"batch": 1, "states": ["gone"]}', "states: must be a list, each one of available, "),
        ("prune", b'{"completed_before": "now"}', "completed_before: must be a time like 2026-11-23T08:00:00Z"),
        ("prune", b'{"completed_before": 1}', "completed_before: must be a time like 2026-11-23T08:00:00Z"),
    ],
)
async def test_a_wrong_field_of_a_body_is_named_in_plain_words(
    filled: Filled, path: str, body: bytes, said: str
) -> None:
    assert (await filled.daemon.post(body, path=f"/api/v1/{path}")).refusal(400, "400").startswith(said)


@pytest.mark.parametrize("cursor", ["x", "zz", "00", "5b5d", "ff" * 900, "\0", "5b312c22785d"])
async def test_a_cursor_that_was_not_given_out_is_refused(filled: Filled, cursor: str) -> None:
    for path in ("batches", "rejections", "batches/1/files"):
        assert (await filled.refusal(path, cursor=cursor)).startswith("cursor: ")
    assert (await filled.refusal("files", reason="http_404", cursor=cursor)).startswith("cursor: ")


async def test_a_cursor_of_another_listing_is_refused(filled: Filled) -> None:
    first = await filled.get("rejections", Page[RejectionItem], limit=2)
    assert (await filled.refusal("batches", cursor=first.next)).startswith("cursor: ")
    batches = await filled.get("batches", Page[BatchItem], limit=1)
    assert (await filled.refusal("files", reason="http_404", cursor=batches.next)).startswith("cursor: ")
    assert (await filled.refusal("rejections", cursor=batches.next)).startswith("cursor: ")


@pytest.mark.parametrize("id", ["0", "4711", str(2**63 - 1), "9" * 19, "0000000000000004711"])
@pytest.mark.parametrize("path", ["batches/{}", "batches/{}/files", "files/{}", "rejections/{}"])
async def test_an_unknown_resource_is_not_found(filled: Filled, path: str, id: str) -> None:
    assert await filled.refusal(path.format(id), 404) == "no row has this id: it may have been deleted"


@pytest.mark.parametrize("id", ["-1", "x", "1.5", "9" * 20, "1%00", "%EF%BC%91"])
async def test_an_invalid_id_is_not_served(filled: Filled, id: str) -> None:
    assert await filled.refusal(f"batches/{id}", 404) == "nothing is served at this path"


async def test_actions_on_unknown_resources_are_not_found(filled: Filled) -> None:
    for path, body in (("recheck", {"file": 4711}), ("recheck", {"batch": 4711}), ("rejections/4711/replay", None)):
        (await act(filled.daemon, path, body)).refusal(404, "404")


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.handler)
async def test_another_method_is_refused_with_the_one_there_is(filled: Filled, endpoint: Endpoint) -> None:
    path = endpoint.path.replace("{id}", "1").replace("{name}", "1")
    served = [each.method for each in ENDPOINTS if each.path == endpoint.path]
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"):
        if method not in served:
            answer = await filled.daemon.ask(method, path)
            assert answer.refusal(405, "405") == f"only {', '.join(served)} is allowed"
            assert answer.headers["Allow"] == ", ".join(served)


# Those that need a parameter, an endpoint or a delivery have tests of their own.
PLAIN = [
    each for each in ENDPOINTS
    if each.method == "GET" and each.id not in ("verdict", "forward_deliveries", "forward_delivery", "expectation")
]  # fmt: skip


@pytest.mark.parametrize("endpoint", PLAIN, ids=lambda e: e.id)
async def test_head_is_answered_as_get_without_the_body_and_ends(filled: Filled, endpoint: Endpoint) -> None:
    path = endpoint.path.replace("{id}", "1")
    query = {"q": "x"} if endpoint.id == "search" else {}
    async with asyncio.timeout(5):
        answer = await filled.daemon.ask("HEAD", path, params=query)
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["Content-Type"].partition(";")[0] == (*endpoint.media, "application/json")[0]


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"},
     {**JSON, "Content-Encoding": "gzip"}],
)  # fmt: skip
async def test_a_body_that_a_form_could_send_is_refused(filled: Filled, headers: dict[str, str]) -> None:
    answer = await filled.daemon.post(b"{}", headers, path="/api/v1/prune")
    assert answer.refusal(415, "415") == "Content-Type: must be application/json"


async def test_a_body_that_is_too_large_is_refused(filled: Filled) -> None:
    body = b'{"reason": "' + b"x" * bodies.MAX_BODY_BYTES + b'"}'
    assert (await filled.daemon.post(body, path="/api/v1/recheck")).refusal(413, "413").startswith("body: larger than")


async def test_a_body_that_does_not_come_is_given_up(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "STALLED_SECONDS", 0.05)
    connection = await filled.daemon.connect()
    await connection.send(
        f"POST /api/v1/prune HTTP/1.1\r\nHost: h\r\n{bearer(filled.daemon)}\r\nContent-Type: application/json\r\n"
        "Content-Length: 9\r\n\r\n{".encode()
    )
    answer = await connection.answer()
    assert answer.refusal(408, "408") == "body: did not arrive in time"
    assert answer.headers["Connection"] == "close"


async def test_an_unreadable_record_is_answered_busy_and_read_again_later(start: Start, tmp_path: Path) -> None:
    daemon = await start()
    served = served_api(daemon)
    there, away = served.records, SqliteRecords(tmp_path / "elsewhere.db")
    served.records = away
    for path in ("batches", "totals", "files/1", "export", "search?q=x"):
        answer = await daemon.get(f"/api/v1/{path}")
        assert "there is no record" in answer.refusal(503, "503")
        assert answer.headers["Retry-After"] == "5"
    assert (await daemon.get("/api/v1/status")).status == 200
    make_record(tmp_path / "elsewhere.db", 1)
    assert (await daemon.get("/api/v1/totals")).json["batches"] == 1
    served.records = there
    await away.close()


async def test_a_read_that_takes_too_long_is_cut_off(filled: Filled) -> None:
    served = served_api(filled.daemon)
    slow, served.records = served.records, impatient_records(filled.daemon.path)
    try:
        assert await filled.refusal("batches", 503) == ("that is too much to read at once: narrow it down")
    finally:
        await served.records.close()
        served.records = slow


# --- What it does ---


async def failing(start: Start, origin: Origin, **sections: Any) -> AppServer:
    origin.statuses = {"/f": 410}
    return await start(verify={**PROBING, "allowed_hosts": ["127.0.0.1"]}, **sections)


async def test_a_recheck_of_a_file_takes_effect_at_once(start: Start) -> None:
    async with Origin() as origin:
        daemon = await failing(start, origin)
        body = notification(entry(target_url=origin.url("/f")))
        (await daemon.post(body)).accepted()
        assert (await daemon.settled(body["batch_id"]))["verdict"] == "incomplete"
        assert (await daemon.get("/api/v1/totals")).json["batches_incomplete"] == 1
        origin.statuses = {}
        since = len(daemon.events.all)
        wanted = {"file": 1, "dry_run": True}
        assert (await act(daemon, "recheck", wanted)).json == {"files": 1, "more": False}
        assert daemon.rows("SELECT state FROM file") == [("unavailable",)]
        assert (await act(daemon, "recheck", {"file": 1})).json == {"files": 1, "more": False}
        # Totals over the whole record are counted again after an action.
        assert (await daemon.get("/api/v1/totals")).json["batches_incomplete"] == 0
        again = await daemon.events.seen("verdict", since, batch_id=body["batch_id"])
        assert again["verdict"] == "complete"


async def test_a_dry_run_counts_the_files_that_a_recheck_takes(start: Start) -> None:
    async with Origin() as origin:
        daemon = await failing(start, origin)
        origin.statuses["/later"] = 404
        body = notification(
            *(entry(target_url=origin.url("/f")) for _ in range(3)),
            *(entry(target_url="http://elsewhere.test/x") for _ in range(2)),
            entry(target_url=origin.url("/later")),
            entry(target_url=origin.url("/good")),
            entry(target_url="http://[/"),
            entry(status="FAILED", target_url=...),
        )
        (await daemon.post(body)).accepted()
        await eventually(lambda: daemon.rows("SELECT 1 FROM file WHERE reason = 'http_404'"))
        await eventually(lambda: daemon.rows("SELECT 1 FROM batch WHERE pending = 1"))
        assert daemon.rows("SELECT count(*) FROM file WHERE reason = 'invalid_url'") == [(1,)]
        ((failed,),) = daemon.rows("SELECT id FROM file WHERE state = 'upload_failed'")
        # Nothing answers any more: a recheck stays pending.
        origin.statuses = {"/f": 503, "/later": 503, "/good": 503}
        host = origin.host
        for wanted, files in (
            ({"file": failed}, 0),
            ({"reason": "http_410", "host": "other.test"}, 0),
            ({"reason": "invalid_url"}, 0),
            ({"batch": 1, "states": []}, 0),
            ({"batch": 1, "states": ["upload_failed"]}, 0),
            ({"reason": "http_404", "host": host, "states": ["pending"]}, 1),
            ({"batch": 1, "host": "elsewhere.test"}, 2),
            ({"reason": "http_410", "host": host}, 3),
            ({"batch": 1, "states": ["available", "available"]}, 1),
        ):
            counted = await act(daemon, "recheck", {**wanted, "dry_run": True})
            assert counted.json == {"files": files, "more": False}, wanted
            done = await act(daemon, "recheck", wanted)
            assert done.json == {"files": files, "more": False}, wanted
            # Guarded again, addresses that are not allowed are settled once more.
            await eventually(lambda: daemon.rows("SELECT 1 FROM batch WHERE blocked = 3"))


async def test_a_recheck_of_a_file_in_flight_requests_it_again(start: Start) -> None:
    async with Origin() as origin:
        gate = origin.gates["/f"] = asyncio.Event()
        daemon = await failing(start, origin)
        body = notification(entry(target_url=origin.url("/f")))
        (await daemon.post(body)).accepted()
        await eventually(lambda: origin.reached["/f"])
        assert (await act(daemon, "recheck", {"batch": 1})).json == {"files": 1, "more": False}
        origin.statuses = {}
        gate.set()
        assert (await daemon.settled(body["batch_id"]))["verdict"] == "complete"
        assert origin.reached["/f"] == 2


async def test_a_recheck_too_large_for_one_request_says_so_and_goes_on_with_the_next(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "ACTION_SECONDS", 0.0)
    monkeypatch.setattr(actions, "ACTION_ROWS", 2)
    daemon = await start()
    body = notification(*(entry(target_url=f"http://elsewhere.test/{n}") for n in range(5)))
    (await daemon.post(body)).accepted()
    await daemon.settled(body["batch_id"])
    first = msgspec.json.decode((await act(daemon, "recheck", {"reason": "host_not_allowed"})).body, type=Rechecked)
    assert first == Rechecked(2, more=True)
    await eventually(lambda: daemon.rows("SELECT 1 FROM batch WHERE blocked = 5"))
    monkeypatch.setattr(actions, "ACTION_SECONDS", 15.0)
    whole = await act(daemon, "recheck", {"reason": "host_not_allowed"})
    assert whole.json["files"] >= 5 and not whole.json["more"]


async def test_a_refused_body_is_taken_after_all_when_more_is_allowed(start: Start) -> None:
    strict = await start(contract={"max_files": 1})
    body = notification(entry(), entry())
    (await strict.post(body)).refusal(400, "400")
    await eventually(lambda: strict.count("rejection") == 1)
    again = await act(strict, "rejections/1/replay")
    assert again.refusal(400, "400").startswith("it is still refused: file_list: ")
    assert strict.count("rejection") == 1
    await strict.stop()
    daemon = await start()
    answers = await asyncio.gather(*(act(daemon, "rejections/1/replay") for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [200, 404, 404, 404, 404]
    (taken,) = (msgspec.json.decode(answer.body, type=Replayed) for answer in answers if answer.status == 200)
    await daemon.settled(body["batch_id"])
    assert daemon.rows("SELECT id, request_id, files FROM notification") == [(taken.delivery, taken.request_id, 2)]
    assert daemon.count("rejection") == 0
    (await act(daemon, "rejections/1/replay")).refusal(404, "404")
    assert (await daemon.get("/api/v1/totals")).json["batches"] == 1


async def test_old_batches_are_deleted_by_retention_or_by_a_time(start: Start) -> None:
    clock = Clock(1_700_000_000_000)
    daemon = await start(clock=clock, retention={"completed": "1d", "rejections": "1d"})
    old, new = notification(entry()), notification(entry())

    async def deliver(body: dict[str, Any]) -> None:
        (await daemon.post(body)).accepted()
        await daemon.settled(body["batch_id"])
        (await daemon.post({})).refusal(400, "400")

    async def prune(**wanted: str) -> int:
        answer = msgspec.json.decode((await act(daemon, "prune", wanted)).body, type=Pruned)
        assert not answer.more
        return answer.rows

    def left() -> tuple[int, int]:
        return daemon.count("batch"), daemon.count("rejection")

    assert clock.fixed is not None
    await deliver(old)
    clock.fixed += 25 * 3600 * 1000
    await deliver(new)
    await eventually(lambda: left() == (2, 2))
    assert await prune(completed_before="2020-01-01T00:00:00Z") == 0
    assert await prune() > 0
    assert left() == (1, 1)
    assert await prune() == 0
    assert await prune(rejections_before="2023-11-16T08:00:00+08:00") == 1
    assert left() == (1, 0)
    assert await prune(completed_before="2023-11-16T00:00:00Z") > 0
    assert left() == (0, 0)


@pytest.mark.parametrize(
    ("cost", "age"),
    [(0.0, MIN_AGE_SECONDS), (0.001, MIN_AGE_SECONDS), (0.02, 4.0), (1.0, MAX_AGE_SECONDS), (60.0, MAX_AGE_SECONDS)],
)
def test_a_cached_answer_is_used_for_a_bounded_time_that_grows_with_its_cost(cost: float, age: float) -> None:
    assert max_age(cost) == pytest.approx(cost + age)


async def test_a_query_that_began_before_a_change_is_not_cached() -> None:
    remembered, gate, asked = TimedCache(), asyncio.Event(), asyncio.Event()

    async def before() -> str:
        asked.set()
        await gate.wait()
        return "before"

    async def after() -> str:
        return "after"

    counting = asyncio.create_task(remembered.get("totals", before))
    await asked.wait()
    # Another count does not wait for it.
    assert await remembered.get("failures", after) == "after"
    remembered.clear()
    gate.set()
    assert await counting == "before"
    assert await remembered.get("totals", after) == "after"
    assert await remembered.get("totals", before) == "after"


# --- Export ---


def make_record(path: Path, files: int) -> None:
    """A database with one batch of so many files, all available."""
    connection = connect(path)
    connection.execute(
        "INSERT INTO batch (id, batch_id, api_code, first_received_at, last_received_at, deliveries, verdict,"
        " completed_at, files, available) VALUES (1, 'large', 'code', ?1, ?1, 1, 'complete', ?1, ?2, ?2)",
        (unix_ms(), files),
    )
    connection.execute(
        "WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < ?)"
        " INSERT INTO file (batch, oss_object_name, target_url, host, reported_status, state, attempts)"
        " SELECT 1, printf('key/%08d/%0200d', n, n), 'http://a.test/' || n, 'a.test', 'FINISHED', 'available', 1"
        " FROM number",
        (files,),
    )
    connection.close()


def served_api(daemon: AppServer) -> Api:
    assert daemon.app is not None
    return daemon.app[API]


def impatient_records(path: Path) -> SqliteRecords:
    """The record, whose reads are all cut off."""
    return SqliteRecords(path, read_seconds=-1.0, progress_steps=1)


class Counted:
    """The record, and how many pages of files were read."""

    def __init__(self, records: Any) -> None:
        self._records = records
        self.pages = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)

    def files(self, *arguments: Any) -> Any:
        self.pages += 1
        return self._records.files(*arguments)


async def test_files_are_exported_as_csv_and_ndjson_by_each_filter(filled: Filled) -> None:
    names: list[str] = []

    async def exported(**parameters: Any) -> list[dict[str, str]]:
        answer = await filled.daemon.get("/api/v1/export", params=parameters)
        assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
        # Without a byte order mark Excel takes it for the local encoding.
        assert answer.body.startswith(b"\xef\xbb\xbf") is (parameters.get("bom") != "false")
        names.append(answer.headers["Content-Disposition"].removeprefix("attachment; filename*=UTF-8''"))
        return list(csv.DictReader(io.StringIO(answer.body.decode("utf-8-sig"), newline="")))

    everything = await exported()
    assert len(everything) == 9
    assert list(everything[0]) == list(FileItem.__struct_fields__)
    assert len(await exported(batch=filled.id_of(filled.incomplete))) == 4
    assert len(await exported(state="available")) == 4
    assert len(await exported(reason="http_404")) == 2
    assert len(await exported(host="elsewhere.test")) == 1
    assert await exported(batch=4711) == []
    assert await exported(api_code="nowhere", bom="false") == []
    of_code = [row for row in everything if row["api_code"] == everything[0]["api_code"]]
    found = await exported(api_code=everything[0]["api_code"], received_from="2001-01-01T00:00:00Z")
    assert sorted(row["id"] for row in found) == sorted(row["id"] for row in of_code)
    assert names[:5] == [
        "files.csv", f"{filled.incomplete['batch_id']}.csv", "available.csv", "http_404.csv", "elsewhere.test.csv",
    ]  # fmt: skip
    answer = await filled.daemon.get("/api/v1/export", params={"format": "ndjson", "reason": "http_410"})
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    (line,) = answer.body.splitlines()
    gone = msgspec.json.decode(line, type=FileItem)
    (row,) = await exported(reason="http_410")
    assert (row["id"], row["http_status"], row["state"]) == (str(gone.id), "410", "unavailable")
    assert gone.verified_at is not None
    assert row["verified_at"] == gone.verified_at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@pytest.mark.parametrize("first", list("=+-@\t\r\n\0＝＋－＠"))
def test_a_cell_that_a_spreadsheet_would_calculate_is_made_text(first: str) -> None:
    """Threat row 89."""
    formula = f"{first}HYPERLINK(1)"
    line = csv_lines([_item(formula)]).decode()
    (row,) = csv.reader(io.StringIO(line, newline=""))
    cells = dict(zip(FileItem.__struct_fields__, row, strict=True))
    for column in ("oss_object_name", "content_type", "etag"):
        assert cells[column] == "'" + formula.replace("\0", "")
    assert cells["host"] == "a.test" and cells["reason"] == "" and cells["id"] == "1"


@pytest.mark.parametrize("text", ['a"b,c\r\nd', " =1", "名;x", "'=1"])
def test_other_cells_come_as_they_are(text: str) -> None:
    (row,) = csv.reader(io.StringIO(csv_lines([_item(text)]).decode(), newline=""))
    assert row[FileItem.__struct_fields__.index("oss_object_name")] == text


def _item(text: str) -> FileItem:
    fields: dict[str, Any] = dict.fromkeys(FileItem.__struct_fields__)
    fields |= {"id": 1, "batch": 1, "batch_id": "b", "api_code": "c", "oss_object_name": text, "host": "a.test"}
    fields |= {"content_type": text, "etag": text, "reported_status": "FINISHED", "state": "available", "attempts": 1}
    return FileItem(**fields)


async def test_an_export_ends_with_its_client(start: Start, tmp_path: Path) -> None:
    """Threat row 56."""
    make_record(tmp_path / "notify.db", 30_000)
    daemon = await start()
    served = served_api(daemon)
    served.records = records = Counted(served.records)
    pages = 30_000 // EXPORT_ROWS
    connection = await daemon.connect()
    await connection.send(f"GET /api/v1/export HTTP/1.1\r\nHost: h\r\n{bearer(daemon)}\r\n\r\n".encode())
    await connection._reader.readuntil(b"\r\n\r\n")
    await connection.close()
    answer = await daemon.get("/api/v1/export")
    ids = [int(line.partition(b",")[0]) for line in answer.body.splitlines()[1:]]
    assert ids == list(range(1, 30_001))
    # One that had gone on meanwhile would have come about as far.
    assert pages <= records.pages < 1.5 * pages


async def test_an_export_without_a_reader_waits_and_is_given_up(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "STALLED_SECONDS", 0.3)
    make_record(tmp_path / "notify.db", 30_000)
    daemon = await start()
    served = served_api(daemon)
    served.records = records = Counted(served.records)
    connection = await daemon.connect()
    await connection.send(f"GET /api/v1/export HTTP/1.1\r\nHost: h\r\n{bearer(daemon)}\r\n\r\n".encode())
    await connection._reader.readuntil(b"\r\n\r\n")
    # The reader stops taking at its limit; then the sockets fill up.
    await daemon.events.seen("client stalled, disconnected", path="/api/v1/export")
    assert records.pages < 30_000 // EXPORT_ROWS
    rest = await connection.rest()
    assert not rest.endswith(b"0\r\n\r\n")


async def test_an_export_that_cannot_be_finished_is_broken_off(start: Start, tmp_path: Path) -> None:
    make_record(tmp_path / "notify.db", 2_000)
    daemon = await start()
    served = served_api(daemon)
    impatient = impatient_records(daemon.path)

    class Closing(Counted):
        def files(self, *arguments: Any) -> Any:
            return impatient.files(*arguments) if self.pages else super().files(*arguments)

    served.records = Closing(served.records)
    connection = await daemon.connect()
    await connection.send(f"GET /api/v1/export HTTP/1.1\r\nHost: h\r\n{bearer(daemon)}\r\n\r\n".encode())
    everything = await connection.rest()
    assert everything.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"HTTP/1.1 503" not in everything
    assert not everything.endswith(b"0\r\n\r\n")
    assert daemon.events.find("export aborted") is not None
    await impatient.close()


# --- The description ---


async def test_the_description_is_valid_and_of_all_that_is_served(filled: Filled) -> None:
    answer = await filled.daemon.get("/openapi.json")
    document = answer.json
    OpenAPIV31SpecValidator(document).validate()
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS}
    assert filled.daemon.app is not None
    routed = {
        re.sub(r"{(\w+):[^}]*}}?", r"{\1}", resource.canonical)
        for resource in filled.daemon.app.router.resources()
        if resource.canonical.startswith("/api/")
    }
    assert routed == {endpoint.path for endpoint in ENDPOINTS}
    assert document["security"] == [{"admin_token": []}]
