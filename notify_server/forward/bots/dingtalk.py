"""DingTalk's custom robot (钉钉自定义机器人): wire form, signature, error codes."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence

import msgspec
from yarl import URL

from notify_server.forward.bots.answer import Judgement, Message, Request, cut, judge_code, read_object

# 20 messages a minute; beyond that the robot is shut for ten minutes.
INTERVAL_MS = 4_000
MAX_BYTES = 18_000
_THROTTLED = {130101: 600_000}
_FATAL = {
    310000: "check the secret, the keyword and the list of addresses in the robot's settings",
    300005: "the access_token is wrong: copy the robot's address again",
}


def sign(secret: str, now: int) -> str:
    """Return the signature for `now` (Unix ms), before it is quoted for the query."""
    text = f"{now}\n{secret}".encode()
    return base64.b64encode(hmac.new(secret.encode(), text, hashlib.sha256).digest()).decode()


def build(
    url: str, secret: str, now: int, message: Message, *, keyword: str = "", mentions: Sequence[str] = ()
) -> Request:
    """Return the request that posts a message."""
    address = URL(url)
    if secret:
        address = address.update_query(timestamp=str(now), sign=sign(secret, now))
    text = f"### {message.title}\n\n{message.markdown}"
    tail = "".join(f"\n\n{part}" for part in (keyword, " ".join(f"@{number}" for number in mentions)) if part)
    # Two spaces and a line end, or the phone joins the lines.
    body = {
        "msgtype": "markdown",
        "markdown": {"title": message.title, "text": cut(text, MAX_BYTES).replace("\n", "  \n") + tail},
        "at": {"atMobiles": list(mentions), "isAtAll": False},
    }
    return Request(str(address), msgspec.json.encode(body))


def judge(status: int, body: bytes, headers: object = None) -> Judgement:
    """Judge an answer by its error code."""
    answer = read_object(body)
    return judge_code(status, answer, answer.get("errcode"), message="errmsg", throttled=_THROTTLED, fatal=_FATAL)
