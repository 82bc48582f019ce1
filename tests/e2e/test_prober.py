"""The prober as a process, over real pipes, against origins that mean harm. Rows are those of the threat table.

Whatever an origin does, its request ends in time with a stable code, and the next request on the same prober is
answered. Sleeps are the hostile servers' own drips.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import resource
import signal
import socket
import ssl
import sys
import time
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import certifi
import pytest
import pytest_asyncio
import trustme

from notify_server.model import Evidence, Reason
from notify_server.processes.frames import FRAME_HEADER, frame
from notify_server.processes.prober_protocol import ProberConfig
from notify_server.verify.guard import Guard
from tests.support.prober import (
    AGENT,
    EMPTY,
    LOOPBACK,
    OK,
    PATIENCE,
    TIMEOUT,
    Behaviour,
    Origin,
    Prober,
    decode_ready,
    encode,
    mute,
    path_of,
    probing,
    read_head,
    serving,
    then_close,
    then_forever,
    then_half_close,
    then_hold,
    then_reset,
    well_behaved,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Of a busy machine, over and above what a request may take.
SLACK = 10.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[list[Prober]]:
    """The prober that the tests share, in a list so that another can take its place."""
    probers = [await Prober.start()]
    yield probers
    await probers[0].end()


@pytest_asyncio.fixture(loop_scope="module")
async def prober(shared: list[Prober]) -> Prober:
    """One prober for all: what an origin does to it must not be felt by the next."""
    assert shared[0].process.stdout is not None
    if shared[0].process.stdout.at_eof():
        shared[0] = await Prober.start()
    return shared[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def good() -> AsyncIterator[Origin]:
    async with serving(well_behaved) as origin:
        yield origin


async def suffer(prober: Prober, good: Origin, behave: Behaviour, method: str, timeout: float = TIMEOUT) -> Evidence:
    """What an origin's behaviour comes to: in time, and without harm to the next request."""
    async with serving(behave) as origin:
        begin = time.monotonic()
        evidence = await prober.ask(f"{origin.url}/x", method, timeout=timeout)
        assert time.monotonic() - begin < timeout + SLACK
        assert evidence.total_ms < (timeout + SLACK) * 1000
        assert (evidence.status is None) == (evidence.failure is not None)
        following = await prober.ask(f"{good.url}/next", timeout=PATIENCE)
        assert (following.status, following.etag) == (200, "/next")
        return evidence


# -- what a storage vendor says of an error ----------------------------------------------------------------------------

XML_ERROR = b"<Error><Code>NoSuchKey</Code>" + b"<Key>a</Key>" * 500 + b"</Error>"


@pytest.mark.parametrize(
    ("method", "head", "body", "code"),
    [
        ("GET", b"Content-Type: application/xml\r\n", XML_ERROR, "NoSuchKey"),
        ("GET", b"Content-Type: application/xml\r\n", b" " * 2048 + XML_ERROR, None),
        ("GET", b"Content-Type: text/html\r\n", XML_ERROR, None),
        ("HEAD", b"Content-Type: application/xml\r\n", b"", None),
    ],
)
async def test_the_code_of_an_error_is_read_from_the_beginning_of_an_xml_body(
    prober: Prober, good: Origin, method: str, head: bytes, body: bytes, code: str | None
) -> None:
    head += b"x-oss-request-id: 5F7C\r\nServer: AliyunOSS\r\nContent-Length: %d\r\n\r\n" % len(body)
    behave = then_hold(b"HTTP/1.1 404 Not Found\r\n" + head + body)
    evidence = await suffer(prober, good, behave, method, PATIENCE)
    assert (evidence.status, evidence.vendor_code, evidence.vendor_request_id) == (404, code, "5F7C")
    assert evidence.headers == {"server": "AliyunOSS"}


# -- rows 57-60, 62, 68: origins that never come to the point ----------------------------------------------------------

ATTACKS: dict[str, tuple[Behaviour, Reason]] = {
    "57 silence after connect": (mute, Reason.TIMEOUT),
    "57 silence within headers": (then_hold(OK, b"ETag: x\r\n"), Reason.TIMEOUT),
    "57 silence within a line": (then_hold(OK, b"Content-Le"), Reason.TIMEOUT),
    "57 silence after an interim response": (then_hold(b"HTTP/1.1 103 Hints\r\nETag: x\r\n\r\n"), Reason.TIMEOUT),
    "58 header drip": (then_forever(OK, b"A: b\r\n", every=0.02), Reason.TIMEOUT),
    "58 header drip, byte by byte": (then_forever(OK + b"A: ", b"b", every=0.02), Reason.TIMEOUT),
    "58 status line drip": (then_forever(b"HTTP/1.1 200 ", b"O", every=0.02), Reason.TIMEOUT),
    "59 endless 1xx": (then_forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100), Reason.PROTOCOL_ERROR),
    "59 endless 1xx, dripping": (then_forever(b"", b"HTTP/1.1 102 Wait\r\n\r\n", every=0.02), Reason.TIMEOUT),
    "60 header of 1 MB": (then_hold(OK, b"A: " + b"b" * 1_000_000 + b"\r\n\r\n"), Reason.PROTOCOL_ERROR),
    "60 header without end": (then_forever(OK + b"A: ", b"b" * 65536), Reason.PROTOCOL_ERROR),
    "60 status line without end": (then_forever(b"HTTP/1.1 200 ", b"b" * 65536), Reason.PROTOCOL_ERROR),
    "60 100,000 headers": (then_hold(OK, b"A: b\r\n" * 100_000, b"\r\n"), Reason.PROTOCOL_ERROR),
    "60 headers without end": (then_forever(OK, b"A: b\r\n" * 1000), Reason.PROTOCOL_ERROR),
    "62 status 0": (then_hold(b"HTTP/1.1 0 Zero\r\n", EMPTY), Reason.PROTOCOL_ERROR),
    "62 status 000": (then_hold(b"HTTP/1.1 000 Zero\r\n", EMPTY), Reason.PROTOCOL_ERROR),
    "62 status 99": (then_hold(b"HTTP/1.1 99 Low\r\n", EMPTY), Reason.PROTOCOL_ERROR),
    "62 status 101": (then_close(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), Reason.PROTOCOL_ERROR),
    "62 status 101, held": (then_hold(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), Reason.TIMEOUT),
    "62 status 199": (then_close(b"HTTP/1.1 199 Odd\r\n\r\n"), Reason.PROTOCOL_ERROR),
    "62 status 600": (then_hold(b"HTTP/1.1 600 High\r\n", EMPTY), Reason.PROTOCOL_ERROR),
    "62 status 999": (then_hold(b"HTTP/1.1 999 High\r\n", EMPTY), Reason.PROTOCOL_ERROR),
    "62 status abc": (then_hold(b"HTTP/1.1 abc Word\r\n", EMPTY), Reason.PROTOCOL_ERROR),
    "62 status -1": (then_hold(b"HTTP/1.1 -1 Minus\r\n", EMPTY), Reason.PROTOCOL_ERROR),
    "62 no status": (then_hold(b"HTTP/1.1\r\n", EMPTY), Reason.PROTOCOL_ERROR),
    "62 another version": (then_hold(b"HTTP/9.9 200 OK\r\n", EMPTY), Reason.PROTOCOL_ERROR),
    "62 no HTTP at all": (then_hold(b"SSH-2.0-OpenSSH_9.2\r\n"), Reason.PROTOCOL_ERROR),
    "62 HTTP/0.9": (then_hold(b"<html>hello</html>\n"), Reason.PROTOCOL_ERROR),
    "62 bytes": (then_hold(bytes(range(256))), Reason.PROTOCOL_ERROR),
    "63 NUL in a header": (then_hold(OK, b"ETag: a\x00b\r\n", EMPTY), Reason.PROTOCOL_ERROR),
    "63 NUL in the reason": (then_hold(b"HTTP/1.1 200 O\x00K\r\n", EMPTY), Reason.PROTOCOL_ERROR),
    "63 CR in a header": (then_hold(OK, b"ETag: a\rSet: b\r\n", EMPTY), Reason.PROTOCOL_ERROR),
    "64 length -1": (then_hold(OK, b"Content-Length: -1\r\n\r\n"), Reason.PROTOCOL_ERROR),
    "64 length abc": (then_hold(OK, b"Content-Length: abc\r\n\r\n"), Reason.PROTOCOL_ERROR),
    "64 length 0x10": (then_hold(OK, b"Content-Length: 0x10\r\n\r\n"), Reason.PROTOCOL_ERROR),
    "64 lengths 5 and 6": (then_hold(OK, b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"), Reason.PROTOCOL_ERROR),
    "68 reset at once": (then_reset(), Reason.PROTOCOL_ERROR),
    "68 reset within headers": (then_reset(OK, b"ETag: x\r\n"), Reason.PROTOCOL_ERROR),
    "68 reset after an interim response": (then_reset(b"HTTP/1.1 100 Continue\r\n\r\n"), Reason.PROTOCOL_ERROR),
    "68 closed at once": (then_close(), Reason.PROTOCOL_ERROR),
    "68 closed within headers": (then_close(OK, b"ETag: x\r\n"), Reason.PROTOCOL_ERROR),
    "68 closed after an interim response": (then_close(b"HTTP/1.1 100 Continue\r\n\r\n"), Reason.PROTOCOL_ERROR),
    "68 half-closed at once": (then_half_close(), Reason.PROTOCOL_ERROR),
    "68 half-closed within headers": (then_half_close(OK, b"ETag: x\r\n"), Reason.PROTOCOL_ERROR),
    "68 half-closed within a line": (then_half_close(OK, b"Content-Le"), Reason.PROTOCOL_ERROR),
}


@pytest.mark.parametrize("name", ATTACKS)
async def test_an_origin_that_gives_no_answer_fails_in_time_and_alone(prober: Prober, good: Origin, name: str) -> None:
    behave, failure = ATTACKS[name]
    # What ends by its own bytes has time for them on a busy machine.
    timeout = TIMEOUT if failure is Reason.TIMEOUT else PATIENCE
    evidence = await suffer(prober, good, behave, "HEAD", timeout)
    assert (evidence.status, evidence.failure) == (None, failure)
    assert not evidence.reused
    assert evidence.remote_addr == "127.0.0.1"
    # Of what did come before, nothing is believed.
    assert (evidence.content_length, evidence.etag, evidence.location) == (None, None, None)


HEADERS_ONLY: dict[str, tuple[Behaviour, int]] = {
    "57 silence after headers": (then_hold(OK, b"Content-Length: 1\r\n\r\n"), 200),
    "57 silence after the headers of a 206": (then_hold(b"HTTP/1.1 206 P\r\nContent-Length: 1\r\n\r\n"), 206),
    "57 silence after the headers of a 404": (then_hold(b"HTTP/1.1 404 N\r\nContent-Length: 9\r\n\r\n"), 404),
    "57 silence after headers without a length": (then_hold(OK, b"\r\n"), 200),
    "58 body drip": (then_forever(OK + b"Content-Length: 1000\r\n\r\n", b"x", every=0.02), 200),
    "64 length beyond 64 bits": (then_hold(OK, b"Content-Length: 99999999999999999999\r\n\r\n"), 200),
    "68 closed after headers": (then_close(OK, b"Content-Length: 1\r\n\r\n"), 200),
    "68 half-closed after headers": (then_half_close(OK, b"Content-Length: 1\r\n\r\n"), 200),
    "a broken chunk": (then_hold(OK, b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), 200),
    "a byte in chunks, with a trailer": (
        then_hold(OK, b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Checksum: 1\r\n\r\n"),
        200,
    ),
    "no bytes in chunks, with a trailer": (
        then_hold(OK, b"Transfer-Encoding: chunked\r\n\r\n0\r\nETag: trailer\r\n\r\n"),
        200,
    ),
}


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("name", HEADERS_ONLY)
async def test_once_the_headers_are_there_the_body_makes_no_difference(
    prober: Prober, good: Origin, name: str, method: str
) -> None:
    behave, status = HEADERS_ONLY[name]
    evidence = await suffer(prober, good, behave, method)
    assert (evidence.status, evidence.failure) == (status, None)
    assert evidence.etag is None


async def test_a_silent_origin_delays_no_other_host(prober: Prober, good: Origin) -> None:
    async with serving(mute) as silent:
        slow = [prober.request(f"{silent.url}/{n}") for n in range(20)]
        quick = [prober.request(f"{good.url}/{n}") for n in range(20)]
        found = await prober.ask_all([*slow, *quick])
    assert {evidence.id for evidence in found[:20]} == {request.id for request in quick}
    assert Counter(evidence.failure for evidence in found) == {None: 20, Reason.TIMEOUT: 20}


async def test_interim_responses_before_the_answer_do_no_harm(prober: Prober, good: Origin) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nContent-Type: early/x\r\nContent-Length: 9\r\n\r\n" * 10
    evidence = await suffer(prober, good, then_hold(interim, OK, b"Content-Length: 7\r\n\r\n"), "HEAD")
    assert (evidence.status, evidence.content_length, evidence.content_type) == (200, 7, None)


@pytest.mark.parametrize(
    ("lengths", "believed"),
    [
        ([b"5"], 5),
        ([b"5", b"5"], 5),
        ([b"999999999999999999"], 999_999_999_999_999_999),
        ([b"9223372036854775807"], None),
        ([b"9223372036854775808"], None),
        ([b"9" * 40], None),
    ],
)
async def test_an_impossible_length_is_not_believed(
    prober: Prober, good: Origin, lengths: list[bytes], believed: int | None
) -> None:
    behave = then_hold(OK, *(b"Content-Length: " + length + b"\r\n" for length in lengths), b"\r\n")
    evidence = await suffer(prober, good, behave, "HEAD")
    assert (evidence.status, evidence.content_length) == (200, believed)


async def test_control_characters_do_not_come_through(prober: Prober, good: Origin) -> None:
    behave = then_hold(
        b"HTTP/1.1 404 \x1b[2J\xff\r\n",
        b"Content-Type: a\x1b[31m\xffb\r\nETag: \x07\x08\r\nLast-Modified: a\tb\x7f\r\n",
        b"Retry-After: \xc2\x9b1\r\nLocation: /\x1b]0;x\x07\r\n",
        EMPTY,
    )
    evidence = await suffer(prober, good, behave, "HEAD")
    assert evidence.status == 404
    assert evidence.content_type == "a\ufffd[31m\ufffdb"
    assert (evidence.etag, evidence.last_modified) == ("\ufffd\ufffd", "a\ufffdb\ufffd")
    assert (evidence.retry_after, evidence.location) == ("\ufffd1", "/\ufffd]0;x\ufffd")


async def test_long_values_are_cut(prober: Prober, good: Origin) -> None:
    evidence = await suffer(prober, good, then_hold(OK, b"ETag: " + b"x" * 10_000 + b"\r\n", EMPTY), "HEAD")
    assert (evidence.status, evidence.etag) == (200, "x" * 255)


# -- row 61: bytes that were not requested -----------------------------------------------------------------------------


async def test_a_body_sent_with_the_answer_to_head_is_not_the_next_answer(prober: Prober) -> None:
    async def body_at_once(reader: StreamReader, writer: StreamWriter) -> None:
        while True:
            head = await read_head(reader)
            stray = b"HTTP/1.1 404 Not Found\r\n" + EMPTY
            writer.write(OK + b"ETag: " + path_of(head) + b"\r\nContent-Length: 45\r\n\r\n" + stray)

    async with serving(body_at_once) as origin:
        for path in ("/1", "/2", "/3"):
            evidence = await prober.ask(origin.url + path)
            assert evidence.etag == path or (evidence.reused and evidence.status == 404)


@pytest.mark.parametrize("stray", [b"HTTP/1.1 404 Not Found\r\n" + EMPTY, b"\xff\xd8\xff\xe0 JFIF", b"<html>"])
async def test_a_body_sent_late_comes_as_a_bad_answer_on_a_reused_connection(prober: Prober, stray: bytes) -> None:
    async def body_late(reader: StreamReader, writer: StreamWriter) -> None:
        await read_head(reader)
        writer.write(OK + EMPTY)
        await read_head(reader)
        writer.write(stray)
        await mute(reader, writer)

    async with serving(body_late) as origin:
        before = await prober.ask(f"{origin.url}/1")
        assert (before.status, before.reused) == (200, False)
        late = await prober.ask(f"{origin.url}/2")
        assert late.reused
        assert late.status in (404, None)
        assert late.failure in (None, Reason.TIMEOUT, Reason.PROTOCOL_ERROR)
        assert origin.connections == 1
        again = await prober.ask(f"{origin.url}/2", fresh=True)
        assert (again.status, again.reused) == (200, False)
        assert origin.connections == 2


async def test_a_connection_that_gave_a_doubtful_answer_gives_no_other(prober: Prober) -> None:
    """Once one stray answer has come, each later answer on that connection belongs to the request before."""

    async def off_by_one(reader: StreamReader, writer: StreamWriter) -> None:
        first = path_of(await read_head(reader))
        writer.write((b"HTTP/1.1 404 N\r\n" if first == b"/missing" else OK) + EMPTY)
        owed = b""
        while True:
            head = await read_head(reader)
            if owed == b"" and path_of(head) == b"/present":
                writer.write(b"HTTP/1.1 404 Not Found\r\n" + EMPTY)
            else:
                found = owed or path_of(head)
                missing = found == b"/missing"
                writer.write((b"HTTP/1.1 404 N\r\n" if missing else OK) + b"ETag: " + found + b"\r\n" + EMPTY)
            owed = path_of(head)

    async with serving(off_by_one) as origin:
        assert (await prober.ask(f"{origin.url}/first")).status == 200
        doubtful = await prober.ask(f"{origin.url}/present")
        assert (doubtful.status, doubtful.failure, doubtful.reused) == (404, None, True)
        # Its own answer, or at least one that is doubted: never that of /present.
        evidence = await prober.ask(f"{origin.url}/missing")
        assert evidence.status == 404


async def test_a_request_on_a_connection_that_dies_is_made_again_on_a_fresh_one(prober: Prober) -> None:
    async def one_answer_each(reader: StreamReader, writer: StreamWriter) -> None:
        await read_head(reader)
        writer.write(OK + EMPTY)
        await read_head(reader)

    async with serving(one_answer_each) as origin:
        assert (await prober.ask(f"{origin.url}/1")).status == 200
        evidence = await prober.ask(f"{origin.url}/2")
        assert (evidence.status, evidence.reused) == (200, False)
        assert origin.connections == 2


async def test_connections_are_reused_unless_the_request_says_otherwise(prober: Prober) -> None:
    async with serving(well_behaved) as origin:
        reused = [(await prober.ask(f"{origin.url}/{n}")).reused for n in range(3)]
        assert (reused, origin.connections) == ([False, True, True], 1)
        fresh = await prober.ask(f"{origin.url}/fresh", fresh=True, keep=False)
        assert (fresh.status, fresh.reused, origin.connections) == (200, False, 2)
        last = await prober.ask(f"{origin.url}/last", keep=False)
        assert (last.status, last.reused, origin.connections) == (200, True, 2)
        after = await prober.ask(f"{origin.url}/after")
        assert (after.status, after.reused, origin.connections) == (200, False, 3)


async def test_phases_are_those_of_the_connection_that_was_made(prober: Prober) -> None:
    async with serving(well_behaved) as origin:
        fresh, again = [await prober.ask(f"{origin.url}/{n}") for n in range(2)]
    assert fresh.connect_ms is not None
    assert fresh.first_byte_ms is not None
    assert 0 <= fresh.connect_ms + fresh.first_byte_ms <= fresh.total_ms + 1
    assert fresh.tls_ms is None
    assert (again.reused, again.dns_ms, again.connect_ms, again.tls_ms) == (True, None, None, None)
    assert again.first_byte_ms is not None
    assert again.remote_addr == "127.0.0.1"


# -- row 65: certificates ----------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority that the prober trusts (`ca_file`), and one that it does not."""

    def __init__(self, folder: Path) -> None:
        self.trusted, self.unknown = trustme.CA(), trustme.CA()
        self.ca_file = folder / "ca.pem"
        self.trusted.cert_pem.write_to_path(str(self.ca_file))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def tls(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trusting(authority: Authority) -> AsyncIterator[Prober]:
    async with probing(ca_file=str(authority.ca_file)) as prober:
        yield prober


def days_ago(days: int) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)


CERTIFICATES: dict[str, Callable[[Authority], trustme.LeafCert]] = {
    "of an unknown authority": lambda authority: authority.unknown.issue_cert("127.0.0.1"),
    "expired": lambda authority: authority.trusted.issue_cert(
        "127.0.0.1", not_before=days_ago(30), not_after=days_ago(1)
    ),
    "not valid yet": lambda authority: authority.trusted.issue_cert(
        "127.0.0.1", not_before=days_ago(-2), not_after=days_ago(-30)
    ),
    "for another address": lambda authority: authority.trusted.issue_cert("127.0.0.2"),
    "for a name": lambda authority: authority.trusted.issue_cert("localhost", "example.com"),
}


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("name", CERTIFICATES)
async def test_a_bad_certificate_is_a_tls_error_and_nothing_is_asked(
    trusting: Prober, authority: Authority, name: str, method: str
) -> None:
    heads: list[bytes] = []

    async def confided(reader: StreamReader, writer: StreamWriter) -> None:
        heads.append(await read_head(reader))

    async with (
        serving(confided, tls=tls(CERTIFICATES[name](authority))) as origin,
        serving(well_behaved, tls=tls(authority.trusted.issue_cert("127.0.0.1"))) as fine,
    ):
        evidence = await trusting.ask(f"{origin.url}/secret", method, timeout=2.0)
        assert (evidence.status, evidence.failure) == (None, Reason.TLS_ERROR)
        assert (await trusting.ask(f"{fine.url}/next", timeout=2.0)).status == 200
    assert heads == []


async def test_a_good_certificate_is_an_answer_with_the_time_its_handshake_took(
    trusting: Prober, authority: Authority
) -> None:
    async with serving(well_behaved, tls=tls(authority.trusted.issue_cert("127.0.0.1"))) as origin:
        evidence = await trusting.ask(f"{origin.url}/x", timeout=2.0)
        again = await trusting.ask(f"{origin.url}/y", timeout=2.0)
    assert (evidence.status, evidence.reused, again.status, again.reused) == (200, False, 200, True)
    assert evidence.tls_ms is not None
    assert evidence.tls_ms > 0


async def test_a_private_authority_is_not_trusted_unless_configured(prober: Prober, authority: Authority) -> None:
    async with serving(well_behaved, tls=tls(authority.trusted.issue_cert("127.0.0.1"))) as origin:
        assert (await prober.ask(f"{origin.url}/x", timeout=2.0)).failure is Reason.TLS_ERROR


async def test_a_server_that_speaks_no_tls_is_a_tls_error(trusting: Prober) -> None:
    async def plain(reader: StreamReader, writer: StreamWriter) -> None:
        await reader.read(1)
        writer.write(OK + EMPTY)
        await mute(reader, writer)

    async with serving(plain) as origin:
        evidence = await trusting.ask(origin.url.replace("http:", "https:"), timeout=2.0)
    assert evidence.failure is Reason.TLS_ERROR


async def test_a_handshake_that_never_ends_is_a_timeout(trusting: Prober) -> None:
    async with serving(mute) as origin:
        evidence = await trusting.ask(origin.url.replace("http:", "https:"))
    assert evidence.failure is Reason.TIMEOUT


# -- row 67: requests, and how much of an answer is read ---------------------------------------------------------------


async def test_a_request_says_no_more_than_it_must(prober: Prober) -> None:
    heads: list[bytes] = []

    async def listening(reader: StreamReader, writer: StreamWriter) -> None:
        while True:
            heads.append(await read_head(reader))
            writer.write(OK + b"Set-Cookie: a=b; Path=/\r\n" + EMPTY)

    # The same handle serves one request after the other: nothing may be left over.
    path = "/a/./../b//c%2Fd%zz;e?x=%2F&y"
    async with serving(listening) as origin:
        for method in ("HEAD", "GET", "HEAD"):
            assert (await prober.ask(origin.url + path, method)).status == 200
        head = {
            f"Host: 127.0.0.1:{origin.port}".encode(),
            f"User-Agent: {AGENT}".encode(),
            b"Accept: */*",
        }
    asked = [(lines[0].decode(), set(lines[1:-2])) for lines in (head.split(b"\r\n") for head in heads)]
    assert asked == [
        (f"HEAD {path} HTTP/1.1", head),
        (f"GET {path} HTTP/1.1", head | {b"Range: bytes=0-0"}),
        (f"HEAD {path} HTTP/1.1", head),
    ]


async def test_a_ranged_get_tells_the_length_of_the_whole_object(prober: Prober, good: Origin) -> None:
    evidence = await prober.ask(f"{good.url}/ranged", "GET")
    assert (evidence.status, evidence.content_length, evidence.etag) == (206, 1234, "/ranged")
    assert (await prober.ask(f"{good.url}/ranged", "GET")).reused


async def test_an_empty_object_is_known_by_its_unsatisfiable_range(prober: Prober, good: Origin) -> None:
    head = b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */0\r\n"
    evidence = await suffer(prober, good, then_hold(head, b"Content-Length: 5\r\n\r\nsorry"), "GET")
    assert (evidence.status, evidence.content_length) == (416, 0)


async def test_a_server_that_ignores_the_range_is_cut_off(prober: Prober, good: Origin) -> None:
    whole = 64 * 1024 * 1024
    sent = 0

    async def everything(reader: StreamReader, writer: StreamWriter) -> None:
        nonlocal sent
        # Little is buffered on this side, so that what was sent was taken, or waits in the prober's own buffer.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        writer.transport.set_write_buffer_limits(0)
        await read_head(reader)
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % whole)
        while sent < whole:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    evidence = await suffer(prober, good, everything, "GET", timeout=1.0)
    assert (evidence.status, evidence.content_length) == (200, whole)
    assert sent <= 8 * 1024 * 1024


# -- section A: the addresses that are dialled -------------------------------------------------------------------------


def anywhere() -> socket.socket:
    """A listener on every address of this machine, IPv6 too where there is any."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("0.0.0.0", 0))


async def untouched(trap: Origin) -> bool:
    """Return whether no connection came; one of our own proves that none is still on its way."""
    _, writer = await asyncio.open_connection("127.0.0.1", trap.port)
    await trap.wait_for(1)
    writer.close()
    await writer.wait_closed()
    return trap.connections == 1


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded() -> AsyncIterator[Prober]:
    """A prober without holes in its guard, as in production."""
    async with probing(networks=()) as prober:
        yield prober


SPELLINGS = (
    "127.0.0.1",
    "127.255.255.254",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "127.1",
    "127.0.0.1.",
    "0.0.0.0",
    "0",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "localhost",
    "localhost.",
    "LOCALHOST",
)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_a_private_address_is_not_dialled_in_any_spelling(guarded: Prober, method: str) -> None:
    async with serving(well_behaved, listener=anywhere()) as trap:
        found = {}
        for host in SPELLINGS:
            evidence = await guarded.ask(f"http://{host}:{trap.port}/", method, timeout=2.0)
            found[host] = (evidence.status, evidence.failure, evidence.remote_addr, evidence.reused)
        assert found == dict.fromkeys(SPELLINGS, (None, Reason.PRIVATE_ADDRESS, None, False))
        assert await untouched(trap)


async def test_a_name_that_resolves_to_loopback_is_dialled_where_the_guard_has_a_hole(prober: Prober) -> None:
    # Of its answers, ::1 is passed over: only 127.0.0.0/8 is open.
    async with serving(well_behaved, listener=anywhere()) as origin:
        evidence = await prober.ask(f"http://localhost:{origin.port}/x", timeout=2.0)
        assert (evidence.status, evidence.remote_addr) == (200, "127.0.0.1")
        refused = await prober.ask(f"http://[::1]:{origin.port}/x")
        assert (refused.status, refused.failure) == (None, Reason.PRIVATE_ADDRESS)


async def test_a_port_that_is_not_allowed_is_not_dialled() -> None:
    async with serving(well_behaved) as trap, serving(well_behaved) as open_one:
        async with probing(ports=[open_one.port]) as prober:
            evidence = await prober.ask(f"{trap.url}/x")
            assert (evidence.failure, evidence.remote_addr) == (Reason.PORT_NOT_ALLOWED, None)
            assert (await prober.ask(f"{open_one.url}/x")).status == 200
        assert await untouched(trap)


@pytest.mark.parametrize("upper", [True, False])
async def test_proxies_in_the_environment_are_ignored(upper: bool) -> None:
    names = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    async with serving(mute) as trap, serving(well_behaved) as origin:
        proxy = {name.upper() if upper else name: f"http://127.0.0.1:{trap.port}" for name in names[:3]}
        async with probing(environ=proxy | {"NO_PROXY": "", "no_proxy": ""}) as prober:
            for method in ("HEAD", "GET"):
                assert (await prober.ask(f"{origin.url}/x", method)).status in (200, 206)
            assert (await prober.ask(f"https://127.0.0.1:{origin.port}/x")).failure is not None
        assert await untouched(trap)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_prober_never_follows_a_redirect_itself(prober: Prober, good: Origin, status: int) -> None:
    async with serving(well_behaved) as trap:
        location = f"{trap.url}/elsewhere"
        head = f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nRefresh: 0; url={location}\r\n".encode()
        for method in ("HEAD", "GET"):
            evidence = await suffer(prober, good, then_hold(head, EMPTY), method)
            assert (evidence.status, evidence.location) == (status, location)
        assert await untouched(trap)


@pytest.mark.parametrize("location", [b"http://[bad", b"file:///etc/passwd", b"", b"http://:99999/", b"\xff\xfe"])
async def test_a_bad_location_is_the_guards_to_refuse(prober: Prober, good: Origin, location: bytes) -> None:
    evidence = await suffer(
        prober, good, then_hold(b"HTTP/1.1 302 F\r\nLocation: " + location + b"\r\n", EMPTY), "HEAD"
    )
    assert evidence.status == 302
    assert evidence.location == location.decode("latin-1").replace("\xff\xfe", "%FF%FE")


async def test_a_long_location_is_not_followed_in_part(prober: Prober, good: Origin) -> None:
    location = b"http://example.com/" + b"a" * 20_000
    evidence = await suffer(
        prober, good, then_hold(b"HTTP/1.1 302 F\r\nLocation: " + location + b"\r\n", EMPTY), "HEAD"
    )
    assert evidence.location is not None
    assert Guard().follow("http://example.com/", evidence.location).refusal is Reason.BAD_REDIRECT


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://",
        "http:///x",
        "http://[::1",
        "http://a b/",
        "http://127.0.0.1:99999/",
        "ftp://127.0.0.1/",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "http://１２７.0.0.1/",
        "http://127.0.0.1/\x00",
        "http://127.0.0.1/文",
    ],
)
async def test_an_address_that_cannot_be_asked_fails_alone(prober: Prober, good: Origin, url: str) -> None:
    # `Target.url` is never one of these; but a prober that died of one would take all other requests with it.
    evidence = await prober.ask(url)
    assert evidence.status is None
    assert evidence.failure in (Reason.INVALID_URL, Reason.PROTOCOL_ERROR, Reason.DNS_ERROR)
    assert evidence.remote_addr is None
    assert (await prober.ask(f"{good.url}/next", timeout=PATIENCE)).status == 200


async def test_a_closed_port_is_a_connect_error_and_an_unknown_name_a_dns_error(prober: Prober) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert (await prober.ask(f"http://127.0.0.1:{port}/")).failure is Reason.CONNECT_ERROR
    # RFC 6761 6.4: no resolver knows it.
    assert (await prober.ask("http://nowhere.invalid/", timeout=PATIENCE)).failure is Reason.DNS_ERROR


# -- the process -------------------------------------------------------------------------------------------------------


async def test_a_prober_ends_when_its_input_does() -> None:
    prober = await Prober.start()
    assert await prober.end() == 0


async def test_a_prober_ends_at_once_with_requests_in_flight() -> None:
    async with serving(mute) as origin:
        prober = await Prober.start()
        prober.send([prober.request(f"{origin.url}/{n}", timeout=PATIENCE) for n in range(10)])
        await origin.wait_for(10)
        async with asyncio.timeout(PATIENCE / 2):
            assert await prober.end() == 0


async def test_a_prober_ends_within_a_frame_and_before_the_first() -> None:
    for begun in (b"", b"\x10", FRAME_HEADER.pack(1000) + b"half of it"):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "notify_server.processes.prober"), stdin=PIPE, stdout=PIPE
        )
        out, _ = await asyncio.wait_for(process.communicate(begun), PATIENCE)
        assert (out, process.returncode) == (b"", 0)


async def test_a_prober_ends_when_its_output_has_no_reader() -> None:
    reading, writing = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "notify_server.processes.prober"), stdin=PIPE, stdout=writing
    )
    os.close(writing)
    prober = Prober(process)
    prober.write(frame(encode(ProberConfig([], list(LOOPBACK), [], AGENT, certifi.where(), 1))))
    (length,) = FRAME_HEADER.unpack(os.read(reading, FRAME_HEADER.size))
    assert decode_ready(os.read(reading, length)).libcurl
    os.close(reading)
    async with serving(well_behaved) as origin:
        prober.send([prober.request(f"{origin.url}/x")])
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
    prober.close_input()


async def test_a_prober_ignores_the_interrupt_of_a_terminal(prober: Prober, good: Origin) -> None:
    async with serving(mute) as silent:
        prober.send([prober.request(f"{silent.url}/x")])
        await silent.wait_for(1)
        for _ in range(3):
            prober.process.send_signal(signal.SIGINT)
        (evidence,) = await prober.receive()
        assert evidence.failure is Reason.TIMEOUT
    assert (await prober.ask(f"{good.url}/next")).status == 200


async def test_frames_may_come_in_any_pieces(prober: Prober, good: Origin) -> None:
    frames = [frame(encode([prober.request(f"{good.url}/{n}", timeout=PATIENCE)])) for n in range(5)]
    whole = b"".join(frames) + frame(encode(()))
    assert prober.process.stdin is not None
    for at in range(0, len(whole), 7):
        prober.write(whole[at : at + 7])
        await prober.process.stdin.drain()
    found: list[Evidence] = []
    while len(found) < 5:
        found += await prober.receive()
    assert {evidence.etag for evidence in found} == {f"/{n}" for n in range(5)}


async def test_ten_thousand_requests_leave_no_descriptors_behind(good: Origin) -> None:
    window, total = 50, 10_000

    async def too_much(reader: StreamReader, writer: StreamWriter) -> None:
        await read_head(reader)
        writer.write(OK + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000)
        await mute(reader, writer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with serving(too_much) as cut, serving(then_close(b"junk")) as junk, probing(concurrency=window) as prober:
        kinds = (
            [(f"{good.url}/x", "HEAD")] * 12 + [(f"{good.url}/x", "GET")] * 2 + [(f"{good.url}/missing", "HEAD")] * 2
        )
        kinds += [
            (f"{cut.url}/x", "GET"),
            (f"{junk.url}/x", "HEAD"),
            (f"{nobody}/x", "HEAD"),
            ("http://[::1]:1/", "HEAD"),
        ]
        sent = answered = 0
        outcomes: Counter[int | Reason | None] = Counter()
        while answered < total:
            room = min(window - (sent - answered), total - sent)
            prober.send([prober.request(*kinds[n % 20], timeout=PATIENCE) for n in range(sent, sent + room)])
            sent += room
            found = await prober.receive()
            answered += len(found)
            outcomes.update(evidence.status or evidence.failure for evidence in found)
            if answered - len(found) < 500 <= answered:
                early = prober.descriptors()
        assert prober.descriptors() <= early + window
    each = total // 20
    assert outcomes[200] == 13 * each
    assert (outcomes[206], outcomes[404]) == (2 * each, 2 * each)
    assert (outcomes[Reason.CONNECT_ERROR], outcomes[Reason.PRIVATE_ADDRESS]) == (each, each)
    assert sum(outcomes.values()) == total


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("needs 4,096 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.parametrize("concurrency", [400, 1600])
async def test_connections_kept_to_many_hosts_never_crowd_out_new_ones(concurrency: int) -> None:
    """select() knows no descriptor above 1,023: a connection beyond it would not be watched."""
    hosts = [f"127.0.{1 + n // 200}.{1 + n % 200}" for n in range(1200)]
    listener = socket.create_server(("0.0.0.0", 0), backlog=1024)
    async with serving(well_behaved, listener=listener) as origin, probing(concurrency=concurrency) as prober:
        for start in range(0, len(hosts), 100):
            requests = [
                prober.request(f"http://{host}:{origin.port}/x", timeout=10.0) for host in hosts[start : start + 100]
            ]
            found = await prober.ask_all(requests)
            assert Counter(evidence.failure for evidence in found) == {None: 100}
        assert prober.descriptors() < 1024
