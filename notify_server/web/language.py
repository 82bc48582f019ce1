"""The texts of the dashboard in both languages, and the choice of the language."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from markupsafe import Markup, escape

from notify_server.model import FileState

TEXTS = Path(__file__).parent / "texts"
LANGUAGE_COOKIE = "notify_server_language"
DEFAULT_LANGUAGE = "en"


class Texts:
    """The texts of one language: `texts("count.files", n=3)`. Values are escaped; `n` selects singular or plural.

    Raises KeyError for an unknown key.
    """

    def __init__(self, language: str) -> None:
        self.language = language
        tables = tomllib.loads((TEXTS / f"{language}.toml").read_text(encoding="utf-8"))
        self.by_key = _flat(tables)

    def __call__(self, key: str, /, **values: object) -> Markup:
        if values.get("n") == 1:
            key = f"{key}_one" if f"{key}_one" in self.by_key else key
        text = escape(self.by_key[key])
        return text.format(**values) if values else text

    def age(self, seconds: float) -> str:
        """Format a duration in its largest unit: `12 s`, `5 min`, `3 h`, `9 d`."""
        if seconds < 60:
            return f"{max(seconds, 0.0):.0f} s"
        if seconds < 3600:
            return self("unit.minutes", n=int(seconds // 60))
        if seconds < 48 * 3600:
            return self("unit.hours", n=int(seconds // 3600))
        return self("unit.days", n=int(seconds // 86_400))

    def reason(self, reason: str | None, part: str, state: FileState | None = None) -> str:
        """Return what a reason means (part `what`) or what to do about it (part `next`)."""
        if reason is None:
            key = FileState.UPLOAD_FAILED.value if state is FileState.UPLOAD_FAILED else "none"
        elif f"reason.{reason}.{part}" in self.by_key:
            key = reason
        else:
            family = f"{reason[:6]}xx"
            key = family if f"reason.{family}.{part}" in self.by_key else "http_other"
        return self(f"reason.{key}.{part}")

    def action(self, what: str) -> str:
        """Return the name of an action; its own when there is no text."""
        key = f"action.{what.replace('.', '_')}"
        return self(key) if key in self.by_key else what

    def flag(self, flag: str) -> str:
        """Return what a flag of a file means; one that is a reason means what the reason does."""
        name, _, day = flag.partition(":")
        return self(f"flag.{name}", day=day) if f"flag.{name}" in self.by_key else self.reason(name, "what")


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, value in tables.items():
        texts |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return texts


LANGUAGES: Mapping[str, Texts] = {language: Texts(language) for language in ("en", "zh")}


def texts_for(request: web.Request) -> Texts:
    """Return the texts in the language of the cookie, otherwise in the one the browser prefers (RFC 9110 12.5.4)."""
    chosen = request.cookies.get(LANGUAGE_COOKIE, "")
    if chosen in LANGUAGES:
        return LANGUAGES[chosen]
    best, language = 0.0, DEFAULT_LANGUAGE
    for item in request.headers.get("Accept-Language", "")[:1000].split(","):
        tag, _, weight = item.partition(";q=")
        quality = float(weight) if re.fullmatch(r"[01](\.[0-9]{0,3})?", weight.strip()) else 1.0
        primary = tag.strip().lower().partition("-")[0]
        if primary in LANGUAGES and quality > best:
            best, language = quality, primary
    return LANGUAGES[language]
