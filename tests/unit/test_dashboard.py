"""The pages and the API as handlers, on a real record, without the processes of the daemon."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestClient

from notify_server.config import Config
from notify_server.forward.news import News
from notify_server.forward.sender import Sender
from notify_server.forward.service import ForwardService
from notify_server.model import CircuitState, FileState, HostView
from notify_server.operations import Actions
from notify_server.store.reading.types import FileFilter
from notify_server.store.sqlite.records import SqliteRecords
from notify_server.store.sqlite.store import SqliteStore
from notify_server.submissions.service import SubmissionService
from notify_server.telemetry.history import Timeline
from notify_server.telemetry.host_rates import HostRates
from notify_server.telemetry.metrics import Metrics
from notify_server.web import rendering
from notify_server.web.admin import Admin
from notify_server.web.api.endpoints import HttpApi
from notify_server.web.api.handlers import Api
from notify_server.web.api.types import RuntimeState
from notify_server.web.dashboard.dashboard import Dashboard
from notify_server.web.routes import DASHBOARD, HTTP_API, add_routes
from notify_server.web.stream import Stream
from tests.store.builders import (
    API_CODE,
    HOST,
    NOW,
    again,
    blocked,
    claim,
    failed,
    finished,
    found,
    missing,
    rejection,
    request,
    take_in,
)
from tests.support.sqlite_faults import opened

if TYPE_CHECKING:
    from pytest_aiohttp import AiohttpClient

Client = TestClient[web.Request, web.Application]

TOKEN = "admin-token-of-this-test"


class Site:
    """The web side of a daemon, with a host list and metrics that a test can set."""

    def __init__(self, path: Path, store: SqliteStore, sections: Mapping[str, Any]) -> None:
        config = Config(**sections)
        self.hosts: list[HostView] = []
        self.metrics = Metrics()
        self.records = SqliteRecords(path)
        self.timeline = Timeline(self.metrics, now=lambda: NOW, backlog=lambda: store.backlog, in_flight=lambda: 0)
        state = RuntimeState(
            "1.0",
            datetime.fromtimestamp(NOW / 1000, UTC),
            config.server.roles,
            lambda: store.nodes,
            lambda: store.backlog,
            lambda: 0,
            lambda: self.hosts,
        )
        admin = Admin(config, lambda: NOW, TOKEN)
        actions = Actions(config, store, self.records, now=lambda: NOW)
        sender = Sender((), store.outbox, now=lambda: NOW)
        forward = ForwardService(
            sender, store.outbox, self.records.outbox, self.records.expectations, News(), lambda: NOW
        )
        submissions = SubmissionService(store.expectations, self.records.expectations, lambda: NOW, lambda: None)
        api = Api(self.records, actions, state, self.timeline, HostRates(), Stream(), forward, submissions)
        self.app = web.Application()
        self.app[HTTP_API] = HttpApi(api, admin, "1.0")
        self.app[DASHBOARD] = Dashboard(config, api, admin, "1.0", lambda: NOW)
        rendering.setup(self.app)
        add_routes(self.app, config.server.callback_path)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    async with opened(tmp_path / "notify.db") as store:
        yield store


@pytest.fixture
def sections() -> dict[str, Any]:
    """The configuration; a test may parametrize it."""
    return {}


@pytest.fixture
async def site(tmp_path: Path, store: SqliteStore, sections: dict[str, Any]) -> AsyncIterator[Site]:
    site = Site(tmp_path / "notify.db", store, sections)
    yield site
    await site.records.close()


@pytest.fixture
async def client(aiohttp_client: AiohttpClient, site: Site) -> Client:
    return await aiohttp_client(site.app, headers={"Authorization": f"Bearer {TOKEN}"})


@pytest.fixture
async def stranger(aiohttp_client: AiohttpClient, site: Site) -> Client:
    """A client without a token."""
    return await aiohttp_client(site.app)


async def page(client: Client, path: str, status: int = 200, **options: Any) -> str:
    """The text of a page, without its tags."""
    async with client.get(path, headers={"Accept-Language": "en"}, **options) as answer:
        assert answer.status == status, path
        return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", await answer.text()))


async def fill(store: SqliteStore) -> None:
    """One file in every state, in two batches."""
    await take_in(store, finished("there"), finished("gone"), failed("failed"), batch_id="one")
    files = sorted(await claim(store), key=lambda file: file.id)
    await store.record([found(files[0]), missing(files[1])], NOW + 1)
    await take_in(store, finished("waiting"), blocked("inside"), failed("failed"), batch_id="two")


# --- Files by state ---


@pytest.mark.parametrize(
    ("state", "keys"),
    [
        ("pending", ["waiting"]),
        ("available", ["there"]),
        ("unavailable", ["gone"]),
        ("blocked", ["inside"]),
        ("upload_failed", ["failed", "failed"]),
    ],
)
async def test_files_of_all_batches_are_listed_by_each_state(
    client: Client, store: SqliteStore, state: str, keys: list[str]
) -> None:
    await fill(store)
    answer = await (await client.get("/api/v1/files", params={"state": state})).json()
    assert sorted(file["oss_object_name"] for file in answer["items"]) == keys
    shown = await page(client, f"/ui/files?state={state}")
    for name in ("waiting", "there", "gone", "inside"):
        assert (f" {name} " in shown) == (name in keys), name


async def test_files_by_state_are_paged_by_id(client: Client, store: SqliteStore) -> None:
    for number in range(5):
        await take_in(store, failed(f"key{number}"), batch_id=f"b{number}")
    names: list[str] = []
    parameters = {"state": "upload_failed", "limit": "2"}
    while True:
        answer = await (await client.get("/api/v1/files", params=parameters)).json()
        names += [file["oss_object_name"] for file in answer["items"]]
        if answer["next"] is None:
            break
        parameters["cursor"] = answer["next"]
    assert names == [f"key{number}" for number in range(5)]


async def test_a_state_or_reason_that_does_not_exist_is_refused_by_the_page(client: Client) -> None:
    assert "state: must be one of" in await page(client, "/ui/files?state=lost", 400)
    assert "did you mean dns_error?" in await page(client, "/ui/files?reason=dns_erorr", 400)


async def test_files_reported_failed_are_a_group_of_the_failures(client: Client, store: SqliteStore) -> None:
    await fill(store)
    shown = await page(client, "/ui/failures")
    assert "Reported FAILED by the platform" in shown
    assert "2 files" in shown


# --- What the pages say ---


async def test_a_batch_that_is_being_checked_says_so_without_a_primary_button(
    client: Client, store: SqliteStore
) -> None:
    await take_in(store, finished("a"), finished("b"), failed("c"))
    async with client.get("/ui/batches/1", headers={"Accept-Language": "en"}) as answer:
        html = await answer.text()
    assert "Checking: 0 of 3 confirmed, 2 to go · 1 reported FAILED" in html
    assert 'class="button primary"' not in html
    await store.record([missing(file) for file in await claim(store)], NOW + 1)
    assert "3 of 3 files are missing" in await page(client, "/ui/batches/1")


async def test_a_recheck_is_shown_with_the_result_before_it(client: Client, store: SqliteStore) -> None:
    await take_in(store, finished("a"))
    requests = (request(http_status=404, reason="http_404"), request(http_status=410, reason="http_410"))
    await store.record([missing(file, requests=requests) for file in await claim(store)], NOW + 1)
    await store.recheck([1], NOW + 2)
    shown = await page(client, "/ui/files/1")
    assert "Rechecking…" in shown
    assert "last result before the recheck: http_410" in shown
    assert "not checked yet" not in shown.lower()


async def test_a_file_reported_failed_is_not_said_to_be_checked_later(client: Client, store: SqliteStore) -> None:
    await take_in(store, failed("a"))
    assert "Not checked: the platform reported FAILED." in await page(client, "/ui/files/1")


@pytest.mark.parametrize(
    ("circuit", "waiting", "listed"),
    [
        (CircuitState.OPEN, True, True),
        (CircuitState.OPEN, False, False),
        (CircuitState.HALF_OPEN, True, False),
        (CircuitState.CLOSED, True, False),
    ],
)
async def test_only_open_circuits_with_files_waiting_are_alarms(
    site: Site, client: Client, store: SqliteStore, circuit: CircuitState, waiting: bool, listed: bool
) -> None:
    await take_in(store, finished("a") if waiting else failed("a"))
    site.hosts = [HostView(HOST, circuit, 20.0, in_flight=0, queued=0, limit=32)]
    assert (f"{HOST} is unreachable. 1 file waiting, next try in 20 s." in await page(client, "/")) == listed


async def test_alarms_tell_a_file_that_is_retried_from_one_given_up(client: Client, store: SqliteStore) -> None:
    await take_in(store, finished("a"), finished("b"))
    first, second = await claim(store)
    await store.record([missing(first), again(second, NOW + 9, reason="http_404")], NOW + 1)
    shown = await page(client, "/")
    assert f"http_404 · 1 file · {HOST} (retrying)" in shown
    assert re.search(rf"http_4\d\d · 1 file · {HOST} \(gave up\)", shown)


async def test_tiles_are_of_the_last_minute_and_ten_minutes(site: Site, client: Client, store: SqliteStore) -> None:
    await take_in(store, finished("a"))
    assert "Callback response time – / – p50 / p99 · 10 min" in await page(client, "/")
    for second in range(700):
        if second == 0:
            site.metrics.ack_seconds.series[""].observe(1.0)
        if 100 <= second < 650:
            site.metrics.ack_seconds.series[""].observe(0.002)
        site.timeline.sample(1000.0 + second)
    status = await (await client.get("/api/v1/status")).json()
    window = status["last_ten_minutes"]
    assert window["seconds"] == 600.0
    assert window["ack_p99_ms"] < 10
    # Nothing has happened in the last minute but what is in the window is shown.
    assert status["last_minute"]["ack_p99_ms"] is None or status["last_minute"]["seconds"] == 60.0
    assert "Callback response time –" not in await page(client, "/")


async def test_the_empty_page_shows_the_url_to_register_and_what_it_needs(client: Client) -> None:
    shown = await page(client, "/")
    assert f"http://127.0.0.1:{client.port}/notify" in shown
    assert "The platform needs a public https address." in shown


@pytest.mark.parametrize("sections", [{"retention": {"rejections": "7d"}}])
async def test_the_rejections_page_says_how_long_bodies_are_kept(client: Client, store: SqliteStore) -> None:
    await store.reject(rejection())
    assert "Bodies are kept for 7 days" in await page(client, "/ui/rejections")


# --- Who did what, and what is known ---


async def post(client: Client, path: str, **fields: object) -> dict[str, Any]:
    async with client.post(path, json=fields) as answer:
        assert answer.status == 200, await answer.text()
        found: dict[str, Any] = await answer.json()
        return found


async def submit(client: Client, path: str, **fields: str) -> str:
    """Submit a form, and return the text of the page that answers."""
    async with client.post(path, data=fields, headers={"Accept-Language": "en"}) as answer:
        assert answer.status == 200, await answer.text()
        return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", await answer.text()))


async def test_every_action_leaves_a_log_line_and_a_row_with_who_what_and_filter(
    client: Client, store: SqliteStore
) -> None:
    await fill(store)
    await store.reject(rejection())
    with structlog.testing.capture_logs() as lines:
        await post(client, "/api/v1/recheck", reason="http_410", host=HOST, dry_run=True)
        await post(client, "/api/v1/recheck", reason="http_410", host=HOST)
        async with client.post(
            "/api/v1/recheck", json={"batch": 2}, headers={"User-Agent": "notify-server-command/anna"}
        ) as answer:
            assert answer.status == 200
        await submit(client, "/ui/acknowledge", rejection="1", note="from a probe")
        await post(client, "/api/v1/prune", completed_before="2001-01-01T00:00:00Z")
    expected = [
        ("prune", "api 127.0.0.1", 0, {"completed_before": "2001-01-01T00:00:00Z"}),
        ("acknowledge", "page 127.0.0.1", 1, {"rejection": 1, "note": "from a probe"}),
        ("recheck", "command anna from 127.0.0.1", 2, {"batch_id": "two", "api_code": API_CODE}),
        ("recheck", "api 127.0.0.1", 1, {"reason": "http_410", "host": HOST}),
    ]
    actions = (await (await client.get("/api/v1/actions")).json())["items"]
    assert [(each["what"], each["who"], each["files"], each["filter"]) for each in actions] == expected
    logged = [line for line in lines if line["event"] == "action"]
    assert [(line["what"], line["who"], line["files"]) for line in logged[::-1]] == [each[:3] for each in expected]
    shown = await page(client, "/ui/actions")
    assert "from a probe" in shown and "Command anna from 127.0.0.1" in shown and "Dashboard 127.0.0.1" in shown


async def test_a_deleted_expectation_is_an_action(client: Client) -> None:
    await client.post("/api/v1/expectations", json={"reference": "order-1", "api_code": "a"})
    assert (await client.delete("/api/v1/expectations", params={"reference": "order-1"})).status == 200
    (action,) = (await (await client.get("/api/v1/actions")).json())["items"]
    assert (action["what"], action["filter"]) == ("expectation.delete", {"reference": "order-1"})


async def test_needs_attention_is_empty_once_all_of_it_is_acknowledged(client: Client, store: SqliteStore) -> None:
    await take_in(store, finished("gone"), failed("failed"), batch_id="one")
    await store.record([missing(file) for file in await claim(store)], NOW + 1)
    await store.reject(rejection())
    shown = await page(client, "/")
    for alarm in ("1 batch is incomplete.", "1 notification rejected.", "http_410 · 1 file", "FAILED · 1 file"):
        assert alarm in shown, alarm
    asked = await page(client, "/ui/acknowledge?batch=1")
    assert "It no longer counts under Needs attention." in asked
    assert "Acknowledged." in await submit(client, "/ui/acknowledge", batch="1", note="known to the platform")
    assert "known to the platform" in await page(client, "/ui/batches/1")
    await submit(client, "/ui/acknowledge", state="unavailable", reason="http_410", host=HOST)
    await submit(client, "/ui/acknowledge", state="upload_failed")
    await submit(client, "/ui/acknowledge", all="rejections")
    shown = await page(client, "/")
    assert "All is well" in shown and "Needs attention" not in shown
    await take_in(store, finished("later"), batch_id="two")
    await store.record([missing(file) for file in await claim(store)], NOW + 2)
    # Actions by hand, and so the next line, are at once visible on the page.
    await submit(client, "/ui/acknowledge", rejection="1")
    shown = await page(client, "/")
    assert "1 batch is incomplete. 2 in all" in shown and "http_410 · 1 file" in shown
    assert "FAILED" not in shown and "rejected." not in shown


async def test_all_incomplete_batches_are_acknowledged_at_once_and_none_twice(
    client: Client, store: SqliteStore
) -> None:
    for name in ("one", "two", "three"):
        await take_in(store, finished("gone"), batch_id=name)
    await store.record([missing(file) for file in await claim(store)], NOW + 1)
    assert "3 are new." in await page(client, "/ui/batches?verdict=incomplete")
    assert await post(client, "/api/v1/acknowledge", all="batches", dry_run=True) == {"acknowledged": 3, "more": False}
    assert (await post(client, "/api/v1/acknowledge", all="batches", note="host was down"))["acknowledged"] == 3
    assert (await post(client, "/api/v1/acknowledge", all="batches"))["acknowledged"] == 0
    listed = await (await client.get("/api/v1/batches", params={"acknowledged": "false"})).json()
    assert listed["items"] == []
    assert "Nothing new to acknowledge." in await submit(client, "/ui/acknowledge", batch="1")


@pytest.mark.parametrize(
    "wanted", [{}, {"batch": 1, "rejection": 1}, {"reason": "http_404"}, {"all": "batches", "host": HOST}]
)
async def test_an_acknowledgement_without_one_subject_is_refused(client: Client, wanted: dict[str, object]) -> None:
    assert (await client.post("/api/v1/acknowledge", json=wanted)).status == 400


async def test_notifications_of_a_batch_are_shown_with_their_bodies(client: Client, store: SqliteStore) -> None:
    await take_in(store, finished("a"), batch_id="one", body=b'{"batch_id":"one","note":"<b>"}')
    await take_in(store, finished("a"), batch_id="one", body=b'{"batch_id":"one","again":true}')
    await take_in(store, finished("a"), batch_id="other", body=b'{"secret":"of another batch"}')
    shown = await page(client, "/ui/batches/1/notifications")
    assert shown.count(" Show ") == 2
    assert '"again": true' not in shown
    assert "&lt;b&gt;" in await page(client, "/ui/batches/1/notifications?show=1")
    assert "again" in await page(client, "/ui/batches/1/notifications?show=2")
    await page(client, "/ui/batches/1/notifications?show=3", 404)


# --- Malformed input ---

MALFORMED = [
    "http://[",
    "http://[x",
    "http://[::1]:99999/",
    "http://h:port/",
    "//[",
    "http://\u2100.example/",
    "http:// /",
]


@pytest.mark.parametrize("address", MALFORMED)
async def test_a_search_for_a_malformed_address_finds_nothing(client: Client, address: str) -> None:
    assert "Nothing found for" in await page(client, "/ui/search", params={"q": address})


@pytest.mark.parametrize(
    "address", ["http://[", "http://[x/ui", "//evil.example/x", "http://h/\\evil", "http://h:99999/"]
)
async def test_a_malformed_page_address_leads_to_the_log_in(stranger: Client, address: str) -> None:
    headers = {"HX-Request": "true", "HX-Current-URL": address}
    async with stranger.get("/ui/batches", headers=headers) as answer:
        assert answer.status == 401
        target = answer.headers["HX-Redirect"]
        assert target.startswith("/ui/login?next=%2F") and "evil" not in target.partition("%2F")[0]


@pytest.mark.parametrize("host", ["[", "[x", "a b", "h:99999"])
async def test_a_malformed_host_header_is_no_error(client: Client, host: str) -> None:
    async with client.get("/", headers={"Host": host}) as answer:
        assert answer.status < 500


# --- Sub-path ---

PREFIXED = re.compile(r'(?:href|action|src|hx-get|hx-post)="(/[^"]*)"')


@pytest.mark.parametrize(
    "path", ["/", "/ui/batches", "/ui/batches/1", "/ui/files/2", "/ui/failures", "/ui/hosts", "/docs"]
)
@pytest.mark.parametrize(
    ("sections", "headers"),
    [
        ({"server": {"public_url": "https://example.com/tools/notify/"}}, {}),
        ({"server": {"trusted_proxies": ["127.0.0.1"]}},
         {"X-Forwarded-Prefix": "/tools/notify"}),
    ],
)  # fmt: skip
async def test_under_a_sub_path_every_link_begins_with_it(
    client: Client, store: SqliteStore, path: str, headers: dict[str, str]
) -> None:
    await fill(store)
    async with client.get(path, headers=headers) as answer:
        assert answer.status == 200
        html = await answer.text()
    links = PREFIXED.findall(html)
    assert len(links) > 5
    assert [link for link in links if not link.startswith("/tools/notify/")] == []
    assert 'data-root="/tools/notify"' in html


@pytest.mark.parametrize("sections", [{"server": {"public_url": "https://example.com/tools/notify"}}])
async def test_under_a_sub_path_redirects_and_commands_begin_with_it(client: Client) -> None:
    async with client.get("/ui/search", allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (303, "/tools/notify/ui/batches")
    assert "https://example.com/tools/notify/notify" in await page(client, "/")


@pytest.mark.parametrize(
    ("sections", "prefix"),
    [
        ({}, "/tools"),
        ({"server": {"trusted_proxies": ["192.0.2.1"]}}, "/tools"),
        *(({"server": {"trusted_proxies": ["127.0.0.1"]}}, wrong)
          for wrong in ("//evil.example", "tools", '/"><script>', "/a/../b", "https://evil.example", "/a b")),
    ],
)  # fmt: skip
async def test_a_prefix_that_is_untrusted_or_malformed_is_ignored(
    client: Client, sections: dict[str, Any], prefix: str
) -> None:
    async with client.get("/ui/login", headers={"X-Forwarded-Prefix": prefix}, allow_redirects=False) as answer:
        assert answer.headers["Location"] == "/" if answer.status == 303 else 'data-root=""' in await answer.text()


# --- Rechecks ---


async def test_a_recheck_of_an_unknown_reason_is_refused(client: Client) -> None:
    async with client.post("/api/v1/recheck", json={"reason": "http_40"}) as answer:
        assert answer.status == 400
        assert (await answer.json())["msg"].startswith("reason: http_40 is not a reason")


async def test_rechecked_files_of_a_group_can_be_watched(client: Client, site: Site, store: SqliteStore) -> None:
    await fill(store)
    reason = (await site.records.files(FileFilter(state=FileState.UNAVAILABLE), None, 1)).items[0].reason
    async with client.get("/") as answer:
        csrf = re.search(r'name="csrf" value="([0-9a-f]+)"', await answer.text()) or re.search(
            r'name="csrf" value="([0-9a-f]+)"', await (await client.get("/ui/files/2")).text()
        )
    assert csrf is not None
    form = {"csrf": csrf[1], "reason": str(reason), "host": HOST, "state": "unavailable"}
    async with client.post("/ui/recheck", data=form, headers={"Accept-Language": "en"}) as answer:
        html = await answer.text()
    assert "1 file queued." in html
    assert f'href="/ui/files?state=pending&amp;host={HOST}"' in html


async def test_files_that_end_soon_are_shown_on_their_batch_and_their_page(store: SqliteStore, client: Client) -> None:
    key = "8ZAFUPII49GQN2AB/IMAGE/-1203985127/L3VwbG9hZC8yMDI2LzExL2xpdmluZ3Jv"
    ends = NOW + 3_600_000
    await take_in(
        store, finished("a", expires_at=ends), finished(key), finished("later", expires_at=NOW + 9 * 86_400_000)
    )
    files = {file.oss_object_name: file for file in await claim(store)}
    # NOW is 08:53 on 2025-10-09.
    await store.record([found(files[key], flags='["deleted_on:2025-10-10"]')], NOW)
    shown = await page(client, "/ui/batches/1")
    assert "2 of 3 files expire soon" in shown
    assert re.search(r" a The URL expires .* /upload/2026/11/livingro The storage deletes the object ", shown)
    assert "Fetch the files before then" in shown
    assert "The URL expires" in await page(client, f"/ui/files/{files['a'].id}")
    assert "The storage deletes the object" in await page(client, f"/ui/files/{files[key].id}")
    assert "Fetch the files before then" not in await page(client, f"/ui/files/{files['later'].id}")


@pytest.mark.parametrize("sections", [{"alert": {"expiring_before": 0}}])
async def test_warning_of_files_that_end_can_be_turned_off(store: SqliteStore, client: Client) -> None:
    await take_in(store, finished("a", expires_at=NOW + 3_600_000))
    assert "expire soon" not in await page(client, "/ui/batches/1")
