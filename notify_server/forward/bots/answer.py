"""The robots' common parts: a message, and the judgement of an answer. All three answer HTTP 200 to refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec


class Message(NamedTuple):
    """A digest: a title, and Markdown whose lines are short enough for a phone."""

    title: str
    markdown: str


class Request(NamedTuple):
    """A request to a robot: the address with its signature, and the body."""

    url: str
    body: bytes


class Judgement(NamedTuple):
    """The meaning of an answer: `throttled` asks to wait for `wait_ms`, `fatal` needs a person, `text` is shown."""

    accepted: bool
    throttled: bool = False
    fatal: bool = False
    wait_ms: int | None = None
    text: str = ""


def read_object(body: bytes) -> Mapping[str, Any]:
    """Return an answer's JSON object, an empty one when it is something else."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def judge_code(
    status: int,
    answer: Mapping[str, Any],
    code: object,
    *,
    message: str,
    throttled: Mapping[int, int],
    fatal: Mapping[int, str],
) -> Judgement:
    """Judge a status and an error code; 0 is success, and only an integer is a code."""
    if not 200 <= status < 300:
        return Judgement(False, throttled=status == 429, text=f"answered HTTP {status}")
    if isinstance(code, bool) or not isinstance(code, int):
        return Judgement(False, text="the answer has no error code: is this the robot's address?")
    if code == 0:
        return Judgement(True)
    said = str(answer.get(message, ""))[:300]
    text = f"error {code}: {said}"
    if code in throttled:
        return Judgement(False, throttled=True, wait_ms=throttled[code], text=text)
    if code in fatal:
        return Judgement(False, fatal=True, text=f"{text} ({fatal[code]})")
    return Judgement(False, text=text)


def cut(text: str, limit: int) -> str:
    """Return `text` in at most `limit` bytes of UTF-8, cut at the end of a line where there is one."""
    raw = text.encode()
    if len(raw) <= limit:
        return text
    kept = raw[: limit - len("\n…".encode())].decode("utf-8", "ignore")
    return kept.rpartition("\n")[0] + "\n…" if "\n" in kept else kept + "…"
