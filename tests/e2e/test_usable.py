"""Files that are there and cannot be used, and signed addresses that end, through the real daemon."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote

import pytest
import pytest_asyncio

from notify_server.simulator.answers import RecordedAnswer, load_answers
from tests.support.daemon import Daemon
from tests.support.notification import finished
from tests.support.origin import Answer, Hit, Origin

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPEN = ["127.0.0.1/32"]
ANSWERS = load_answers()
SIGNED = "?OSSAccessKeyId=key&Signature=sig&Expires="


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def daemon(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """One for all tests. The only wait is longer than a test: retries have to come early."""
    verify = {
        "allowed_networks": OPEN,
        "retry_schedule": ["1h"],
        "allowed_ports": [],
        "referer": "https://www.example/",
    }
    async with Daemon(tmp_path_factory.mktemp("usable"), {"verify": verify}) as running:
        yield running
        assert await running.terminate() == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def impatient(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """One whose first attempt is the last."""
    verify = {"allowed_networks": OPEN, "retry_schedule": [], "allowed_ports": []}
    async with Daemon(tmp_path_factory.mktemp("impatient"), {"verify": verify}) as running:
        yield running
        assert await running.terminate() == 0


@pytest_asyncio.fixture(loop_scope="module")
async def origin() -> AsyncIterator[Origin]:
    async with Origin() as serving:
        yield serving


@pytest.fixture
def batch(numbers: Iterator[int] = itertools.count(1)) -> str:  # noqa: B008 (one counter for all)
    return f"batch-{next(numbers)}"


async def test_recorded_answers_give_the_expected_verdicts(impatient: Daemon, origin: Origin, batch: str) -> None:
    keys: dict[str, RecordedAnswer] = {answer.key(number): answer for number, answer in enumerate(ANSWERS)}
    urls = {key: f"/{key}?{answer.query}" if answer.query else f"/{key}" for key, answer in keys.items()}

    def play(hit: Hit) -> Answer:
        answer = keys[hit.path[1:].partition("?")[0]]
        return Answer(raw=answer.reply(hit.method).payload(hit.method), close=True)

    origin.default = play
    files = await impatient.settle(batch, [finished(origin.url(path), key) for key, path in urls.items()])
    found = {
        keys[key].name: (file["state"], file["reason"], json.loads(file["flags"] or "[]"))
        for key, file in files.items()
    }
    # Loopback has no TLS.
    expected = {
        answer.name: (answer.expect.state, answer.expect.reason, _with_plain_http(answer.expect.flags))
        for answer in ANSWERS
    }
    assert found == expected
    for key, file in files.items():
        expect = keys[key].expect
        assert expect.vendor_code in (None, file["vendor_code"]), keys[key].name
        assert expect.vendor_request_id in (None, file["vendor_request_id"]), keys[key].name


def _with_plain_http(flags: list[str]) -> list[str]:
    place = flags.index("signed") if "signed" in flags else len(flags)
    return [*flags[:place], "plain_http", *flags[place:]]


async def test_an_expired_address_is_not_requested_and_spends_no_attempt(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    origin.default = Answer(headers={"Content-Length": "5000"})
    end = int(time.time())
    expired, living = origin.url(f"/expired{SIGNED}{end - 1}"), origin.url(f"/living{SIGNED}{end + 3600}")
    files = await daemon.settle(batch, [finished(expired, "expired"), finished(living, "living")])
    assert [hit.path.partition("?")[0] for hit in origin.hits] == ["/living"]
    assert {name: (f["state"], f["reason"], f["attempts"], f["expires_at"]) for name, f in files.items()} == {
        "expired": ("unavailable", "expired", 0, (end - 1) * 1000),
        "living": ("available", None, 1, (end + 3600) * 1000),
    }
    # A fresh address is another chance.
    files = await daemon.settle(batch, [finished(living, "expired")])
    assert files["expired"]["state"] == "available"


async def test_the_last_attempt_is_made_thirty_seconds_before_the_address_ends(
    daemon: Daemon, origin: Origin, batch: str
) -> None:
    origin.default = Answer(404, close=True)
    # The first attempt has some seconds on a busy machine before it would be the last one.
    end = int(time.time()) + 34
    (file,) = (await daemon.settle(batch, [finished(origin.url(f"/soon{SIGNED}{end}"), "soon")])).values()
    assert (file["state"], file["reason"], file["attempts"]) == ("unavailable", "http_404", 2)
    last = daemon.attempts(file)[-1]
    assert 0 <= last["started_at"] - (end - 30) * 1000 < 10_000
    # The last attempt asks with GET too.
    assert [hit.method for hit in origin.hits] == ["HEAD", "HEAD", "GET"]


async def test_a_refusal_after_the_end_is_expired(daemon: Daemon, origin: Origin, batch: str) -> None:
    gate = asyncio.Event()
    origin.default = Answer(403, close=True, gate=gate)
    end = int(time.time()) + 1
    await daemon.deliver(batch, [finished(origin.url(f"/late{SIGNED}{end}"), "late")])
    await origin.reached()
    asyncio.get_running_loop().call_at(asyncio.get_running_loop().time() + end - time.time(), gate.set)
    await daemon.verdict(batch)
    file = daemon.files(batch)["late"]
    assert (file["state"], file["reason"], file["attempts"], len(origin.hits)) == ("unavailable", "expired", 1, 1)


async def test_the_referer_is_sent_with_every_request(daemon: Daemon, origin: Origin, batch: str) -> None:
    origin.on("/a", Answer(405, close=True), Answer(headers={"Content-Length": "1"}, body=b"x"))
    await daemon.settle(batch, [origin.url("/a")])
    assert [(hit.method, hit.headers["referer"]) for hit in origin.hits] == [
        ("HEAD", "https://www.example/"),
        ("GET", "https://www.example/"),
    ]


def oss_v1(verb: str, path: str, expires: int, secret: str = "secret") -> str:
    """The signature of OSS V1 for an object of the bucket `bkt`, as it stands in a query."""
    text = f"{verb}\n\n\n{expires}\n/bkt{path}"
    return quote(base64.b64encode(hmac.new(secret.encode(), text.encode(), hashlib.sha1).digest()), safe="")


async def test_the_signature_is_that_of_the_vendors_package() -> None:
    signed = Path(__file__).parents[1] / "samples" / "signed_addresses.json"
    urls = {each["signer"]: each["url"] for each in json.loads(signed.read_text("utf-8"))}
    assert f"Signature={oss_v1('GET', '/a.jpg', 1_764_234_000)}" in urls["alibabacloud_oss_v2 v1"]


async def test_an_address_signed_for_get_is_found_by_the_ranged_get(
    impatient: Daemon, origin: Origin, batch: str
) -> None:
    """The origin checks signature and time, as OSS does: the signature holds for one verb alone."""

    def check(hit: Hit) -> Answer:
        path, _, query = hit.path.partition("?")
        given = dict(parse_qsl(query))
        wanted = unquote(oss_v1(hit.method, path, int(given["Expires"])))
        refused = given["Signature"] != wanted or time.time() > int(given["Expires"])
        body = b"<Error><Code>SignatureDoesNotMatch</Code></Error>"
        headers = {"Content-Type": "application/xml"}
        return Answer(403, headers, body, close=True) if refused else Answer(206, {"Content-Length": "1"}, b"x")

    origin.default = check
    end = int(time.time()) + 3600
    urls = {
        name: origin.url(f"/{name}?OSSAccessKeyId=key&Expires={end}&Signature={signature}")
        for name, signature in (
            ("get", oss_v1("GET", "/get", end)),
            ("head", oss_v1("HEAD", "/head", end)),
            ("wrong", oss_v1("GET", "/wrong", end, "another")),
        )
    }
    files = await impatient.settle(batch, [finished(url, name) for name, url in urls.items()])
    assert {name: (file["state"], file["reason"], file["vendor_code"]) for name, file in files.items()} == {
        "get": ("available", None, None),
        "head": ("available", None, None),
        "wrong": ("unavailable", "http_403", "SignatureDoesNotMatch"),
    }
    assert {file["expires_at"] for file in files.values()} == {end * 1000}
    assert [hit.method for hit in origin.hits if hit.path.startswith("/get")] == ["HEAD", "GET"]
