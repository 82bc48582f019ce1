"""Formats a refused body for people: indented when it is JSON, with the faulty field marked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# Larger or deeper bodies are shown unchanged.
MAX_PARSED = 512 * 1024
DEEPEST = 100
MAX_LINES = 400
MAX_RAW = 32 * 1024

Path = tuple[str | int, ...]

_FIELD = re.compile(r"(?P<path>[A-Za-z_]\w*(?:\[\d{1,9}\]|\.\w+)*): ")
_STEP = re.compile(r"\[(\d+)\]|\.?(\w+)")


class Line(NamedTuple):
    """A line of a body."""

    text: str
    at_fault: bool = False


class Body(NamedTuple):
    """Some lines of a body, and the number of lines left out before and after them."""

    lines: list[Line]
    before: int
    after: int
    is_json: bool
    batch_id: str | None = None


def field_at_fault(detail: str) -> Path:
    """Return the path at the start of a refusal, such as `file_list[3].target_url: …`; empty when there is none."""
    match = _FIELD.match(detail)
    steps = _STEP.findall(match["path"]) if match else []
    return tuple(int(index) if index else name for index, name in steps)


def readable(body: str, detail: str) -> Body:
    """Return the body that was refused with this text."""
    if len(body) <= MAX_PARSED:
        try:
            # Pairs, because a name may occur twice.
            value = json.loads(body, object_pairs_hook=_Members)
            lines = list(_lines(value, ()))
        except (ValueError, RecursionError):
            pass
        else:
            return _marked(lines, field_at_fault(detail), value)
    raw = body[:MAX_RAW].splitlines()
    return Body([Line(_plain(text)) for text in raw[:MAX_LINES]], 0, max(0, len(raw) - MAX_LINES), False)


class _Members(list[tuple[str, Any]]):
    """The members of an object, in their order."""


def _plain(text: str) -> str:
    # Half of a surrogate pair is not a character, and cannot be sent.
    return text.encode("utf-8", "backslashreplace").decode()


def _scalar(value: object) -> str:
    return _plain(json.dumps(value, ensure_ascii=False))


def _lines(value: Any, path: Path, name: str = "", comma: str = "") -> Iterator[tuple[Path, str]]:
    indent = "  " * len(path)
    if len(path) > DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, list) and value:
        members: list[tuple[str | int, Any]] = list(value) if isinstance(value, _Members) else list(enumerate(value))
        opened, closed = ("{", "}") if isinstance(value, _Members) else ("[", "]")
        yield path, f"{indent}{name}{opened}"
        for position, (key, member) in enumerate(members, 1):
            label = f"{_scalar(key)}: " if isinstance(key, str) else ""
            yield from _lines(member, (*path, key), label, "," if position < len(members) else "")
        yield (*path, ""), f"{indent}{closed}{comma}"
    elif isinstance(value, list):
        yield path, f"{indent}{name}{'{}' if isinstance(value, _Members) else '[]'}{comma}"
    else:
        yield path, f"{indent}{name}{_scalar(value)}{comma}"


def _member(value: Any, name: str) -> Any:
    return dict(value).get(name) if isinstance(value, _Members) else None


def _marked(lines: list[tuple[Path, str]], fault: Path, value: Any) -> Body:
    paths = {path for path, _ in lines}
    notification: Any = value
    prefix: Path = ()
    for envelope in ("request_content", "params"):
        if isinstance(inner := _member(value, envelope), _Members):
            notification, prefix = inner, (envelope,)
    # A missing field has no line; its parent has one.
    wanted = next((path for end in range(len(fault), 0, -1) if (path := prefix + fault[:end]) in paths), None)
    shown = [Line(text, path == wanted) for path, text in lines]
    at = next((number for number, line in enumerate(shown) if line.at_fault), 0)
    start = max(0, min(at - MAX_LINES // 2, len(shown) - MAX_LINES))
    batch_id = _member(notification, "batch_id")
    return Body(
        shown[start : start + MAX_LINES],
        start,
        max(0, len(shown) - start - MAX_LINES),
        True,
        batch_id if isinstance(batch_id, str) else None,
    )
