"""Decides whether an answer with a 2xx status accepts the event: in-house services often answer 200 to everything."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

_FORM = re.compile(r"(?P<kind>json|text):(?P<rest>.+)", re.DOTALL)


class Accept(NamedTuple):
    """A rule for the body: `kind` is "status" (any body), "json" (`path` has the value `wanted`) or "text" (the body
    contains `wanted`).
    """

    kind: str
    path: tuple[str, ...] = ()
    wanted: str = ""

    def matches(self, body: bytes) -> bool:
        """Return whether the beginning of an answer's body satisfies the rule."""
        if self.kind == "status":
            return True
        if self.kind == "text":
            return self.wanted.encode() in body
        try:
            value: Any = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        for name in self.path:
            if not isinstance(value, dict) or name not in value:
                return False
            value = value[name]
        return _as_text(value) == self.wanted

    def __str__(self) -> str:
        if self.kind == "status":
            return "status"
        return f"text:{self.wanted}" if self.kind == "text" else f"json:{'.'.join(self.path)}={self.wanted}"


def parse_accept(text: str) -> Accept:
    """Read "status", "json:PATH=VALUE" (PATH with dots for nested objects) or "text:PART". Raises ValueError."""
    if text == "status":
        return Accept("status")
    if match := _FORM.fullmatch(text):
        if match["kind"] == "text":
            return Accept("text", (), match["rest"])
        path, equals, wanted = match["rest"].partition("=")
        names = tuple(path.split("."))
        if equals and all(names):
            return Accept("json", names, wanted)
    raise ValueError('must be "status", "json:code=000" or "text:success"')


def _as_text(value: object) -> str | None:
    """Return a JSON scalar as it would be written in the rule: true, 0, 000."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) else None
