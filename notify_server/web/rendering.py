"""Renders pages: templates, static files, and security headers.

Stored text is untrusted. Templates escape it, isolate its text direction, and link only http and https URLs; and the
content security policy allows no script but our own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from mimetypes import guess_type
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp_jinja2
import jinja2
from aiohttp import web

from notify_server.contract.object_key import decode_object_key
from notify_server.model import FileState, Reason
from notify_server.web.public_url import with_prefix

HERE = Path(__file__).parent
YEAR_SECONDS = 365 * 86_400

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:{images}; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
# Min width of a bar's segment in percent, so that one missing file of ten thousand is visible.
_LEAST_SHARE = 1.5


# --- Files that pages load ---


class Static:
    """The static files, in memory. Their URLs contain a digest of all files, so browsers may cache them for ever."""

    def __init__(self, folder: Path = HERE / "static") -> None:
        served = [path for path in sorted(folder.rglob("*")) if path.suffix in (".css", ".js", ".svg")]
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in served}
        self.version = hashlib.sha256(b"\0".join(self.files.values())).hexdigest()[:12]

    def answer(self, version: str, name: str) -> web.Response | None:
        """Return the file, or None when no file has this name."""
        content = self.files.get(name)
        if content is None:
            return None
        kept = f"public, max-age={YEAR_SECONDS}, immutable" if version == self.version else "no-cache"
        response = web.Response(
            body=content,
            content_type=guess_type(name)[0],
            charset="utf-8",
            headers={**_HEADERS, "Cache-Control": kept, "Content-Security-Policy": "default-src 'none'"},
        )
        response.enable_compression()
        return response


# --- Templates ---


class Segment(NamedTuple):
    """A segment of a bar; `start` and `width` are percent."""

    name: str
    start: float
    width: float


def bar(parts: Sequence[tuple[str, float]]) -> list[Segment]:
    """Divide a bar in proportion to the amounts; every amount above zero stays visible."""
    whole = sum(amount for _, amount in parts)
    widths = [(name, max(100 * amount / whole, _LEAST_SHARE)) for name, amount in parts if amount > 0]
    scale = 100 / sum(width for _, width in widths) if widths else 1.0
    segments, start = [], 0.0
    for name, width in widths:
        segments.append(Segment(name, round(start, 2), round(width * scale, 2)))
        start += width * scale
    return segments


def milliseconds(value: float | None) -> str:
    """Format milliseconds: `0.4 ms`, `12 ms`, `3.4 s`."""
    if value is None:
        return "–"
    if value < 1000:
        return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"
    return f"{value / 1000:.1f} s"


def size(value: int | None) -> str:
    """Format bytes: `512 B`, `12.1 kB`, `3.4 MB`."""
    if value is None:
        return "–"
    amount = float(value)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:,.1f} GB"


def iso(moment: datetime) -> str:
    """Format a time for programs: `2026-11-23T03:04:18.774Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc(moment: datetime) -> str:
    """Format a time for people: `2026-11-23 03:04:18 UTC`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def is_link(address: str | None) -> bool:
    """Return True for an http or https URL of printable characters, which a page may link to."""
    return address is not None and bool(re.match("https?://[^/?#]", address, re.I)) and address.isprintable()


def setup(app: web.Application) -> None:
    """Install the templates in the application."""
    environment = aiohttp_jinja2.setup(
        app,
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {
        "number": lambda value: f"{value:,}",
        "rate": lambda value: f"{value:,.1f}" if value < 10 else f"{value:,.0f}",
        "ms": milliseconds,
        "size": size,
        "iso": iso,
        "utc": utc,
        "object_key": decode_object_key,
        "bar": bar,
    }
    environment.tests["link"] = is_link
    environment.globals |= {"states": list(FileState), "reasons": list(Reason)}


def page(
    request: web.Request,
    template: str,
    context: Mapping[str, Any],
    *,
    status: int = 200,
    images: bool = False,
    prefix: str = "",
) -> web.Response:
    """Render a page or a part of one. With `images` it may load pictures from any host."""
    text = aiohttp_jinja2.render_string(template, request, dict(context))
    return web.Response(
        # A query may contain lone surrogates.
        body=with_prefix(text, prefix).encode("utf-8", "backslashreplace"),
        status=status,
        content_type="text/html",
        charset="utf-8",
        headers=page_headers(images=images),
    )


def page_headers(*, images: bool = False) -> dict[str, str]:
    """Return the headers of every page and redirect."""
    policy = _POLICY.format(images=" https: http:" if images else "")
    return {**_HEADERS, "Cache-Control": "no-store", "Content-Security-Policy": policy}
