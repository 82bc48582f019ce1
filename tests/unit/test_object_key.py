"""The object key's form, one damage at a time."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notify_server.contract.object_key import ObjectKey, decode_object_key

SAMPLE = json.loads(Path(__file__).parents[1].joinpath("samples", "notification.json").read_bytes())
NAME = "L2FwdF9jb21tb24vb18xZmRsdXNzNWkx"


def key(app_id: str = "8ZAFUPII49GQN2AB", file_type: str = "IMAGE", number: str = "1", name: str = NAME) -> str:
    return f"{app_id}/{file_type}/{number}/{name}"


def named(path: bytes) -> str:
    return key(name=base64.b64encode(path).decode())


def test_every_key_of_the_published_example_is_decoded() -> None:
    decoded = [decode_object_key(entry["oss_object_name"]) for entry in SAMPLE["file_list"]]
    assert decoded[0] == ObjectKey("8ZAFUPII49GQN2AB", "IMAGE", -1091150479, "/apt_common/o_1fdluss5i1")
    assert [each.source_path[-2:] for each in decoded if each] == ["i1", "i1", "i1", "i1", "i8", "i1", "i1"]


@pytest.mark.parametrize("file_type", ["IMAGE", "FILE", "VIDEO", "VR"])
def test_the_platforms_file_types_are_known(file_type: str) -> None:
    decoded = decode_object_key(key(file_type=file_type))
    assert decoded is not None
    assert decoded.file_type == file_type


@pytest.mark.parametrize("file_type", ["", "image", "AUDIO", "IMAGES"])
def test_other_file_types_are_not_of_the_form(file_type: str) -> None:
    assert decode_object_key(key(file_type=file_type)) is None


@pytest.mark.parametrize("number", [0, 2**31 - 1, -(2**31)])
def test_the_hash_is_a_signed_32_bit_number(number: int) -> None:
    decoded = decode_object_key(key(number=str(number)))
    assert decoded is not None
    assert decoded.hash_number == number


@pytest.mark.parametrize("number", ["2147483648", "-2147483649", "", "-", "-0", "01", "+1", "1.0", "9" * 5000, "１"])
def test_other_numbers_are_not_of_the_form(number: str) -> None:
    assert decode_object_key(key(number=number)) is None


@pytest.mark.parametrize("app_id", ["", "8ZAFUPII49GQN2A", "8ZAFUPII49GQN2AB1", "8ZAFUPII49GQN2A-"])
def test_an_application_id_has_16_letters_and_digits(app_id: str) -> None:
    assert decode_object_key(key(app_id=app_id)) is None


@pytest.mark.parametrize("name", ["", NAME[:-4], NAME + "AAAA", NAME[:-1] + "=", NAME[:-1] + "*", NAME + "\n"])
def test_a_name_has_32_base64_characters(name: str) -> None:
    assert decode_object_key(key(name=name)) is None


@pytest.mark.parametrize("other", ["", "/", "a/b", key() + ".JPG!style0.jpg", "/" + key(), key().replace("/", "\\")])
def test_other_forms_of_key_are_not_decoded(other: str) -> None:
    assert decode_object_key(other) is None


def test_a_character_that_the_24_byte_cut_divides_is_left_out() -> None:
    decoded = decode_object_key(named(("/" + "图" * 8).encode()[:24]))
    assert decoded is not None
    assert decoded.source_path == "/" + "图" * 7


def test_both_base64_alphabets_are_read() -> None:
    path = "/a?b>c/~~~???>>>abcdefgh"
    standard = base64.b64encode(path.encode()).decode()
    url_safe = base64.urlsafe_b64encode(path.encode()).decode()
    assert "/" in standard
    assert standard != url_safe
    for name in (standard, url_safe):
        decoded = decode_object_key(key(name=name))
        assert decoded is not None
        assert decoded.source_path == path


@pytest.mark.parametrize("path", [b"\xff" + b"a" * 23, b"a" * 23 + b"\n", b"\x1b" + b"a" * 23, b"a" * 23 + b"\x7f"])
def test_bytes_that_are_no_path_are_not_of_the_form(path: bytes) -> None:
    assert decode_object_key(named(path)) is None


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40) | st.binary(min_size=24, max_size=24).map(named))
def test_any_text_is_decoded_or_is_not_of_the_form(text: str) -> None:
    decoded = decode_object_key(text)
    assert decoded is None or text.startswith(f"{decoded.app_id}/{decoded.file_type}/{decoded.hash_number}/")
