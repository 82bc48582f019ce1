"""The envelope is opened as published, and only what the platform signed, lately, is taken for its own."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from notify_server.contract.envelope import NEWER, OLDER, Envelope, Spelling, open_envelope
from notify_server.contract.signature import (
    PlatformKey,
    canonical_strings,
    load_platform_key,
    nonce_key,
    verify,
)
from notify_server.contract.wire import parse_notification
from notify_server.errors import ContractError, SignatureError
from notify_server.model import Notification

SAMPLES = Path(__file__).parents[1] / "samples"
BARE = (SAMPLES / "notification.json").read_bytes()
VECTOR = json.loads((SAMPLES / "signature_vector.json").read_bytes())
NOW = 1_604_990_109_987
WINDOW = 30_000
SPELLINGS = pytest.mark.parametrize("names", [NEWER, OLDER], ids=["newer", "older"])


class Signer:
    """The platform's side: a private key, and the published recipe written a second time."""

    def __init__(self) -> None:
        self.private_key = rsa.generate_private_key(65537, 1024)
        self.public = self.private_key.public_key()
        self.key = load_platform_key(self.public_text())

    def public_text(self, encoding: Encoding = Encoding.DER) -> str:
        octets = self.public.public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)
        return octets.decode() if encoding is Encoding.PEM else base64.b64encode(octets).decode()

    def private_der(self, form: PrivateFormat, encryption: KeySerializationEncryption) -> str:
        return base64.b64encode(self.private_key.private_bytes(Encoding.DER, form, encryption)).decode()

    def sign(self, text: str) -> str:
        octets = self.private_key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA1())
        return base64.b64encode(octets).decode()

    def seal(
        self, names: Spelling, parameters: dict[str, Any], *, code: str = "code", **changes: Any
    ) -> dict[str, Any]:
        """An envelope signed over its own code, then changed by `changes`."""
        head = {names.app_id: "8ZAFUPII49GQN2AB", "nonce": "123AO9", "timestamp": NOW, names.api_code: code}
        signed = parameters | head
        text = "&".join(f"{name}={json_text(signed[name])}" for name in sorted(signed) if is_signed(signed[name]))
        return head | {names.parameters: parameters, "sign": self.sign(text)} | changes


def is_signed(value: Any) -> bool:
    return value is not None and not isinstance(value, dict | list)


def json_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer()


@pytest.fixture(scope="module")
def stranger() -> Signer:
    return Signer()


def parameters(**changes: Any) -> dict[str, Any]:
    entry = {"oss_object_name": "key", "status": "FINISHED", "target_url": "https://h/key"}
    return {"batch_id": "b", "api_code": "code", "file_list": [entry]} | changes


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def opened(value: Any) -> Envelope:
    envelope = open_envelope(value if isinstance(value, bytes) else as_bytes(value))
    assert envelope is not None
    return envelope


def notification(envelope: Envelope) -> Notification:
    return parse_notification(envelope.notification, max_files=10)


def malformed(value: Any) -> tuple[str, str]:
    with pytest.raises(ContractError) as caught:
        open_envelope(value if isinstance(value, bytes) else as_bytes(value))
    return caught.value.field, caught.value.problem


def check(value: Any, *keys: PlatformKey, now_ms: int = NOW, window_ms: int = WINDOW) -> PlatformKey:
    return verify(opened(value), keys, now_ms=now_ms, window_ms=window_ms)


def refused(value: Any, *keys: PlatformKey, now_ms: int = NOW) -> str:
    with pytest.raises(SignatureError) as caught:
        check(value, *keys, now_ms=now_ms)
    return caught.value.code


# The published example


def test_the_published_example_verifies() -> None:
    key = load_platform_key(VECTOR["public_key_base64_der"])
    envelope = opened(VECTOR["envelope"])
    assert canonical_strings(envelope) == [VECTOR["canonical_string"]]
    assert verify(envelope, [key], now_ms=NOW, window_ms=0) is key
    assert nonce_key(envelope) == "OIG0AF4DMOK2VC2N&123AO9"


@pytest.mark.parametrize("field", ["appId", "nonce", "apiCode"])
def test_the_published_example_altered_does_not_verify(field: str) -> None:
    key = load_platform_key(VECTOR["public_key_base64_der"])
    assert refused(VECTOR["envelope"] | {field: VECTOR["envelope"][field][:-1] + "x"}, key) == "401001"
    assert refused(VECTOR["envelope"] | {"params": {"name": "测验"}}, key) == "401001"
    assert refused(VECTOR["envelope"] | {"timestamp": NOW + 1}, key) == "401001"


# Recognising an envelope


@SPELLINGS
def test_an_envelope_is_opened_in_either_spelling(signer: Signer, names: Spelling) -> None:
    sealed = signer.seal(names, parameters(), client_sign="ignored", extra=[1])
    envelope = opened(sealed)
    assert envelope.spelling is names
    assert envelope.app_id == "8ZAFUPII49GQN2AB"
    assert envelope.nonce == "123AO9"
    assert envelope.timestamp == NOW
    assert envelope.sign == sealed["sign"]
    assert envelope.api_code == "code"
    assert envelope.scalars == {"batch_id": "b", "api_code": "code"}
    assert notification(envelope) == parse_notification(as_bytes(parameters()), max_files=10)
    assert check(sealed, signer.key) is signer.key


@SPELLINGS
def test_the_business_parameters_may_be_a_string_of_json(signer: Signer, names: Spelling) -> None:
    sealed = signer.seal(names, parameters(remark="图"))
    as_string = sealed | {names.parameters: " " + json.dumps(parameters(remark="图"))}
    assert opened(as_string).scalars == opened(sealed).scalars
    assert notification(opened(as_string)) == notification(opened(sealed))
    assert check(as_string, signer.key)


def test_a_bare_notification_is_not_an_envelope() -> None:
    assert open_envelope(BARE) is None
    assert open_envelope(as_bytes(parameters())) is None


@SPELLINGS
def test_a_notification_with_its_own_file_list_is_bare_whatever_else_it_has(signer: Signer, names: Spelling) -> None:
    sealed = signer.seal(names, parameters())
    assert open_envelope(as_bytes(sealed | {"file_list": []})) is None
    assert open_envelope(as_bytes(sealed | {"file_list": None})) is not None


@SPELLINGS
def test_without_business_parameters_it_is_not_an_envelope(signer: Signer, names: Spelling) -> None:
    sealed = signer.seal(names, parameters())
    assert open_envelope(as_bytes(sealed | {names.parameters: None})) is None
    assert open_envelope(as_bytes(without(sealed, names.parameters))) is None


def test_the_names_deeper_in_a_notification_do_not_make_it_an_envelope() -> None:
    entry = {"oss_object_name": "k", "status": "FAILED", "params": {}, "request_content": {}}
    assert open_envelope(as_bytes(parameters(file_list=[entry]))) is None


def test_of_both_spellings_the_newer_one_counts(signer: Signer) -> None:
    sealed = signer.seal(NEWER, parameters(), params={"batch_id": "forged"}, appId="forged")
    assert notification(opened(sealed)).batch_id == "b"
    assert check(sealed, signer.key)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'"params"',
        b'["params"]',
        b'{"params": {}',
        b'{"params": NaN}',
        b'{"params": {}, "x": "\\ud800"}',
        b'{"params": {}, "x": "\xff"}',
        b'{"params": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        '{"params": {}}'.encode("utf-16"),
    ],
)
def test_a_body_that_is_not_a_json_object_is_left_to_the_notification_parser(body: bytes) -> None:
    assert open_envelope(body) is None
    with pytest.raises(ContractError):
        parse_notification(body, max_files=1)


# A malformed envelope


@SPELLINGS
def test_every_field_of_the_envelope_but_the_signature_is_required(signer: Signer, names: Spelling) -> None:
    sealed = signer.seal(names, parameters())
    for field in (names.app_id, "nonce", "timestamp", names.api_code):
        assert malformed(without(sealed, field)) == (field, "missing")
        assert malformed(sealed | {field: None}) == (field, "missing")


@SPELLINGS
def test_text_fields_of_the_envelope_have_their_lengths(signer: Signer, names: Spelling) -> None:
    sealed = signer.seal(names, parameters())
    for field, longest in ((names.app_id, 64), ("nonce", 64), (names.api_code, 50), ("sign", 2732)):
        for length in (1, longest):
            assert opened(sealed | {field: "图" * length})
        assert malformed(sealed | {field: "x" * (longest + 1)}) == (field, f"longer than {longest} characters")
        assert malformed(sealed | {field: 7}) == (field, "must be a string, not a number")
        assert malformed(sealed | {field: ["x"]}) == (field, "must be a string, not an array")
        assert malformed(sealed | {field: "x\0"}) == (field, "contains a NUL character")
    for field in (names.app_id, "nonce", names.api_code):
        assert malformed(sealed | {field: ""}) == (field, "empty")


@pytest.mark.parametrize("timestamp", [10**12, 10**13 - 1, str(NOW)])
def test_a_timestamp_is_13_digits_as_a_number_or_a_string(signer: Signer, timestamp: int | str) -> None:
    assert opened(signer.seal(NEWER, parameters(), timestamp=timestamp)).timestamp == int(timestamp)


@pytest.mark.parametrize(
    "timestamp",
    [
        10**12 - 1,
        10**13,
        -NOW,
        float(NOW),
        True,
        [],
        {},
        "",
        f" {NOW}",
        f"{NOW}\n",
        "0604990109987",
        "１６０４９９０１０９９８７",
        2**63,
        float("1e300"),
    ],
)
def test_any_other_timestamp_is_malformed(signer: Signer, timestamp: Any) -> None:
    sealed = signer.seal(NEWER, parameters(), timestamp=timestamp)
    assert malformed(sealed) == ("timestamp", "must be 13 digits, Unix milliseconds")


def test_a_timestamp_of_5000_digits_is_malformed(signer: Signer) -> None:
    body = as_bytes(signer.seal(NEWER, parameters(), timestamp=NOW)).replace(str(NOW).encode(), b"9" * 5000)
    assert malformed(body)[0] == "timestamp"


def test_a_timestamp_given_as_a_string_is_signed_as_its_digits(signer: Signer) -> None:
    assert check(signer.seal(NEWER, parameters(), timestamp=str(NOW)), signer.key)


@SPELLINGS
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "must be an object, not an array"),
        (7, "must be an object, not a number"),
        (True, "must be an object, not a boolean"),
        ("[]", "must be an object, not an array"),
        ("null", "must be an object, not null"),
        ("", "empty"),
        (" ", "empty"),
        ("{", "not valid JSON (truncated)"),
        ('{"x": "\\ud800 and more"}', "not valid JSON"),
        ("[" * 100_000, "must be an object, not an array"),
        ('{"x":' * 100_000, "nested too deeply"),
    ],
)
def test_business_parameters_are_an_object(signer: Signer, names: Spelling, content: Any, problem: str) -> None:
    field, said = malformed(signer.seal(names, parameters(), **{names.parameters: content}))
    assert field == names.parameters
    assert said.startswith(problem)


@SPELLINGS
def test_an_identifier_cannot_pass_for_its_neighbour_in_the_signed_string(signer: Signer, names: Spelling) -> None:
    sealed = signer.seal(names, parameters(remark="x"))
    forged = sealed | {"nonce": "123AO9&remark=x", names.parameters: parameters()}
    assert malformed(forged) == ("nonce", "must not contain &")
    assert malformed(sealed | {names.app_id: "a&b"}) == (names.app_id, "must not contain &")


# The notification inside


@SPELLINGS
def test_a_notification_without_an_api_code_has_the_envelopes(signer: Signer, names: Spelling) -> None:
    for inner in (without(parameters(), "api_code"), parameters(api_code=None)):
        sealed = signer.seal(names, inner, code='c"ode')
        assert notification(opened(sealed)).api_code == 'c"ode'
        assert len(notification(opened(sealed)).file_list) == 1
        assert check(sealed, signer.key)


def test_a_notification_keeps_its_own_api_code(signer: Signer) -> None:
    assert notification(opened(signer.seal(NEWER, parameters(api_code="inner")))).api_code == "inner"


def test_a_wrong_field_inside_is_named_by_the_notification_parser(signer: Signer) -> None:
    for changes, field in (
        ({"api_code": {}}, "api_code"),
        ({"batch_id": 7}, "batch_id"),
        ({"file_list": [7]}, "file_"),
    ):
        envelope = opened(signer.seal(NEWER, parameters(**changes)))
        with pytest.raises(ContractError) as caught:
            notification(envelope)
        assert caught.value.field.startswith(field)


def test_of_a_parameter_given_twice_the_same_one_is_signed_and_used(signer: Signer) -> None:
    sealed = as_bytes(signer.seal(NEWER, parameters()))
    forged = sealed.replace(b'"batch_id"', b'"batch_id": "forged", "batch_id"')
    assert notification(opened(forged)).batch_id == opened(forged).scalars["batch_id"] == "b"
    assert refused(sealed.replace(b'"file_list"', b'"batch_id": "forged", "file_list"'), signer.key) == "401001"


# The signed text


def test_parameters_are_sorted_by_name_and_written_as_in_the_json_text() -> None:
    body = (
        b'{"timestamp":1604990109987,"sign":"s","nonce":"n","app_id":"i","api_code":"c","request_content":'
        b'{"z":1.50,"b":1E3,"B":-0,"t":true,"f":false,"text":"a=1&b \\u56fe","empty":"","n":null,"o":{"p":1},"l":[1]}}'
    )
    assert canonical_strings(opened(body)) == [
        "B=-0&api_code=c&app_id=i&b=1E3&empty=&f=false&nonce=n&t=true&text=a=1&b 图&timestamp=1604990109987&z=1.50"
    ]


def test_the_older_spelling_signs_both_codes() -> None:
    body = as_bytes(
        {"appId": "i", "nonce": "n", "timestamp": NOW, "sign": "s", "apiCode": "C", "params": {"api_code": "c"}}
    )
    assert canonical_strings(opened(body)) == [f"apiCode=C&api_code=c&appId=i&nonce=n&timestamp={NOW}"]


def test_in_the_newer_spelling_either_code_may_be_the_signed_one(signer: Signer) -> None:
    sealed = signer.seal(NEWER, parameters(api_code="inner"), code="outer")
    first, second = canonical_strings(opened(sealed))
    assert first == f"api_code=outer&app_id=8ZAFUPII49GQN2AB&batch_id=b&nonce=123AO9&timestamp={NOW}"
    assert second == f"api_code=inner&app_id=8ZAFUPII49GQN2AB&batch_id=b&nonce=123AO9&timestamp={NOW}"
    for text in (first, second):
        assert check(sealed | {"sign": signer.sign(text)}, signer.key)
    assert refused(sealed | {"sign": signer.sign(first.replace("outer", "third"))}, signer.key) == "401001"


def test_equal_codes_make_one_string(signer: Signer) -> None:
    assert len(canonical_strings(opened(signer.seal(NEWER, parameters())))) == 1


@SPELLINGS
@pytest.mark.parametrize("field", ["nonce", "timestamp", "id"])
def test_no_parameter_takes_the_place_of_the_envelopes_own(signer: Signer, names: Spelling, field: str) -> None:
    field = names.app_id if field == "id" else field
    sealed = signer.seal(names, parameters())
    original = str(sealed[field])
    replayed = sealed | {field: original[:-1] + "0", names.parameters: parameters(**{field: original})}
    assert refused(replayed, signer.key) == "401001"


# The signature


def test_any_one_of_the_configured_keys_verifies_and_is_returned(signer: Signer, stranger: Signer) -> None:
    sealed = signer.seal(NEWER, parameters())
    assert check(sealed, stranger.key, signer.key) is signer.key
    assert check(sealed, signer.key, stranger.key) is signer.key


def test_a_signature_by_another_key_or_with_no_key_configured_is_refused(signer: Signer, stranger: Signer) -> None:
    sealed = signer.seal(NEWER, parameters())
    assert refused(sealed, stranger.key) == "401001"
    assert refused(sealed) == "401001"


def test_a_missing_or_empty_signature_is_unproven_rather_than_malformed(signer: Signer) -> None:
    sealed = signer.seal(NEWER, parameters())
    for unsigned in (without(sealed, "sign"), sealed | {"sign": None}, sealed | {"sign": ""}):
        assert notification(opened(unsigned)).batch_id == "b"
        with pytest.raises(SignatureError, match="sign is missing") as caught:
            check(unsigned, signer.key)
        assert caught.value.code == "401001"


@pytest.mark.parametrize("sign", ["*", "AAA", "AAAA", "====", "签名", "A" * 172, "A" * 252])
def test_a_signature_that_is_none_is_refused(signer: Signer, sign: str) -> None:
    assert refused(signer.seal(NEWER, parameters(), sign=sign), signer.key) == "401001"


def test_junk_around_a_good_signature_is_refused(signer: Signer) -> None:
    sealed = signer.seal(NEWER, parameters())
    assert refused(sealed | {"sign": "*" + sealed["sign"]}, signer.key) == "401001"


def test_a_signature_with_another_hash_is_refused(signer: Signer) -> None:
    sealed = signer.seal(NEWER, parameters())
    (text,) = canonical_strings(opened(sealed))
    octets = signer.private_key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
    assert refused(sealed | {"sign": base64.b64encode(octets).decode()}, signer.key) == "401001"


# The timestamp


@pytest.mark.parametrize("offset", [-WINDOW, 0, WINDOW])
def test_a_timestamp_just_inside_the_window_is_accepted(signer: Signer, offset: int) -> None:
    assert check(signer.seal(NEWER, parameters()), signer.key, now_ms=NOW + offset)


@pytest.mark.parametrize("offset", [-WINDOW - 1, WINDOW + 1])
def test_a_timestamp_just_outside_the_window_is_refused(signer: Signer, offset: int) -> None:
    assert refused(signer.seal(NEWER, parameters()), signer.key, now_ms=NOW + offset) == "403001"


def test_who_cannot_sign_learns_nothing_of_the_clock(signer: Signer, stranger: Signer) -> None:
    assert refused(signer.seal(NEWER, parameters()), stranger.key, now_ms=NOW + WINDOW + 1) == "401001"


# The nonce


def test_a_nonce_counts_once_for_each_application(signer: Signer) -> None:
    pairs = [("a", "bc"), ("ab", "c"), ("a", "b"), ("b", "a")]
    keys = {nonce_key(opened(signer.seal(NEWER, parameters(), app_id=i, nonce=n))) for i, n in pairs}
    assert len(keys) == len(pairs)


def test_both_spellings_share_their_nonces(signer: Signer) -> None:
    newer, older = (nonce_key(opened(signer.seal(names, parameters()))) for names in (NEWER, OLDER))
    assert newer == older


# Keys


def test_a_key_is_read_from_bare_base64_and_from_pem(signer: Signer) -> None:
    bare, pem = signer.public_text(), signer.public_text(Encoding.PEM)
    wrapped = "\n".join(bare[start : start + 64] for start in range(0, len(bare), 64))
    for text in (bare, f" {bare}\n", wrapped, pem, pem.replace("\n", "\r\n"), pem.replace("\n", " ")):
        assert load_platform_key(text) == signer.key


def test_a_fingerprint_is_the_beginning_of_the_keys_sha_256(signer: Signer) -> None:
    der = base64.b64decode(signer.public_text())
    assert signer.key.fingerprint == hashlib.sha256(der).hexdigest()[:16]
    assert load_platform_key(VECTOR["public_key_base64_der"]).fingerprint != signer.key.fingerprint


def unloadable(text: str) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_platform_key(text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 120
    assert caught.value.__cause__ is None
    return message


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_a_private_key_pasted_by_mistake_is_called_one_and_not_repeated(signer: Signer, form: PrivateFormat) -> None:
    bare = signer.private_der(form, NoEncryption())
    pem = signer.private_key.private_bytes(Encoding.PEM, form, NoEncryption()).decode()
    for text in (bare, pem):
        message = unloadable(text)
        assert message.startswith("a private key")
        assert not any(bare[start : start + 8] in message for start in range(0, len(bare) - 8))


def test_an_encrypted_private_key_is_called_a_private_key_too(signer: Signer) -> None:
    text = signer.private_der(PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))
    assert unloadable(text).startswith("a private key")


@pytest.mark.parametrize("label", ["RSA PRIVATE KEY", "OPENSSH PRIVATE KEY"])
def test_a_private_key_in_a_form_that_cannot_be_read_is_called_one_by_its_label(label: str) -> None:
    text = f"-----BEGIN {label}-----\nProc-Type: 4,ENCRYPTED\n\nAAAA\n-----END {label}-----"
    assert unloadable(text).startswith("a private key")


def test_a_key_of_another_kind_is_refused() -> None:
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    assert unloadable(pem).startswith("not an RSA key")


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("platform.pem", "neither base64"),
        ("公钥", "neither base64"),
        ("AAAA", "not a public key"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "not a public key"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n", "neither base64"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "a certificate"),
    ],
)
def test_a_text_that_is_no_key_is_refused_with_the_reason(text: str, beginning: str) -> None:
    assert unloadable(text).startswith(beginning)


# 512 bits, made once with openssl: cryptography makes none this short, but reads them.
SHORT_KEY = (
    "MFwwDQYJKoZIhvcNAQEBBQADSwAwSAJBAPnXtkyipg7nEH0grfoSgwQwAVPW0R9e"
    "r2CJMjIwcJHWLjaUpwNTFO9N+Ppzje3HvpL69IRGVkJsooge+CWvIAcCAwEAAQ=="
)


def test_a_key_short_enough_to_be_forged_is_refused() -> None:
    assert "512 bits" in unloadable(SHORT_KEY)


# Properties

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = texts | st.integers(-(2**40), 2**40) | st.booleans()
extras = st.dictionaries(
    st.text("abcxyz_", min_size=1, max_size=5), scalars | st.lists(scalars, max_size=2), max_size=4
)
spellings = st.sampled_from([NEWER, OLDER])


@settings(max_examples=40, deadline=None)
@given(names=spellings, extra=extras, data=st.data())
def test_no_covered_scalar_can_be_altered_and_anything_else_can(
    signer: Signer, names: Spelling, extra: dict[str, Any], data: st.DataObject
) -> None:
    inner = without(parameters(), "api_code") | extra
    sealed = signer.seal(names, inner)
    assert check(sealed, signer.key) is signer.key

    uncovered = inner | {name: ["altered"] for name, value in inner.items() if isinstance(value, list)}
    assert check(sealed | {names.parameters: uncovered}, signer.key) is signer.key

    covered = [name for name, value in inner.items() if is_signed(value)]
    field = data.draw(st.sampled_from([names.app_id, "nonce", "timestamp", names.api_code, *covered]))
    if field == "timestamp":
        forged = sealed | {field: NOW + data.draw(st.integers(1, WINDOW))}
    elif field in covered:
        value = data.draw(scalars.filter(lambda value: json_text(value) != json_text(inner[field])))
        forged = sealed | {names.parameters: inner | {field: value}}
    else:
        letters = st.text("abc123", min_size=1, max_size=6)
        forged = sealed | {field: data.draw(letters.filter(lambda value: value != sealed[field]))}
    assert refused(forged, signer.key) == "401001"
    removed = sealed | {names.parameters: without(inner, "batch_id")}
    assert refused(removed, signer.key) == "401001"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
good_values = {
    "app_id": "i",
    "appId": "i",
    "nonce": "n",
    "timestamp": NOW,
    "sign": "AAAA",
    "api_code": "c",
    "apiCode": "c",
    "request_content": parameters(),
    "params": json.dumps(parameters()),
}
near_envelopes = st.fixed_dictionaries(
    {}, optional={name: st.just(value) | json_values for name, value in good_values.items()}
)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=20).map(lambda octets: b'{"params":' + octets) | near_envelopes.map(as_bytes))
def test_any_bytes_raise_contract_and_signature_errors_only(signer: Signer, body: bytes) -> None:
    try:
        envelope = open_envelope(body)
        if envelope is not None:
            msgspec.json.decode(envelope.notification)
            verify(envelope, [signer.key], now_ms=NOW, window_ms=WINDOW)
    except ContractError as error:
        assert error.field in good_values
    except SignatureError as error:
        assert error.code == "401001"
