"""Signatures and headers of forwarded events: Standard Webhooks and CloudEvents."""

from __future__ import annotations

import base64
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from notify_server.config.forward import webhook_secret
from notify_server.events.payload import EventType
from notify_server.forward.cloudevents import header_value, headers
from notify_server.forward.standard_webhooks import Signer
from tests.forward.test_payload import sample

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_" + base64.b64encode(bytes(range(32))).decode()


def test_specification_vector_is_reproduced() -> None:
    made = Signer([SECRET]).headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330_000, b'{"test": 2432232314}')
    assert made == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_timestamp_is_in_whole_seconds() -> None:
    assert Signer([]).headers("evt_a", 1_999, b"{}")["webhook-timestamp"] == "1"


def test_every_secret_verifies_during_rotation() -> None:
    now = time.time_ns() // 1_000_000
    made = Signer([SECRET, OTHER]).headers("evt_a", now, b'{"a":1}')
    assert len(made["webhook-signature"].split(" ")) == 2
    for secret in (SECRET, OTHER):
        assert Webhook(secret).verify(b'{"a":1}', made) == {"a": 1}


def test_signature_is_left_out_without_secrets() -> None:
    assert set(Signer([]).headers("evt_a", 0, b"{}")) == {"webhook-id", "webhook-timestamp"}


def refused(body: bytes, headers: dict[str, str]) -> bool:
    try:
        Webhook(SECRET).verify(body, headers, json_parse=False)
    except (WebhookVerificationError, ValueError):
        return True
    return False


@pytest.mark.parametrize("kind", EventType)
def test_altered_byte_is_refused(kind: EventType) -> None:
    event = sample(kind)
    made = Signer([SECRET]).headers(event.key, time.time_ns() // 1_000_000, event.payload)
    assert not refused(event.payload, made)
    body = event.payload
    for place in range(len(body)):
        head, tail = body[:place], body[place + 1 :]
        assert refused(head + bytes([body[place] ^ 1]) + tail, made), place
        assert refused(head + tail, made), place
    assert refused(body + b"\n", made)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_altered_header_is_refused(name: str) -> None:
    event = sample(EventType.BATCH_INCOMPLETE)
    made = Signer([SECRET]).headers(event.key, time.time_ns() // 1_000_000, event.payload)
    value = made[name]
    # The last digit of the base64 of 32 bytes has bits that mean nothing, and a padding follows.
    places = range(len(value) - 2 if name == "webhook-signature" else len(value))
    for place in places:
        altered = value[:place] + ("A" if value[place] != "A" else "B") + value[place + 1 :]
        assert refused(event.payload, made | {name: altered}), place
    assert refused(event.payload, {key: header for key, header in made.items() if key != name})


@pytest.mark.parametrize(
    "secret",
    ["", "whsec_", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_c2hvcnQ=", "whsec_***", "whsec_" + "A" * 100],
)
def test_wrong_secret_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ValueError, match="must be whsec_ and the base64") as refused:
        webhook_secret(secret)
    assert secret in ("", "whsec_") or secret not in str(refused.value)


def test_good_secret_is_accepted() -> None:
    webhook_secret(SECRET)
    webhook_secret(OTHER)


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("plain-1", "plain-1"),
        ("a b", "a%20b"),
        ('"quoted" 50%', "%22quoted%22%2050%25"),
        ("批次", "%E6%89%B9%E6%AC%A1"),
        ("Euro €😀", "Euro%20%E2%82%AC%F0%9F%98%80"),
        ("a\r\nb: c", "a%0D%0Ab:%20c"),
        ("\ud800", "%EF%BF%BD"),
        ("~!#$&'()*+,-./:;<=>?@[\\]^_`{|}", "~!#$&'()*+,-./:;<=>?@[\\]^_`{|}"),
    ],
)
def test_header_values_are_percent_encoded(text: str, encoded: str) -> None:
    assert header_value(text) == encoded


@given(st.text())
def test_any_subject_is_a_valid_header(text: str) -> None:
    assert all("!" <= ch <= "~" for ch in header_value(text))


def test_cloudevents_attributes_are_complete() -> None:
    made = headers(
        key="evt_a", endpoint="listings", type="batch.complete", time="2026-01-01T00:00:00.000Z", subject="b 1"
    )
    assert made == {
        "ce-specversion": "1.0",
        "ce-id": "evt_a",
        "ce-source": "/notify_server/listings",
        "ce-type": "batch.complete",
        "ce-time": "2026-01-01T00:00:00.000Z",
        "ce-subject": "b%201",
    }


def test_event_of_no_batch_has_no_subject() -> None:
    assert "ce-subject" not in headers(key="k", endpoint="e", type="test.ping", time="t", subject=None)
