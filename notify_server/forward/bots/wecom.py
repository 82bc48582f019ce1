"""WeCom's group robot (企业微信群机器人): wire form and error codes. The key in its address is its only secret."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from notify_server.forward.bots.answer import Judgement, Message, Request, cut, judge_code, read_object

INTERVAL_MS = 4_000
MAX_BYTES = 4_096
_THROTTLED = {45009: 60_000}
_FATAL = {93000: "the robot's address is wrong or the robot was removed: copy its address again"}


def build(
    url: str, secret: str, now: int, message: Message, *, keyword: str = "", mentions: Sequence[str] = ()
) -> Request:
    """Return the request that posts a message."""
    tail = "".join(f"\n{part}" for part in (keyword, " ".join(f"<@{number}>" for number in mentions)) if part)
    text = cut(f"### {message.title}\n{message.markdown}", MAX_BYTES - len(tail.encode()))
    return Request(url, msgspec.json.encode({"msgtype": "markdown", "markdown": {"content": text + tail}}))


def judge(status: int, body: bytes, headers: object = None) -> Judgement:
    """Judge an answer by its error code."""
    answer = read_object(body)
    return judge_code(status, answer, answer.get("errcode"), message="errmsg", throttled=_THROTTLED, fatal=_FATAL)
