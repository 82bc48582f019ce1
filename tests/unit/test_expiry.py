"""The end of a signed address is read as the vendors' own packages write it."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notify_server.contract.expiry import EARLIEST, LATEST, expiry, is_signed

# Each address was signed by the package that `signer` names, for one hour; `ends` is the package's own end.
SIGNED = json.loads((Path(__file__).parents[1] / "samples" / "signed_addresses.json").read_text("utf-8"))
URL = "https://files.example.com/a.jpg"
END = 1_795_816_800


@pytest.mark.parametrize("vector", SIGNED, ids=[each["signer"] for each in SIGNED])
def test_expiry_of_a_vendors_own_address(vector: dict[str, object]) -> None:
    assert expiry(str(vector["url"])) == vector["ends"]
    assert not is_signed(str(vector["url"]))


@pytest.mark.parametrize("vector", SIGNED, ids=[each["signer"] for each in SIGNED])
def test_names_count_in_any_case_and_escaped(vector: dict[str, object]) -> None:
    address, _, query = str(vector["url"]).partition("?")
    pairs = [part.partition("=") for part in query.split("&")]
    shouted = "&".join(f"{name.upper()}{equals}{value}" for name, equals, value in pairs)
    assert expiry(f"{address}?{shouted}#{query}") == vector["ends"]


@pytest.mark.parametrize(
    ("query", "end"),
    [
        ("", None),
        (f"Expires={END}", None),
        (f"Expires={END}&Signature=x", None),
        (f"Expires={END}&OSSAccessKeyId=x", None),
        (f"Expires={END}&Signature=&OSSAccessKeyId=x", None),
        (f"Expires={END}&Signature=x&AccessKeyId=x", END),
        (f"Expires={END}&Expires={END}&Signature=x&AccessKeyId=x", END),
        (f"Expires={END}&Expires={END + 1}&Signature=x&AccessKeyId=x", None),
        ("Expires=-1&Signature=x&AccessKeyId=x", None),
        ("Expires=3600&Signature=x&AccessKeyId=x", None),
        (f"Expires={END}000&Signature=x&AccessKeyId=x", None),
        ("Expires=%C2%B2&Signature=x&AccessKeyId=x", None),
        (f"x-oss-expires={END}&x-oss-signature-version=OSS2", END),
        (f"x-oss-expires={END}", None),
        ("x-oss-expires=3600&x-oss-signature-version=OSS4-HMAC-SHA256&x-oss-date=20261127T210000Z", END),
        ("x-oss-expires=3600&x-oss-signature-version=OSS4-HMAC-SHA256&x-oss-date=20261327T210000Z", None),
        ("x-oss-expires=3600&x-oss-signature-version=OSS4-HMAC-SHA256", None),
        ("X-Amz-Date=20261127T210000Z&X-Amz-Expires=3600", END),
        ("X-Amz-Date=20261127T210000Z", None),
        ("X-Amz-Expires=3600", None),
        ("X-Tos-Date=20261127T210000Z&X-Tos-Expires=3600", END),
        (f"q-sign-time=1;{END}&q-key-time=1;{END + 60}&q-signature=x", END),
        (f"q-sign-time=1;{END + 60}&q-key-time=1;{END}&q-signature=x", END),
        (f"q-sign-time=1;{END}", None),
        (f"q-sign-time={END}&q-signature=x", None),
        (f"e={END}&token=key:sign", END),
        (f"e={END}&token=session", None),
        (f"e={END}", None),
        (f"e={END}&token=key:sign&Expires={END - 60}&Signature=x&AccessKeyId=x", END - 60),
    ],
)
def test_expiry_of_a_query(query: str, end: int | None) -> None:
    assert expiry(f"{URL}?{query}") == (None if end is None else end * 1000)


@pytest.mark.parametrize(
    ("query", "signed"),
    [
        ("auth_key=1795816800-0-0-d41d8cd98f00b204e9800998ecf8427e", True),
        ("sign=d41d8cd98f00b204e9800998ecf8427e&t=1795816800", True),
        ("Expires=3600&Signature=x&OSSAccessKeyId=x", True),
        (f"Expires={END}&Signature=x&OSSAccessKeyId=x", False),
        ("sign=", False),
        ("design=1", False),
        ("style=small", False),
        ("", False),
    ],
)
def test_address_whose_end_is_unknown_is_signed(query: str, signed: bool) -> None:
    assert is_signed(f"{URL}?{query}") is signed


@given(st.text())
def test_expiry_of_any_text_is_none_or_a_plausible_moment(text: str) -> None:
    for url in (text, f"{URL}?{text}", f"{URL}?Expires={text}&Signature=x&AccessKeyId=x", f"{URL}?e={text}&token=a:b"):
        end = expiry(url)
        assert end is None or EARLIEST * 1000 <= end <= LATEST * 1000
        is_signed(url)


@given(st.integers(EARLIEST, LATEST), st.text(max_size=20), st.randoms())
def test_expiry_is_the_same_in_any_order_of_parameters(end: int, more: str, random: object) -> None:
    pairs = [("OSSAccessKeyId", "x"), ("Expires", str(end)), ("Signature", "a+b/=="), ("response-type", more)]
    random.shuffle(pairs)  # type: ignore[attr-defined]
    assert expiry(f"{URL}?{urlencode(pairs, quote_via=quote)}") == end * 1000
