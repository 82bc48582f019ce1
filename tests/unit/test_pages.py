"""The parts that pages are made of."""

from __future__ import annotations

import json

import pytest

from notify_server.callbacks.refused_body import MAX_LINES, field_at_fault, readable
from notify_server.web.dashboard.forms import local_target
from notify_server.web.rendering import bar, is_link, milliseconds, size


@pytest.mark.parametrize("target", ["/", "/ui/batches/7?state=all&cursor=ab", "/ui/search?q=%E5%9B%BE"])
def test_an_address_of_ours_is_gone_to(target: str) -> None:
    assert local_target(target) == target


@pytest.mark.parametrize(
    "target",
    [
        None,
        "",
        "ui",
        "//evil.example",
        "/\\evil.example",
        "https://evil.example",
        "/\t/evil.example",
        "/a\r\nb",
        "/a\\b",
    ],
)
def test_an_address_of_others_is_not_gone_to(target: str | None) -> None:
    assert local_target(target) == "/"


@pytest.mark.parametrize("address", ["http://a.example/b", "HTTPS://a.example", "https://a.example/图"])
def test_a_web_address_may_be_a_link(address: str) -> None:
    assert is_link(address)


@pytest.mark.parametrize(
    "address", [None, "", "javascript:alert(1)", "data:text/html,x", "http:/a", "//a", "http://a/\u202e", " http://a"]
)
def test_nothing_else_is_a_link(address: str | None) -> None:
    assert not is_link(address)


def test_one_of_ten_thousand_can_be_seen_in_a_bar() -> None:
    (most, one) = bar([("available", 9999), ("pending", 0), ("unavailable", 1)])
    assert (most.name, one.name) == ("available", "unavailable")
    assert one.width > 1
    assert most.start == 0
    assert abs(most.width + one.width - 100) < 0.1
    assert bar([("available", 0)]) == []


def test_amounts_are_short() -> None:
    assert [milliseconds(value) for value in (None, 0.42, 12.3, 3400)] == ["–", "0.4 ms", "12 ms", "3.4 s"]
    assert [size(value) for value in (None, 512, 12_100, 3_400_000, 5_000_000_000_000)] == [
        "–", "512 B", "12.1 kB", "3.4 MB", "5,000.0 GB"
    ]  # fmt: skip


def test_the_field_at_fault_is_what_the_refusal_begins_with() -> None:
    assert field_at_fault("file_list[3].target_url: is missing") == ("file_list", 3, "target_url")
    assert field_at_fault("batch_id: must not be empty") == ("batch_id",)
    assert field_at_fault("the body is not JSON") == ()


def faulty(body: object, detail: str) -> list[str]:
    return [line.text.strip() for line in readable(json.dumps(body), detail).lines if line.at_fault]


def test_the_field_at_fault_is_marked() -> None:
    body = {"batch_id": "b", "file_list": [{"target_url": "a"}, {"target_url": "b", "status": "FINISHED"}]}
    assert faulty(body, "file_list[1].target_url: is wrong") == ['"target_url": "b",']
    assert faulty({"request_content": body}, "file_list[0].target_url: is wrong") == ['"target_url": "a"']
    # Missing parts are marked at their place.
    assert faulty(body, "file_list[0].status: is missing") == ["{"]
    assert faulty(body, "api_code: is missing") == []
    assert faulty({"file_list": []}, "file_list: must not be empty") == ['"file_list": []']


def test_a_long_body_is_shown_around_its_fault() -> None:
    body = {"batch_id": "b", "file_list": [{"status": "FINISHED"}] * 5000}
    shown = readable(json.dumps(body), "file_list[2500].status: is wrong")
    assert len(shown.lines) == MAX_LINES
    assert sum(line.at_fault for line in shown.lines) == 1
    assert shown.before + MAX_LINES + shown.after == 4 + 3 * 5000 + 1 - 1 + 1
    assert shown.batch_id == "b"


@pytest.mark.parametrize(
    "body", ["not JSON", "[" * 5000, "[" * 200 + "]" * 200, '{"n": ' + "9" * 5000 + "}", "", "\x00\n\x1b[31m"]
)
def test_text_that_is_not_json_or_too_deep_is_shown_unchanged(body: str) -> None:
    shown = readable(body, "x")
    assert not shown.is_json
    assert "\n".join(line.text for line in shown.lines) == body.rstrip("\n")


def test_half_a_surrogate_pair_can_be_shown() -> None:
    (line,) = readable('"\\ud800"', "x").lines
    assert line.text == '"\\ud800"'


def test_a_name_that_stands_there_twice_is_shown_twice() -> None:
    assert [line.text for line in readable('{"a": 1, "a": 2}', "x").lines] == ["{", '  "a": 1,', '  "a": 2', "}"]
