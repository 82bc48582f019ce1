"""Who may look at the record and act on it: with a configured admin_token, and with the one that the server makes."""

from __future__ import annotations

import hmac
import itertools
import re
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
from notify_server.web.admin import CODE_SECONDS, COOKIE, CSRF_HEADER, LOGINS_A_SECOND, SESSION_SECONDS, Admin
from notify_server.web.routes import ROUTES
from tests.support.app import JSON, AppServer, Clock, Events, Start, build_config
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
async def test_nothing_is_shown_without_a_token(guarded: AppServer, path: str, headers: dict[str, str]) -> None:
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

    def __init__(self, client: TestClient[web.Request, web.Application], admin: Admin) -> None:
        self._client = client
        self.admin = admin
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

        async def once(request: web.Request) -> web.StreamResponse:
            response = web.Response(text="in")
            try:
                entered = admin.log_in_once(request, request.match_info["code"], response)
            except RefusedError as error:
                return error_response(str(uuid4()), error.status, error.code, error.message, error.headers)
            return response if entered else web.Response(status=401)

        async def logout(request: web.Request) -> web.StreamResponse:
            response = web.Response(text="out")
            await admin.log_out(request, response)
            return response

        app = web.Application()
        app.router.add_post("/login", login)
        app.router.add_get("/once/{code}", once)
        app.router.add_get("/page", admin.guard(page))
        app.router.add_post("/act", admin.guard(page))
        app.router.add_post("/logout", admin.guard(logout))
        client = TestClient(TestServer(app), cookie_jar=DummyCookieJar())
        await client.start_server()
        clients.append(client)
        return Browser(client, admin)

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
    cookie = browser.cookie.value
    answer = await browser.ask("POST", "/logout", {CSRF_HEADER: await browser.csrf()})
    assert answer.status == 200
    # A copy of the cookie is worth nothing either.
    assert (await browser.ask("GET", "/page", {"Cookie": f"{COOKIE}={cookie}"})).status == 401
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


# --- The token that the server makes ---


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost"},
        {"Host": "127.0.0.1:8080"},
        {"Host": "[::1]"},
        {"Host": "evil.example"},
        {"Host": "["},
        {"Forwarded": "for=127.0.0.1"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Real-IP": "127.0.0.1"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer None"},
        {"Cookie": f"{COOKIE}="},
        {"Cookie": f"{COOKIE}=99999999999."},
    ],
)
async def test_without_a_configured_token_no_address_opens_anything(
    daemon: AppServer, path: str, headers: dict[str, str]
) -> None:
    answer = await daemon.get(path, headers=headers, anonymous=True, allow_redirects=False)
    if answer.status == 303:
        assert answer.headers["Location"].startswith("/ui/login")
    else:
        assert answer.status == 401
    assert b"schemas" not in answer.body and b"batches" not in answer.body


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_no_version_of_http_opens_anything(daemon: AppServer, version: str) -> None:
    """nginx forwards in HTTP/1.0 by default before version 1.29.7, and in HTTP/1.1 since."""
    connection: Connection = await daemon.connect()
    await connection.send(f"GET /api/v1/totals HTTP/{version}\r\nHost: 127.0.0.1\r\n\r\n".encode())
    (await connection.answer()).refusal(401, "401")


@pytest.mark.parametrize("trusted", [[], ["127.0.0.1", "::1"]])
async def test_without_a_configured_token_strangers_cannot_act(start: Start, trusted: list[str]) -> None:
    daemon = await start(server={"port": 0, "trusted_proxies": trusted})
    headers = {**JSON, "Host": "localhost"}
    (await daemon.post(b"{}", headers, path="/api/v1/prune", anonymous=True)).refusal(401, "401")


async def test_key_of_sessions_cannot_be_derived_without_the_token(daemon: AppServer) -> None:
    ends = "99999999999"
    for guess in (b"", b"None"):
        key = hmac.digest(guess, b"notify_server log-in", "sha256")
        cookie = f"{ends}.{hmac.new(key, f'session {ends}'.encode(), 'sha256').hexdigest()}"
        answer = await daemon.get("/api/v1/totals", headers={"Cookie": f"{COOKIE}={cookie}"}, anonymous=True)
        answer.refusal(401, "401")


async def test_other_sites_cannot_read_answers(daemon: AppServer) -> None:
    answer = await daemon.get("/api/v1/totals")
    assert answer.status == 200
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


async def test_token_is_kept_with_the_record_and_survives_a_restart(start: Start) -> None:
    first = await start()
    file = first.path.with_name("admin_token")
    token = file.read_text().strip()
    assert (len(token) >= 32, file.stat().st_mode & 0o777) == (True, 0o600)
    await first.stop()
    second = await start()
    assert second.token == token
    assert (await second.get("/api/v1/totals")).status == 200


async def test_configured_token_counts_in_place_of_the_one_that_the_server_made(start: Start) -> None:
    first = await start()
    made = first.token
    await first.stop()
    second = await start(auth={"admin_token": TOKEN})
    (await second.get("/api/v1/totals", headers={"Authorization": f"Bearer {made}"})).refusal(401, "401")
    assert (await second.get("/api/v1/totals", headers=BEARER)).status == 200


async def test_configured_token_makes_no_file_and_no_log_in_address(start_server: Start, events: Events) -> None:
    since = len(events.all)
    daemon = await start_server(auth={"admin_token": TOKEN})
    assert not daemon.path.with_name("admin_token").exists()
    assert not [event for event in events.all[since:] if "/ui/login" in str(event.get("url"))]


async def logged_in(daemon: AppServer) -> str:
    """Log in with the token; the cookie as a browser sends it."""
    answer = await daemon.ask("POST", "/ui/login", anonymous=True, data={"token": daemon.token}, allow_redirects=False)
    return f"{COOKIE}={SimpleCookie(answer.headers['Set-Cookie'])[COOKIE].value}"


async def test_log_out_ends_one_session_and_holds_after_a_restart(start: Start) -> None:
    daemon = await start()
    ended, other = await logged_in(daemon), await logged_in(daemon)
    page = (await daemon.get("/", anonymous=True, headers={"Cookie": ended})).body.decode()
    csrf = page.partition('name="csrf" value="')[2].partition('"')[0]
    answer = await daemon.ask(
        "POST", "/ui/logout", anonymous=True, headers={"Cookie": ended}, data={"csrf": csrf}, allow_redirects=False
    )
    assert answer.status == 303
    await daemon.stop()
    again = await start()
    for each, status in ((ended, 401), (other, 200)):
        assert (await again.get("/api/v1/totals", anonymous=True, headers={"Cookie": each})).status == status


# --- The log-in address ---

OFFER = "open the dashboard with this address, once within 15 minutes"


async def test_address_in_the_log_logs_in_once(start_server: Start, events: Events) -> None:
    since = len(events.all)
    daemon = await start_server()
    address = (await events.seen(OFFER, since))["url"]
    assert address.startswith(f"http://127.0.0.1:{daemon.port}/ui/login/")
    # A chat program's preview and a browser that looks ahead do not use it up.
    assert (await daemon.ask("HEAD", address, anonymous=True)).status == 200
    assert (await daemon.get(address, anonymous=True, headers={"Sec-Purpose": "prefetch;prerender"})).status == 200
    wrong = await daemon.get(address[:-1], anonymous=True, allow_redirects=False)
    assert (wrong.status, "Set-Cookie" in wrong.headers) == (401, False)
    entered = await daemon.get(address, anonymous=True, allow_redirects=False)
    assert (entered.status, entered.headers["Location"]) == (303, "/")
    cookie = SimpleCookie(entered.headers["Set-Cookie"])[COOKIE].value
    page = await daemon.get("/", anonymous=True, headers={"Cookie": f"{COOKIE}={cookie}"}, allow_redirects=False)
    assert page.status == 200
    again = await daemon.get(address, anonymous=True, headers={"Accept-Language": "en"})
    assert again.status in (401, 429)
    assert "Set-Cookie" not in again.headers


async def test_log_in_address_of_a_server_behind_a_public_url_begins_with_it(
    start_server: Start, events: Events
) -> None:
    since = len(events.all)
    await start_server(server={"port": 0, "public_url": "https://example.com/notify/"})
    assert (await events.seen(OFFER, since))["url"].startswith("https://example.com/notify/ui/login/")


async def test_code_is_void_after_its_use_after_its_time_and_once_there_is_another(open_browser: Any) -> None:
    clock = Clock(NOW)
    browser = await open_browser(clock, server={"trusted_proxies": ["127.0.0.1"]})
    admin: Admin = browser.admin
    sources = itertools.count(1)

    async def enter(code: str) -> int:
        headers = {"X-Forwarded-For": f"192.0.2.{next(sources)}"}
        return int((await browser.ask("GET", f"/once/{code}", headers)).status)

    assert await enter("x") == 401
    old, code = admin.make_code(), admin.make_code()
    assert [await enter(old), await enter(code), await enter(code)] == [401, 200, 401]
    code = admin.make_code()
    clock.fixed = NOW + CODE_SECONDS * 1000 - 1
    assert await enter(code) == 200
    code = admin.make_code()
    clock.fixed += CODE_SECONDS * 1000
    assert await enter(code) == 401


async def test_click_on_another_site_logs_in_too(start_server: Start, events: Events) -> None:
    since = len(events.all)
    daemon = await start_server()
    address = (await events.seen(OFFER, since))["url"]
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    answer = await daemon.get(address, anonymous=True, headers=headers, allow_redirects=False)
    # A browser sends no SameSite cookie after a redirect that began elsewhere.
    assert (answer.status, answer.headers["Refresh"]) == (200, "0; url=/")
    assert "SameSite=Strict" in answer.headers["Set-Cookie"]


async def test_codes_are_guessed_no_faster_than_tokens(open_browser: Any) -> None:
    browser = await open_browser()
    statuses = [(await browser.ask("GET", f"/once/{number}")).status for number in range(LOGINS_A_SECOND + 1)]
    assert statuses == [401] * LOGINS_A_SECOND + [429]


# --- All routes ---

OPEN_PATHS = ("/healthz", "/readyz", "/metrics", "/ui/login", "/ui/language", "/ui/static/")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def concrete(path: str) -> str:
    """A route's path with a value for each of its parameters."""
    return re.sub(r"\{(\w+):(?:[^{}]|\{[^{}]*\})*\}", lambda found: "/x" if found[1] == "path" else "1", path)


async def test_every_route_but_the_open_ones_wants_the_token_whatever_the_method(daemon: AppServer) -> None:
    paths = {concrete(route.path) for route in ROUTES} - {"//x"}
    assert len(paths) > 30
    wrong = []
    for path in sorted(paths):
        if path.startswith(OPEN_PATHS):
            continue
        for method in METHODS:
            answer = await daemon.ask(method, path, anonymous=True, allow_redirects=False)
            is_log_in = answer.status == 303 and answer.headers["Location"].startswith("/ui/login")
            # 404 and 405 say nothing about the record; the method is not served at all.
            if answer.status not in (401, 404, 405) and not is_log_in:
                wrong.append((method, path, answer.status))
            # Not found only where the method is not served: the API looks at the token before it looks at anything.
            if path.startswith("/api/") and answer.status != 401:
                wrong.append((method, path, answer.status))
    assert wrong == []


@pytest.mark.parametrize(
    "target",
    [
        "//api/v1/totals",
        "/api//v1/totals",
        "/api/v1/totals/",
        "/api/v1/./totals",
        "/api/v1/x/../totals",
        "/ui/static/../../api/v1/totals",
        "/ui/static/x/..%2f..%2fapi/v1/totals",
        "/%61pi/v1/totals",
        "/api/v1/totals?token=x",
        "/api/v1/totals#/ui/login",
        "/api/v1/totals;/ui/login",
        "/ui/login/../../api/v1/totals",
        "http://localhost/api/v1/totals",
        "/notify/../api/v1/totals",
        "/healthz/../api/v1/totals",
    ],
)
async def test_no_spelling_of_a_path_leads_past_the_token(daemon: AppServer, target: str) -> None:
    connection: Connection = await daemon.connect()
    await connection.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = await connection.answer()
    assert answer.status in (303, 400, 401, 404), answer
    assert b"oldest_pending_at" not in answer.body


@pytest.mark.parametrize(
    "headers",
    [
        "X-HTTP-Method-Override: GET\r\nX-Original-URL: /healthz",
        "X-Rewrite-URL: /healthz",
        "Authorization: Bearer x\r\nAuthorization: Bearer {token}",
        "Authorization: Bearer x, Bearer {token}",
        "Proxy-Authorization: Bearer {token}",
        "Cookie: notify_server_session={token}",
    ],
)
async def test_no_header_leads_past_the_token(daemon: AppServer, headers: str) -> None:
    connection: Connection = await daemon.connect()
    sent = headers.format(token=daemon.token)
    await connection.send(f"GET /api/v1/totals HTTP/1.1\r\nHost: h\r\n{sent}\r\nConnection: close\r\n\r\n".encode())
    assert (await connection.answer()).status in (400, 401)
