"""The dashboard, in a real browser and on the wire."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from playwright.async_api import Browser, BrowserContext, expect
from yarl import URL

from notify_server.web.admin import COOKIE
from tests.support.browser import DESKTOP, PHONE, Watched, chromium, context, watched
from tests.support.daemon import Daemon
from tests.support.notification import API_CODE, batch_body, failed, finished
from tests.support.origin import Answer, Hit, Origin
from tests.support.waiting import Bell

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKEN = "a-token-for-tests"
SCRIPT = "<script>pwned()</script>"
IMAGE = '"><img src=x onerror=pwned()>'
HOSTILE = f"{SCRIPT}{IMAGE}"
LINK = "javascript:pwned()"
KEY = "8ZAFUPII49GQN2AB/IMAGE/-1091150479/L2FwdF9jb21tb24vb18xZmRsdXNzNWkx"
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000 1f15c4890000000d49444154789c63f8cfc0f01f0005050102"
    "2fa9b1d40000000049454e44ae426082"
)


class Receiver:
    """Receives events: /good accepts them, /bad fails."""

    def __init__(self) -> None:
        self.accepted = 0
        self.bell = Bell()

    async def handle(self, request: web.Request) -> web.Response:
        await request.read()
        if request.path == "/bad":
            return web.Response(status=500, text=HOSTILE, content_type="text/html")
        self.accepted += 1
        self.bell.ring()
        return web.Response()


@dataclass
class Site:
    """A daemon with a record in which there is something of everything, the origin of its files, and a browser."""

    daemon: Daemon
    origin: Origin
    receiver: Receiver
    browser: Browser
    base: str
    # Of a session: a log-in for every test would be more than one source may try.
    cookie: str

    @asynccontextmanager
    async def visit(self, path: str = "/", *, known: bool = True, **settings: Any) -> AsyncIterator[Watched]:
        """A page of a visitor of its own; nothing may be wrong with it in the end."""
        async with context(self.browser, **settings) as visitor:
            if known:
                await self.log_in(visitor)
            page = await watched(visitor, self.base)
            await page.go(path)
            yield page
            assert page.problems == []

    async def log_in(self, visitor: BrowserContext) -> None:
        await visitor.add_cookies([{"name": COOKIE, "value": self.cookie, "url": self.base, "sameSite": "Strict"}])

    def id_of(self, table: str, column: str, value: str) -> int:
        return int(self.daemon.value(f"SELECT id FROM {table} WHERE {column} = ?", value))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    picture = {"Content-Type": "image/png", "ETag": '"5d41"'}

    def answer(hit: Hit) -> Answer:
        headers = picture | ({"Content-Length": "1000"} if hit.method == "HEAD" else {})
        return Answer(headers=headers, body=b"" if hit.method == "HEAD" else PNG)

    loopback = ["127.0.0.0/8"]
    async with contextlib.AsyncExitStack() as stack:
        origin, receiver, app = await stack.enter_async_context(Origin()), Receiver(), web.Application()
        app.router.add_post("/{name}", receiver.handle)
        server = await stack.enter_async_context(TestServer(app))
        config: dict[str, Any] = {
            "auth": {"admin_token": TOKEN},
            "verify": {"allowed_networks": loopback, "allowed_ports": [], "retry_schedule": ["1h"]},
            "alert": {"at_risk_after": "0.001s"},
            "forward": [
                {"name": name, "url": f"{server.make_url(name)}?token=hush-hush", "allowed_networks": loopback}
                for name in ("good", "bad")
            ],
        }
        daemon = await stack.enter_async_context(Daemon(tmp_path_factory.mktemp("site"), config))
        browser = await stack.enter_async_context(chromium())
        origin.default = answer
        origin.on("/gone", Answer(410, close=True))
        origin.on("/late", Answer(404, close=True))
        evil = {"Content-Type": f"text/html;{IMAGE}", "ETag": f'"{HOSTILE}"', "Last-Modified": HOSTILE}
        origin.on("/evil", Answer(200, evil))
        origin.on("/away", Answer(302, {"Location": LINK}, close=True))
        origin.on("/hop", Answer(302, {"Location": f"/x?{IMAGE}"}, close=True))
        submissions: list[dict[str, Any]] = [
            {"reference": HOSTILE, "api_code": API_CODE, "batch_id": "broken", "files": 9},
            {"reference": SCRIPT, "api_code": API_CODE, "batch_id": IMAGE[:80], "notify_within": "1ms"},
            {"reference": "order 1", "api_code": API_CODE, "files": 4},
        ]
        for submission in submissions:
            async with aiohttp.ClientSession() as session:
                path = f"{daemon.callback.removesuffix('/notify')}/api/v1/expectations"
                bearer = {"Authorization": f"Bearer {TOKEN}"}
                async with session.post(path, json=submission, headers=bearer) as registered:
                    assert registered.status == 201, await registered.text()
        await daemon.settle("whole", [finished(origin.url(f"/p{n}.png"), f"{KEY[:-1]}{n}") for n in range(4)])
        blocked = finished("http://10.1.2.3/x", "blocked")
        await daemon.settle("broken", [origin.url("/gone"), origin.url("/a"), blocked, failed("failed")])
        await daemon.settle("for the keyboard", [finished(origin.url("/gone"), "k1"), origin.url("/b")])
        await daemon.deliver("waiting", [origin.url("/late"), origin.url("/c")])
        await daemon.eventually("SELECT count(*) = 1 FROM file WHERE reason = 'http_404'")
        await daemon.settle(
            HOSTILE,
            [
                finished(origin.url("/evil"), HOSTILE),
                finished(origin.url("/gone"), IMAGE),
                finished(origin.url(f"/gone?{IMAGE}"), LINK),
                finished(origin.url("/hop"), "\u202e</title><script>pwned()</script>"),
                failed(SCRIPT, LINK),
            ],
        )
        await daemon.deliver(f"redirected {IMAGE}", [finished(origin.url("/away"), "away")])
        await daemon.eventually("SELECT count(*) = 1 FROM file WHERE reason = 'bad_redirect'")
        for entry in (finished(LINK, HOSTILE), finished("ftp://x", IMAGE)):
            assert (await daemon.post(batch_body(HOSTILE, [origin.url("/a"), entry]))).status == 400
        await daemon.eventually("SELECT count(*) = 2 FROM rejection")
        await daemon.eventually("SELECT count(*) = 0 FROM notification WHERE expanded_at IS NULL")
        base = daemon.callback.removesuffix("/notify")
        async with (
            aiohttp.ClientSession(base, cookie_jar=aiohttp.CookieJar(unsafe=True)) as session,
            session.post("/ui/login", data={"token": TOKEN}, allow_redirects=False) as answered,
        ):
            cookie = answered.cookies[COOKIE].value
        await daemon.eventually("SELECT count(*) = 1 FROM event WHERE type = 'batch.at_risk'")
        await daemon.eventually("SELECT count(*) > 0 FROM forward WHERE endpoint = 'bad' AND last_response IS NOT NULL")
        yield Site(daemon, origin, receiver, browser, base, cookie)


def all_pages(site: Site) -> list[str]:
    hostile, broken = (site.id_of("batch", "batch_id", name) for name in (HOSTILE, "broken"))
    files = [site.id_of("file", "oss_object_name", name) for name in (HOSTILE, LINK, SCRIPT, "away")]
    refused = site.daemon.value("SELECT min(id) FROM forward WHERE last_response LIKE '%pwned%'")
    return [
        "/",
        "/ui/batches",
        "/ui/batches?verdict=incomplete&api_code=nothing",
        f"/ui/batches/{hostile}?state=all",
        f"/ui/batches/{broken}",
        *(f"/ui/files/{file}" for file in files),
        "/ui/files?reason=http_410",
        "/ui/files?state=pending",
        "/ui/failures",
        "/ui/hosts",
        "/ui/expected",
        "/ui/expected?state=late",
        "/ui/expected?reference=nothing",
        "/ui/rejections",
        "/ui/rejections/1",
        "/ui/search?q=%3Cscript%3Epwned()%3C/script%3E%22%3E%3Cimg%20src=x",
        "/ui/search?q=w",
        f"/ui/recheck?batch={broken}",
        "/ui/deliveries",
        "/ui/deliveries/bad",
        f"/ui/delivery/{refused}",
        "/ui/deliveries/good/replay?since=2026-01-01T00:00:00Z",
        "/docs",
        "/ui/login",
    ]


# --- In the browser ---


async def test_somebody_new_logs_in_finds_a_failed_file_and_makes_it_available(site: Site) -> None:
    async with site.visit("/", known=False) as seen:
        page = seen.page
        assert page.url == f"{site.base}/ui/login"
        await page.get_by_label("admin_token").fill(TOKEN)
        await page.get_by_role("button", name="Log in").click()
        await expect(page.get_by_role("heading", name="Needs attention")).to_be_visible()

        await page.get_by_role("link", name="broken 3 of 4 files missing").click()
        await expect(page.get_by_role("heading", name="3 of 4 files are missing")).to_be_visible()
        await page.get_by_role("link", name=site.origin.url("/gone")).click()
        await expect(page.get_by_text("permanently deleted (410)")).to_be_visible()
        await expect(page.locator("table tbody tr")).to_have_count(1)

        site.origin.on("/gone", Answer())
        try:
            await page.get_by_role("button", name="Recheck now").click()
            await expect(page.locator(".title .chip")).to_have_text("Available")
            await expect(page.get_by_text("permanently deleted")).to_have_count(0)
        finally:
            site.origin.on("/gone", Answer(410, close=True))


async def test_missing_files_are_found_and_rechecked_in_three_clicks(site: Site) -> None:
    before = site.origin.count["/gone"]
    async with site.visit("/") as seen:
        page = seen.page
        await page.get_by_role("link", name=re.compile("for the keyboard 1 of 2 files missing")).click()
        await expect(page.get_by_role("cell", name="http_410 permanently deleted")).to_be_visible()
        await page.get_by_role("button", name="Recheck missing files").click()
        await page.get_by_role("button", name="Recheck 1 file").click()
        await site.origin.reached(before + 1, "/gone")


async def test_the_way_to_a_recheck_can_be_gone_by_keyboard(site: Site) -> None:
    before = site.origin.count["/gone"]
    async with site.visit("/") as seen:
        page = seen.page

        async def tab_to(text: str) -> None:
            for _ in range(60):
                await page.keyboard.press("Tab")
                focused = await page.evaluate("document.activeElement.innerText || ''")
                outline = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none" or focused == ""
                if text in focused:
                    return
            raise AssertionError(f"{text} cannot be reached")

        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.hash") == "#content"
        await tab_to("for the keyboard")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("heading", name="for the keyboard")).to_be_visible()
        await tab_to("Recheck missing files")
        await page.keyboard.press("Space")
        confirm = page.get_by_role("button", name="Recheck 1 file")
        await expect(confirm).to_be_focused()
        await page.keyboard.press("Enter")
        await site.origin.reached(before + 1, "/gone")


async def test_without_scripts_everything_is_done_as_well(site: Site) -> None:
    before = site.origin.count["/gone"]
    async with context(site.browser, java_script_enabled=False) as visitor:
        page = await visitor.new_page()
        await page.goto(f"{site.base}/ui/batches")
        assert page.url == f"{site.base}/ui/login?next=%2Fui%2Fbatches"
        await page.get_by_label("admin_token").fill(TOKEN)
        await page.get_by_role("button", name="Log in").click()
        assert page.url == f"{site.base}/ui/batches"
        await page.get_by_role("link", name="for the keyboard").click()
        await page.get_by_role("button", name="Recheck missing files").click()
        await expect(page.get_by_text("Recheck 1 file now?")).to_be_visible()
        await page.get_by_role("button", name="Recheck 1 file").click()
        await expect(page.get_by_text("1 file queued.")).to_be_visible()
        await site.origin.reached(before + 1, "/gone")


async def test_endpoint_is_tested_replayed_stopped_and_started_from_its_page(site: Site) -> None:
    async with site.visit("/ui/deliveries") as seen:
        page = seen.page
        await expect(page.get_by_role("row", name=re.compile("bad"))).to_contain_text("Failing")
        await page.get_by_role("link", name="good").click()
        await page.get_by_role("button", name="Send a test event").click()
        await expect(page.get_by_text("Delivered in")).to_be_visible()
        await page.get_by_role("button", name="Count").click()
        confirm = page.get_by_role("button", name=re.compile(r"Send \d+ again"))
        await expect(confirm).to_be_focused()
        before = site.receiver.accepted
        await confirm.click()
        await expect(page.get_by_text("due now.")).to_be_visible()
        await site.receiver.bell.until(lambda: site.receiver.accepted >= before + 3)
        await page.get_by_role("button", name="Stop").click()
        await expect(page.locator(".title .chip")).to_have_text("Stopped")
        await expect(page.get_by_role("button", name="Send a test event")).to_have_count(0)
        await page.get_by_role("button", name="Start").click()
        await expect(page.locator(".title .chip")).to_have_text("Working")


async def test_endpoint_page_works_without_scripts_and_shows_request_and_answer(site: Site) -> None:
    async with context(site.browser, java_script_enabled=False) as visitor:
        await site.log_in(visitor)
        page = await visitor.new_page()
        await page.goto(f"{site.base}/ui/deliveries/bad")
        await page.get_by_label("Send again from").fill("2100-01-01T00:00")
        await page.get_by_role("button", name="Count").click()
        await expect(page.get_by_text("No event of this endpoint falls within this time.")).to_be_visible()
        await page.get_by_role("link", name="Back").click()
        await page.get_by_role("button", name="Send a test event").click()
        await expect(page.get_by_text("Not delivered: answered HTTP 500")).to_be_visible()
        await page.get_by_role("link", name="Back").click()
        await page.get_by_role("link", name=re.compile("Batch complete")).first.click()
        assert '"batch_id": "whole"' in await page.locator("pre").first.inner_text()
        assert HOSTILE in await page.locator("pre").nth(1).inner_text()
        assert "hush-hush" not in await page.content()


async def test_batch_page_shows_what_was_sent_and_why_the_batch_is_at_risk(site: Site) -> None:
    async with site.visit(f"/ui/batches/{site.id_of('batch', 'batch_id', 'waiting')}") as seen:
        risk = seen.page.locator("section[aria-labelledby=risk-title]")
        await expect(risk).to_contain_text("At risk: 1 file is not confirmed yet")
        await expect(risk).to_contain_text("http_404")
        await expect(risk.locator("time")).to_have_count(3)
        sent = seen.page.locator("#sent tbody tr")
        await expect(sent).to_have_count(2)
        await expect(sent.filter(has_text="good")).to_contain_text("Delivered")
        await expect(sent.filter(has_text="bad")).to_contain_text("answered HTTP 500")


async def test_a_group_of_failures_is_counted_before_its_recheck(site: Site) -> None:
    async with site.visit("/ui/failures") as seen:
        section = seen.page.locator("section#bad_redirect")
        await section.get_by_role("button", name="Recheck").click()
        await expect(section.get_by_text("Recheck 1 file now?")).to_be_visible()
        before = site.origin.count["/away"]
        await section.get_by_role("button", name="Recheck 1 file").click()
        await expect(section.get_by_text("1 file queued.")).to_be_visible()
        await site.origin.reached(before + 1, "/away")


async def test_a_refusal_shows_the_field_at_fault_and_what_comes_of_taking_it_now(site: Site) -> None:
    async with site.visit("/ui/rejections/1") as seen:
        page = seen.page
        await expect(page.locator("mark")).to_contain_text('"target_url": "javascript:pwned()"')
        async with page.expect_response(re.compile("/replay$")) as answered:
            await page.get_by_role("button", name="Reprocess").click()
        assert (await answered.value).status == 422
        await expect(page.get_by_role("alert")).to_contain_text("file_list[1].target_url")
        # The browser itself tells of an answer that is a refusal.
        assert [problem for problem in seen.problems if "422" not in problem] == []
        seen.problems.clear()


async def test_the_overview_is_live(site: Site) -> None:
    async with site.visit("/") as seen:
        page = seen.page
        await expect(page.locator("#live")).to_have_text("live")
        await expect(page.locator(".plot canvas")).to_have_count(4)
        taken = page.locator("[data-sum=accepted]")
        before = int(site.daemon.value("SELECT count(*) FROM notification"))
        # The sample of the last second may be on its way.
        await expect(taken).to_have_text(f"{before} in 10 minutes")
        await site.daemon.deliver("one more", [site.origin.url("/live")])
        await expect(taken).to_have_text(f"{before + 1} in 10 minutes")
        await page.get_by_role("button", name="24 hours").click()
        await expect(page.get_by_role("button", name="24 hours")).to_have_attribute("aria-pressed", "true")


async def test_pictures_are_loaded_from_the_store_only_on_request(site: Site) -> None:
    batch = site.id_of("batch", "batch_id", "whole")
    async with site.visit(f"/ui/batches/{batch}") as seen:
        page = seen.page
        assert site.origin.of("/p0.png")[0].method == "HEAD"
        asked = len(site.origin.hits)
        await expect(page.locator("img")).to_have_count(0)
        await page.get_by_role("link", name="Pictures").click()
        await expect(page.locator("img")).to_have_count(4)
        await site.origin.reached(asked + 4)
        images = page.locator("img").first
        await expect(images).to_have_js_property("naturalWidth", 1)
        assert "referer" not in site.origin.hits[-1].headers
        seen.problems = [problem for problem in seen.problems if site.origin.url("/p") not in problem]


async def test_the_search_box_finds_batches_files_and_addresses(site: Site) -> None:
    batch = site.id_of("batch", "batch_id", "whole")
    async with site.visit("/") as seen:
        page = seen.page
        for sought, found in (
            ("whol", f"/ui/batches/{batch}"),
            (f"{KEY[:-1]}2", f"/ui/files/{site.id_of('file', 'oss_object_name', f'{KEY[:-1]}2')}"),
            (f"https://elsewhere.example/{KEY[:-1]}3", None),
            ("w", "/ui/search?q=w"),
        ):
            await page.get_by_role("searchbox", name="Search").fill(sought)
            await page.keyboard.press("Enter")
            wanted = found or f"/ui/files/{site.id_of('file', 'oss_object_name', f'{KEY[:-1]}3')}"
            await expect(page).to_have_url(site.base + wanted)


async def test_times_of_the_filter_are_those_of_the_reader(site: Site) -> None:
    async with site.visit("/ui/batches?received_before=2020-01-01T16:00:00Z") as seen:
        page = seen.page
        await expect(page.get_by_role("heading", name="No matching batches")).to_be_visible()
        await expect(page.get_by_label("Received before")).to_have_value("2020-01-02T00:00")
        await page.get_by_label("Received before").fill("2100-01-01T08:00")
        await page.get_by_role("button", name="Filter").click()
        assert "received_before=2100-01-01T00%3A00%3A00.000Z" in page.url
        await expect(page.get_by_role("link", name="whole")).to_be_visible()


async def test_the_language_is_the_browsers_until_another_is_chosen(site: Site) -> None:
    async with site.visit("/ui/hosts", locale="zh-CN") as seen:
        page = seen.page
        await expect(page.get_by_role("heading", name="主机")).to_be_visible()
        assert await page.evaluate("document.documentElement.lang") == "zh-CN"
        await page.get_by_role("button", name="切换语言：English").click()
        assert page.url == f"{site.base}/ui/hosts"
        await expect(page.get_by_role("heading", name="Storage hosts")).to_be_visible()
        await seen.go("/")
        await expect(page.get_by_role("heading", name="Overview")).to_be_visible()


async def test_times_are_local_and_say_what_they_are_in_utc(site: Site) -> None:
    async with site.visit("/ui/batches") as seen:
        time = seen.page.locator("time").first
        title, text = await time.get_attribute("title"), await time.inner_text()
        assert title is not None and re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", title)
        hour = (int(title[11:13]) + 8) % 24
        assert f"{hour:02}{title[13:19]}" in text


@pytest.mark.parametrize(("width", "locale"), [(DESKTOP, "en-GB"), (PHONE, "zh-CN")])
async def test_every_page_is_sound(site: Site, width: int, locale: str) -> None:
    """Threats, row 85: what was stored does nothing. No page breaks the policy, is wider than the window, or shuts
    anybody out, be it light or dark."""
    settings = {"viewport": {"width": width, "height": 844}, "locale": locale, "reduced_motion": "reduce"}
    wrong: dict[str, list[str]] = {}
    async with context(site.browser, **settings) as visitor:
        await site.log_in(visitor)
        seen = await watched(visitor, site.base)
        for path in all_pages(site):
            if path == "/ui/login":
                await visitor.clear_cookies()
            await seen.page.emulate_media(color_scheme="light")
            await seen.go(path)
            found = seen.problems + await seen.violations()
            await seen.page.emulate_media(color_scheme="dark")
            found += await seen.violations(["color-contrast"])
            if over := await seen.overflow():
                found.append(f"{over} px wider than the window")
            found += await seen.page.evaluate(
                """() => [
                    document.documentElement.dataset.pwned ? 'a stored string ran' : '',
                    ...[...document.querySelectorAll('main script, main img, [onerror], iframe, object, embed')]
                        .map((element) => `planted: ${element.outerHTML}`),
                    ...[...document.querySelectorAll('a[href]')].filter((a) => !/^https?:$/.test(a.protocol))
                        .map((a) => `leads to ${a.href}`),
                    ...[...document.querySelectorAll('a[href]')]
                        .filter((a) => a.host !== location.host && !/noreferrer/.test(a.rel))
                        .map((a) => `tells where it comes from: ${a.href}`),
                ].filter(Boolean)"""
            )
            if found:
                wrong[path] = found
            seen.problems = []
    assert wrong == {}


async def test_stored_strings_are_shown_as_they_are(site: Site) -> None:
    """Without this, a page that leaves them out would pass for one that keeps them harmless (row 85)."""
    async with site.visit(f"/ui/files/{site.id_of('file', 'oss_object_name', HOSTILE)}") as seen:
        shown = await seen.page.inner_text("main")
        assert shown.count(HOSTILE) >= 3
        assert f"text/html;{IMAGE}" in shown
    async with site.visit("/ui/batches") as seen:
        assert HOSTILE in await seen.page.inner_text("main")
    async with site.visit("/ui/rejections/1") as seen:
        assert SCRIPT in await seen.page.inner_text("main")
    async with site.visit(f"/ui/files/{site.id_of('file', 'oss_object_name', SCRIPT)}") as seen:
        assert LINK in await seen.page.inner_text("main")


async def test_a_page_of_another_site_can_neither_act_nor_frame(site: Site) -> None:
    """Row 90. The other site is at another port, so that the browser sends the cookie along: SameSite does not help."""
    attempts = site.daemon.value("SELECT count(*) FROM attempt")
    file = site.id_of("file", "oss_object_name", "k1")
    form = f'<form method=post action="{site.base}/ui/recheck"><input name=file value={file}></form>'
    evil = f"{form}<script>document.forms[0].submit()</script>".encode()
    frame = f'<iframe src="{site.base}/"></iframe>'.encode()
    async with Origin() as other, context(site.browser) as visitor:
        html = {"Content-Type": "text/html"}
        other.on("/post", Answer(headers=html, body=evil))
        other.on("/frame", Answer(headers=html, body=frame))
        other.default = Answer(404)
        await site.log_in(visitor)
        page = await visitor.new_page()
        async with page.expect_response(f"{site.base}/ui/recheck") as refused:
            await page.goto(other.url("/post"), wait_until="commit")
        assert (await refused.value).status == 403
        await expect(page.get_by_role("heading", name="Invalid request")).to_be_visible()

        messages: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        await page.goto(other.url("/frame"), wait_until="load")
        assert any("frame-ancestors" in message for message in messages), messages
        assert "Overview" not in await page.frames[1].content()
        await page.goto("about:blank")
    assert site.daemon.value("SELECT count(*) FROM attempt") == attempts


# --- On the wire ---


def client(site: Site, *, known: bool = False) -> aiohttp.ClientSession:
    cookies = {COOKIE: site.cookie} if known else {}
    return aiohttp.ClientSession(site.base, cookies=cookies, cookie_jar=aiohttp.CookieJar(unsafe=True))


async def test_nothing_is_shown_or_changed_without_the_token(site: Site) -> None:
    """Row 90."""
    async with client(site) as session:
        for path in [path for path in all_pages(site) if path != "/ui/login"]:
            async with session.get(path, allow_redirects=False) as answer:
                assert (answer.status, await answer.read()) == (303, b""), path
                assert answer.headers["Location"].startswith("/ui/login")
        for path, data in (
            ("/ui/recheck", {"file": "1"}),
            ("/ui/rejections/1/replay", {"x": "y"}),
            ("/ui/logout", {"x": "y"}),
        ):
            async with session.post(path, data=data, allow_redirects=False) as answer:
                assert answer.status == 401, path
        async with session.get("/", headers={"Authorization": "Bearer wrong-token"}) as answer:
            assert answer.status == 401
        async with session.get(
            "/ui/batches", headers={"HX-Request": "true", "HX-Current-URL": f"{site.base}/ui/hosts"}
        ) as answer:
            assert (answer.status, answer.headers["HX-Redirect"]) == (401, "/ui/login?next=%2Fui%2Fhosts")
            assert await answer.read() == b""
        async with session.post("/ui/login", data={"token": "wrong-token"}, allow_redirects=False) as answer:
            assert answer.status == 401
            assert "Set-Cookie" not in answer.headers


async def test_a_form_without_its_token_or_from_elsewhere_does_nothing(site: Site) -> None:
    """Row 90."""
    async with client(site, known=True) as session:
        async with session.get("/ui/failures") as answer:
            page = await answer.text()
        csrf = re.search(r'name="csrf" value="(\w+)"', page)
        assert csrf is not None
        recheck = {"file": str(site.id_of("file", "oss_object_name", "k1"))}
        for data, headers in (
            (recheck, {}),
            (recheck | {"csrf": "0" * 64}, {}),
            (recheck | {"csrf": csrf[1]}, {"Origin": "http://evil.example"}),
            (recheck | {"csrf": csrf[1]}, {"Sec-Fetch-Site": "cross-site"}),
        ):
            async with session.post("/ui/recheck", data=data, headers=headers) as answer:
                assert answer.status == 403
        async with session.post("/ui/recheck", json=recheck) as answer:
            assert answer.status == 415
        async with session.post("/ui/recheck", data={"x": "y" * 70_000, "csrf": csrf[1]}) as answer:
            assert answer.status == 413
        async with session.post("/ui/language", data={"to": "zh"}, headers={"Sec-Fetch-Site": "cross-site"}) as answer:
            assert answer.status == 403


async def test_pages_are_harmless_by_their_headers(site: Site) -> None:
    async with client(site, known=True) as session:
        batch = site.id_of("batch", "batch_id", "whole")
        for path in ("/", "/docs", "/ui/batches/999999", "/ui/nothing", f"/ui/batches/{batch}?view=pictures", "/ui/x"):
            async with session.get(path) as answer:
                policy = answer.headers["Content-Security-Policy"]
                assert "unsafe" not in policy
                assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} <= set(
                    policy.split("; ")
                )
                assert ("http:" in policy) == ("pictures" in path)
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Referrer-Policy"] == "no-referrer"
                assert answer.headers["Cache-Control"] == "no-store"
                assert answer.status == (404 if "999999" in path or path.endswith(("/nothing", "/x")) else 200)


async def test_files_of_pages_are_kept_for_ever_under_an_address_that_changes_with_them(site: Site) -> None:
    async with client(site) as session:
        async with session.get("/ui/login") as answer:
            page = await answer.text()
        named = re.findall(r'(?:src|href)="(/ui/static/[^"]+)"', page)
        assert len(named) >= 4
        for path in named:
            async with session.get(path) as answer:
                assert answer.status == 200
                assert "immutable" in answer.headers["Cache-Control"]
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
            async with session.get(re.sub(r"static/\w+", "static/older", path)) as answer:
                assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-cache")
        for path in ("x/vendor/../../dashboard.py", "x/%2e%2e/dashboard.py", "x/%2Fetc/passwd", "x/y"):
            async with session.get(URL(f"{site.base}/ui/static/{path}", encoded=True)) as answer:
                assert answer.status == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/ui/batches?verdict=maybe", 400),
        ("/ui/batches?cursor=00", 400),
        ("/ui/batches?received_from=yesterday", 400),
        ("/ui/batches?received_from=0001-01-01T00:00:00%2B14:00", 400),
        ("/ui/batches?unknown=1", 400),
        ("/ui/batches/1?state=odd", 400),
        ("/ui/files?reason=http_410&cursor=zz", 400),
        ("/ui/files?cursor=zz", 400),
        ("/ui/recheck", 400),
        ("/ui/recheck?file=-1", 400),
        ("/ui/recheck?file=999999", 404),
        ("/ui/files/999999999999999999", 404),
        ("/ui/files/9999999999999999999", 404),
        ("/ui/search?q=%ED%A0%80%00", 200),
        ("/ui/search?q=" + "x" * 3000, 200),
    ],
)
async def test_invalid_parameters_are_explained_on_a_page(site: Site, path: str, status: int) -> None:
    async with client(site, known=True) as session, session.get(path) as answer:
        assert (answer.status, answer.content_type) == (status, "text/html")


async def test_a_log_in_leads_to_where_one_wanted_to_go_and_nowhere_else(site: Site) -> None:
    async with client(site) as session:
        for wanted, gone in (
            ("/ui/hosts?x=1", "/ui/hosts?x=1"),
            ("//evil.example", "/"),
        ):
            form = {"token": TOKEN, "next": wanted}
            async with session.post("/ui/login", data=form, allow_redirects=False) as answer:
                assert (answer.status, answer.headers["Location"]) == (303, gone)
                cookie = answer.headers["Set-Cookie"]
                assert "HttpOnly" in cookie and "SameSite=Strict" in cookie


async def test_who_logs_out_is_out(site: Site) -> None:
    async with site.visit("/") as seen:
        await seen.page.get_by_role("button", name="Log out").click()
        await expect(seen.page.get_by_label("admin_token")).to_be_visible()
        await seen.go("/ui/batches")
        assert "/ui/login" in seen.page.url


async def test_the_dashboard_works_with_the_bearer_token_as_well(site: Site) -> None:
    async with client(site) as session, session.get("/", headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
        assert answer.status == 200
        assert (await session.head("/", headers={"Authorization": f"Bearer {TOKEN}"})).status == 200


async def test_address_that_the_server_prints_opens_the_dashboard_with_one_click(site: Site, tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon, chromium_page(site, daemon) as seen:
        page = seen.page
        await expect(page.get_by_label("admin_token")).to_be_visible()
        offered = await daemon.line("open the dashboard with this address, once within 15 minutes")
        await page.goto(offered["url"])
        assert page.url == f"{seen.base}/"
        await expect(page.get_by_role("heading", name="No notifications yet")).to_be_visible()
        url, command = await page.locator(".command code").all_inner_texts()
        assert url == daemon.callback
        assert command.startswith(f"curl {daemon.callback}")
        await expect(page.get_by_text("This address is only reachable from this machine.")).to_be_visible()
        for path in ("/ui/batches", "/ui/failures", "/ui/hosts", "/ui/rejections"):
            await seen.go(path)
            await expect(page.locator(".empty h2")).to_be_visible()
        await seen.go("/ui/login")
        assert page.url == f"{seen.base}/"


async def test_a_stopped_server_is_seen_on_every_page(site: Site, tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon, context(site.browser) as visitor:
        await daemon.deliver("stopped", [site.origin.url("/gone")])
        overview = await watched(visitor, daemon.callback.removesuffix("/notify"))
        offered = await daemon.line("open the dashboard with this address, once within 15 minutes")
        await overview.page.goto(offered["url"])
        await expect(overview.page.locator("#live")).to_have_text("live")
        batch = await watched(visitor, overview.base)
        await batch.go("/ui/batches/1")
        assert await daemon.terminate() == 0
        await expect(overview.page.get_by_role("alert")).to_contain_text("Disconnected since")
        await expect(overview.page.locator("body")).to_have_class("stale")
        await batch.page.bring_to_front()
        await batch.page.get_by_role("button", name="Recheck missing files").click()
        await expect(batch.page.get_by_text("The server does not respond. Nothing was changed.")).to_be_visible()


@asynccontextmanager
async def chromium_page(site: Site, daemon: Daemon) -> AsyncIterator[Watched]:
    """A page of another daemon's."""
    async with context(site.browser) as visitor:
        seen = await watched(visitor, daemon.callback.removesuffix("/notify"))
        await seen.go("/")
        yield seen
        assert seen.problems == []
