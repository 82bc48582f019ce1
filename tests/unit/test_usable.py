"""Whether a file can be used, over recorded-shape answers and case by case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notify_server.config import HostSettings, UsableConfig
from notify_server.contract.expiry import expiry
from notify_server.model import DueFile, Evidence, FileState, Reason, Target
from notify_server.processes.prober_headers import error_code, has_xml, read_headers
from notify_server.processes.sniffing import sniff
from notify_server.simulator.answers import RecordedAnswer, load_answers
from notify_server.verify import policy
from notify_server.verify.guard import Guard
from notify_server.verify.usable import deleted_on, flags, media_types, problem, wants_look

ANSWERS = load_answers()
NAMES = [f"{answer.vendor}: {answer.name}" for answer in ANSWERS]
SETTINGS = HostSettings()
OFF = UsableConfig(empty="off", not_media="off", archived="off", hotlink="off", expired="off", sniff="off")
FLAG = UsableConfig(empty="flag", not_media="flag", archived="flag", hotlink="flag", expired="flag")
KEY = "8ZAFUPII49GQN2AB/IMAGE/-1091150479/L2FwdF9jb21tb24vb18xZmRsdXNzNWkx"
GUARD = Guard()


def evidence(answer: RecordedAnswer, method: str, *, looks: bool) -> Evidence:
    """What a prober makes of the answer."""
    head, _, body = answer.reply(method).payload(method).partition(b"\r\n\r\n")
    lines = [line + b"\r\n" for line in head.split(b"\r\n")]
    kept, status = read_headers(lines), answer.reply(method).status
    is_xml = status >= 400 and has_xml(lines)
    return Evidence(
        *(1, status, None, False, "192.0.2.1", None, None, None, None, 1.0, *kept[:6]),
        vendor_request_id=kept.vendor_request_id,
        vendor_code=kept.vendor_code or (error_code(body[:2048]) if is_xml else None),
        headers=kept.further,
        sniffed=sniff(body[:512]) if looks and method == "GET" and body and status < 300 else None,
    )


def play(
    answer: RecordedAnswer, rules: UsableConfig | None, *, last: bool = True, scheme: str = "https"
) -> tuple[policy.Conclusion, Evidence, tuple[str, ...], list[str]]:
    """Run an attempt: its conclusion, the last evidence, the flags, and the methods that were used."""
    key = answer.key(1)
    url = f"{scheme}://files.example.com/{key}" + (f"?{answer.query}" if answer.query else "")
    ask = policy.first(Target(url, "files.example.com", "files.example.com"), SETTINGS)
    methods = []
    while True:
        methods.append(ask.method)
        looks = rules is not None and rules.sniff != "off" and bool(media_types(key, rules))
        item = evidence(answer, ask.method, looks=looks)
        found = policy.judge(ask, item, SETTINGS, GUARD.follow, last=last, key=key, usable=rules)
        if isinstance(found, policy.Conclusion):
            accepted = policy.is_accepted(ask, item, SETTINGS)
            file = DueFile(1, 1, "files.example.com", url, 0, key, expiry(url))
            if rules is None:
                return found, item, (), methods
            shown, careful = (
                flags(file, item, rules, accepted=accepted, method=ask.method, plain=plain)
                for plain in (found.plain, False)
            )
            assert shown == careful
            return msgspec.structs.replace(found, plain=False), item, shown, methods
        ask = found


def state(conclusion: policy.Conclusion) -> FileState:
    return policy.conclude(conclusion, 1, (), 0.0, 0.0, None).state


def test_there_are_enough_recorded_answers_and_each_has_a_name() -> None:
    assert len(ANSWERS) >= 60
    assert len(set(NAMES)) == len(ANSWERS)
    samples = Path(__file__).parents[1] / "samples" / "answers"
    assert sum(len(json.loads(path.read_text("utf-8"))) for path in samples.glob("*.json")) == len(ANSWERS)


@pytest.mark.parametrize("answer", ANSWERS, ids=NAMES)
def test_recorded_answer_gives_the_expected_verdict(answer: RecordedAnswer) -> None:
    conclusion, item, shown, _ = play(answer, UsableConfig())
    expect = answer.expect
    assert (state(conclusion), conclusion.reason, list(shown)) == (expect.state, expect.reason, expect.flags)
    if expect.vendor_code is not None:
        assert item.vendor_code == expect.vendor_code
    if expect.vendor_request_id is not None:
        assert item.vendor_request_id == expect.vendor_request_id


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("answer", ANSWERS, ids=NAMES)
def test_verdicts_with_all_rules_off_are_those_without_the_rules(answer: RecordedAnswer, last: bool) -> None:
    conclusion, item, _, methods = play(answer, None, last=last)
    assert play(answer, OFF, last=last)[:2] == (conclusion, item)
    assert play(answer, OFF, last=last)[3] == methods


@pytest.mark.parametrize("answer", ANSWERS, ids=NAMES)
def test_flagged_rules_change_no_verdict_and_are_shown(answer: RecordedAnswer) -> None:
    without, _, _, _ = play(answer, None)
    conclusion, _, shown, _ = play(answer, FLAG)
    assert state(conclusion) == state(without)
    if without.state is FileState.AVAILABLE and answer.expect.state is FileState.UNAVAILABLE:
        assert answer.expect.reason in shown


@pytest.mark.parametrize("answer", ANSWERS, ids=NAMES)
def test_unusable_files_are_retried_unless_the_reason_is_final(answer: RecordedAnswer) -> None:
    conclusion, _, _, _ = play(answer, UsableConfig(), last=False)
    if conclusion.reason in (Reason.EMPTY, Reason.NOT_MEDIA):
        assert not conclusion.final
    if conclusion.reason == Reason.HOTLINK:
        assert conclusion.final
    if conclusion.reason == Reason.ARCHIVED:
        assert conclusion.final is ("under way" not in answer.name)


def item(status: int = 200, **fields: Any) -> Evidence:
    return Evidence(1, status, None, False, "192.0.2.1", None, None, None, None, 1.0, **fields)


def reason_of(key: str, found: Evidence, rules: UsableConfig) -> str | None:
    wrong = problem(key, found, rules, accepted=True, method="HEAD")
    return None if wrong is None else wrong.reason


@pytest.mark.parametrize(
    ("type", "reason"),
    [
        ("text/html", "not_media"),
        ("Text/HTML; charset=utf-8", "not_media"),
        ("text/plain", "not_media"),
        ("application/json", "not_media"),
        ("application/problem+json", "not_media"),
        ("application/xml", "not_media"),
        ("application/xhtml+xml", "not_media"),
        ("image/svg+xml", None),
        ("image/jpeg", None),
        ("video/mp4", None),
        ("application/pdf", None),
        ("application/octet-stream", None),
        ("", None),
        (None, None),
    ],
)
def test_not_media_by_type(type: str | None, reason: str | None) -> None:
    assert reason_of(KEY, item(content_type=type, content_length=5000), UsableConfig()) == reason


@pytest.mark.parametrize(
    "key", ["", "a.jpg", KEY.replace("IMAGE", "FILE"), KEY.replace("IMAGE", "VR"), KEY + "x", KEY.lower()]
)
def test_keys_that_promise_no_picture_are_exempt_unless_a_type_is_expected(key: str) -> None:
    page = item(content_type="text/html", content_length=0)
    assert reason_of(key, page, UsableConfig()) is None
    assert not wants_look(key, item(), UsableConfig())
    assert reason_of(key, page, UsableConfig(expect=("image/*",))) == "empty"
    assert reason_of(key, item(content_type="text/html"), UsableConfig(expect=("image/*",))) == "not_media"
    assert reason_of(key, item(content_type="text/html"), UsableConfig(expect=("text/*",))) is None


@pytest.mark.parametrize(
    ("sniff", "type", "length", "looks"),
    [
        ("doubtful", "image/jpeg", 1024, False),
        ("doubtful", "image/jpeg", 1023, True),
        ("doubtful", "image/jpeg", None, False),
        ("doubtful", None, 5000, True),
        ("doubtful", "application/octet-stream; x=y", 5000, True),
        ("all", "image/jpeg", 5000, True),
        ("off", None, 5, False),
    ],
)
def test_the_first_bytes_are_read_where_the_headers_leave_doubt(
    sniff: Any, type: str | None, length: int | None, looks: bool
) -> None:
    assert wants_look(KEY, item(content_type=type, content_length=length), UsableConfig(sniff=sniff)) is looks


@pytest.mark.parametrize(
    ("beginning", "type"),
    [
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"GIF89a", "image/gif"),
        (b"\0\0\0\x18ftypmp42", "video/mp4"),
        (b"<!DOCTYPE html>", "text/html"),
        (b"\xef\xbb\xbf \r\n\t<html>", "text/html"),
        (b"<?xml version='1.0'?><svg >", "image/svg+xml"),
        (b' {"code": 404}', "application/json"),
        (b"[1]", None),
        (b"404 page not found", None),
        (b"", None),
        (b"\0" * 512, None),
    ],
)
def test_the_kind_of_a_file_is_recognised_by_its_first_bytes(beginning: bytes, type: str | None) -> None:
    assert sniff(beginning) == type


@given(st.binary(max_size=512))
def test_any_beginning_is_read_without_failing(beginning: bytes) -> None:
    sniff(beginning)


@pytest.mark.parametrize(
    ("announced", "day"),
    [
        ('expiry-date="Fri, 28 Dec 2026 23:59:59 GMT", rule-id="a"', "2026-12-28"),
        ('rule-id="a", expiry-date="Fri, 28 Dec 2026 00:00:00 GMT"', "2026-12-28"),
        ('expiry-date="soon"', None),
        ('expiry-date="Fri, 28 Dec 99999 00:00:00 GMT"', None),
        ("", None),
    ],
)
def test_the_day_of_deletion_is_read(announced: str, day: str | None) -> None:
    assert deleted_on(item(headers={"x-oss-expiration": announced})) == day
    assert deleted_on(item(headers={"x-amz-expiration": announced})) == day


END = 1_795_816_800_000


@pytest.mark.parametrize(
    ("wait_ms", "now", "expires_at", "outcome"),
    [
        (5_000, END - 100_000, END, policy.Outcome(FileState.PENDING, 5_000)),
        (300_000, END - 100_000, END, policy.Outcome(FileState.PENDING, 70_000)),
        (300_000, END - 100_000, None, policy.Outcome(FileState.PENDING, 300_000)),
        (5_000, END - 30_000, END, policy.Outcome(FileState.UNAVAILABLE)),
        (5_000, END - 1, END, policy.Outcome(FileState.UNAVAILABLE)),
        (None, END, END, policy.Outcome(FileState.PENDING, None)),
    ],
)
def test_no_wait_reaches_beyond_the_end_of_the_address(
    wait_ms: int | None, now: int, expires_at: int | None, outcome: policy.Outcome
) -> None:
    assert policy.squeeze(policy.Outcome(FileState.PENDING, wait_ms), now, expires_at) == outcome


@given(st.integers(0, 10**8), st.integers(0, 10**9))
def test_attempt_at_the_squeezed_time_is_the_last(wait_ms: int, left_ms: int) -> None:
    now = END - left_ms
    squeezed = policy.squeeze(policy.Outcome(FileState.PENDING, wait_ms), now, END)
    if squeezed.wait_ms is None:
        assert policy.is_last(1, (1.0, 1.0), now, END)
    elif squeezed.wait_ms < wait_ms:
        assert policy.is_last(1, (1.0, 1.0), now + squeezed.wait_ms, END)
        assert now + squeezed.wait_ms < END
