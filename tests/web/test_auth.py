"""Who may call back: by token, by network, by signature; and who called, when proxies stand in between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from hypothesis import example, given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from notify_server.callbacks.access import client_address, within
from notify_server.config import IPNetwork

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.app import AppServer, Clock, Signer, Start
    from tests.support.http import Reply
    from tests.web.conftest import Locked

TOKEN = "token-of-the-platform"
WINDOW_MS = 30_000


def without_id(answer: Reply) -> dict[str, Any]:
    content = answer.json
    assert isinstance(content, dict)
    del content["request_id"]
    return content


# The signed envelope


@pytest.fixture
def signed(signer: Signer) -> dict[str, Any]:
    """Settings under which only what the platform has signed is accepted."""
    return {"signature": "required", "platform_keys": [signer.public]}


@pytest.mark.parametrize("mode", ["optional", "required"])
async def test_a_good_signature_is_accepted_in_every_form_and_its_key_kept(
    start: Start, signer: Signer, mode: str
) -> None:
    daemon = await start(auth={"signature": mode, "platform_keys": [signer.public]})
    for older in (False, True):
        for as_text in (False, True):
            parameters = daemon.notification(name="测试", count=7)
            body = json.dumps(signer.seal(parameters, older=older, as_text=as_text)).encode()
            request_id = (await daemon.post(body)).accepted()
            assert daemon.rows(
                "SELECT batch_id, api_code, signature, body, files FROM notification WHERE request_id = ?", request_id
            ) == [(parameters["batch_id"], "code", signer.fingerprint, body.decode(), 1)]
            await daemon.settled(parameters["batch_id"])
    assert daemon.counts() == (4, 0)


async def test_an_envelope_is_opened_and_proves_nothing_when_signatures_are_off(start: Start, signer: Signer) -> None:
    daemon = await start()
    parameters = daemon.notification()
    envelope = {**signer.seal(parameters, timestamp=1_000_000_000_000), "sign": "wrong"}
    for _ in range(2):
        (await daemon.post(envelope)).accepted()
    assert daemon.rows("SELECT DISTINCT batch_id, signature FROM notification") == [(parameters["batch_id"], "none")]


async def test_an_unsigned_notification_is_accepted_where_signatures_are_optional(
    start: Start, signer: Signer, sample: bytes
) -> None:
    daemon = await start(auth={"signature": "optional", "platform_keys": [signer.public]})
    (await daemon.post(sample)).accepted()
    assert daemon.rows("SELECT signature FROM notification") == [("none",)]


UNPROVEN: dict[str, Callable[[Signer, Signer, dict[str, Any]], Any]] = {
    "no signature": lambda signer, other, given: {**signer.seal(given), "sign": None},
    "an empty signature": lambda signer, other, given: {**signer.seal(given), "sign": ""},
    "not base64": lambda signer, other, given: {**signer.seal(given), "sign": "not base64!"},
    "another text's": lambda signer, other, given: {**signer.seal(given), "sign": signer.sign("another text")},
    "a signature cut short": lambda signer, other, given: {**signer.seal(given), "sign": signer.sign("")[:-8]},
    "another key's": lambda signer, other, given: other.seal(given),
    "batch_id altered": lambda signer, other, given: altered(signer.seal(given), batch_id="another"),
    "api_code altered": lambda signer, other, given: (
        altered(signer.seal(given), api_code="another") | {"api_code": "another"}
    ),
    "apiCode altered": lambda signer, other, given: {**signer.seal(given, older=True), "apiCode": "another"},
    "inner api_code altered": lambda signer, other, given: (
        signer.seal(given, older=True) | {"params": {**given, "api_code": "another"}}
    ),
    "nonce altered": lambda signer, other, given: {**signer.seal(given), "nonce": "zzzzzz"},
    "timestamp altered": lambda signer, other, given: signer.seal(given) | {"timestamp": 1_604_990_109_988},
    "app_id altered": lambda signer, other, given: {**signer.seal(given), "app_id": "0000000000000000"},
    "a parameter added": lambda signer, other, given: altered(signer.seal(given), added="1"),
    "old, and another key's": lambda signer, other, given: other.seal(given, timestamp=1_000_000_000_000),
}


def altered(envelope: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**envelope, "request_content": {**envelope["request_content"], **changes}}


@pytest.mark.parametrize("mode", ["optional", "required"])
async def test_a_signature_that_proves_nothing_has_one_answer_whatever_the_cause(
    start: Start, signer: Signer, other_signer: Signer, clock: Clock, mode: str
) -> None:
    daemon = await start(clock=clock, auth={"signature": mode, "platform_keys": [signer.public]})
    answers = {
        cause: await daemon.post(make(signer, other_signer, daemon.notification())) for cause, make in UNPROVEN.items()
    }
    if mode == "required":
        answers["not signed"] = await daemon.post(daemon.notification())
        answers["not JSON"] = await daemon.post(b"not JSON")
        answers["nothing"] = await daemon.post(b"")
        answers["envelope by escapes"] = await daemon.post(
            json.dumps(other_signer.seal(daemon.notification())).replace("request", "\\u0072equest").encode()
        )
    for cause, answer in answers.items():
        assert answer.refusal(401, "401001"), cause
    assert len({json.dumps(without_id(answer)) for answer in answers.values()}) == 1
    assert len({answer.json["request_id"] for answer in answers.values()}) == len(answers)
    assert len({tuple(sorted(answer.headers)) for answer in answers.values()}) == 1
    assert daemon.counts() == (0, 0)
    # All of it for want of a proof, not for anything else.
    (await daemon.post(signer.seal(daemon.notification(), timestamp=clock.fixed))).accepted()


@pytest.mark.parametrize("off", [-WINDOW_MS, -1, 0, WINDOW_MS])
async def test_a_timestamp_just_inside_the_window_is_accepted(
    start: Start, signer: Signer, signed: dict[str, Any], clock: Clock, off: int
) -> None:
    daemon = await start(clock=clock, auth=signed)
    (await daemon.post(signer.seal(daemon.notification(), timestamp=clock() + off))).accepted()


@pytest.mark.parametrize("off", [-WINDOW_MS - 1, WINDOW_MS + 1, -(10**11)])
async def test_a_timestamp_just_outside_the_window_is_refused_and_nothing_kept(
    start: Start, signer: Signer, signed: dict[str, Any], clock: Clock, off: int
) -> None:
    daemon = await start(clock=clock, auth=signed)
    answer = await daemon.post(signer.seal(daemon.notification(), timestamp=clock() + off))
    answer.refusal(403, "403001")
    assert daemon.counts() == (0, 0)


async def test_the_window_is_configured(start: Start, signer: Signer, signed: dict[str, Any], clock: Clock) -> None:
    daemon = await start(clock=clock, auth={**signed, "timestamp_window": "1500ms"})
    (await daemon.post(signer.seal(daemon.notification(), timestamp=clock() - 1500))).accepted()
    (await daemon.post(signer.seal(daemon.notification(), timestamp=clock() - 1501))).refusal(403, "403001")


async def test_a_nonce_is_good_for_one_notification(start: Start, signer: Signer, signed: dict[str, Any]) -> None:
    daemon = await start(auth=signed)
    envelope = signer.seal(daemon.notification(), nonce="abc123")
    (await daemon.post(envelope)).accepted()
    again = signer.seal(daemon.notification(), nonce="abc123")
    for repeated in (envelope, again):
        (await daemon.post(repeated)).refusal(403, "403002")
    (await daemon.post(signer.seal(daemon.notification(), nonce="abc124"))).accepted()
    # Each application counts its own.
    (await daemon.post(signer.seal(daemon.notification(), nonce="abc123", app_id="another"))).accepted()
    assert daemon.counts() == (3, 0)


async def test_of_fifty_requests_at_once_with_one_nonce_one_is_accepted(
    start: Start, signer: Signer, signed: dict[str, Any]
) -> None:
    daemon = await start(auth=signed)
    body = signer.seal(daemon.notification())
    answers = await asyncio.gather(*(daemon.post(body) for _ in range(50)))
    accepted = [answer for answer in answers if answer.status == 200]
    assert len(accepted) == 1
    accepted[0].accepted()
    for answer in answers:
        if answer is not accepted[0]:
            answer.refusal(403, "403002")
    assert daemon.counts() == (1, 0)


async def test_a_repeated_nonce_does_no_harm_to_those_it_arrives_with(
    start: Start, signer: Signer, signed: dict[str, Any]
) -> None:
    daemon = await start(auth=signed)
    used = signer.seal(daemon.notification())
    (await daemon.post(used)).accepted()
    bodies = [signer.seal(daemon.notification()) if n % 2 else used for n in range(20)]
    answers = await asyncio.gather(*(daemon.post(body) for body in bodies))
    assert [answer.status for answer in answers] == [403, 200] * 10
    for body, answer in zip(bodies, answers, strict=True):
        if answer.status == 200:
            request_id = answer.accepted()
            batch_id = body["request_content"]["batch_id"]
            kept = daemon.rows("SELECT request_id FROM notification WHERE batch_id = ?", batch_id)
            assert kept == [(request_id,)]


async def test_a_nonce_stays_used_across_a_restart(start: Start, signer: Signer, signed: dict[str, Any]) -> None:
    daemon = await start(auth=signed)
    envelope = signer.seal(daemon.notification())
    (await daemon.post(envelope)).accepted()
    await daemon.stop()
    daemon = await start(auth=signed)
    (await daemon.post(envelope)).refusal(403, "403002")
    (await daemon.post(signer.seal(daemon.notification()))).accepted()
    assert daemon.counts() == (2, 0)


@pytest.mark.parametrize("ttl", [30, 45, 60, 61])
async def test_no_request_is_accepted_twice_while_its_timestamp_is_good(
    start: Start, signer: Signer, signed: dict[str, Any], clock: Clock, ttl: int
) -> None:
    daemon = await start(clock=clock, auth={**signed, "timestamp_window": 30, "nonce_ttl": ttl})
    began = clock()
    envelope = signer.seal(daemon.notification(), timestamp=began + WINDOW_MS)
    (await daemon.post(envelope)).accepted()
    for seconds in (1, 30, 31, 45, 46, 59, 60):
        clock.fixed = began + seconds * 1000
        (await daemon.post(envelope)).refusal(403, "403002")
    clock.fixed = began + 2 * WINDOW_MS + 1
    (await daemon.post(envelope)).refusal(403, "403001")
    assert daemon.counts() == (1, 0)


async def test_a_nonce_is_forgotten_after_its_time(
    start: Start, signer: Signer, signed: dict[str, Any], clock: Clock
) -> None:
    daemon = await start(clock=clock, auth={**signed, "nonce_ttl": 90})
    began = clock()
    (await daemon.post(signer.seal(daemon.notification(), nonce="n", timestamp=began))).accepted()
    clock.fixed = began + 89_999
    again = signer.seal(daemon.notification(), nonce="n", timestamp=clock())
    (await daemon.post(again)).refusal(403, "403002")
    clock.fixed = began + 90_001
    (await daemon.post(signer.seal(daemon.notification(), nonce="n", timestamp=clock()))).accepted()
    assert daemon.count("nonce") == 1


async def test_a_request_that_was_not_taken_may_be_sent_again_with_its_nonce(
    start: Start, signer: Signer, signed: dict[str, Any], locked: Locked, impatient_store: None
) -> None:
    daemon = await start(auth=signed)
    envelope = signer.seal(daemon.notification())
    bad = signer.seal(daemon.notification(batch_id=""), nonce="abcdef")
    with locked(daemon):
        (await daemon.post(envelope)).refusal(503, "503")
    (await daemon.post(envelope)).accepted()
    (await daemon.post(bad)).refusal(400, "400")
    (await daemon.post(signer.seal(daemon.notification(), nonce="abcdef"))).accepted()


async def test_the_old_key_and_the_new_are_accepted_while_both_are_configured(
    start: Start, signer: Signer, other_signer: Signer
) -> None:
    keys = [signer.public, other_signer.public]
    daemon = await start(auth={"signature": "required", "platform_keys": keys})
    for each in (other_signer, signer):
        (await daemon.post(each.seal(daemon.notification()))).accepted()
    fingerprints = daemon.rows("SELECT signature FROM notification ORDER BY id")
    assert fingerprints == [(other_signer.fingerprint,), (signer.fingerprint,)]
    await daemon.stop()
    daemon = await start(auth={"signature": "required", "platform_keys": keys[1:]})
    (await daemon.post(signer.seal(daemon.notification()))).refusal(401, "401001")
    (await daemon.post(other_signer.seal(daemon.notification()))).accepted()


async def test_a_proven_notification_that_breaks_the_contract_is_named_and_kept(
    start: Start, signer: Signer, signed: dict[str, Any]
) -> None:
    daemon = await start(auth=signed)
    entries = [daemon.entry(), daemon.entry(target_url="ftp://h/")]
    body = json.dumps(signer.seal(daemon.notification(*entries))).encode()
    message = (await daemon.post(body)).refusal(400, "400")
    assert message.startswith("file_list[1].target_url: ")
    assert daemon.rows("SELECT code, detail, body FROM rejection") == [("400", message, body)]
    assert daemon.count("notification") == 0


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("nonce", {"nonce": None}),
        ("nonce", {"nonce": 7}),
        ("nonce", {"nonce": "n&m"}),
        ("app_id", {"app_id": ""}),
        ("timestamp", {"timestamp": "yesterday"}),
        ("timestamp", {"timestamp": 10**4000}),
        ("timestamp", {"timestamp": {}}),
        ("sign", {"sign": 1}),
        ("sign", {"sign": "A" * 2733}),
        ("api_code", {"api_code": "c" * 51}),
        ("request_content", {"request_content": "not JSON"}),
        ("request_content", {"request_content": "[" * 100_000}),
        ("request_content", {"request_content": 7}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(next(iter(value.values())) if value else "")[:30],
)
async def test_a_malformed_envelope_is_refused_by_its_field_and_kept_where_anyone_may_send(
    daemon: AppServer, signer: Signer, field: str, changes: dict[str, Any]
) -> None:
    rejections = daemon.count("rejection")
    body = json.dumps({**signer.seal(daemon.notification()), **changes}).encode()
    message = (await daemon.post(body)).refusal(400, "400")
    assert message.startswith(f"{field}: ")
    assert daemon.rows("SELECT body FROM rejection ORDER BY id DESC LIMIT 1") == [(body,)]
    assert daemon.count("rejection") == rejections + 1


async def test_nothing_is_kept_of_a_sender_who_has_proven_nothing(
    start: Start, signer: Signer, other_signer: Signer, signed: dict[str, Any]
) -> None:
    daemon = await start(auth=signed, server={"body_limit_bytes": 50_000})
    sealed = other_signer.seal(daemon.notification())
    refusals = [
        await daemon.post({**sealed, "nonce": ""}),
        await daemon.post({**sealed, "sign": 1}),
        await daemon.post({**sealed, "request_content": "not JSON"}),
        await daemon.post(sealed, {"Content-Type": "text/plain"}),
        await daemon.post(b"x" * 50_001),
    ]
    for refusal in refusals:
        assert 400 <= refusal.status < 500
    assert daemon.counts() == (0, 0)


# The token


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(start_shared: Start) -> AppServer:
    return await start_shared(auth={"callback_token": TOKEN})


@pytest.mark.parametrize(
    ("query", "authorization"),
    [
        (f"?token={TOKEN}", None),
        (f"?a=b&token={TOKEN}", None),
        (f"?token={TOKEN}&token=wrong", None),
        ("", f"Bearer {TOKEN}"),
        ("", f"bearer  {TOKEN} "),
        ("?token=wrong", f"BEARER {TOKEN}"),
        (f"?token={TOKEN}", "Basic dXNlcjpwYXNz"),
    ],
)
async def test_the_token_is_taken_from_the_address_or_as_bearer(
    guarded: AppServer, query: str, authorization: str | None
) -> None:
    headers = {"Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
    (await guarded.post(guarded.notification(), headers, path=f"/notify{query}")).accepted()


@pytest.mark.parametrize(
    ("query", "authorization"),
    [
        ("", None),
        ("?token=", None),
        ("?token=wrong", None),
        (f"?token={TOKEN}x", None),
        (f"?token={TOKEN[:-1]}", None),
        (f"?token={TOKEN.upper()}", None),
        (f"?Token={TOKEN}", None),
        ("?token=%FF%00", None),
        ("?token=令牌", None),
        ("", "Bearer"),
        ("", "Bearer wrong"),
        ("", f"Bearer {TOKEN} {TOKEN}"),
        ("", f"Bearer{TOKEN}"),
        ("", f"Basic {TOKEN}"),
        ("", TOKEN),
        ("", "Bearer 令牌"),
        (f"?token={TOKEN}", "Bearer wrong"),
    ],
)
async def test_without_the_token_everything_is_refused_and_nothing_kept(
    guarded: AppServer, query: str, authorization: str | None
) -> None:
    before = guarded.counts()
    headers = {"Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
    answers = [
        await guarded.post(body, headers, path=f"/notify{query}") for body in (guarded.notification(), b"not JSON", b"")
    ]
    answers.append(await guarded.post(b"<xml/>", {**headers, "Content-Type": "text/xml"}, path=f"/notify{query}"))
    for answer in answers:
        answer.refusal(401, "401001")
        assert without_id(answer) == without_id(answers[0])
    assert guarded.counts() == before


async def test_a_token_does_not_replace_a_signature(start: Start, signer: Signer, signed: dict[str, Any]) -> None:
    daemon = await start(auth={**signed, "callback_token": TOKEN})
    path = f"/notify?token={TOKEN}"
    (await daemon.post(daemon.notification(), path=path)).refusal(401, "401001")
    (await daemon.post(signer.seal(daemon.notification()))).refusal(401, "401001")
    (await daemon.post(signer.seal(daemon.notification()), path=path)).accepted()


# Networks and proxies


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxied(start_shared: Start) -> AppServer:
    return await start_shared(server={"trusted_proxies": ["127.0.0.0/8", "10.0.0.0/8"]})


async def test_a_caller_from_elsewhere_is_refused_and_nothing_kept(start: Start) -> None:
    daemon = await start(auth={"callback_networks": ["192.0.2.0/24", "2001:db8::/32"]})
    for body in (daemon.notification(), b"not JSON"):
        (await daemon.post(body)).refusal(403, "401002")
    # A header is no proof where no proxy is trusted.
    forwarded = {"Content-Type": "application/json", "X-Forwarded-For": "192.0.2.7"}
    (await daemon.post(daemon.notification(), forwarded)).refusal(403, "401002")
    assert daemon.counts() == (0, 0)


async def test_a_caller_from_an_allowed_network_is_accepted(start: Start) -> None:
    daemon = await start(auth={"callback_networks": ["192.0.2.0/24", "127.0.0.1"]})
    (await daemon.post(daemon.notification())).accepted()


async def test_behind_a_trusted_proxy_it_is_the_caller_whose_network_counts(start: Start) -> None:
    daemon = await start(server={"trusted_proxies": ["127.0.0.1"]}, auth={"callback_networks": ["192.0.2.0/24"]})
    for caller, status in (("192.0.2.7", 200), ("203.0.113.5, 192.0.2.7", 200), ("192.0.2.7, 203.0.113.5", 403)):
        headers = {"Content-Type": "application/json", "X-Forwarded-For": caller}
        assert (await daemon.post(daemon.notification(), headers)).status == status
    (await daemon.post(daemon.notification())).refusal(403, "401002")
    assert daemon.rows("SELECT remote_addr FROM notification") == [("192.0.2.7",)] * 2


async def test_an_untrusted_peer_cannot_name_another_caller(start: Start) -> None:
    daemon = await start(server={"trusted_proxies": ["10.0.0.0/8"]}, auth={"callback_networks": ["192.0.2.0/24"]})
    forwarded = {"Content-Type": "application/json", "X-Forwarded-For": "192.0.2.7"}
    (await daemon.post(daemon.notification(), forwarded)).refusal(403, "401002")
    assert daemon.counts() == (0, 0)


@pytest.mark.parametrize(
    ("lines", "caller"),
    [
        ([], "127.0.0.1"),
        (["192.0.2.7"], "192.0.2.7"),
        (["203.0.113.5, 192.0.2.7"], "192.0.2.7"),
        (["203.0.113.5", "192.0.2.7"], "192.0.2.7"),
        (["192.0.2.7, 10.0.0.1", " 10.0.0.2 ,127.0.0.9"], "192.0.2.7"),
        (["192.0.2.7, 203.0.113.5, 10.0.0.1"], "203.0.113.5"),
        (["192.0.2.7,203.0.113.5", "10.0.0.1"], "203.0.113.5"),
        (["10.0.0.1, 10.0.0.2"], "10.0.0.1"),
        (["[2001:db8::1]"], "2001:db8::1"),
        (["2001:DB8:0::1"], "2001:db8::1"),
        (["192.0.2.7, unknown, 10.0.0.1"], "10.0.0.1"),
        (["192.0.2.7, "], "127.0.0.1"),
        ([""], "127.0.0.1"),
        ([",,,"], "127.0.0.1"),
        (["192.0.2.7\t"], "192.0.2.7"),
        (["\x7f\xff garbage; for=1"], "127.0.0.1"),
        (["192.0.2.7:8080"], "192.0.2.7"),
    ],
)
async def test_behind_trusted_proxies_the_last_address_that_is_none_of_them_is_the_caller(
    proxied: AppServer, lines: list[str], caller: str
) -> None:
    connection = await proxied.connect()
    body = json.dumps(proxied.notification()).encode()
    fields = b"".join(b"X-Forwarded-For: " + line.encode("latin-1") + b"\r\n" for line in lines)
    head = b"POST /notify HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n" % len(body)
    await connection.send(head + fields + b"\r\n" + body)
    answer = await connection.answer()
    if b"\x7f" in fields:
        assert answer.status == 400  # Not HTTP: RFC 9110, 5.5.
    else:
        request_id = answer.accepted()
        assert proxied.rows("SELECT remote_addr FROM notification WHERE request_id = ?", request_id) == [(caller,)]
    await connection.close()


@pytest.mark.parametrize("zone", [b"\xff", b"\xff" * 1000, b"eth0", b"x" * 5000, b"<script>"])
async def test_an_address_with_a_zone_that_is_not_text_does_no_harm(proxied: AppServer, zone: bytes) -> None:
    connection = await proxied.connect()
    body = json.dumps(proxied.notification()).encode()
    head = b"POST /notify HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n" % len(body)
    for content in (body, b"!" * len(body)):
        await connection.send(head + b"X-Forwarded-For: fe80::1%" + zone + b"\r\n\r\n" + content)
        answer = await connection.answer()
        assert answer.status == (200 if content is body else 400)
    for table in ("notification", "rejection"):
        ((kept,),) = proxied.rows(f"SELECT remote_addr FROM {table} ORDER BY id DESC LIMIT 1")
        assert str(ip_address(kept)) == kept
        assert len(kept) <= 45


NETWORKS = [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32"), ip_network("192.0.2.1")]
PROXIES = st.one_of(
    st.ip_addresses(network="10.0.0.0/8"), st.ip_addresses(network="2001:db8::/32"), st.just(ip_address("192.0.2.1"))
).map(str)
STRANGERS = st.ip_addresses().filter(lambda address: not any(address in network for network in NETWORKS)).map(str)
LISTS = st.lists(st.one_of(PROXIES, STRANGERS), max_size=6)


def client_of(peer: str, lines: list[str], trusted: Sequence[IPNetwork], name: str = "X-Forwarded-For") -> str:
    return client_address(peer, CIMultiDictProxy(CIMultiDict((name, line) for line in lines)), trusted)


@pytest.mark.parametrize(
    ("name", "line", "caller"),
    [
        ("X-Forwarded-For", "203.0.113.9:51008", "203.0.113.9"),
        ("X-Forwarded-For", "[2001:db8::9]:51008", "2001:db8::9"),
        ("X-Forwarded-For", "[2001:db8::9]", "2001:db8::9"),
        ("X-Forwarded-For", "2001:db8::9", "2001:db8::9"),
        ("X-Forwarded-For", "198.51.100.1:1, 203.0.113.9:51008, 10.0.0.2:80", "203.0.113.9"),
        ("Forwarded", "for=203.0.113.9", "203.0.113.9"),
        ("Forwarded", 'for="203.0.113.9:51008";proto=https;by=10.0.0.1', "203.0.113.9"),
        ("Forwarded", 'by=10.0.0.1; For="[2001:db8::9]:51008"', "2001:db8::9"),
        ("Forwarded", "for=198.51.100.1, for=203.0.113.9, for=10.0.0.2", "203.0.113.9"),
        ("Forwarded", 'for="2001:db8::9', "unknown"),
        ("Forwarded", "for=unknown", "10.0.0.1"),
        ("Forwarded", "for=_hidden", "10.0.0.1"),
        ("Forwarded", "proto=https", "10.0.0.1"),
    ],
)
def test_caller_behind_a_proxy_is_found_in_every_spelling(name: str, line: str, caller: str) -> None:
    assert client_of("10.0.0.1", [line], NETWORKS, name) == caller


@pytest.mark.parametrize(
    ("listed", "forwarded", "caller"),
    [
        ("203.0.113.9", "for=203.0.113.9", "203.0.113.9"),
        ("203.0.113.9:51008", 'for="203.0.113.9:4711"', "203.0.113.9"),
        ("203.0.113.9", "for=198.51.100.1", "unknown"),
        ("198.51.100.1", "for=203.0.113.9, for=10.0.0.2", "unknown"),
    ],
)
def test_two_headers_that_disagree_give_no_caller(listed: str, forwarded: str, caller: str) -> None:
    # A proxy writes one of them, and passes the other on as the caller sent it.
    headers = CIMultiDict([("X-Forwarded-For", listed), ("Forwarded", forwarded)])
    assert client_address("10.0.0.1", headers, NETWORKS) == caller


def is_proxy(text: str) -> bool:
    return within(text, NETWORKS)


@given(peer=STRANGERS, lines=st.lists(st.text(max_size=60)))
def test_an_untrusted_peer_is_the_caller_whatever_it_says(peer: str, lines: list[str]) -> None:
    if not is_proxy(peer):
        assert client_of(peer, lines, NETWORKS) == peer
    assert client_of(peer, lines, ()) == peer


@given(peer=PROXIES, hops=LISTS)
def test_the_caller_is_the_last_stranger_or_else_the_first_proxy(peer: str, hops: list[str]) -> None:
    strangers = [hop for hop in hops if not is_proxy(hop)]
    expected = strangers[-1] if strangers else (hops or [peer])[0]
    assert client_of(peer, [",".join(hops)] if hops else [], NETWORKS) == expected


@given(peer=PROXIES, hops=LISTS, cuts=st.lists(st.booleans(), min_size=6, max_size=6))
def test_how_the_header_is_cut_into_lines_changes_nothing(peer: str, hops: list[str], cuts: list[bool]) -> None:
    lines: list[str] = []
    for hop, cut in zip(hops, cuts, strict=False):
        if lines and not cut:
            lines[-1] += f" , {hop}"
        else:
            lines.append(hop)
    assert client_of(peer, lines, NETWORKS) == client_of(peer, hops, NETWORKS)


@given(peer=PROXIES, claims=st.text(max_size=60), caller=STRANGERS, hops=st.lists(PROXIES, max_size=4))
def test_what_the_caller_claims_changes_nothing(peer: str, claims: str, caller: str, hops: list[str]) -> None:
    if not is_proxy(caller):
        assert client_of(peer, [claims, caller, *hops], NETWORKS) == caller


@given(peer=PROXIES, lines=st.lists(st.text(alphabet=st.characters(), max_size=60), max_size=5))
@example("10.0.0.1", ["fe80::1%\udcff"])
@example("10.0.0.1", ["fe80::1%" + "x" * 5000])
@example("10.0.0.1", ["fe80::1%\x1b[31m"])
@example("10.0.0.1", ["[[10.0.0.2]]"])
@example("10.0.0.1", ["\u0661.1.1.1", "\uff11.1.1.1"])
def test_garbage_never_becomes_an_address(peer: str, lines: list[str]) -> None:
    caller = client_of(peer, lines, NETWORKS)
    assert isinstance(ip_address(caller), IPv4Address | IPv6Address)
    assert caller.isascii()
    assert caller.isprintable()
    assert len(caller) <= 45


@given(address=st.ip_addresses(v=4))
def test_an_ipv4_address_is_in_its_networks_however_it_is_mapped(address: IPv4Address) -> None:
    network = ip_network((address, 24), strict=False)
    elsewhere = ip_network((int(address) ^ 1 << 31, 24), strict=False)
    mapped = IPv6Address(0xFFFF_0000_0000 | int(address))
    for text in (str(address), str(mapped), f"::ffff:{address}"):
        assert within(text, [network])
        assert within(text, [elsewhere, network])
        assert not within(text, [elsewhere])
        assert not within(text, [])
    assert within(str(mapped), [ip_network("::ffff:0:0/96")])
    assert not within(str(address), [ip_network("::/0")])


@given(address=st.ip_addresses(v=6))
def test_an_ipv6_address_is_in_its_networks_whatever_its_zone(address: IPv6Address) -> None:
    network = ip_network((address, 64), strict=False)
    elsewhere = ip_network((int(address) ^ 1 << 127, 64), strict=False)
    for text in (str(address), address.exploded, f"{address}%eth0"):
        assert within(text, [network])
        assert not within(text, [elsewhere])


@given(text=st.text(max_size=30))
@example("")
@example("%")
@example("127.1")
@example("0177.0.0.1")
@example("127.0.0.1 ")
@example("127.0.0.1/8")
@example("/tmp/socket")
def test_an_invalid_address_is_in_no_network(text: str) -> None:
    try:
        ip_address(text.partition("%")[0])
    except ValueError:
        assert not within(text, [ip_network("0.0.0.0/0"), ip_network("::/0")])


@pytest.mark.parametrize("token", ["abc+def/ghi==", "with%2Bescapes", "plain-token-0123"])
async def test_token_is_taken_as_it_stands_in_the_address(start: Start, token: str) -> None:
    daemon = await start(auth={"callback_token": token})
    body = json.dumps(daemon.notification()).encode()
    for path, accepted in ((f"/notify?token={token}", True), (f"/notify?token={token}x", False)):
        connection = await daemon.connect()
        head = f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n"
        await connection.send(head.encode() + body)
        answer = await connection.answer()
        assert answer.status == (200 if accepted else 401), answer
