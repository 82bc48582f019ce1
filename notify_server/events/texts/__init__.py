"""The texts of events and of bots' messages, in both languages. Reasons have the dashboard's words."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Literal

Language = Literal["zh", "en"]
LANGUAGES: tuple[Language, ...] = ("zh", "en")
_PACKAGE = Path(__file__).parents[2]


@cache
def _reasons(language: Language) -> dict[str, dict[str, str]]:
    text = (_PACKAGE / "web" / "texts" / f"{language}.toml").read_text(encoding="utf-8")
    reasons: dict[str, dict[str, str]] = tomllib.loads(text)["reason"]
    return reasons


@cache
def _messages(language: Language) -> dict[str, dict[str, str]]:
    text = (_PACKAGE / "events" / "texts" / f"{language}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def reason_text(language: Language, reason: str | None, state: str, part: Literal["what", "next"] = "what") -> str:
    """Return what a reason means (`what`), or what to do about it (`next`)."""
    known = _reasons(language)
    if reason is None:
        key = "upload_failed" if state == "upload_failed" else "none"
    elif reason in known:
        key = reason
    else:
        family = f"{reason[:6]}xx"
        key = family if family in known else "http_other"
    return known[key][part]


def text(language: Language, key: str, **values: Any) -> str:
    """Return the message `section.name`; with `count=1` its singular where the language has one."""
    section, _, name = key.partition(".")
    of_section = _messages(language)[section]
    if values.get("count") == 1:
        name = f"{name}_one" if f"{name}_one" in of_section else name
    return of_section[name].format(**values)
