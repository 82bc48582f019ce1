"""A notification is acked once it is durable; whatever else comes to the callback path is refused, and says why."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.app import AppServer, Start
    from tests.web.conftest import Locked

TRAILING = b'{"batch_id": "b", "api_code": "c", "file_list": []} {}'


# The ack


async def test_the_published_sample_is_acked_and_then_in_the_inbox(daemon: AppServer, sample: bytes) -> None:
    request_id = (await daemon.post(sample)).accepted()
    # Read at once: nothing else has had a turn since the answer was seen.
    ((batch_id, api_code, body, remote_addr, signature, kept_id, files),) = daemon.rows(
        "SELECT batch_id, api_code, body, remote_addr, signature, request_id, files FROM notification"
        " WHERE request_id = ?",
        request_id,
    )
    assert batch_id == "b452c50b50614fd697aa6c2b75563de0.80.16408499070570077"
    assert api_code == "rent.dcentralize.room.add"
    assert body.encode() == sample
    assert (remote_addr, signature, kept_id, files) == ("127.0.0.1", "none", request_id, 7)
    verdict = await daemon.settled(batch_id)
    assert verdict["files"] == 7


async def test_no_ack_is_given_before_the_commit(start: Start, locked: Locked) -> None:
    daemon = await start()
    with locked(daemon):
        asked = asyncio.create_task(daemon.post(daemon.notification()))
        done, _ = await asyncio.wait([asked], timeout=0.3)
        assert not done
        assert daemon.count("notification") == 0
    (await asked).accepted()
    assert daemon.count("notification") == 1


async def test_the_default_ack_is_json_in_the_platforms_convention(daemon: AppServer) -> None:
    answer = await daemon.post(daemon.notification())
    request_id = answer.accepted()
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.body == f'{{"request_id":"{request_id}","code":"000","msg":"成功","data":null}}'.encode()


async def test_a_configured_ack_has_the_request_id_wherever_its_placeholder_stands(start: Start) -> None:
    body = "{request_id}<ok id='{request_id}' data='{}'>{{request_id}} 成功</ok>{request_id}"
    daemon = await start(ack={"status": 202, "content_type": "text/xml; charset=utf-8", "body": body})
    answer = await daemon.post(daemon.notification())
    assert answer.status == 202
    assert answer.headers["Content-Type"] == "text/xml; charset=utf-8"
    ((request_id,),) = daemon.rows("SELECT request_id FROM notification")
    assert (
        answer.body.decode() == f"{request_id}<ok id='{request_id}' data='{{}}'>{{{request_id}}} 成功</ok>{request_id}"
    )


@pytest.mark.parametrize("body", ["", "OK"])
async def test_an_ack_need_not_name_the_request(start: Start, body: str) -> None:
    daemon = await start(ack={"content_type": "text/plain", "body": body})
    for _ in range(2):
        answer = await daemon.post(daemon.notification())
        assert (answer.status, answer.body) == (200, body.encode())


async def test_an_identical_delivery_is_acked_alike_and_counted_in_one_batch(daemon: AppServer) -> None:
    body = json.dumps(daemon.notification()).encode()
    batch_id = json.loads(body)["batch_id"]
    first = (await daemon.post(body)).accepted()
    verdict = await daemon.settled(batch_id)
    since = len(daemon.events.all)
    second = (await daemon.post(body)).accepted()
    assert first != second
    # The inbox is expanded in order: what comes after is settled later.
    await daemon.serves()
    query = "SELECT deliveries, files, completed_at - first_received_at FROM batch WHERE batch_id = ?"
    assert daemon.rows(query, batch_id) == [(2, 1, round(verdict["seconds"] * 1000))]
    assert daemon.rows("SELECT count(*) FROM notification WHERE batch_id = ?", batch_id) == [(2,)]
    assert daemon.events.find("verdict", since, batch_id=batch_id) is None


# Accepted notifications


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_id": "b" * 80},
        {"batch_id": "批" * 80},
        {"batch_id": "\U0001f600" * 80},
        {"batch_id": "\n\x1b[31m\x9b\u2028'\""},
        {"api_code": "c" * 50},
        {"file_list": []},
        {"file_list": [{"oss_object_name": "k" * 1024, "status": "FAILED"}]},
        {"file_list": [{"oss_object_name": "k", "status": "FAILED", "target_url": ""}]},
        {"file_list": [{"oss_object_name": "k", "status": "FAILED", "target_url": None}]},
        {"file_list": [{"oss_object_name": "k", "status": "FAILED", "target_url": "not an address"}]},
        {"file_list": [{"oss_object_name": "k", "status": "FINISHED", "target_url": "http://h/" + "u" * 291}]},
        {"file_list": [{"oss_object_name": "k", "status": "FINISHED", "target_url": "HTTPS://[::1"}]},
        {"unknown": {"deep": [1, {"er": None}]}, "Batch_id": "another"},
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
async def test_what_the_contract_allows_is_accepted_and_settled(daemon: AppServer, changes: dict[str, Any]) -> None:
    body = daemon.notification(**changes)
    (await daemon.post(body)).accepted()
    await daemon.settled(body["batch_id"])


async def test_ten_thousand_files_are_accepted_and_one_more_is_refused(daemon: AppServer) -> None:
    entries = [daemon.entry() for _ in range(10_001)]
    body = daemon.notification(*entries[1:])
    (await daemon.post(body)).accepted()
    assert (await daemon.settled(body["batch_id"]))["files"] == 10_000
    message = (await daemon.post(daemon.notification(*entries))).refusal(400, "400")
    assert message.startswith("file_list: ")


async def test_the_number_of_files_allowed_is_configured(start: Start) -> None:
    daemon = await start(contract={"max_files": 2})
    (await daemon.post(daemon.notification(daemon.entry(), daemon.entry()))).accepted()
    body = daemon.notification(daemon.entry(), daemon.entry(), daemon.entry())
    assert (await daemon.post(body)).refusal(400, "400").startswith("file_list: ")


@pytest.mark.parametrize(
    "raw",
    [
        b'"unknown": 1e400',
        b'"unknown": ' + b"9" * 5000,
        b'"unknown": 9223372036854775808',
        b'"unknown": -1e-9999',
        b'"unknown": "\\u0000"',
        b'"unknown": "\\ud800"',
        b'"\\ud800": 1',
        b'"\\u0000": 1',
        b'"": {"": {"": []}}',
        b'"unknown": ' + b"[" * 900 + b"]" * 900,
        b'"a": 1, "a": 2, "\\u0061": 3',
    ],
    ids=lambda raw: raw.decode()[:30],
)
async def test_an_odd_unknown_field_does_no_harm(daemon: AppServer, raw: bytes) -> None:
    for at_the_top in (True, False):
        body = daemon.notification()
        text = json.dumps(body).encode()
        text = b"{" + raw + b", " + text[1:] if at_the_top else text.replace(b'"status"', raw + b', "status"')
        answer = await daemon.post(text)
        if answer.status == 200:
            await daemon.settled(body["batch_id"])
        else:
            answer.refusal(400, "400")
    await daemon.serves()


# What the contract refuses


async def refused(daemon: AppServer, body: bytes, field: str) -> str:
    """Post a body that breaks the contract; check all that comes of it; return the message about the field."""
    notifications, rejections = daemon.counts()
    message = (await daemon.post(body)).refusal(400, "400")
    named, colon, problem = message.partition(": ")
    assert (named, colon) == (field, ": "), message
    assert problem
    kept = daemon.rows("SELECT code, detail, remote_addr, body FROM rejection ORDER BY id DESC LIMIT 1")
    assert kept == [("400", message, "127.0.0.1", body)]
    assert daemon.counts() == (notifications, rejections + 1)
    return problem


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("batch_id", {"batch_id": ...}),
        ("batch_id", {"batch_id": None}),
        ("batch_id", {"batch_id": ""}),
        ("batch_id", {"batch_id": 1}),
        ("batch_id", {"batch_id": ["b"]}),
        ("batch_id", {"batch_id": {"b": 1}}),
        ("batch_id", {"batch_id": True}),
        ("batch_id", {"batch_id": 2**63}),
        ("batch_id", {"batch_id": 10**4000}),
        ("batch_id", {"batch_id": "b" * 81}),
        ("batch_id", {"batch_id": "批" * 81}),
        ("batch_id", {"batch_id": "b\0"}),
        ("api_code", {"api_code": ...}),
        ("api_code", {"api_code": None}),
        ("api_code", {"api_code": ""}),
        ("api_code", {"api_code": 1.5}),
        ("api_code", {"api_code": "c" * 51}),
        ("api_code", {"api_code": "\0"}),
        ("file_list", {"file_list": ...}),
        ("file_list", {"file_list": None}),
        ("file_list", {"file_list": {}}),
        ("file_list", {"file_list": "[]"}),
        ("file_list", {"file_list": 7}),
        ("file_list[0]", {"file_list": [None]}),
        ("file_list[0]", {"file_list": ["key"]}),
        ("file_list[0]", {"file_list": [[]]}),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value, default=str)[:40],
)
async def test_a_field_that_breaks_the_contract_is_named_and_the_body_kept(
    daemon: AppServer, field: str, changes: dict[str, Any]
) -> None:
    await refused(daemon, json.dumps(daemon.notification(**changes)).encode(), field)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("oss_object_name", {"oss_object_name": ...}),
        ("oss_object_name", {"oss_object_name": None}),
        ("oss_object_name", {"oss_object_name": ""}),
        ("oss_object_name", {"oss_object_name": 1}),
        ("oss_object_name", {"oss_object_name": "k" * 1025}),
        ("oss_object_name", {"oss_object_name": "a\0b"}),
        ("oss_object_name", {"oss_object_name": "", "status": "FAILED"}),
        ("status", {"status": ...}),
        ("status", {"status": None}),
        ("status", {"status": ""}),
        ("status", {"status": "finished"}),
        ("status", {"status": "DONE"}),
        ("status", {"status": 0}),
        ("target_url", {"target_url": ...}),
        ("target_url", {"target_url": None}),
        ("target_url", {"target_url": ""}),
        ("target_url", {"target_url": 1}),
        ("target_url", {"target_url": ["http://h/"]}),
        ("target_url", {"target_url": "http://h/" + "u" * 292}),
        ("target_url", {"target_url": "http://h/" + "u" * 292, "status": "FAILED"}),
        ("target_url", {"target_url": "http://h/" + "u" * 2**20}),
        ("target_url", {"target_url": "http://h/\0"}),
        ("target_url", {"target_url": "/relative"}),
        ("target_url", {"target_url": "//h/"}),
        ("target_url", {"target_url": "ftp://h/"}),
        ("target_url", {"target_url": "javascript:alert(1)"}),
        ("target_url", {"target_url": "http://"}),
        ("target_url", {"target_url": "http:///path"}),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value, default=str)[:40],
)
async def test_an_entry_that_breaks_the_contract_is_named_by_its_place(
    daemon: AppServer, field: str, changes: dict[str, Any]
) -> None:
    entries = [daemon.entry(), daemon.entry(), daemon.entry(), daemon.entry(**changes), daemon.entry(status="DONE")]
    if field != "status":
        entries.pop()
    await refused(daemon, json.dumps(daemon.notification(*entries)).encode(), f"file_list[3].{field}")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "empty"),
        (b" \r\n\t", "empty"),
        (b"not JSON", "not valid JSON"),
        (b"batch_id=b&api_code=c", "not valid JSON"),
        (b"[]", "must be a JSON object, not an array"),
        (b'"text"', "must be a JSON object, not a string"),
        (b"null", "must be a JSON object, not null"),
        (b"42", "must be a JSON object, not a number"),
        (b"true", "must be a JSON object, not a boolean"),
        (b'{"batch_id": "b", "api_code": "c", "file_list": [', "not valid JSON"),
        (TRAILING, "not valid JSON"),
        (TRAILING[:-3].replace(b'"b"', b"NaN"), "not valid JSON"),
        (TRAILING[:-3].replace(b'"b"', b"Infinity"), "not valid JSON"),
        (TRAILING[:-3].replace(b'"b"', b'"\\ud800"'), "not valid JSON"),
        (TRAILING[:-3].replace(b'"b"', b'"\n"'), "not valid JSON"),
        (TRAILING[:-3].replace(b'"b"', b"'b'"), "not valid JSON"),
        (TRAILING[:-3].replace(b'"b"', b'"\xe9"'), "not UTF-8"),
        (TRAILING[:-3].replace(b'"b"', b'"b", "unknown": "\xe9"'), "not UTF-8"),
        (TRAILING[:-3].replace(b'"b"', b'"\xed\xa0\x80"'), "not UTF-8"),
        (TRAILING[:-3].decode().encode("utf-16"), "not UTF-8"),
        (TRAILING[:-3].decode().encode("utf-16-le"), "not valid JSON"),
        (TRAILING[:-3].decode().encode("utf-32-be"), "not valid JSON"),
        (gzip.compress(TRAILING[:-3], mtime=0), "not UTF-8"),
        (b"[" * 100_000, "must be a JSON object, not an array"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"unknown": ' + b"[" * 2000 + b"]" * 2000 + b"," + TRAILING[1:-3], "nested too deeply"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_body_that_is_no_notification_is_refused_as_a_whole_and_kept(
    daemon: AppServer, body: bytes, problem: str
) -> None:
    assert (await refused(daemon, body, "body")).startswith(problem)


async def test_a_number_too_large_for_any_machine_is_named_by_its_field(daemon: AppServer) -> None:
    await refused(daemon, TRAILING[:-3].replace(b'"b"', b"1e400"), "batch_id")
    await refused(daemon, TRAILING[:-3].replace(b'"b"', b"-" + b"9" * 5000), "batch_id")


async def test_the_refusal_repeats_nothing_of_what_was_sent(daemon: AppServer) -> None:
    entry = daemon.entry(status="PASSWORD", target_url="PASSWORD", oss_object_name="PASSWORD" * 200)
    for changes in ({}, {"batch_id": "PASSWORD" * 20}, {"api_code": {"PASSWORD": 1}}):
        answer = await daemon.post(daemon.notification(entry, **changes))
        assert "PASSWORD" not in answer.refusal(400, "400")


async def test_mutilated_bodies_are_accepted_or_refused_and_never_fail(daemon: AppServer, sample: bytes) -> None:
    chance = random.Random(20240229)
    for _ in range(200):
        body = bytearray(sample)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(body))
            match chance.randrange(4):
                case 0:
                    body[at] = chance.randrange(256)
                case 1:
                    del body[at : at + chance.randint(1, 30)]
                case 2:
                    body[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 8)))
                case _:
                    body[at:at] = chance.choice([b'"', b"\\", b"{", b"]", b"null", b"\\u0000", b"\\ud800", b"\x00"])
        notifications, rejections = daemon.counts()
        answer = await daemon.post(bytes(body))
        if answer.status == 200:
            answer.accepted()
            assert daemon.counts() == (notifications + 1, rejections)
        else:
            answer.refusal(400, "400")
            assert daemon.counts() == (notifications, rejections + 1)
    await daemon.serves()


# How it is sent


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "PROPFIND"])
async def test_any_other_method_is_refused_with_the_allowed_ones(daemon: AppServer, method: str) -> None:
    before = daemon.counts()
    answer = await daemon.ask(method, "/notify", json=daemon.notification())
    assert answer.headers["Allow"] == "POST"
    if method == "HEAD":
        assert (answer.status, answer.body) == (405, b"")
    else:
        answer.refusal(405, "405")
    assert daemon.counts() == before


async def not_found(daemon: AppServer) -> int:
    """Return how many POSTs were to paths that are not served."""
    text = (await daemon.get("/metrics")).body.decode()
    found = re.search(r'^notify_server_callbacks_total\{code="404"\} (\d+)', text, re.MULTILINE)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("path", ["/notify/x", "/Notify", "/notif", "/x/notify", "/api/v1", "/%00"])
async def test_post_to_another_path_is_refused_logged_and_counted(daemon: AppServer, path: str) -> None:
    before, since = daemon.counts(), len(daemon.events.all)
    counted = await not_found(daemon)
    (await daemon.ask("POST", path, json=daemon.notification())).refusal(404, "404")
    assert daemon.counts() == before
    assert await not_found(daemon) == counted + 1
    (event,) = [each for each in daemon.events.all[since:] if each["event"].startswith("a POST to a path")]
    assert event["callback_path"] == "/notify"


@pytest.mark.parametrize("path", ["/notify/", "/notify/x", "/Notify", "/api/v1"])
async def test_get_of_another_path_is_refused(daemon: AppServer, path: str) -> None:
    (await daemon.ask("GET", path)).refusal(404, "404")


@pytest.mark.parametrize("path", ["/notify/", "//notify", "//notify//?token=", "/notify/?a=b"])
async def test_callback_registered_with_a_slash_more_is_taken(daemon: AppServer, path: str) -> None:
    connection = await daemon.connect()
    body = json.dumps(daemon.notification()).encode()
    for _ in range(2):
        await connection.send(b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)))
        await connection.send(body)
        (await connection.answer()).accepted()


async def test_callback_registered_with_a_slash_less_is_taken(start: Start) -> None:
    daemon = await start(server={"callback_path": "/hooks/files/"})
    (await daemon.post(daemon.notification(), path="/hooks/files")).accepted()


async def test_the_callback_path_is_configured(start: Start) -> None:
    daemon = await start(server={"callback_path": "/hooks/files+1"})
    (await daemon.post(daemon.notification(), path="/hooks/files+1?any=thing")).accepted()
    (await daemon.post(daemon.notification())).refusal(404, "404")


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json;charset=UTF-8",
        'Application/JSON ; Charset="utf-8"; version=1',
        "application/json; charset=utf8",
        "application/vnd.platform+json",
        "text/json",
        None,
    ],
)
async def test_json_in_utf_8_is_accepted_however_its_type_is_written(
    daemon: AppServer, content_type: str | None
) -> None:
    body = json.dumps(daemon.notification()).encode()
    if content_type is None:
        answer = await daemon.post(body, {}, skip_auto_headers=["Content-Type"])
    else:
        answer = await daemon.post(body, {"Content-Type": content_type})
    answer.accepted()


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "text/plain; charset=utf-8",
        "application/xml",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/octet-stream",
        "application/json; charset=ISO-8859-1",
        "application/json;charset=gbk",
        "application/json; charset=utf-8; charset=gbk",
        "image/svg+json",
        "json",
        "\xff",
    ],
)
async def test_notification_is_accepted_whatever_its_type_says(daemon: AppServer, content_type: str) -> None:
    (await daemon.post(daemon.notification(), {"Content-Type": content_type})).accepted()


async def test_notification_is_utf_8_whatever_its_type_says(daemon: AppServer) -> None:
    body = json.dumps(daemon.notification()).encode("utf-16")
    headers = {"Content-Type": "application/json; charset=utf-16"}
    assert (await daemon.post(body, headers)).refusal(400, "400") == "body: not UTF-8"


async def test_byte_order_mark_before_a_notification_is_passed_over_and_kept(daemon: AppServer) -> None:
    notification = daemon.notification()
    body = b"\xef\xbb\xbf" + json.dumps(notification).encode()
    (await daemon.post(body)).accepted()
    assert daemon.rows("SELECT CAST(body AS BLOB) FROM notification ORDER BY id DESC LIMIT 1") == [(body,)]
    await daemon.settled(notification["batch_id"])


@pytest.mark.parametrize("coding", ["identity", "UTF-8", "utf8", "x", ""])
async def test_content_encoding_that_is_no_compression_is_passed_over(daemon: AppServer, coding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    (await daemon.post(daemon.notification(), headers)).accepted()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "x-gzip", "identity, GZIP"])
async def test_a_compressed_body_is_refused_and_kept(daemon: AppServer, encoding: str) -> None:
    notifications, rejections = daemon.counts()
    body = gzip.compress(json.dumps(daemon.notification()).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    assert (await daemon.post(body, headers)).refusal(415, "415").startswith("Content-Encoding: ")
    assert daemon.counts() == (notifications, rejections + 1)
    assert daemon.rows("SELECT body FROM rejection ORDER BY id DESC LIMIT 1") == [(body,)]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.test"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
async def test_web_page_of_another_site_cannot_make_a_browser_post(daemon: AppServer, headers: dict[str, str]) -> None:
    before = daemon.counts()
    answer = await daemon.post(daemon.notification(), {"Content-Type": "text/plain", **headers})
    answer.refusal(403, "401002")
    assert daemon.counts() == before


@pytest.mark.parametrize("digits", [19, 400, 5000])
async def test_content_length_of_many_digits_is_too_large(served: AppServer, digits: int) -> None:
    connection = await served.connect()
    await connection.send(b"POST /notify HTTP/1.1\r\nHost: h\r\nContent-Length: " + b"9" * digits + b"\r\n\r\n{}")
    answer = await connection.answer()
    assert 400 <= answer.status < 500, answer
    await served.serves()


async def in_chunks(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_the_largest_size_is_accepted_and_one_byte_more_is_not(start: Start, chunked: bool) -> None:
    daemon = await start(server={"body_limit_bytes": 100_000})
    body = daemon.notification()
    exact = json.dumps(body).encode().ljust(100_000)
    (await daemon.post(in_chunks(exact, 7777) if chunked else exact)).accepted()
    assert daemon.rows("SELECT length(body) FROM notification") == [(100_000,)]
    more = exact + b" "
    message = (await daemon.post(in_chunks(more, 7777) if chunked else more)).refusal(413, "413")
    assert "100000" in message
    assert daemon.counts() == (1, 1)
    assert daemon.rows("SELECT code, detail FROM rejection") == [("413", message)]
    (await daemon.post(body)).accepted()


async def test_a_chunked_body_arrives_whole(daemon: AppServer) -> None:
    body = json.dumps(daemon.notification(*(daemon.entry() for _ in range(50)))).encode()
    request_id = (await daemon.post(in_chunks(body, 100))).accepted()
    ((kept,),) = daemon.rows("SELECT body FROM notification WHERE request_id = ?", request_id)
    assert kept.encode() == body


def raw_request(body: bytes, *fields: bytes, host: bytes = b"Host: h\r\n") -> bytes:
    head = b"POST /notify HTTP/1.1\r\n" + host + b"Content-Type: application/json\r\n"
    return head + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body


GOOD = TRAILING[:-3]
LENGTH = b"Content-Length: %d" % len(GOOD)
CHUNKED = b"Transfer-Encoding: chunked"


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(raw_request(GOOD, LENGTH, CHUNKED), id="length and chunked"),
        pytest.param(raw_request(GOOD, LENGTH, b"Content-Length: 5"), id="two lengths"),
        pytest.param(raw_request(GOOD, b"Content-Length: -1"), id="negative length"),
        pytest.param(raw_request(GOOD, b"Content-Length: +5"), id="signed length"),
        pytest.param(raw_request(GOOD, b"Content-Length: 99999999999999999999999"), id="overflowing length"),
        pytest.param(raw_request(GOOD, LENGTH, *(b"X-%d: x" % n for n in range(200))), id="200 headers"),
        pytest.param(raw_request(GOOD, LENGTH, b"X: " + b"x" * 9000), id="9 kB header"),
        pytest.param(raw_request(GOOD, LENGTH, b"X: a\0b"), id="NUL in a header"),
        pytest.param(raw_request(GOOD, LENGTH, b"X : a"), id="space before the colon"),
        pytest.param(raw_request(b"zz\r\n", CHUNKED), id="bad chunk size"),
        pytest.param(raw_request(b"5\r\nabcdefgh\r\n0\r\n\r\n", CHUNKED), id="chunk longer than it says"),
        pytest.param(raw_request(b"-5\r\nabcde\r\n0\r\n\r\n", CHUNKED), id="negative chunk"),
        pytest.param(raw_request(b"", b"Transfer-Encoding: chunked, gzip"), id="unknown transfer coding"),
        pytest.param(b"POST  /notify HTTP/1.1\r\n\r\n", id="two spaces"),
        pytest.param(b"POST /notify HTTP/3.7\r\nHost: h\r\n\r\n", id="unknown version"),
        pytest.param(b"NONSENSE /notify HTTP/1.1\r\nHost: h\r\n\r\n", id="unknown method"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500) + b"\r\n\r\n", id="TLS"),
        pytest.param(b"\r\n\r\n\0\xff\xfe garbage \r\n\r\n", id="garbage"),
    ],
)
async def test_bytes_that_are_not_http_are_refused_and_the_next_caller_served(
    served: AppServer, request_bytes: bytes
) -> None:
    before = served.count("notification")
    connection = await served.connect()
    await connection.send(request_bytes)
    answer = await connection.answer()
    assert 400 <= answer.status < 500, answer
    assert await connection.rest() == b""
    assert served.count("notification") == before
    await served.serves()


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(raw_request(GOOD, LENGTH, host=b""), id="no host"),
        pytest.param(raw_request(GOOD, LENGTH, b"Host: another"), id="two hosts"),
        pytest.param(raw_request(GOOD, LENGTH, host=b"Host: \xff\x80:99999\r\n"), id="host that is none"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"/json", b"/json\xff"), id="type that is not text"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"/json", b"/json; charset=\xe9"), id="charset not text"),
        pytest.param(raw_request(GOOD, LENGTH, b"Authorization: Bearer \xff"), id="authorization not text"),
        pytest.param(raw_request(GOOD, LENGTH, b"X-Forwarded-For: \xff, ,,;"), id="forwarded for not text"),
        pytest.param(raw_request(GOOD, LENGTH, b"X: \xff\x80"), id="any header not text"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"/notify", b"/notify?token=%ff&%"), id="odd query"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"/notify", b"/notify?\xff\xfe"), id="query not text"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"/notify", b"/\xff\xfe"), id="path not text"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"/notify", b"/%ff%00"), id="path of odd escapes"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"/notify", b"http://h/notify"), id="absolute address"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"/notify", b"http://h:99999/notify"), id="absurd port"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"/notify", b"//notify"), id="double slash"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"/notify", b"*"), id="asterisk"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"/notify", b"notify"), id="no slash"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"/notify", b"/" + b"n" * 9000), id="9 kB path"),
        pytest.param(raw_request(GOOD, LENGTH, b"Connection: Upgrade", b"Upgrade: websocket"), id="upgrade"),
        pytest.param(raw_request(GOOD, LENGTH, b"Connection: Upgrade", b"Upgrade: h2c"), id="upgrade to HTTP/2"),
        pytest.param(raw_request(GOOD, LENGTH, b"Expect: the impossible"), id="unknown expectation"),
        pytest.param(raw_request(GOOD, LENGTH, b"Content-Encoding: \xff"), id="encoding not text"),
        pytest.param(raw_request(b"", b"X: no length"), id="no body"),
        pytest.param(raw_request(GOOD, LENGTH).replace(b"POST", b"CONNECT"), id="CONNECT"),
    ],
)
async def test_an_odd_request_never_fails_and_the_next_caller_is_served(
    served: AppServer, request_bytes: bytes
) -> None:
    connection = await served.connect()
    await connection.send(request_bytes)
    answer = await connection.answer()
    assert 200 <= answer.status < 500, answer
    await served.serves()


async def test_refusals_leave_the_connection_in_step(served: AppServer) -> None:
    connection = await served.connect()
    bad = b"[1, 2, 3]"
    await connection.send(raw_request(bad, b"Content-Length: %d" % len(bad)))
    (await connection.answer()).refusal(400, "400")
    await connection.send(b"GET /notify HTTP/1.1\r\nHost: h\r\n\r\n")
    (await connection.answer()).refusal(405, "405")
    await connection.send(b"HEAD /notify HTTP/1.1\r\nHost: h\r\n\r\n")
    assert (await connection.answer(bodiless=True)).status == 405
    await connection.send(raw_request(GOOD, LENGTH, b"Content-Encoding: gzip"))
    (await connection.answer()).refusal(415, "415")
    await connection.send(raw_request(GOOD, LENGTH) * 2)
    first, second = await connection.answer(), await connection.answer()
    assert first.accepted() != second.accepted()


async def test_a_client_that_waits_for_leave_to_send_is_given_it(served: AppServer) -> None:
    connection = await served.connect()
    await connection.send(raw_request(b"", LENGTH, b"Expect: 100-continue"))
    assert (await connection.answer()).status == 100
    await connection.send(GOOD)
    (await connection.answer()).accepted()


async def test_a_bad_chunk_after_good_ones_is_the_callers_fault(start_server: Start) -> None:
    daemon = await start_server(server={"body_timeout": 0.2})
    for bad in (b"zz\r\n", b"-1\r\n", b"3\r\nabcdef\r\n", b"\r\n", b"1" * 40 + b"\r\n"):
        connection = await daemon.connect()
        await connection.send(raw_request(b"5\r\n" + GOOD[:5] + b"\r\n", CHUNKED))
        # Told by an answer on another connection that the server has seen it by now.
        assert (await daemon.get("/healthz")).status == 200
        await connection.send(bad)
        assert (await connection.answer()).status in (400, 408)
        assert not (await connection.rest()).startswith((b"HTTP/1.1 2", b"HTTP/1.1 5"))
    await daemon.serves()
    assert daemon.count("notification") == 1


async def test_half_a_body_is_not_accepted(served: AppServer) -> None:
    before = served.count("notification")
    since = len(served.events.all)
    for request in (raw_request(GOOD[:-5], LENGTH), raw_request(b"5\r\n" + GOOD[:5], CHUNKED)):
        connection = await served.connect()
        await connection.send(request)
        connection.end()
        answer = await connection.rest()
        assert not answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 5"))
    # No news: callers go as they come.
    assert not [event for event in served.events.all[since:] if event["level"] in ("error", "critical")]
    await served.serves()
    assert served.count("notification") == before + 1


# When it cannot be taken


def waiting(daemon: AppServer, files: int) -> dict[str, Any]:
    """A notification of files that stay pending: nothing listens at their address."""
    return daemon.notification(*(daemon.entry(target_url=f"http://127.0.0.1:1/{n}") for n in range(files)))


async def test_a_backlog_at_its_limit_refuses_what_comes_next_and_writes_nothing(start: Start) -> None:
    verify = {"backlog_limit": 3, "allowed_networks": ["127.0.0.1"], "allowed_ports": [1]}
    daemon = await start(verify=verify, auth={"callback_token": "token-of-the-platform"})
    token = {"Authorization": "Bearer token-of-the-platform", "Content-Type": "application/json"}
    (await daemon.post(waiting(daemon, 2), token)).accepted()
    # Tried, and waiting for its next attempt: no less waiting than before.
    await eventually(lambda: daemon.count("attempt") == 2)
    (await daemon.post(waiting(daemon, 1), token)).accepted()
    before = daemon.counts()
    for body in (waiting(daemon, 1), b"not JSON", daemon.notification(file_list=[])):
        answer = await daemon.post(body, token)
        answer.refusal(503, "503")
        assert answer.headers["Retry-After"] == "5"
    (await daemon.post(waiting(daemon, 1))).refusal(401, "401001")
    assert daemon.counts() == before == (2, 0)


async def test_files_settled_at_once_do_not_count_as_backlog(start: Start) -> None:
    daemon = await start(verify={"backlog_limit": 1})
    for _ in range(3):
        await daemon.serves()


async def test_a_store_that_cannot_commit_refuses_until_it_can(
    start: Start, locked: Locked, impatient_store: None
) -> None:
    daemon = await start()
    body, bad = daemon.notification(), b"not JSON"
    with locked(daemon):
        for refused_body in (body, bad):
            answer = await daemon.post(refused_body)
            answer.refusal(503, "503")
            assert answer.headers["Retry-After"] == "5"
        answer = await daemon.post(bad, {"Content-Type": "text/plain"})
        answer.refusal(503, "503")
        assert answer.headers["Retry-After"] == "5"
    assert daemon.counts() == (0, 0)
    (await daemon.post(body)).accepted()
    (await daemon.post(bad)).refusal(400, "400")
    assert daemon.counts() == (1, 1)
    await daemon.settled(body["batch_id"])
