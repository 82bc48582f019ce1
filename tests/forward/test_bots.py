"""The robots' wire forms, signatures and error codes."""

from __future__ import annotations

import json
from types import ModuleType
from urllib.parse import parse_qs, urlsplit

import pytest

from notify_server.forward.bots import dingtalk, feishu, wecom
from notify_server.forward.bots.answer import Message, cut

MESSAGE = Message("2 batches", "**b1** x\n- a: missing")
BOTS = [dingtalk, wecom, feishu]


def test_dingtalk_signature_matches_its_vector() -> None:
    signature = "sSFWELbV2YwjdDQhWZwTcWlX5BWUx5J6TPpsZmuPii0="
    assert dingtalk.sign("this is secret", 1700000000000) == signature
    request = dingtalk.build("https://h/robot/send?access_token=t", "this is secret", 1700000000000, MESSAGE)
    # Quoted once, so that a server which reads the query sees it as it is.
    assert "sign=sSFWELbV2YwjdDQhWZwTcWlX5BWUx5J6TPpsZmuPii0%3D" in request.url or (
        parse_qs(urlsplit(request.url).query)["sign"] == [signature]
    )
    query = parse_qs(urlsplit(request.url).query)
    assert query == {"access_token": ["t"], "timestamp": ["1700000000000"], "sign": [signature]}


def test_dingtalk_signature_with_plus_and_slash_survives_the_query() -> None:
    seen = set()
    for now in range(1700000000000, 1700000000200):
        signature = dingtalk.sign("SECabc", now)
        seen |= {ch for ch in "+/" if ch in signature}
        request = dingtalk.build("https://h/send?access_token=t", "SECabc", now, MESSAGE)
        # As a strict form decoder reads it: "+" would be a space.
        assert parse_qs(urlsplit(request.url).query)["sign"] == [signature]
    assert seen == {"+", "/"}


def test_feishu_signature_matches_its_vector() -> None:
    assert feishu.sign("demo", 1599360473_999) == "l1N0gAcBjdwBvGm1xMjOF0XSyaLRpR7tuO5dHfhAYc8="
    body = json.loads(feishu.build("https://h/hook/x", "demo", 1599360473_000, MESSAGE).body)
    assert (body["timestamp"], body["sign"]) == ("1599360473", "l1N0gAcBjdwBvGm1xMjOF0XSyaLRpR7tuO5dHfhAYc8=")
    assert body["msg_type"] == "interactive"
    assert body["card"]["header"]["title"]["content"] == "2 batches"


def test_dingtalk_mentions_stand_in_the_text_too() -> None:
    request = dingtalk.build("https://h/s", "", 0, MESSAGE, keyword="notify", mentions=["13800000000"])
    body = json.loads(request.body)
    assert body["msgtype"] == "markdown"
    assert body["at"] == {"atMobiles": ["13800000000"], "isAtAll": False}
    assert "@13800000000" in body["markdown"]["text"]
    assert "notify" in body["markdown"]["text"]
    assert "sign" not in request.url


def test_unsigned_robots_get_no_signature() -> None:
    assert "sign" not in json.loads(feishu.build("https://h/x", "", 0, MESSAGE).body)
    assert wecom.build("https://h/send?key=k", "", 0, MESSAGE).url == "https://h/send?key=k"


@pytest.mark.parametrize("text", ["字" * 5000, "line of text\n" * 800, "x" * 9000])
def test_wecom_message_fits_into_4096_bytes(text: str) -> None:
    body = json.loads(wecom.build("https://h", "", 0, Message("t", text), keyword="k", mentions=["m"]).body)
    content = body["markdown"]["content"]
    assert len(content.encode()) <= 4096
    assert content.endswith("k\n<@m>")


def test_text_is_cut_between_characters() -> None:
    assert cut("字字字字", 100) == "字字字字"
    assert len(cut("字" * 100, 50).encode()) <= 50


@pytest.mark.parametrize(
    ("bot", "answer"),
    [
        (dingtalk, {"errcode": 0, "errmsg": "ok"}),
        (wecom, {"errcode": 0, "errmsg": "ok"}),
        (feishu, {"code": 0, "msg": "success"}),
        (feishu, {"StatusCode": 0, "StatusMessage": "success"}),
    ],
)
def test_success_code_is_accepted(bot: ModuleType, answer: dict[str, object]) -> None:
    assert bot.judge(200, json.dumps(answer).encode(), {}).accepted


@pytest.mark.parametrize(
    ("bot", "answer", "kind"),
    [
        (dingtalk, {"errcode": 130101, "errmsg": "send too fast"}, "throttled"),
        (dingtalk, {"errcode": 310000, "errmsg": "sign not match"}, "fatal"),
        (dingtalk, {"errcode": 300005, "errmsg": "token is not exist"}, "fatal"),
        (dingtalk, {"errcode": -1, "errmsg": "system busy"}, ""),
        (wecom, {"errcode": 45009, "errmsg": "api freq out of limit"}, "throttled"),
        (wecom, {"errcode": 93000, "errmsg": "invalid webhook url"}, "fatal"),
        (feishu, {"code": 11232, "msg": "frequency limited"}, "throttled"),
        (feishu, {"code": 19021, "msg": "sign match fail"}, "fatal"),
        (feishu, {"code": 19024, "msg": "Key Words Not Found"}, ""),
    ],
)
def test_200_with_an_error_code_is_a_failure(bot: ModuleType, answer: dict[str, object], kind: str) -> None:
    found = bot.judge(200, json.dumps(answer).encode(), {})
    assert not found.accepted
    assert (found.throttled, found.fatal) == (kind == "throttled", kind == "fatal")
    assert str(next(iter(answer.values()))) in found.text


@pytest.mark.parametrize("bot", BOTS)
@pytest.mark.parametrize(
    "body", [b"", b"ok", b"[]", b"{}", b'{"errcode":"0","code":"0"}', b'{"errcode":false,"code":false}']
)
def test_200_without_a_code_is_a_failure(bot: ModuleType, body: bytes) -> None:
    assert not bot.judge(200, body, {}).accepted


@pytest.mark.parametrize("bot", BOTS)
def test_http_error_is_a_failure(bot: ModuleType) -> None:
    assert not bot.judge(500, b'{"errcode":0,"code":0}', {}).accepted
    assert bot.judge(429, b"", {}).throttled


def test_feishu_rate_limit_header_is_read() -> None:
    assert feishu.judge(429, b'{"code":11232}', {"x-ogw-ratelimit-reset": "7"}).wait_ms == 7_000
    assert feishu.judge(429, b"", {"x-ogw-ratelimit-reset": "soon"}).wait_ms is None
    assert feishu.judge(200, b'{"code":0}', {"x-ogw-ratelimit-reset": "7"}).accepted
