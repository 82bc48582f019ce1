"""Who is let in to look at the record and act on it: with an admin_token, and without one."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Mapping
from http.cookies import Morsel, SimpleCookie
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from aiohttp import DummyCookieJar, web
from aiohttp.test_utils import TestClient, TestServer

from notify_server.app import ADMIN
from notify_server.callbacks.errors import RefusedError, error_response
from notify_server.web.admin import COOKIE, CSRF_HEADER, LOGINS_A_SECOND, SESSION_SECONDS, Admin
from tests.support.app import JSON, AppServer, Clock, Start, build_config
from tests.support.http import Connection, Reply
from tests.support.notification import notification

TOKEN = "correct-horse-battery"
NOW = 1_700_000_000_000
BEARER = {"Authorization": f"Bearer {TOKEN}"}
GUARDED = ("/api/v1/totals", "/api/v1/batches", "/api/v1/stream", "/api/v1/export", "/openapi.json", "/docs", "/")
# What keeps a secret of the record, planted where any of the answers would show it.
SECRET = "planted-batch"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(start_shared: Start) -> AppServer:
    """A daemon with an admin_token."""
    daemon = await start_shared(auth={"admin_token": TOKEN}, server={"port": 0, "trusted_proxies": ["10.0.0.0/8"]})
    (await daemon.post(notification(batch_id=SECRET))).accepted()
    await daemon.settled(SECRET)
    return daemon


def admin_of(daemon: AppServer) -> Admin:
    assert daemon.app is not None
    return daemon.app[ADMIN]


# --- With an admin_token ---


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong-token-entirely"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer t\xf6ken-\udcff"},
        {"Cookie": f"{COOKIE}={TOKEN}"},
        {"X-Forwarded-For": "127.0.0.1", "Host": "localhost"},
    ],
)
async def test_nothing_is_told_to_who_has_no_token(guarded: AppServer, path: str, headers: dict[str, str]) -> None:
    """Threat row 90."""
    sent = {name: value.encode("latin-1", "replace").decode("latin-1") for name, value in headers.items()}
    answer = await guarded.get(path, headers=sent, allow_redirects=False)
    if path in ("/", "/docs"):
        # A person's browser is led to the log-in.
        assert answer.status in (303, 401)
    else:
        answer.refusal(401, "401")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert SECRET.encode() not in answer.body and b"schemas" not in answer.body


async def test_nothing_is_done_for_who_has_no_token(guarded: AppServer) -> None:
    for path in ("recheck", "prune", "rejections/1/replay"):
        body = b'{"completed_before": "9999-01-01T00:00:00Z"}' if path == "prune" else b'{"batch": 1}'
        (await guarded.post(body, path=f"/api/v1/{path}")).refusal(401, "401")
    assert guarded.count("batch") == 1


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_who_has_the_token_is_let_in(guarded: AppServer, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {TOKEN}"}
    assert SECRET in (await guarded.get("/api/v1/batches", headers=headers)).body.decode()
    document = (await guarded.get("/openapi.json", headers=headers)).json
    assert document["security"] == [{"admin_token": []}]
    assert (await guarded.post(b'{"batch": 1, "dry_run": true}', {**JSON, **headers}, path="/api/v1/recheck")).json


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_what_monitors_and_the_platform_ask_needs_no_token(guarded: AppServer, path: str) -> None:
    assert (await guarded.get(path, headers={"Host": "elsewhere.example", "Forwarded": "for=1.2.3.4"})).status == 200


async def test_the_callback_needs_no_admin_token_nor_does_the_token_serve_for_it(start: Start) -> None:
    daemon = await start(auth={"admin_token": TOKEN, "callback_token": "quite-another-one"})
    (await daemon.post(notification(), {**JSON, **BEARER})).refusal(401, "401001")
    (await daemon.post(notification(), {**JSON, "Authorization": "Bearer quite-another-one"})).accepted()
    (await daemon.get("/api/v1/totals", headers={"Authorization": "Bearer quite-another-one"})).refusal(401, "401")
    (await daemon.get(f"/api/v1/totals?token={TOKEN}")).refusal(401, "401")


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """What has been compared in constant time."""
    compare, seen = hmac.compare_digest, list[tuple[bytes, bytes]]()

    def watched(a: Any, b: Any) -> bool:
        seen.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    return seen


async def test_secrets_are_compared_in_constant_time(guarded: AppServer, compared: list[tuple[bytes, bytes]]) -> None:
    await guarded.get("/api/v1/totals", headers={"Authorization": "Bearer guess"})
    assert compared == [(b"guess", TOKEN.encode())]
    await guarded.get("/api/v1/totals", headers={"Cookie": f"{COOKIE}=9999999999.00"})
    assert compared[1][0] == b"00" and len(compared[1][1]) == 64


# --- Log-in ---


class Browser:
    """A page with a log-in, and what it guards, answered by an Admin as the dashboard does. Keeps its cookie."""

    def __init__(self, client: TestClient[web.Request, web.Application]) -> None:
        self._client = client
        self.cookie: Morsel[str] | None = None

    async def ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, **options: Any) -> Reply:
        sent = dict(headers or {})
        if self.cookie is not None:
            sent.setdefault("Cookie", f"{COOKIE}={self.cookie.value}")
        async with self._client.request(method, path, headers=sent, **options) as response:
            for line in response.headers.getall("Set-Cookie", ()):
                self.cookie = SimpleCookie(line)[COOKIE]
            return Reply(response.status, response.headers, await response.read())

    async def log_in(self, token: str = TOKEN, headers: Mapping[str, str] | None = None) -> Reply:
        return await self.ask("POST", "/login", headers, data={"token": token})

    async def csrf(self) -> str:
        return (await self.ask("GET", "/page")).body.decode()


@pytest_asyncio.fixture(loop_scope="module")
async def open_browser(tmp_path: Path) -> AsyncIterator[Any]:
    clients: list[TestClient[web.Request, web.Application]] = []

    async def go(clock: Clock | None = None, **sections: Any) -> Browser:
        admin = Admin(build_config(tmp_path, {"auth": {"admin_token": TOKEN}, **sections}), clock or Clock(NOW))

        async def login(request: web.Request) -> web.StreamResponse:
            form = await request.post()
            response = web.Response(text="in")
            try:
                if not admin.log_in(request, str(form["token"]), response):
                    return web.Response(status=401)
            except RefusedError as error:
                return error_response(str(uuid4()), error.status, error.code, error.message, error.headers)
            return response

        async def page(request: web.Request) -> web.StreamResponse:
            return web.Response(text=admin.csrf(request))

        async def logout(request: web.Request) -> web.StreamResponse:
            response = web.Response(text="out")
            admin.log_out(response)
            return response

        app = web.Application()
        app.router.add_post("/login", login)
        app.router.add_get("/page", admin.guard(page))
        app.router.add_post("/act", admin.guard(page))
        app.router.add_post("/logout", admin.guard(logout))
        client = TestClient(TestServer(app), cookie_jar=DummyCookieJar())
        await client.start_server()
        clients.append(client)
        return Browser(client)

    yield go
    for client in clients:
        await client.close()


async def test_a_log_in_is_a_cookie_that_scripts_and_other_sites_do_not_get(open_browser: Any) -> None:
    browser = await open_browser()
    assert (await browser.ask("GET", "/page")).status == 401
    assert (await browser.log_in()).status == 200
    assert browser.cookie["httponly"] is True
    assert browser.cookie["samesite"] == "Strict"
    assert browser.cookie["path"] == "/"
    assert browser.cookie["domain"] == ""
    assert int(browser.cookie["max-age"]) == SESSION_SECONDS
    assert TOKEN not in browser.cookie.value
    assert (await browser.ask("GET", "/page")).status == 200


async def test_the_cookie_is_for_tls_alone_where_there_is_tls(open_browser: Any, tmp_path: Path) -> None:
    forwarded = {"X-Forwarded-Proto": "https"}
    plain = await open_browser()
    await plain.log_in(headers=forwarded)
    assert not plain.cookie["secure"], "anyone can say so"
    behind = await open_browser(server={"trusted_proxies": ["127.0.0.1"]})
    await behind.log_in(headers={"X-Forwarded-Proto": "http"})
    assert not behind.cookie["secure"]
    await behind.log_in(headers=forwarded)
    assert behind.cookie["secure"] is True
    (tmp_path / "certificate.pem").touch()
    own = await open_browser(
        server={"ssl_certificate": tmp_path / "certificate.pem", "ssl_key": tmp_path / "certificate.pem"}
    )
    await own.log_in()
    assert own.cookie["secure"] is True


async def test_a_log_in_ends_in_time_and_with_the_log_out(open_browser: Any) -> None:
    clock = Clock(NOW)
    browser = await open_browser(clock)
    await browser.log_in()
    clock.fixed = NOW + SESSION_SECONDS * 1000 - 1
    assert (await browser.ask("GET", "/page")).status == 200
    clock.fixed += 1
    assert (await browser.ask("GET", "/page")).status == 401
    await browser.log_in()
    answer = await browser.ask("POST", "/logout", {CSRF_HEADER: await browser.csrf()})
    assert answer.status == 200
    assert browser.cookie.value == "" and int(browser.cookie["max-age"]) == 0


@pytest.mark.parametrize(
    "forge",
    [
        lambda value: "",
        lambda value: value[:-1] + ("0" if value[-1] != "0" else "1"),
        lambda value: str(int(value.partition(".")[0]) + 1) + "." + value.partition(".")[2],
        lambda value: "9" * 15 + "." + value.partition(".")[2],
        lambda value: "9" * 5000 + "." + value.partition(".")[2],
        lambda value: "-1." + value.partition(".")[2],
        lambda value: "١٧٠." + value.partition(".")[2],
        lambda value: value.partition(".")[0],
        lambda value: value.partition(".")[0] + ".",
        lambda value: "." + value.partition(".")[2],
        lambda value: value.replace(".", "\xff."),
        lambda value: value.upper(),
    ],
)
async def test_a_cookie_that_was_forged_or_altered_is_none(open_browser: Any, forge: Any) -> None:
    browser = await open_browser()
    await browser.log_in()
    forged = forge(browser.cookie.value)
    assert forged != browser.cookie.value
    answer = await browser.ask("GET", "/page", {"Cookie": f"{COOKIE}={forged}"})
    answer.refusal(401, "401")


async def test_another_token_ends_every_log_in(open_browser: Any) -> None:
    before = await open_browser()
    await before.log_in()
    after = await open_browser(auth={"admin_token": "another-token"})
    after.cookie = before.cookie
    assert (await after.ask("GET", "/page")).status == 401
    # On another node with the same token it holds.
    beside = await open_browser()
    beside.cookie = before.cookie
    assert (await beside.ask("GET", "/page")).status == 200


async def test_an_action_needs_the_page_s_csrf_token(open_browser: Any) -> None:
    browser, other = await open_browser(), await open_browser(Clock(NOW + 5000))
    await browser.log_in()
    await other.log_in()
    csrf, stale = await browser.csrf(), await other.csrf()
    assert csrf != stale
    for wrong in ({}, {CSRF_HEADER: ""}, {CSRF_HEADER: csrf[:-1]}, {CSRF_HEADER: stale}, {CSRF_HEADER: "\xff"}):
        answer = await browser.ask("POST", "/act", wrong)
        assert answer.refusal(403, "403") == "X-CSRF-Token: is missing or stale, load the page again"
    assert (await browser.ask("POST", "/act", {CSRF_HEADER: csrf})).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://{host}"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://{host}.evil.example"},
        {"Origin": "http://localhost:1"},
    ],
)
async def test_an_action_that_another_site_asks_for_is_refused_even_with_cookie_and_token(
    open_browser: Any, headers: dict[str, str]
) -> None:
    """Threat row 90."""
    browser = await open_browser()
    await browser.log_in()
    sent = {name: value.format(host="here.example") for name, value in headers.items()}
    sent |= {CSRF_HEADER: await browser.csrf(), "Host": "here.example"}
    answer = await browser.ask("POST", "/act", sent)
    assert answer.refusal(403, "403") == "requests from other sites are refused"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://here.example"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://here.example"},
        # A proxy has put its own name for us into Host.
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://there.example"},
        {"Sec-Fetch-Site": "none"},
    ],
)
async def test_an_action_of_our_own_page_is_taken(open_browser: Any, headers: dict[str, str]) -> None:
    browser = await open_browser()
    await browser.log_in()
    sent = {CSRF_HEADER: await browser.csrf(), "Host": "here.example", **headers}
    assert (await browser.ask("POST", "/act", sent)).status == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_another_site_may_lead_here_but_not_fetch_or_frame(open_browser: Any, site: str) -> None:
    browser = await open_browser()
    await browser.log_in()
    for mode, dest in (("navigate", "iframe"), ("navigate", "object"), ("no-cors", "image"), ("no-cors", "script"),
                       ("cors", "empty")):  # fmt: skip
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
        assert (await browser.ask("GET", "/page", headers)).refusal(403, "403") == "other sites cannot read this"
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert (await browser.ask("GET", "/page", headers)).status == 200


async def test_a_password_for_a_proxy_does_not_stand_in_the_way_of_the_cookie(open_browser: Any) -> None:
    browser = await open_browser()
    await browser.log_in()
    assert (await browser.ask("GET", "/page", {"Authorization": "Basic eDp5"})).status == 200
    assert (await browser.ask("GET", "/page", {"Authorization": "Bearer eDp5"})).status == 401


async def test_who_guesses_has_to_wait_and_others_do_not(open_browser: Any) -> None:
    browser = await open_browser(server={"trusted_proxies": ["127.0.0.1"]})
    for _ in range(LOGINS_A_SECOND):
        assert (await browser.log_in("wrong", {"X-Forwarded-For": "192.0.2.1"})).status == 401
    answer = await browser.log_in("wrong", {"X-Forwarded-For": "198.51.100.9, 192.0.2.1"})
    answer.refusal(429, "429")
    assert answer.headers["Retry-After"] == "1"
    assert (await browser.log_in(TOKEN, {"X-Forwarded-For": "192.0.2.1"})).status == 429
    assert (await browser.log_in(TOKEN, {"X-Forwarded-For": "192.0.2.2"})).status == 200


# --- Without one ---


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1:9", "127.8.8.8", "[::1]:8080", "localhost."]
)
async def test_without_a_token_this_machine_is_let_in_under_its_own_names(daemon: AppServer, host: str) -> None:
    assert (await daemon.get("/api/v1/totals", headers={"Host": host})).status == 200
    assert (await daemon.get("/openapi.json", headers={"Host": host})).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "127.1", "2130706433", "0x7f.1",
     "0.0.0.0", "[::]", "[::ffff:127.0.0.1]", "evil.example#127.0.0.1", "x y", "[", ""],
)  # fmt: skip
async def test_a_name_that_was_made_to_point_here_is_refused(daemon: AppServer, host: str) -> None:
    """DNS rebinding: the browser believes itself on the page's own site."""
    for path in ("/api/v1/totals", "/openapi.json"):
        (await daemon.get(path, headers={"Host": host})).refusal(403, "403")
    for path in ("/", "/docs", "/ui/batches"):
        assert (await daemon.get(path, headers={"Host": host})).status == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Forwarded": "for=192.0.2.1"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"x-forwarded-for": ""},
        {"X-Forwarded-Host": "localhost"},
        {"X-Forwarded-Proto": "https"},
        {"X-Real-IP": "127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"CF-Connecting-IP": "192.0.2.1"},
    ],
)
async def test_who_comes_through_a_proxy_is_not_of_this_machine(daemon: AppServer, headers: dict[str, str]) -> None:
    message = (await daemon.get("/api/v1/totals", headers=headers)).refusal(403, "403")
    assert message == "without [auth] admin_token this is answered on this machine only: set one"


async def raw(daemon: AppServer, request: str) -> Reply:
    connection: Connection = await daemon.connect()
    await connection.send(request.replace("\n", "\r\n").encode())
    return await connection.answer()


async def test_a_proxy_that_says_nothing_is_known_by_its_old_version_of_http(daemon: AppServer) -> None:
    # nginx, told nothing but where to pass things to.
    (await raw(daemon, "GET /api/v1/totals HTTP/1.0\nHost: 127.0.0.1:8080\nConnection: close\n\n")).refusal(403, "403")
    assert (await raw(daemon, "GET /api/v1/totals HTTP/1.1\nHost: 127.0.0.1\n\n")).status == 200


async def test_a_trusted_proxy_is_not_of_this_machine(start: Start) -> None:
    daemon = await start(server={"port": 0, "trusted_proxies": ["127.0.0.1"]})
    (await daemon.get("/api/v1/totals")).refusal(403, "403")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}, 403),
    ],
)
async def test_without_a_token_other_sites_cannot_act(daemon: AppServer, headers: dict[str, str], status: int) -> None:
    sent = {name: value.format(port=daemon.port) for name, value in headers.items()}
    answer = await daemon.post(b"{}", {**JSON, **sent}, path="/api/v1/prune")
    assert answer.status == status


async def test_without_a_token_other_sites_cannot_look(daemon: AppServer) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}
    for path in ("/api/v1/totals", "/api/v1/export", "/api/v1/stream", "/openapi.json"):
        (await daemon.get(path, headers=headers)).refusal(403, "403")
    answer = await daemon.get("/api/v1/totals")
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


async def test_without_a_token_nobody_is_logged_in_and_no_cookie_can_be_made(daemon: AppServer, start: Start) -> None:
    key = hmac.digest(b"", b"notify_server log-in", "sha256")
    ends = "99999999999"
    cookie = f"{ends}.{hmac.new(key, f'session {ends}'.encode(), 'sha256').hexdigest()}"
    headers = {"Cookie": f"{COOKIE}={cookie}", "Host": "evil.example"}
    (await daemon.get("/api/v1/totals", headers=headers)).refusal(403, "403")
    assert not admin_of(daemon).needs_login


async def test_another_machine_is_refused(daemon: AppServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer as a neighbour on the network has it: no socket of this machine can show it."""
    for peer, status in (("192.0.2.7", 403), ("fe80::1%eth0", 403), ("", 403), ("::1", 200), ("127.0.0.1", 200)):
        monkeypatch.setattr(web.Request, "remote", peer)
        assert (await daemon.get("/api/v1/totals")).status == status
