"""A real browser for tests of the dashboard: Debian's chromium, and pages that are watched while they are open."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, Request, async_playwright

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = 1280
PHONE = 390
# Called by whatever was planted in stored strings, should it ever run.
_TRAP = "window.pwned = () => { document.documentElement.dataset.pwned = 'yes'; }"


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser of its own, with a profile that is gone afterwards."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield browser
        finally:
            await browser.close()


class Watched:
    """A page, and all that was wrong with it: errors on the console (a breach of the policy is one), exceptions, and
    requests to anything but `base`."""

    def __init__(self, page: Page, base: str) -> None:
        self.page = page
        self.base = base
        self.problems: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("request", self._request)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text} ({message.location.get('url')})")

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.base, "data:")):
            self.problems.append(f"asked for {request.url}")

    async def go(self, path: str) -> None:
        """Load a page of the dashboard."""
        await self.page.goto(self.base + path, wait_until="load")

    async def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        wide: int = await self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        return wide

    async def violations(self, rules: Sequence[str] = ()) -> list[str]:
        """What axe finds serious or critical, one line each; by these rules alone, or by all of them."""
        results = await Axe().run(
            self.page, options={"resultTypes": ["violations"]} | ({"runOnly": rules} if rules else {})
        )
        return [
            f"{found['id']}: {node['html'][:200]} {node['any'][0]['message'] if node['any'] else ''}"
            for found in results.response["violations"]
            if found["impact"] in ("serious", "critical")
            for node in found["nodes"]
        ]


@asynccontextmanager
async def context(browser: Browser, **settings: Any) -> AsyncIterator[BrowserContext]:
    """A visitor with cookies of its own; English and a desktop's window by default."""
    defaults = {"viewport": {"width": DESKTOP, "height": 900}, "locale": "en-GB", "timezone_id": "Asia/Shanghai"}
    visitor = await browser.new_context(**{**defaults, **settings})
    visitor.set_default_timeout(10_000)
    await visitor.add_init_script(_TRAP)
    try:
        yield visitor
    finally:
        await visitor.close()


async def watched(visitor: BrowserContext, base: str) -> Watched:
    """A new page of the visitor's."""
    return Watched(await visitor.new_page(), base)
