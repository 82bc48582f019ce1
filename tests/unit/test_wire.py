"""Every rule of the contract at its boundary, on both sides; and no bytes that raise anything but ContractError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notify_server.contract.wire import contract_error, parse_notification, unknown_fields
from notify_server.errors import ContractError
from notify_server.model import FileEntry, Notification, ReportedStatus

SAMPLE = Path(__file__).parents[1].joinpath("samples", "notification.json").read_bytes()
URL = "https://store.example.com/a"
MAX_FILES = 20


def entry(**changes: Any) -> dict[str, Any]:
    return {"oss_object_name": "key", "status": "FINISHED", "target_url": URL} | changes


def document(*entries: Any, **changes: Any) -> dict[str, Any]:
    return {"batch_id": "b", "api_code": "a", "file_list": list(entries)} | changes


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def parse(value: Any, *, max_files: int = MAX_FILES) -> Notification:
    return parse_notification(value if isinstance(value, bytes) else as_bytes(value), max_files=max_files)


def refusal(value: Any, *, max_files: int = MAX_FILES) -> tuple[str, str]:
    with pytest.raises(ContractError) as caught:
        parse(value, max_files=max_files)
    return caught.value.field, caught.value.problem


# Accepted notifications


def test_the_published_example_is_read_as_it_stands() -> None:
    notification = parse(SAMPLE)
    assert notification.batch_id == "b452c50b50614fd697aa6c2b75563de0.80.16408499070570077"
    assert notification.api_code == "rent.dcentralize.room.add"
    assert len(notification.file_list) == 7
    first = notification.file_list[0]
    assert first.status is ReportedStatus.FINISHED
    assert first.target_url == f"https://test-tmhouse-oss.ebaas.com/{first.oss_object_name}"


def test_entries_are_the_models_own_type_and_compare_equal_to_it() -> None:
    notification = parse(document(entry(), entry(status="FAILED")))
    assert notification == Notification(
        "b", "a", [FileEntry("key", ReportedStatus.FINISHED, URL), FileEntry("key", ReportedStatus.FAILED, URL)]
    )


def test_a_file_list_may_be_empty() -> None:
    assert parse(document()) == Notification("b", "a", [])


def test_fields_come_in_any_order_and_spelled_with_escapes() -> None:
    body = b'{"file_list":[],"api\\u005fcode":"\\u0061","batch_id":"\\u6279\\ud83d\\ude00"}'
    assert parse(body) == Notification("批😀", "a", [])


def test_of_a_name_given_twice_the_last_counts() -> None:
    assert parse(b'{"batch_id":"b","api_code":"a","file_list":[],"batch_id":"c"}').batch_id == "c"


# Lengths, in characters


@pytest.mark.parametrize(("field", "longest"), [("batch_id", 80), ("api_code", 50)])
@pytest.mark.parametrize("character", ["x", "批", "😀"])
def test_top_level_strings_have_1_to_their_longest_length_in_characters(
    field: str, longest: int, character: str
) -> None:
    assert getattr(parse(document(**{field: character})), field) == character
    assert getattr(parse(document(**{field: character * longest})), field) == character * longest
    assert refusal(document(**{field: character * (longest + 1)})) == (field, f"longer than {longest} characters")
    assert refusal(document(**{field: ""})) == (field, "empty")


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
@pytest.mark.parametrize("character", ["x", "图"])
def test_object_names_have_1_to_1024_characters_whatever_the_status(status: str, character: str) -> None:
    good = entry(status=status)
    for length in (1, 1024):
        assert parse(document(good | {"oss_object_name": character * length}))
    too_long = good | {"oss_object_name": character * 1025}
    assert refusal(document(good, too_long)) == ("file_list[1].oss_object_name", "longer than 1024 characters")
    assert refusal(document(good, good | {"oss_object_name": ""})) == ("file_list[1].oss_object_name", "empty")


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_target_urls_have_at_most_300_characters_whatever_the_status(status: str) -> None:
    url = "http://h/" + "图" * 291
    good = entry(status=status, target_url=url)
    assert parse(document(good)).file_list[0].target_url == url
    too_long = good | {"target_url": url + "x"}
    assert refusal(document(good, too_long)) == ("file_list[1].target_url", "longer than 300 characters")


def test_a_megabyte_of_address_is_refused_without_being_repeated() -> None:
    field, problem = refusal(document(entry(target_url="http://h/" + "x" * 1_000_000)))
    assert (field, problem) == ("file_list[0].target_url", "longer than 300 characters")


def test_a_file_list_has_at_most_max_files_entries() -> None:
    assert len(parse(document(entry(), entry()), max_files=2).file_list) == 2
    assert refusal(document(entry(), entry(), entry()), max_files=2) == ("file_list", "more than 2 entries")


def test_ten_thousand_and_one_files_are_one_too_many_for_the_default_limit() -> None:
    files = [entry(oss_object_name=str(number)) for number in range(10_000)]
    assert len(parse(document(*files), max_files=10_000).file_list) == 10_000
    assert refusal(document(*files, entry()), max_files=10_000) == ("file_list", "more than 10000 entries")


# Status and address


@pytest.mark.parametrize("status", ["finished", "FINISHED ", "UPLOADING", "", "FAILED - at `$.batch_id`"])
def test_the_status_is_finished_or_failed_and_nothing_else(status: str) -> None:
    assert refusal(document(entry(), entry(status=status))) == ("file_list[1].status", "must be FINISHED or FAILED")


@pytest.mark.parametrize(
    "url", ["http://h", "https://h", "HTTP://h", "hTTpS://h/", "http://h:80?q", "http://exa mple/", "http://[::1]/"]
)
def test_an_address_with_an_http_scheme_and_an_authority_is_left_to_the_guard(url: str) -> None:
    assert parse(document(entry(target_url=url))).file_list[0].target_url == url


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "https://",
        # Folds to https where letters are not ASCII's.
        "http\u017f://h/",
        "http:///path",
        "https://?query",
        "http://#fragment",
        "http:/h",
        "http:h",
        "//h/path",
        "/path",
        "h.example.com/path",
        "ftp://h/",
        "httpss://h/",
        "xhttp://h/",
        "\x0bhttp://h/",
        "javascript:alert(1)",
        "ſhttp://h",
    ],
)
def test_a_finished_file_has_an_absolute_http_address(url: str) -> None:
    problem = "must be an absolute http or https address"
    assert refusal(document(entry(), entry(target_url=url))) == ("file_list[1].target_url", problem)


def test_a_finished_file_without_an_address_is_refused() -> None:
    assert refusal(document(entry(), without(entry(), "target_url"))) == ("file_list[1].target_url", "missing")
    assert refusal(document(entry(), entry(target_url=None))) == ("file_list[1].target_url", "missing")
    assert refusal(document(entry(), entry(target_url=""))) == ("file_list[1].target_url", "empty")


def test_a_failed_file_without_an_address_comes_back_with_none() -> None:
    failed = entry(status="FAILED")
    notification = parse(
        document(entry(), without(failed, "target_url"), failed | {"target_url": None}, failed | {"target_url": ""})
    )
    nothing = FileEntry("key", ReportedStatus.FAILED, None)
    assert notification.file_list == [FileEntry("key", ReportedStatus.FINISHED, URL), nothing, nothing, nothing]


def test_a_failed_file_may_have_any_text_for_an_address() -> None:
    assert parse(document(entry(status="FAILED", target_url="n/a"))).file_list[0].target_url == "n/a"


def test_entries_after_a_failed_one_are_checked_too() -> None:
    failed = without(entry(status="FAILED"), "target_url")
    assert refusal(document(failed, entry(target_url="x")))[0] == "file_list[1].target_url"


# Types, missing fields


@pytest.mark.parametrize("field", ["batch_id", "api_code", "file_list"])
def test_every_top_level_field_is_required(field: str) -> None:
    assert refusal(without(document(entry()), field)) == (field, "missing")


@pytest.mark.parametrize("field", ["oss_object_name", "status"])
def test_every_field_of_an_entry_but_the_address_is_required(field: str) -> None:
    assert refusal(document(entry(), without(entry(), field))) == (f"file_list[1].{field}", "missing")


WRONG_STRINGS = [
    (1, "must be a string, not a number"),
    (1.5, "must be a string, not a number"),
    (True, "must be a string, not a boolean"),
    ([], "must be a string, not an array"),
    ({}, "must be a string, not an object"),
]


@pytest.mark.parametrize(("value", "problem"), [*WRONG_STRINGS, (None, "must be a string, not null")])
def test_a_required_string_of_another_type_is_named_with_both_types(value: Any, problem: str) -> None:
    assert refusal(document(batch_id=value)) == ("batch_id", problem)
    assert refusal(document(api_code=value)) == ("api_code", problem)
    assert refusal(document(entry(oss_object_name=value))) == ("file_list[0].oss_object_name", problem)
    assert refusal(document(entry(status=value))) == ("file_list[0].status", problem)


@pytest.mark.parametrize(("value", "problem"), WRONG_STRINGS)
@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_an_address_of_another_type_is_named_with_both_types(status: str, value: Any, problem: str) -> None:
    assert refusal(document(entry(status=status, target_url=value))) == ("file_list[0].target_url", problem)


def test_the_file_list_is_an_array_of_objects() -> None:
    assert refusal(document(file_list={})) == ("file_list", "must be an array, not an object")
    assert refusal(document(file_list=None)) == ("file_list", "must be an array, not null")
    assert refusal(document(file_list="[]")) == ("file_list", "must be an array, not a string")
    assert refusal(document(entry(), 7)) == ("file_list[1]", "must be an object, not a number")
    assert refusal(document(entry(), None)) == ("file_list[1]", "must be an object, not null")


# Characters that cannot be stored


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_a_nul_character_is_refused_in_every_string(status: str) -> None:
    problem = "contains a NUL character"
    good = entry(status=status)
    assert refusal(document(batch_id="b\0")) == ("batch_id", problem)
    assert refusal(document(api_code="\0")) == ("api_code", problem)
    assert refusal(document(good, good | {"oss_object_name": "k\0"})) == ("file_list[1].oss_object_name", problem)
    assert refusal(document(good, good | {"target_url": URL + "\0"})) == ("file_list[1].target_url", problem)


def test_the_text_of_the_nul_escape_and_nul_in_unknown_fields_are_harmless() -> None:
    failed = without(entry(status="FAILED"), "target_url")
    assert parse(document(entry(), failed, batch_id="\\u0000", extra="\0")).batch_id == "\\u0000"


@pytest.mark.parametrize("escape", [r"\ud800", r"\udc00", r"\ud800\u0041", r"\udc00\ud800", r"\ud83d x"])
def test_a_lone_surrogate_makes_the_body_invalid_json(escape: str) -> None:
    body = as_bytes(document(batch_id="SURROGATE")).replace(b"SURROGATE", escape.encode())
    field, problem = refusal(body)
    assert field == "body"
    assert problem.startswith("not valid JSON (")


# The body as a whole


@pytest.mark.parametrize("body", [b"", b" ", b"\r\n\t "])
def test_a_body_of_nothing_is_empty(body: bytes) -> None:
    assert refusal(body) == ("body", "empty")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"[]", "an array"),
        (b'"x"', "a string"),
        (b"1", "a number"),
        (b"1.5", "a number"),
        (b"null", "null"),
        (b"true", "a boolean"),
    ],
)
def test_a_body_that_is_not_an_object_is_named_for_what_it_is(body: bytes, kind: str) -> None:
    assert refusal(body) == ("body", f"must be a JSON object, not {kind}")


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"{", "truncated"),
        (b"batch_id=b", "invalid character (byte 0)"),
        (b'{"batch_id": NaN}', "invalid character (byte 13)"),
        (b'{"x": Infinity}', "invalid character (byte 6)"),
        (b'{"batch_id":"b","api_code":"a","file_list":[]} x', "trailing characters (byte 48)"),
        (b'{"batch_id":"a\nb"}', "invalid character (byte 14)"),
    ],
)
def test_an_error_names_the_position_where_a_body_stops_being_json(body: bytes, detail: str) -> None:
    assert refusal(body) == ("body", f"not valid JSON ({detail})")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_other_encodings_of_unicode_are_refused(encoding: str) -> None:
    field, problem = refusal(SAMPLE.decode().encode(encoding))
    assert field == "body"
    assert problem.startswith(("not UTF-8", "not valid JSON ("))


@pytest.mark.parametrize("octets", [b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xe6\x89"])
def test_bytes_that_are_not_utf_8_are_refused_wherever_they_stand(octets: bytes) -> None:
    for body in (document(batch_id="HERE"), document(unknown="HERE"), document(HERE=1)):
        assert refusal(as_bytes(body).replace(b"HERE", octets)) == ("body", "not UTF-8")


@pytest.mark.parametrize("depth", [1_000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"x":', b"}")])
def test_a_body_nested_a_thousand_deep_or_more_is_refused(depth: int, opening: bytes, closing: bytes) -> None:
    nest = opening * depth + b"0" + closing * depth
    body = as_bytes(document(extra="HERE")).replace(b'"HERE"', nest)
    assert refusal(body) == ("body", "nested too deeply")


@pytest.mark.parametrize("number", [b"9" * 5_000, b"1e400", b"-1e400", b"9223372036854775808", b"-0.0"])
def test_a_number_of_any_size_is_refused_for_a_string_and_ignored_elsewhere(number: bytes) -> None:
    assert refusal(as_bytes(document(batch_id="HERE")).replace(b'"HERE"', number))[0] == "batch_id"
    assert parse(as_bytes(document(extra="HERE")).replace(b'"HERE"', number))


def test_a_problem_never_repeats_what_the_sender_wrote() -> None:
    secret = "secret\x1b[31m"
    for body in (
        document(entry(status=secret)),
        document(entry(target_url=secret)),
        {secret: 1},
        document({secret: 1}),
        secret,
        as_bytes(document(batch_id=secret))[:-20],
    ):
        field, problem = refusal(body)
        assert "secret" not in field + problem
        assert "\x1b" not in field + problem
        assert len(problem) < 100


@pytest.mark.parametrize("kind", [msgspec.DecodeError, msgspec.ValidationError])
def test_a_text_of_msgspecs_that_is_not_known_is_cut_short_and_escaped(kind: type[Exception]) -> None:
    error = contract_error(kind("New in some version: \x1b" + "x" * 1000), b"{}")
    assert error.field == "body"
    assert "\\x1b" in error.problem
    assert len(error.problem) < 100


# Unknown fields


def test_unknown_fields_are_ignored_and_counted_at_both_levels() -> None:
    body = as_bytes(document(entry(), entry(size=1, etag={"deep": 1}), extra=[1, {"x": 2}]))
    assert parse(body) == parse(document(entry(), entry()))
    assert unknown_fields(body) == 3


def test_a_notification_with_known_fields_only_has_no_unknown_ones() -> None:
    assert unknown_fields(SAMPLE) == 0
    assert unknown_fields(as_bytes(document())) == 0
    assert unknown_fields(as_bytes(document(without(entry(status="FAILED"), "target_url")))) == 0


def test_counting_from_deeper_in_the_stack_than_parsing_does_not_fail() -> None:
    body = as_bytes(document(extra="HERE")).replace(b'"HERE"', b"[" * 600 + b"]" * 600)
    assert parse(body)

    def count(frames: int) -> int:
        return count(frames - 1) if frames else unknown_fields(body)

    assert count(500) == 1


# Properties

characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
urls = st.builds("{}{}".format, st.sampled_from(["http://h", "HTTPS://h"]), st.text(characters, max_size=291))
statuses = st.sampled_from(ReportedStatus)
names = st.text(characters, min_size=1, max_size=1024)
entries = st.one_of(
    st.builds(FileEntry, names, statuses, urls),
    st.builds(
        FileEntry, names, st.just(ReportedStatus.FAILED), st.none() | st.text(characters, min_size=1, max_size=300)
    ),
)
notifications = st.builds(
    Notification,
    st.text(characters, min_size=1, max_size=80),
    st.text(characters, min_size=1, max_size=50),
    st.lists(entries, max_size=4),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
near_entries = st.fixed_dictionaries(
    {},
    optional={name: json_values | st.just(value) for name, value in entry().items()},
)
near_documents = st.fixed_dictionaries(
    {},
    optional={
        "batch_id": json_values | st.just("b"),
        "api_code": json_values | st.just("a"),
        "file_list": json_values | st.lists(near_entries | json_values, max_size=3),
        "extra": json_values,
    },
)


@st.composite
def cut_up_samples(draw: st.DrawFn) -> bytes:
    start = draw(st.integers(0, len(SAMPLE)))
    end = draw(st.integers(start, min(len(SAMPLE), start + 8)))
    return SAMPLE[:start] + draw(st.binary(max_size=4) | st.sampled_from([b"\\u0000", b"\\ud800"])) + SAMPLE[end:]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | cut_up_samples() | near_documents.map(as_bytes) | json_values.map(as_bytes))
def test_any_bytes_give_a_notification_or_a_contract_error(body: bytes) -> None:
    try:
        notification = parse_notification(body, max_files=MAX_FILES)
    except ContractError as error:
        assert error.field == "body" or error.field.split("[")[0] in Notification.__struct_fields__
        assert error.problem
    else:
        assert isinstance(notification, Notification)
        assert unknown_fields(body) >= 0


@settings(max_examples=60, deadline=None)
@given(notifications, st.booleans())
def test_any_valid_notification_round_trips(notification: Notification, escaped: bool) -> None:
    body = msgspec.json.encode(notification)
    if escaped:
        body = as_bytes(json.loads(body))
    assert parse_notification(body, max_files=4) == notification
    assert unknown_fields(body) == 0


NOT_A_STRING: st.SearchStrategy[Any] = st.sampled_from([None, 0, 1.5, True, [], {}])
DAMAGES = {
    "batch_id": NOT_A_STRING | st.sampled_from(["", "x" * 81, "\0"]),
    "api_code": NOT_A_STRING | st.sampled_from(["", "x" * 51, "\0"]),
    "oss_object_name": NOT_A_STRING | st.sampled_from(["", "x" * 1025, "\0"]),
    "status": NOT_A_STRING | st.text(characters, max_size=9).filter(lambda text: text not in set(ReportedStatus)),
    "target_url": NOT_A_STRING
    | st.sampled_from(["", "h/", "ftp://h/", "http://", "http://h/" + "x" * 292, URL + "\0"]),
}


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(st.builds(FileEntry, names, st.just(ReportedStatus.FINISHED), urls), min_size=1, max_size=4))
def test_any_single_damage_is_refused_under_the_damaged_fields_name(
    data: st.DataObject, files: list[FileEntry]
) -> None:
    body = msgspec.to_builtins(Notification("b", "a", files))
    field = data.draw(st.sampled_from(sorted(DAMAGES)))
    damage = data.draw(DAMAGES[field])
    if field in body:
        body[field], path = damage, field
    else:
        index = data.draw(st.integers(0, len(files) - 1))
        body["file_list"][index][field], path = damage, f"file_list[{index}].{field}"
    assert refusal(body)[0] == path


def test_byte_order_mark_before_a_notification_is_passed_over() -> None:
    marked = SAMPLE.decode().encode("utf-8-sig")
    assert parse_notification(marked, max_files=100) == parse_notification(SAMPLE, max_files=100)
    assert unknown_fields(marked) == unknown_fields(SAMPLE)
