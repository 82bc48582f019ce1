"""Feishu's and Lark's custom robot (飞书自定义机器人): wire form, signature, error codes."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence

import msgspec

from notify_server.forward.bots.answer import Judgement, Message, Request, cut, judge_code, read_object

# 100 messages a minute and 5 a second; the same pace as the others is enough for digests.
INTERVAL_MS = 4_000
MAX_BYTES = 18_000
_THROTTLED = {11232: 60_000}
_FATAL = {19021: "check the secret, and this machine's clock"}
_RESET = "x-ogw-ratelimit-reset"


def sign(secret: str, now: int) -> str:
    """Return the signature for `now` (Unix ms): the text to be signed is the key, and the message is empty."""
    key = f"{now // 1000}\n{secret}".encode()
    return base64.b64encode(hmac.new(key, b"", hashlib.sha256).digest()).decode()


def build(
    url: str, secret: str, now: int, message: Message, *, keyword: str = "", mentions: Sequence[str] = ()
) -> Request:
    """Return the request that posts a message."""
    tail = "".join(f"\n{part}" for part in (keyword, " ".join(f"@{number}" for number in mentions)) if part)
    card = {
        "config": {"wide_screen_mode": True},
        "header": {"title": {"tag": "plain_text", "content": message.title}},
        "elements": [{"tag": "markdown", "content": cut(message.markdown, MAX_BYTES) + tail}],
    }
    body: dict[str, object] = {"msg_type": "interactive", "card": card}
    if secret:
        body = {"timestamp": str(now // 1000), "sign": sign(secret, now), **body}
    return Request(url, msgspec.json.encode(body))


def judge(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Judgement:
    """Judge an answer by its error code; older robots answer `StatusCode`."""
    answer = read_object(body)
    code = answer.get("code", answer.get("StatusCode"))
    # A 429 may come with a code in its body.
    if status == 429 and isinstance(code, int) and code in _THROTTLED:
        status = 200
    judgement = judge_code(status, answer, code, message="msg", throttled=_THROTTLED, fatal=_FATAL)
    reset = (headers or {}).get(_RESET, "")
    if judgement.throttled and reset.isascii() and reset.isdigit():
        judgement = judgement._replace(wait_ms=min(int(reset[:9]), 3600) * 1000)
    return judgement
