"""The texts of bots' messages: the event, the batch, the missing files with reasons, what to do, a link."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from notify_server.events.payload import (
    BatchRow,
    EndpointData,
    EventType,
    ExpectationData,
    PingData,
    batch_event,
    plain_event,
    utc,
)
from notify_server.events.texts import LANGUAGES, Language, _messages, reason_text
from notify_server.forward.digest import compose, recovered
from tests.forward.test_payload import AT, ENDING, MISSING, row, sample


def payload(kind: EventType, batch: BatchRow | None = None, **more: Any) -> dict[str, Any]:
    event = sample(kind) if batch is None else batch_event(kind, batch, MISSING, AT, **more)
    loaded: dict[str, Any] = json.loads(event.payload)
    return loaded


def test_both_languages_have_the_same_texts() -> None:
    def keys(language: Language) -> set[str]:
        return {f"{section}.{key}" for section, texts in _messages(language).items() for key in texts}

    assert {key for key in keys("en") if not key.endswith("_one")} == keys("zh")


def test_chinese_has_full_width_punctuation() -> None:
    for texts in _messages("zh").values():
        for text in texts.values():
            assert not set(text.replace("{", "").replace("}", "")) & set(",;!?()"), text


def test_digest_names_missing_files_and_reasons() -> None:
    problem = payload(EventType.BATCH_INCOMPLETE, row(), url="https://n.example.com/ui/batches/7")
    message = compose("en", [problem])
    assert message.title == "1 batch has missing files"
    assert message.markdown.split("\n") == [
        "**20261127-0001** rent.dcentralize.room.add",
        "2 of 7 files missing",
        f"- /upload/2026/11/livingro: {reason_text('en', 'http_404', 'unavailable')} (http_404)",
        f"- b.jpg: {reason_text('en', None, 'upload_failed')}",
        f"What to do: {reason_text('en', 'http_404', 'unavailable', 'next')}",
        "[Open the batch](https://n.example.com/ui/batches/7)",
    ]


def test_digest_in_chinese_keeps_the_code() -> None:
    message = compose("zh", [payload(EventType.BATCH_INCOMPLETE)])
    assert message.title == "1 个批次有文件缺失"
    assert "共 7 个文件，缺失 2 个" in message.markdown
    assert "（http_404）" in message.markdown
    assert "处理办法：" in message.markdown


def test_digest_of_files_that_expire_soon_says_when_and_what_to_do() -> None:
    message = compose("en", [payload(EventType.BATCH_EXPIRING)])
    first, second = (time.strftime("%m-%d %H:%M", time.localtime(each.at / 1000)) for each in ENDING)
    which, summary, *files, advice = message.markdown.split("\n")
    assert message.title == "Files of 1 batch expire soon"
    assert which == "**20261127-0001** rent.dcentralize.room.add"
    assert summary.startswith(f"2 of 7 files expire soon, the first at {first} (UTC")
    assert files == [
        f"- /upload/2026/11/livingro: the URL expires at {first}",
        f"- c.jpg: the storage deletes the object at {second}",
    ]
    assert advice == (
        "What to do: fetch the files before then, or have the platform deliver the batch again with new URLs."
    )
    in_chinese = compose("zh", [payload(EventType.BATCH_EXPIRING)])
    assert in_chinese.title == "1 个批次的文件即将失效"
    assert "处理办法：请在此之前取走文件" in in_chinese.markdown


def test_digest_shows_five_batches_by_batch_id() -> None:
    many = [payload(EventType.BATCH_INCOMPLETE, row(batch_id=f"b{n}")) for n in (7, 3, 5, 1, 6, 2, 4)]
    message = compose("en", many, dashboard="https://n.example.com/")
    shown = [line for line in message.markdown.split("\n") if line.startswith("**")]
    assert [line.split("**")[1] for line in shown] == ["b1", "b2", "b3", "b4", "b5"]
    assert message.title == "7 batches have missing files"
    assert message.markdown.endswith("and 2 more batches [Open the dashboard](https://n.example.com/)")


def test_at_risk_names_the_next_check_and_the_latest_verdict() -> None:
    message = compose("en", [payload(EventType.BATCH_AT_RISK)])
    assert message.title == "1 batch may end with missing files"
    assert "Next check " in message.markdown
    assert "final result by " in message.markdown
    assert "nothing yet" in message.markdown


@pytest.mark.parametrize(
    ("zone", "shown"),
    [("UTC", "(UTC)"), ("Asia/Shanghai", "(UTC+8)"), ("Asia/Kolkata", "(UTC+5:30)"), ("America/New_York", "(UTC-5)")],
)
def test_times_name_the_zone_of_the_machine(monkeypatch: pytest.MonkeyPatch, zone: str, shown: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert shown in compose("en", [payload(EventType.BATCH_AT_RISK)]).markdown
    finally:
        monkeypatch.undo()
        time.tzset()


def test_title_names_the_problem_that_all_batches_share() -> None:
    at_risk, other = (payload(EventType.BATCH_AT_RISK, row(batch_id=name)) for name in "ab")
    assert compose("zh", [at_risk]).title == "1 个批次可能缺失文件"
    assert compose("en", [at_risk, other]).title == "2 batches may end with missing files"
    assert compose("en", [at_risk, payload(EventType.BATCH_SHORT)]).title == "2 batches have problems"


def test_batch_with_two_problems_counts_once() -> None:
    both = [payload(EventType.BATCH_SHORT), payload(EventType.BATCH_INCOMPLETE)]
    for each in both:
        each["data"]["batch_id"] = "same"
    assert compose("en", both).title == "1 batch has problems"


def test_advice_is_about_the_most_frequent_reason() -> None:
    problem = payload(EventType.BATCH_INCOMPLETE)
    first = problem["data"]["missing"][0]
    problem["data"]["missing"] = [first, *[first | {"reason": None, "state": "upload_failed"} for _ in range(3)]]
    assert f"What to do: {reason_text('en', None, 'upload_failed', 'next')}" in compose("en", [problem]).markdown


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", EventType)
def test_every_type_has_a_message(language: Language, kind: EventType) -> None:
    make = recovered if kind in (EventType.BATCH_COMPLETE, EventType.ENDPOINT_RECOVERED) else compose
    message = make(language, [payload(kind)])
    assert message.title
    assert message.markdown
    assert "{" not in message.title + message.markdown


def test_text_from_outside_cannot_format_link_or_mention() -> None:
    hostile = "x](http://evil) **b** @all <@all>\n# h"
    message = compose("en", [payload(EventType.BATCH_INCOMPLETE, row(batch_id=hostile))])
    first = message.markdown.split("\n")[0]
    assert "@all" not in first
    assert "](http" not in first
    assert "<" not in first
    assert "rent.dcentralize" in first


def test_reminder_and_recovery_have_their_own_titles() -> None:
    problem = payload(EventType.BATCH_INCOMPLETE)
    other = payload(EventType.BATCH_INCOMPLETE, row(batch_id="other"))
    assert compose("zh", [problem, other], reminder=True).title == "提醒（未解决）：2 个批次有文件缺失"
    assert recovered("zh", [payload(EventType.BATCH_COMPLETE)] * 3).title == "已恢复：3 个批次全部齐全"


def test_stopped_endpoint_says_how_to_start_it() -> None:
    data = EndpointData("listings", 1, 410, "answered HTTP 410", 3, stopped=True)
    message = compose("en", [json.loads(plain_event(EventType.ENDPOINT_FAILING, data, AT).payload)])
    assert message.title == "Forwarding to listings fails"
    assert "notify-server forward start listings" in message.markdown


def test_ping_is_a_message_of_its_own() -> None:
    ping = json.loads(plain_event(EventType.TEST_PING, PingData("g"), AT).payload)
    assert compose("en", [ping]).title == "Test message from notify_server"


def overdue(**changes: Any) -> dict[str, Any]:
    at = utc(AT)
    assert at is not None
    fields: dict[str, Any] = {
        "batch_id": None, "api_code": "rent.add", "reference": "order-1", "expected_files": 12, "files": None,
        "limit": "notify_within", "limit_at": at,
    }  # fmt: skip
    event = plain_event(EventType.BATCH_LATE, ExpectationData(**fields | changes), AT)
    return dict(json.loads(event.payload))


def test_overdue_notification_names_its_reference_and_what_to_do() -> None:
    message = compose("en", [overdue(), overdue(batch_id="b-2", reference="order-2")])
    assert message.title == "2 batches are overdue"
    assert "**order-1** rent.add\nNo notification received by " in message.markdown
    assert "**b-2** order-2 rent.add" in message.markdown
    assert message.markdown.count("What to do: ask the platform") == 2
    assert compose("zh", [overdue()]).title == "1 个批次逾期未通知"
    assert compose("en", [overdue(), payload(EventType.BATCH_INCOMPLETE)]).title == "2 batches have problems"


def test_silence_names_its_api_code_and_the_last_notification() -> None:
    quiet = {"reference": None, "expected_files": None, "limit": "quiet"}
    message = compose("en", [overdue(**quiet, last_received_at=utc(AT - 86_400_000))])
    assert message.title == "1 api_code has no new notifications"
    assert message.markdown.startswith("**rent.add**\nNo notification since 1")
    message = compose("zh", [overdue(**quiet)])
    assert message.markdown.startswith("**rent.add**\n从未收到通知")
