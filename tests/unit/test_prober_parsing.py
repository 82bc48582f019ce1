"""What a prober keeps of an answer's headers: text that is safe to show, and a length that can be believed."""

from __future__ import annotations

import base64
import json
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from notify_server.model import Reason
from notify_server.processes.prober_headers import (
    FURTHER_LIMIT,
    LOCATION_LIMIT,
    VALUE_LIMIT,
    Answer,
    error_code,
    has_xml,
    read_headers,
    sanitise,
)
from notify_server.verify.guard import Guard

NOTHING = Answer(None, None, None, None, None, None)
MARK = "\ufffd"
many = settings(max_examples=150, deadline=None)


def lines(*fields: bytes, status: bytes = b"200 OK") -> list[bytes]:
    return [b"HTTP/1.1 " + status + b"\r\n", *(field + b"\r\n" for field in fields), b"\r\n"]


def length(*fields: bytes, status: bytes = b"200 OK") -> int | None:
    return read_headers(lines(*fields, status=status)).content_length


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"image/jpeg", "image/jpeg"),
        (b" \t image/jpeg \r\n", "image/jpeg"),
        (b"", ""),
        (b" ", ""),
        ("文件".encode(), "文件"),
        (b"a\x1b[31mb", f"a{MARK}[31mb"),
        (b"a\rb", f"a{MARK}b"),
        (b"a\nb", f"a{MARK}b"),
        (b"a\tb", f"a{MARK}b"),
        (b"a\x00b", f"a{MARK}b"),
        (b"a\x7fb", f"a{MARK}b"),
        (b"a\xffb", f"a{MARK}b"),
        (b"a\xc2\x9bb", f"a{MARK}b"),
        (b"a\xed\xa0\x80b", f"a{MARK * 3}b"),
    ],
)
def test_a_value_becomes_text_that_no_terminal_acts_on(value: bytes, text: str) -> None:
    assert sanitise(value) == text


def test_a_value_is_cut_at_its_limit() -> None:
    assert sanitise(b"x" * VALUE_LIMIT) == "x" * VALUE_LIMIT
    assert sanitise(b"x" * (VALUE_LIMIT + 1)) == "x" * VALUE_LIMIT
    assert sanitise(("文" * 300).encode()) == "文" * VALUE_LIMIT
    assert sanitise(b"abcdef", 3) == "abc"


def is_safe(text: str, limit: int) -> bool:
    return len(text) <= limit and not any(unicodedata.category(ch) in ("Cc", "Cs") for ch in text)


@many
@given(st.binary() | st.text().map(str.encode), st.integers(0, 300))
def test_no_bytes_make_a_control_character_or_more_than_the_limit(value: bytes, limit: int) -> None:
    assert is_safe(sanitise(value, limit), limit)


# -- fields ------------------------------------------------------------------------------------------------------------


def test_the_fields_that_matter_are_kept_and_the_others_are_not() -> None:
    found = read_headers(
        lines(
            b"X-Frame-Options: DENY",
            b"Content-Length: 1234",
            b"Content-Type: image/jpeg",
            b'ETag: "abc"',
            b"Last-Modified: Tue, 14 Nov 2023 22:13:30 GMT",
            b"Retry-After: 120",
            b"Location: https://example.com/a:b",
            b"Set-Cookie: secret",
        )
    )
    assert found == Answer(
        1234, "image/jpeg", '"abc"', "Tue, 14 Nov 2023 22:13:30 GMT", "120", "https://example.com/a:b"
    )


@pytest.mark.parametrize("name", [b"content-type", b"CONTENT-TYPE", b"Content-Type", b"cOnTeNt-tYpE"])
@pytest.mark.parametrize("gap", [b"", b" ", b" \t "])
def test_a_field_is_known_by_its_name_in_any_case(name: bytes, gap: bytes) -> None:
    assert read_headers(lines(name + b":" + gap + b"a/b")).content_type == "a/b"


def test_nothing_is_known_of_an_answer_without_headers() -> None:
    assert read_headers(lines()) == NOTHING
    assert read_headers([]) == NOTHING


def test_a_field_without_value_is_there_and_empty() -> None:
    assert read_headers(lines(b"Location:", b"ETag: ")) == NOTHING._replace(location="", etag="")


def test_of_a_repeated_field_the_first_counts() -> None:
    assert read_headers(lines(b"ETag: one", b"ETag: two")).etag == "one"


def test_lines_that_are_no_fields_are_passed_over() -> None:
    found = read_headers(lines(b"garbage", b"", b":", b": x", b"Content-Type", b"\xff\x00", b"ETag: one"))
    assert found == NOTHING._replace(etag="one")


@pytest.mark.parametrize("blank", [b" ", b"\t", b"  \t"])
def test_a_line_that_begins_with_a_blank_is_no_field(blank: bytes) -> None:
    # RFC 9112 2.2 and 5.2: it is the rest of the line before, or to be ignored after the status line.
    found = read_headers(lines(blank + b"Content-Type: evil/x", b"X: y", blank + b"Content-Length: 7", b"ETag: one"))
    assert found == NOTHING._replace(etag="one")


def test_interim_responses_do_not_count() -> None:
    interim = lines(b"Content-Length: 1", b"Content-Type: early/x", b"ETag: early", status=b"103 Early Hints")
    found = read_headers([*lines(status=b"100 Continue"), *interim, *lines(b"Content-Length: 2")])
    assert found == NOTHING._replace(content_length=2)


def test_values_from_strangers_come_out_safe() -> None:
    found = read_headers(
        lines(
            b"Content-Type: a\x1b[31m\xffb",
            b"ETag: \x00\x07",
            b"Last-Modified: a\rb",
            b"Retry-After: 1\x0b2",
            b"Location: /\x1b]0;x\x07",
        )
    )
    assert found == Answer(None, f"a{MARK}[31m{MARK}b", MARK * 2, f"a{MARK}b", f"1{MARK}2", f"/{MARK}]0;x{MARK}")


@pytest.mark.parametrize("name", [b"Content-Type", b"ETag", b"Last-Modified", b"Retry-After"])
def test_long_values_are_cut(name: bytes) -> None:
    assert max(len(text) for text in read_headers(lines(name + b": " + b"x" * 300_000))[1:] if text) == VALUE_LIMIT


BASE = "https://example.com/"


def test_a_location_is_kept_whole_as_far_as_it_can_be_followed() -> None:
    location = "/" + "a" * (8192 - len(BASE))
    found = read_headers(lines(b"Location: " + location.encode())).location
    assert found == location
    assert Guard().follow(BASE, found).refusal is None


@pytest.mark.parametrize("size", [8193, 9000, 300_000])
@pytest.mark.parametrize("begin", ["/", "http://elsewhere.example.com/"])
def test_a_location_that_is_too_long_leads_nowhere_rather_than_elsewhere(begin: str, size: int) -> None:
    # `Guard.follow` refuses more than 8,192 characters: it must not be handed the beginning of such an address.
    found = read_headers(lines(b"Location: " + begin.ljust(size, "a").encode())).location
    assert found is not None
    assert Guard().follow(BASE, found).refusal is Reason.BAD_REDIRECT
    assert len(found) <= LOCATION_LIMIT


# -- the length of the object ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "whole"),
    [(b"0", 0), (b"1", 1), (b" 42 ", 42), (b"007", 7), (b"999999999999999999", 999_999_999_999_999_999)],
)
def test_a_content_length_is_a_row_of_digits(value: bytes, whole: int) -> None:
    assert length(b"Content-Length: " + value) == whole


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b" ", b"-1", b"+1", b"1.0", b"1e3", b"0x10", b"1,000", b"5, 5", b"5 5", b"abc", b"5abc", b"\xd9\xa3"),
        *(b"\xb2", b"1\x00", b"\x1b5", b"9" * 19, b"9223372036854775808", b"18446744073709551616", b"9" * 100_000),
    ],
)
def test_a_content_length_that_is_no_reasonable_number_is_not_believed(value: bytes) -> None:
    assert length(b"Content-Length: " + value) is None


def test_a_repeated_content_length_is_believed_when_it_is_the_same() -> None:
    assert length(b"Content-Length: 5", b"content-length:5 ") == 5


def test_conflicting_content_lengths_are_not_believed() -> None:
    assert length(b"Content-Length: 5", b"Content-Length: 6") is None
    assert length(b"Content-Length: 5", b"Content-Length: -5") is None
    assert length(b"Content-Length: 5", b"Content-Length: 5", b"Content-Length: 6") is None


PARTIAL = b"206 Partial Content"


@pytest.mark.parametrize(
    ("value", "whole"),
    [
        (b"bytes 0-0/1234", 1234),
        (b"Bytes 0-0/1234 ", 1234),
        (b"bytes\t0-0/1", 1),
        (b"bytes 0-0/999999999999999999", 999_999_999_999_999_999),
    ],
)
def test_the_length_of_the_whole_object_is_taken_from_content_range(value: bytes, whole: int) -> None:
    assert length(b"Content-Length: 1", b"Content-Range: " + value, status=PARTIAL) == whole
    assert length(b"Content-Range: " + value, status=PARTIAL) == whole


def test_an_unsatisfiable_range_tells_the_length_whatever_the_length_of_the_error_page() -> None:
    not_satisfiable = b"416 Range Not Satisfiable"
    assert length(b"Content-Range: bytes */0", b"Content-Length: 99", status=not_satisfiable) == 0
    assert length(b"Content-Range: bytes */7", b"Content-Length: 0", status=not_satisfiable) == 7


@pytest.mark.parametrize(
    "value",
    [
        *(b"bytes 0-0/*", b"bytes */*", b"", b"junk", b"bytes", b"bytes 0-0", b"bytes 0-0/", b"bytes 0-0/-1", b"\xff"),
        *(b"bytes 0-0/x", b"bytes -/5", b"bytes=0-0/5", b"lines 0-0/5", b"bytes 0-0/5 6", b"bytes 0-0/" + b"9" * 19),
    ],
)
def test_a_content_range_that_does_not_tell_leaves_the_length_unknown(value: bytes) -> None:
    # RFC 9110 14.4: "*" is a length that the server does not know. Content-Length is that of the part.
    assert length(b"Content-Length: 1", b"Content-Range: " + value, status=PARTIAL) is None


@pytest.mark.parametrize("status", [PARTIAL, b"416 Range Not Satisfiable"])
def test_without_a_content_range_the_length_of_a_part_or_of_an_error_page_is_not_the_objects(status: bytes) -> None:
    assert length(b"Content-Length: 0", status=status) is None


# -- anything at all ---------------------------------------------------------------------------------------------------

NAMES = [b"Content-Length", b"content-type", b"ETAG", b"Last-Modified", b"Retry-After", b"Location", b"Content-Range"]
any_value = (
    st.binary()
    | st.sampled_from([b"0", b"1", b"-1", b"bytes */0", b"bytes 0-0/*", b"9" * 19, b"\x1b[2J", b"\xc2\x9b31m"])
    | st.from_regex(rb"\Abytes [0-9*-]{0,5}/[0-9*]{0,25}\Z")
    | st.integers(0, 400).map(lambda n: b"\xe6" * n)
)
any_field = st.builds(
    lambda name, value: name + b": " + value + b"\r\n", st.sampled_from(NAMES) | st.binary(), any_value
)
any_line = any_field | st.binary() | st.sampled_from([b"HTTP/1.1 200 OK\r\n", b"HTTP/", b"\r\n", b"\n", b""])


@many
@given(st.lists(any_line, max_size=12))
@example([b"Content-Length: " + b"9" * 5000])
@example([b"Content-Range: bytes 0-0/" + b"9" * 5000])
def test_no_header_lines_make_reading_raise_or_return_unsafe_values(some: list[bytes]) -> None:
    found = read_headers(some)
    assert found.content_length is None or 0 <= found.content_length < 10**18
    assert all(is_safe(text, VALUE_LIMIT) for text in found[1:5] if text is not None)
    assert found.location is None or is_safe(found.location, LOCATION_LIMIT)


# -- what a storage vendor says ----------------------------------------------------------------------------------------

ERROR = b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code><Message>gone</Message></Error>"


@pytest.mark.parametrize(
    "name",
    ["x-oss-request-id", "x-amz-request-id", "X-Cos-Request-Id", "x-tos-request-id", "x-obs-request-id", "X-Reqid"],
)
def test_the_vendors_request_id_is_kept(name: str) -> None:
    answer = read_headers(lines(name.encode() + b": 5F7C0A1B\x00"))
    assert (answer.vendor_request_id, answer.further) == (f"5F7C0A1B{MARK}", None)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (base64.b64encode(ERROR), "NoSuchKey"),
        (base64.b64encode(b"<Error></Error>"), None),
        (b"no base64!", None),
        (b"", None),
        (b"\xff", None),
    ],
)
def test_the_code_of_an_oss_error_is_read_from_its_header(value: bytes, code: str | None) -> None:
    assert read_headers(lines(b"x-oss-err: " + value, status=b"404 Not Found")).vendor_code == code


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (ERROR, "NoSuchKey"),
        (b"<Code> InvalidObjectState\n</Code>", "InvalidObjectState"),
        (b"<Code>a b</Code>", None),
        (b"<Code>\x1b[31m</Code>", None),
        (b"<Code>" + b"x" * 65 + b"</Code>", None),
        (b"<html>404</html>", None),
        (b"", None),
    ],
)
def test_the_code_of_an_error_is_read_from_its_body(body: bytes, code: str | None) -> None:
    assert error_code(body) == code


def test_only_xml_is_taken_for_a_vendors_error() -> None:
    assert has_xml(lines(b"content-TYPE: application/xml;charset=utf-8"))
    assert has_xml(lines(b"Content-Type: text/XML"))
    assert not has_xml(lines(b"Content-Type: text/html", b"X-Note: xml"))


def test_further_fields_are_kept_by_name_and_no_other() -> None:
    answer = read_headers(
        lines(
            b"Server: AliyunOSS",
            b"Set-Cookie: secret",
            b"x-oss-hash-crc64ecma: 1",
            b"X-OSS-EC: 0003-00000503",
            b"Content-Disposition: attachment; filename=\x1b",
        )
    )
    assert answer.further == {
        "server": "AliyunOSS",
        "x-oss-hash-crc64ecma": "1",
        "x-oss-ec": "0003-00000503",
        "content-disposition": f"attachment; filename={MARK}",
    }


def test_further_fields_are_bounded_and_the_most_important_stay() -> None:
    names = [b"via", b"x-cache", b"server", b"content-disposition", b"content-md5", b"x-oss-storage-class", b"x-oss-ec"]
    answer = read_headers(lines(*(name + b": " + ("文" * 255).encode() for name in names)))
    assert answer.further is not None
    assert len(json.dumps(answer.further, ensure_ascii=False, separators=(",", ":")).encode()) <= FURTHER_LIMIT
    assert {"x-oss-ec", "x-oss-storage-class"} <= answer.further.keys()
    assert not {"via", "x-cache"} & answer.further.keys()
