"""The simulator's parts, each alone: the plan, the object store's answers, how the platform delivers,
and that every kind of difference is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import socket
import sqlite3
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import msgspec
import pytest
import trustme
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console
from standardwebhooks import Webhook
from typer.testing import CliRunner

from notify_server.cli.common import trust_only
from notify_server.cli.main import app
from notify_server.cli.simulate import Options, configured, run, show
from notify_server.config import AuthConfig, Config, ServerConfig, StoreConfig
from notify_server.contract.object_key import decode_object_key
from notify_server.contract.wire import parse_notification, unknown_fields
from notify_server.errors import StoreRefusedError, StoreUnavailableError
from notify_server.model import FileState, ReportedStatus, Verdict
from notify_server.simulator import record as simulator_record
from notify_server.simulator.answers import answers_named
from notify_server.simulator.compare import Comparison, Difference, Tally, compare
from notify_server.simulator.object_store import ObjectStore
from notify_server.simulator.plan import CONTENT_TYPE, EXPECTED, Kind, Plan, PlantedFile
from notify_server.simulator.platform import Platform, SimulationError
from notify_server.simulator.receiver import Behaviour, Receivers, receivers_named
from notify_server.simulator.record import FileRow, RecordViews
from notify_server.simulator.run import Report, busiest_second, percentile
from notify_server.store.sqlite.database import connect

OBJECTS = "http://127.0.0.1:9/"
SHARES = {
    Kind.SLOW: 0.1,
    Kind.REFUSES_HEAD: 0.2,
    Kind.FAILS_FIRST: 0.1,
    Kind.MISSING: 0.1,
    Kind.FAILED: 0.2,
}
PLAN = Plan(seed=7, batches=4, files=10, shares=SHARES, redelivered=0.5)


def planted(plan: Plan) -> list[bytes]:
    return [batch.body(OBJECTS) for batch in Platform(plan).deliveries]


def of_kind(kind: Kind, plan: Plan = PLAN) -> PlantedFile:
    return next(file for file in Platform(plan).files if file.kind is kind)


# --- The plan ---


def test_the_same_seed_plants_and_delivers_the_same() -> None:
    assert planted(PLAN) == planted(PLAN)
    assert list(Platform(PLAN).files) == list(Platform(PLAN).files)


def test_another_seed_plants_something_else() -> None:
    other = Plan(seed=8, batches=4, files=10, shares=SHARES, redelivered=0.5)
    assert not {file.key for file in Platform(PLAN).files} & {file.key for file in Platform(other).files}


def test_batch_ids_have_the_published_form() -> None:
    ids = [batch.batch_id for batch in Platform(Plan(seed=1, batches=200, files=1)).batches]
    assert len(set(ids)) == 200
    assert all(re.fullmatch(r"[0-9a-f]{32}\.[1-9][0-9]*\.[0-9]{17}", batch_id) for batch_id in ids)


def test_keys_have_the_published_form_and_decode_to_a_source_path() -> None:
    files = list(Platform(Plan(seed=1, batches=20, files=50)).files)
    assert len({file.key for file in files}) == 1000
    for file in files:
        assert re.fullmatch(r"[0-9A-Z]{16}/IMAGE/-?[0-9]+/[0-9A-Za-z+/]{32}", file.key)
        key = decode_object_key(file.key)
        assert key is not None
        assert key.source_path.startswith("/apt_common/o_")
        assert len(key.source_path) == 24


def test_every_notification_keeps_the_contract() -> None:
    for body in planted(PLAN):
        assert len(parse_notification(body, max_files=10).file_list) == 10
        assert unknown_fields(body) == 0


def test_addresses_are_the_object_stores_and_end_in_the_key() -> None:
    for batch in Platform(PLAN).batches:
        for entry in parse_notification(batch.body(OBJECTS), max_files=10).file_list:
            reported_failed = batch.files[entry.oss_object_name].kind is Kind.FAILED
            assert entry.status is (ReportedStatus.FAILED if reported_failed else ReportedStatus.FINISHED)
            if not reported_failed:
                assert entry.target_url == OBJECTS + entry.oss_object_name


def test_files_reported_failed_come_with_and_without_an_address() -> None:
    platform = Platform(Plan(seed=7, batches=1, files=40, shares={Kind.FAILED: 1}))
    entries = parse_notification(platform.batches[0].body(OBJECTS), max_files=40).file_list
    assert {entry.target_url is None for entry in entries} == {True, False}


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_exact(seed: int) -> None:
    plan = Plan(seed=seed, batches=4, files=10, shares=SHARES)
    assert Counter(file.kind for file in Platform(plan).files) == {
        Kind.PRESENT: 12, Kind.SLOW: 4, Kind.REFUSES_HEAD: 8, Kind.FAILS_FIRST: 4, Kind.MISSING: 4, Kind.FAILED: 8,
    }  # fmt: skip


def test_shares_that_do_not_divide_never_plant_more_files_than_there_are() -> None:
    plan = Plan(seed=1, batches=1, files=3, shares={Kind.SLOW: 0.5, Kind.MISSING: 0.5})
    assert Counter(file.kind for file in Platform(plan).files).total() == 3


def test_shares_may_come_to_exactly_one() -> None:
    plan = Plan(seed=1, shares=dict.fromkeys(list(EXPECTED)[1:], 0.2))
    assert Kind.PRESENT not in {file.kind for file in Platform(plan).files}


@pytest.mark.parametrize(
    ("shares", "redelivered", "problem"),
    [
        ({Kind.SLOW: 0.7, Kind.FAILED: 0.4}, 0.0, "the shares of files come to 1.1, more than 1: slow 0.7 + reported"),
        ({Kind.SLOW: -0.1}, 0.0, "the share of slow must be from 0 to 1, not -0.1"),
        ({Kind.MISSING: float("nan")}, 0.0, "the share of missing must be from 0 to 1, not nan"),
        ({}, 1.5, "the share of redelivered must be from 0 to 1, not 1.5"),
    ],
)
def test_impossible_shares_are_refused_by_name(shares: dict[Kind, float], redelivered: float, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        Plan(seed=1, shares=shares, redelivered=redelivered)


def test_the_redelivered_share_of_batches_is_delivered_twice() -> None:
    platform = Platform(Plan(seed=1, batches=20, files=1, redelivered=0.25))
    times = Counter(batch.batch_id for batch in platform.deliveries)
    assert Counter(times.values()) == {1: 15, 2: 5}


def test_redeliveries_come_before_and_after_other_batches() -> None:
    platform = Platform(Plan(seed=1, batches=20, files=1, redelivered=1.0))
    order = [platform.batches.index(batch) for batch in platform.deliveries]
    gaps = {
        order.index(batch) - (len(order) - 1 - order[::-1].index(batch))
        for batch in range(len(platform.batches))
    }  # fmt: skip
    assert len(gaps) > 5


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (Kind.PRESENT, FileState.AVAILABLE),
        (Kind.SLOW, FileState.AVAILABLE),
        (Kind.REFUSES_HEAD, FileState.AVAILABLE),
        (Kind.FAILS_FIRST, FileState.AVAILABLE),
        (Kind.MISSING, FileState.UNAVAILABLE),
        (Kind.FAILED, FileState.UPLOAD_FAILED),
    ],
)
def test_every_kind_has_a_state_to_end_in(kind: Kind, state: FileState) -> None:
    assert EXPECTED[kind] is state


def test_recorded_responses_are_a_batch_of_their_own_with_the_queries_of_their_addresses() -> None:
    answers = answers_named("oss, s3")
    assert {answer.vendor for answer in answers} == {"oss", "s3"}
    *others, recorded = Platform(Plan(seed=7, batches=2, files=3, answers=answers)).batches
    assert [len(batch.files) for batch in others] == [3, 3]
    assert [file.answer for file in recorded.files.values()] == list(answers)
    addresses = {entry["target_url"] for entry in msgspec.json.decode(recorded.body(OBJECTS))["file_list"]}
    assert sum(1 for address in addresses if "?" in address) == sum(1 for answer in answers if answer.query)
    assert recorded.count(FileState.UNAVAILABLE) > 0


@pytest.mark.parametrize("names", ["oos", "oss,oos"])
def test_unknown_vendor_of_recorded_responses_is_refused_with_those_known(names: str) -> None:
    with pytest.raises(ValueError, match=r"--answers: no responses of oos are recorded: choose all, or from .*oss \("):
        answers_named(names)


@pytest.mark.parametrize(
    ("columns", "retried", "fault"),
    [
        ({}, False, None),
        ({"reason": "http_404"}, False, "oss, {name}: reason http_404, planted empty"),
        ({"state": "available", "reason": None}, False, "no reason given"),
        ({"state": "pending"}, True, None),
        ({"vendor_request_id": "other"}, False, "oss, {name}: vendor_request_id other, planted {id}"),
    ],
)
async def test_recorded_response_is_compared_with_what_was_found(
    tmp_path: Path, columns: dict[str, object], retried: bool, fault: str | None
) -> None:
    answer = next(each for each in answers_named("oss") if each.expect.reason == "empty")
    expect = msgspec.structs.replace(answer.expect, vendor_request_id="5F7C")
    plan = Plan(seed=7, batches=1, files=1, answers=(msgspec.structs.replace(answer, expect=expect),))
    platform = Platform(plan)
    write_record(tmp_path / "notify.db", platform)
    wanted: dict[str, object] = {"state": "unavailable", "reason": "empty", "vendor_request_id": "5F7C"} | columns
    with contextlib.closing(connect(tmp_path / "notify.db")) as connection:
        assignments = ", ".join(f"{name} = ?" for name in wanted)
        connection.execute(f"UPDATE file SET {assignments} WHERE batch = 2", tuple(wanted.values()))
    async with await RecordViews.open(tmp_path / "notify.db") as views:
        comparison = await compare(platform.batches, views, OBJECTS, Counter(file.key for file in platform.files))
    tally = comparison.files[Kind.RECORDED]
    assert (tally.as_expected, tally.retried) == (fault is None and not retried, retried)
    reasons = [each.reason for each in comparison.differences if each.planted == Kind.RECORDED]
    assert reasons == ([] if fault is None else [fault.format(name=answer.name, id="5F7C")])


# --- The object store ---


@contextlib.asynccontextmanager
async def origin(
    *files: PlantedFile, slow_seconds: float = 0.0
) -> AsyncIterator[tuple[ObjectStore, aiohttp.ClientSession]]:
    async with ObjectStore(slow_seconds=slow_seconds) as objects, aiohttp.ClientSession(objects.address) as session:
        objects.plant(files)
        yield objects, session


async def test_a_present_object_tells_head_what_it_is() -> None:
    file = of_kind(Kind.PRESENT)
    async with origin(file) as (_, session), session.head(file.key) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Length"] == str(file.size)
        assert answer.headers["Content-Type"] == CONTENT_TYPE
        assert answer.headers["ETag"]
        assert answer.headers["Last-Modified"]


async def test_a_present_object_is_served_whole() -> None:
    file = of_kind(Kind.PRESENT)
    async with origin(file) as (_, session), session.get(file.key) as answer:
        assert (answer.status, len(await answer.read())) == (200, file.size)


@pytest.mark.parametrize(("asked", "first", "last"), [("0-0", 0, 0), ("2-5", 2, 5), ("-1", 99, 99), ("90-", 90, 99)])
async def test_a_range_is_served_with_the_whole_length(asked: str, first: int, last: int) -> None:
    file = PlantedFile("a", Kind.PRESENT, 100)
    async with (
        origin(file) as (_, session),
        session.get(file.key, headers={"Range": f"bytes={asked}"}) as answer,
    ):
        assert (answer.status, answer.headers["Content-Range"]) == (206, f"bytes {first}-{last}/100")
        assert len(await answer.read()) == last - first + 1


@pytest.mark.parametrize("asked", ["100-", "rubbish"])
async def test_a_range_that_cannot_be_had_is_answered_416(asked: str) -> None:
    file = PlantedFile("a", Kind.PRESENT, 100)
    async with (
        origin(file) as (_, session),
        session.get(file.key, headers={"Range": f"bytes={asked}"}) as answer,
    ):
        assert (answer.status, answer.headers["Content-Range"]) == (416, "bytes */100")


async def test_a_missing_object_is_missing_for_ever() -> None:
    file = of_kind(Kind.MISSING)
    async with origin(file) as (_, session):
        for method in ("HEAD", "GET", "HEAD"):
            async with session.request(method, file.key) as answer:
                assert answer.status == 404


async def test_an_object_that_is_not_planted_does_not_exist() -> None:
    async with origin() as (_, session), session.head("what") as answer:
        assert answer.status == 404


@pytest.mark.parametrize("status", [403, 405])
async def test_an_object_that_refuses_head_answers_a_ranged_get(status: int) -> None:
    file = PlantedFile("a", Kind.REFUSES_HEAD, 10, status)
    async with origin(file) as (_, session):
        async with session.head(file.key) as answer:
            assert answer.status == status
        async with session.get(file.key, headers={"Range": "bytes=0-0"}) as answer:
            assert answer.status == 206


@pytest.mark.parametrize("failures", [1, 2])
async def test_an_object_that_fails_at_first_is_there_afterwards(failures: int) -> None:
    file = PlantedFile("a", Kind.FAILS_FIRST, 10, 503, failures)
    async with origin(file) as (_, session):
        seen = []
        for _ in range(4):
            async with session.head(file.key) as answer:
                seen.append(answer.status)
    assert seen == [503] * failures + [200] * (4 - failures)


async def test_a_slow_object_answers_late() -> None:
    file = of_kind(Kind.SLOW)
    async with origin(file, slow_seconds=0.05) as (_, session):
        started = asyncio.get_running_loop().time()
        async with session.head(file.key) as answer:
            assert answer.status == 200
        assert asyncio.get_running_loop().time() - started >= 0.05


async def test_requests_are_counted_for_each_object() -> None:
    files = [PlantedFile("a/1", Kind.PRESENT, 10), PlantedFile("a/2", Kind.MISSING, 10, 404)]
    async with origin(*files) as (objects, session):
        for key in ("a/1", "a/1", "a/2"):
            async with session.head(key):
                pass
        assert objects.requests == {"a/1": 2, "a/2": 1}


# --- Delivery ---

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def endpoint(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/notify", handler)
    server = TestServer(app, scheme="https" if tls else "http")
    await server.start_server(ssl=tls)
    try:
        yield str(server.make_url("/notify"))
    finally:
        await server.close()


async def test_every_delivery_is_posted_once_and_its_ack_timed() -> None:
    bodies = []

    async def ack(request: web.Request) -> web.Response:
        assert request.content_type == "application/json"
        bodies.append(await request.read())
        return web.json_response({"code": "000"})

    platform = Platform(PLAN)
    async with endpoint(ack) as url:
        await platform.deliver(url, OBJECTS)
    assert sorted(bodies) == sorted(planted(PLAN))
    assert (platform.posted, platform.acked, platform.repeated) == (6, 6, 0)
    assert all(latency > 0 for latency in platform.latencies_ms)


async def test_a_redelivery_is_identical_to_the_byte() -> None:
    bodies = Counter[bytes]()

    async def ack(request: web.Request) -> web.Response:
        bodies[await request.read()] += 1
        return web.Response()

    async with endpoint(ack) as url:
        await Platform(PLAN).deliver(url, OBJECTS)
    assert Counter(bodies.values()) == {1: 2, 2: 2}


async def test_the_token_goes_into_the_authorization_header() -> None:
    seen = set()

    async def ack(request: web.Request) -> web.Response:
        seen.add(request.headers.get("Authorization"))
        return web.Response()

    async with endpoint(ack) as url:
        await Platform(PLAN).deliver(url, OBJECTS, token="sesame-open")
        await Platform(PLAN).deliver(url, OBJECTS)
    assert seen == {"Bearer sesame-open", None}


async def test_no_more_posts_are_under_way_than_allowed() -> None:
    under_way = most = 0
    full = asyncio.Event()

    async def ack(request: web.Request) -> web.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if under_way == 3:
            full.set()
        await full.wait()
        under_way -= 1
        return web.Response()

    async with endpoint(ack) as url:
        await Platform(Plan(seed=1, batches=30, files=1)).deliver(url, OBJECTS, concurrency=3)
    assert most == 3


async def test_a_rate_spreads_the_posts() -> None:
    moments = []

    async def ack(request: web.Request) -> web.Response:
        moments.append(asyncio.get_running_loop().time())
        return web.Response()

    async with endpoint(ack) as url:
        started = asyncio.get_running_loop().time()
        await Platform(Plan(seed=1, batches=5, files=1)).deliver(url, OBJECTS, rate=50)
    # A post may be late, never early; timers count in milliseconds.
    assert moments[-1] - started >= 4 / 50 - 0.002


@pytest.mark.parametrize("trouble", [503, 429, "cut off"])
async def test_a_notification_that_is_not_acked_is_posted_again(trouble: int | str) -> None:
    posts = Counter[bytes]()

    async def ack(request: web.Request) -> web.Response:
        body = await request.read()
        posts[body] += 1
        if posts[body] > 2:
            return web.Response()
        if isinstance(trouble, str):
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return web.Response(status=trouble, headers={"Retry-After": "0"})

    platform = Platform(Plan(seed=1, batches=3, files=1), retry_waits=(0.0, 0.0))
    async with endpoint(ack) as url:
        await platform.deliver(url, OBJECTS)
    assert list(posts.values()) == [3, 3, 3]
    assert (platform.posted, platform.acked, platform.repeated) == (3, 3, 6)


async def test_a_batch_that_is_never_taken_is_given_up() -> None:
    async def busy(request: web.Request) -> web.Response:
        return web.Response(status=503, text="later,\nplease")

    async with endpoint(busy) as url:
        with pytest.raises(SimulationError, match=r"/notify answers 503: later, please: gave up on batch [0-9a-f]{32}"):
            await Platform(PLAN, retry_waits=(0.0, 0.0)).deliver(url, OBJECTS)


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413])
async def test_a_refusal_is_final(status: int) -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=status, text="no", headers={"Location": "/notify"})

    platform = Platform(PLAN)
    async with endpoint(refuse) as url:
        with pytest.raises(SimulationError, match=f"answers {status}: no"):
            await platform.deliver(url, OBJECTS)
    assert platform.repeated == 0


async def test_a_daemon_of_ones_own_is_trusted_by_its_certificate_alone(tmp_path: Path) -> None:
    async def ack(request: web.Request) -> web.Response:
        return web.Response()

    certificate = trustme.CA().issue_cert("notify.example.com")
    path = tmp_path / "certificate.pem"
    certificate.cert_chain_pems[0].write_to_path(str(path))
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(served)
    platform = Platform(Plan(seed=1, batches=1, files=1))
    async with endpoint(ack, served) as url:
        await platform.deliver(url, OBJECTS, tls=trust_only(path))
    assert platform.acked == 1


# --- The comparison ---


def write_record(path: Path, platform: Platform) -> None:
    """The record as it should be once all is settled."""
    with contextlib.closing(connect(path)) as connection:
        for number, batch in enumerate(platform.batches, start=1):
            states = Counter(file.expected for file in batch.files.values())
            verdict = Verdict.COMPLETE if states[FileState.AVAILABLE] == len(batch.files) else Verdict.INCOMPLETE
            connection.execute(
                "INSERT INTO batch (id, batch_id, api_code, first_received_at, last_received_at, verdict, completed_at,"
                " files, available, unavailable, upload_failed) VALUES (?, ?, ?, 0, 0, ?, 9, ?, ?, ?, ?)",
                (
                    number,
                    batch.batch_id,
                    batch.api_code,
                    verdict,
                    len(batch.files),
                    states[FileState.AVAILABLE],
                    states[FileState.UNAVAILABLE],
                    states[FileState.UPLOAD_FAILED],
                ),
            )
            for file in batch.files.values():
                failed, available = file.kind is Kind.FAILED, file.expected is FileState.AVAILABLE
                connection.execute(
                    "INSERT INTO file (batch, oss_object_name, target_url, host, reported_status, state, reason,"
                    " content_length, content_type, verified_at) VALUES (?, ?, ?, '', ?, ?, ?, ?, ?, 1000)",
                    (
                        number,
                        file.key,
                        OBJECTS + file.path,
                        "FAILED" if failed else "FINISHED",
                        file.expected,
                        "http_404" if file.kind is Kind.MISSING else None,
                        file.size if available else None,
                        CONTENT_TYPE if available else None,
                    ),
                )


class Played:
    """A record as planted, to be changed, and what comparing it then gives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.platform = Platform(PLAN)
        self.requests = Counter(file.key for file in self.platform.files if file.kind is not Kind.FAILED)
        write_record(path, self.platform)

    def change(self, statement: str, *parameters: object) -> None:
        with contextlib.closing(sqlite3.connect(self.path)) as connection, connection:
            assert connection.execute(statement, parameters).rowcount >= 1

    def change_file(self, file: PlantedFile, **columns: object) -> None:
        assignments = ", ".join(f"{column} = ?" for column in columns)
        self.change(f"UPDATE file SET {assignments} WHERE oss_object_name = ?", *columns.values(), file.key)

    def compare(self) -> Comparison:
        async def compared() -> Comparison:
            async with await RecordViews.open(self.path) as record:
                return await compare(self.platform.batches, record, OBJECTS, self.requests)

        return asyncio.run(compared())

    def shown(self) -> tuple[int, str]:
        """The exit code and the output."""
        report = Report(self.compare(), 6, 6, 0, 1.0, 2.0, 3.0, 32, 16.0, 32, 2.0, False)
        text = io.StringIO()
        return show(report, Console(file=text, width=200)), text.getvalue()


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return Played(tmp_path / "notify.db")


def test_a_record_that_is_as_planted_has_no_differences(played: Played) -> None:
    comparison = played.compare()
    assert not comparison.different
    assert comparison.differences == []
    assert comparison.files[Kind.PRESENT] == Tally(12, 12, 0, 0)
    assert sum(tally.as_expected for tally in comparison.files.values()) == 40
    assert comparison.batches == Tally(4, 4, 0, 0)
    assert comparison.verified_at == [1.0] * 32


def test_a_record_that_is_as_planted_exits_0(played: Played) -> None:
    code, text = played.shown()
    assert code == 0
    assert "Everything is as planted." in text
    for kind in EXPECTED:
        assert kind in text


@pytest.mark.parametrize(
    ("kind", "columns", "state", "reason"),
    [
        (Kind.PRESENT, {"state": "unavailable", "reason": "timeout"}, "unavailable", "timeout"),
        (Kind.PRESENT, {"state": "pending", "reason": None}, "pending", "no reason given"),
        (Kind.PRESENT, {"content_length": 1}, "available", "content_length 1, planted {size}"),
        (Kind.PRESENT, {"content_type": "text/html"}, "available", "content_type text/html, planted image/jpeg"),
        (Kind.PRESENT, {"reason": "http_200"}, "available", "reason http_200, planted None"),
        (Kind.PRESENT, {"target_url": "http://else/"}, "available", "target_url http://else/"),
        (Kind.SLOW, {"state": "pending", "reason": "timeout"}, "pending", "timeout"),
        (Kind.REFUSES_HEAD, {"state": "unavailable", "reason": "http_405"}, "unavailable", "http_405"),
        (Kind.REFUSES_HEAD, {"content_length": None}, "available", "content_length None, planted {size}"),
        (Kind.FAILS_FIRST, {"state": "pending", "reason": "http_503"}, "pending", "http_503"),
        (Kind.MISSING, {"state": "available", "reason": None}, "available", "no reason given"),
        (Kind.MISSING, {"reason": "http_403"}, "unavailable", "reason http_403"),
        (Kind.MISSING, {"state": "pending", "reason": "timeout"}, "pending", "timeout"),
        (Kind.FAILED, {"state": "available"}, "available", "no reason given"),
        (Kind.FAILED, {"state": "pending"}, "pending", "no reason given"),
    ],
)
def test_a_file_that_differs_is_reported(
    played: Played, kind: Kind, columns: dict[str, object], state: str, reason: str
) -> None:
    file = of_kind(kind)
    played.change_file(file, **columns)
    comparison = played.compare()
    assert comparison.differences == [
        Difference(file.key, kind, EXPECTED[kind], state, reason.format(size=file.size))
    ]  # fmt: skip
    assert comparison.files[kind].different == 1
    assert comparison.files[kind].as_expected == comparison.files[kind].planted - 1


def test_a_planted_difference_is_shown_and_exits_1(played: Played) -> None:
    file = of_kind(Kind.PRESENT)
    played.change_file(file, state="unavailable", reason="timeout")
    code, text = played.shown()
    assert code == 1
    (line,) = [line for line in text.splitlines() if file.key in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        file.key, "present", "available", "unavailable", "timeout",
    ]  # fmt: skip
    assert "1 of 40 files and 1 of 4 batches differ." in text


def test_a_file_that_is_not_in_the_record_is_reported(played: Played) -> None:
    file = of_kind(Kind.PRESENT)
    played.change("DELETE FROM file WHERE oss_object_name = ?", file.key)
    assert played.compare().differences == [Difference(file.key, "present", "available", "not in the record", "")]


def test_a_batch_that_is_not_in_the_record_is_reported_file_by_file(played: Played) -> None:
    first = played.platform.batches[0]
    played.change("DELETE FROM file WHERE batch = 1")
    played.change("DELETE FROM batch WHERE id = 1")
    comparison = played.compare()
    assert {difference.key for difference in comparison.differences} == set(first.files)
    assert comparison.batches == Tally(4, 3, 0, 1)


def test_a_file_that_was_never_planted_is_reported_with_its_batch(played: Played) -> None:
    first = played.platform.batches[0]
    played.change("INSERT INTO file (batch, oss_object_name, host, reported_status, state) "
                  "VALUES (1, 'stray', '', 'FAILED', 'upload_failed')")  # fmt: skip
    played.change("UPDATE batch SET files = files + 1, upload_failed = upload_failed + 1 WHERE id = 1")
    assert played.compare().differences == [
        Difference(first.batch_id, "batch", "10 files", "11 files", "not as planted")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "state", "reason"),
    [
        ("verdict = 'complete'", "complete", "wrong verdict"),
        ("verdict = 'pending'", "pending", "wrong verdict"),
        (
            "available = available - 1, unavailable = unavailable + 1",
            "incomplete",
            "says {available} available, its files say {more}",
        ),
    ],
)
def test_a_batch_that_differs_though_its_files_do_not_is_reported(
    played: Played, change: str, state: str, reason: str
) -> None:
    first = played.platform.batches[0]
    more = first.count(FileState.AVAILABLE)
    played.change(f"UPDATE batch SET {change} WHERE id = 1")
    # A verdict that is only late, with nothing left to wait for, is seen as well.
    if state == "pending":
        played.change("UPDATE batch SET available = available - 1, pending = pending + 1 WHERE id = 1")
        reason = "1 files pending"
    assert played.compare().differences == [
        Difference(first.batch_id, "batch", "incomplete", state, reason.format(available=more - 1, more=more))
    ]


def test_a_file_reported_failed_must_not_have_been_requested(played: Played) -> None:
    file = of_kind(Kind.FAILED)
    played.requests[file.key] = 2
    assert [difference.reason for difference in played.compare().differences] == [
        "reported FAILED, yet requested 2 times"
    ]


def test_a_file_reported_available_must_have_been_requested(played: Played) -> None:
    del played.requests[of_kind(Kind.PRESENT).key]
    assert [difference.reason for difference in played.compare().differences] == ["never requested"]


def test_missing_files_may_still_be_retried(played: Played) -> None:
    played.change("UPDATE file SET state = 'pending' WHERE reason = 'http_404'")
    played.change(
        "UPDATE batch SET verdict = 'pending', pending = unavailable, unavailable = 0, completed_at = NULL "
        "WHERE unavailable > 0"
    )
    comparison = played.compare()
    assert not comparison.different
    assert comparison.files[Kind.MISSING] == Tally(4, 0, 4, 0)
    assert comparison.batches.retried > 0
    code, text = played.shown()
    assert code == 0
    assert "still being retried" in text


def test_only_the_first_differences_are_listed_and_all_are_counted(played: Played) -> None:
    played.change("UPDATE file SET state = 'unavailable', reason = 'timeout' WHERE state = 'available'")
    comparison = played.compare()
    assert (len(comparison.differences), comparison.different_files) == (10, 28)
    _, text = played.shown()
    assert "The first 10 differences" in text
    assert "28 of 40 files and 4 of 4 batches differ." in text


@pytest.mark.parametrize("reason", ["private_address", "port_not_allowed"])
def test_a_daemon_that_refuses_loopback_gets_an_error_naming_the_setting(played: Played, reason: str) -> None:
    played.change_file(of_kind(Kind.PRESENT), state="blocked", reason=reason)
    code, text = played.shown()
    assert code == 1
    (hint,) = [line for line in text.splitlines() if "allowed_networks" in line]
    assert '[verify] allowed_networks = ["127.0.0.0/8"] and allowed_ports = []' in hint


def test_what_a_daemon_says_is_shown_as_text_not_as_markup(played: Played) -> None:
    played.change_file(of_kind(Kind.PRESENT), state="unavailable", reason="[red]x[/red]")
    assert "[red]x[/red]" in played.shown()[1]


# --- Reading the record ---


async def test_opening_a_missing_record_is_refused_and_creates_no_file(tmp_path: Path) -> None:
    with pytest.raises(StoreRefusedError, match="there is no record"):
        await RecordViews.open(tmp_path / "notify.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a database, and longer than a header of one hundred bytes" * 9])
async def test_opening_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notify.db"
    path.write_bytes(content)
    with pytest.raises(StoreRefusedError, match=r"notify\.db: "):
        await RecordViews.open(path)


async def test_a_record_whose_path_looks_like_a_uri_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "a?mode=rw#%41 b.db"
    connect(path).close()
    async with await RecordViews.open(path) as record:
        assert await record.last_delivery() == 0


@pytest.mark.parametrize("statement", ["DELETE FROM file", "PRAGMA user_version = 9", "CREATE TABLE x (y)"])
async def test_a_statement_that_writes_is_refused(played: Played, statement: str) -> None:
    async with await RecordViews.open(played.path) as record:
        with pytest.raises(StoreUnavailableError, match="readonly"):
            await record.first_rows(statement, 1)


async def test_rows_are_read_in_chunks(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [(batch.batch_id, batch.api_code) for batch in played.platform.batches]

    async def everything() -> tuple[object, list[list[FileRow]]]:
        files = [[row async for row in record.files(*batch)] for batch in batches]
        return await record.batches(batches), files

    async with await RecordViews.open(played.path) as record:
        whole = await everything()
        monkeypatch.setattr(simulator_record, "CHUNK_BATCHES", 3)
        monkeypatch.setattr(simulator_record, "CHUNK_FILES", 5)
        assert await everything() == whole
    assert [len(rows) for rows in whole[1]] == [10] * 4


def test_the_queries_scan_no_table(played: Played) -> None:
    with contextlib.closing(sqlite3.connect(played.path)) as connection:
        summaries = simulator_record._SUMMARIES.replace(":rows", "(?, ?), (?, ?)")
        for query, parameters in ((summaries, "abcd"), (simulator_record._RESULTS, (*"abc", 1))):
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", tuple(parameters))]
            assert not [step for step in plan if step.startswith(("SCAN batch", "SCAN file"))], plan


async def test_no_transaction_is_held_between_reads(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_record, "CHUNK_FILES", 5)
    batch = played.platform.batches[0]
    record = await RecordViews.open(played.path)
    async with record:
        rows = record.files(batch.batch_id, batch.api_code)
        await anext(rows)
        await record.first_rows("SELECT * FROM file_result", 1)
        with contextlib.closing(sqlite3.connect(played.path, timeout=0)) as writer:
            with writer:
                writer.execute("UPDATE batch SET deliveries = 9")
            # Only without any reader can the whole WAL go.
            assert writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        assert len([row async for row in rows]) == 9


async def test_a_delivery_counts_as_expanded_once_it_is_or_has_been_pruned(tmp_path: Path) -> None:
    path = tmp_path / "notify.db"
    with contextlib.closing(connect(path)) as connection:
        for id, expanded_at in ((1, 5), (2, None)):
            connection.execute(
                "INSERT INTO notification (id, batch_id, api_code, received_at, remote_addr, signature, request_id,"
                " files, expanded_at, body) VALUES (?, '', '', 0, '', '', '', 0, ?, '')",
                (id, expanded_at),
            )
        async with await RecordViews.open(path) as record:
            assert await record.last_delivery() == 2
            assert [await record.expanded(delivery) for delivery in (1, 2)] == [True, False]
            # Pruned: it was expanded before that.
            assert await record.expanded(99)


# --- Figures and options ---


def test_percentiles_are_values_that_were_measured() -> None:
    assert [percentile([1.0, 2.0, 3.0, 4.0], share) for share in (0.5, 0.99, 1.0)] == [2.0, 4.0, 4.0]
    assert percentile(list(map(float, range(1, 101))), 0.99) == 99.0
    assert percentile([], 0.5) == 0.0


def test_the_busiest_second_is_any_second_not_one_of_the_clocks() -> None:
    assert busiest_second([0.0, 0.9, 1.1, 1.8, 1.9, 5.0]) == 4
    assert busiest_second([]) == 0


def options(**given: object) -> Options:
    defaults: dict[str, object] = {
        "config": None, "url": None, "store": None, "own_daemon": False, "keep": None,
        "rate": 0.0, "slow_seconds": 1.0, "timeout": 1.0, "settle": 1.0,
    }  # fmt: skip
    return Options(**(defaults | given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"own_daemon": True, "url": "http://a/b"}, "leave out --url"),
        ({"own_daemon": True, "config": Path("a"), "store": Path("b")}, "leave out --config, --store"),
        ({"keep": Path("a")}, "give both"),
        ({"url": "a/b"}, "--url must be an absolute http or https address, not 'a/b'"),
        ({"url": "ftp://a/b"}, "--url must be an absolute"),
        ({"url": "http://a:port/"}, "--url must be an absolute"),
    ],
)
def test_options_that_contradict_each_other_are_refused(given: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        options(**given)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8080/notify"),
        ("0.0.0.0", "http://127.0.0.1:8080/notify"),
        ("::", "http://127.0.0.1:8080/notify"),
        ("fd00::1", "http://[fd00::1]:8080/notify"),
        ("notify.internal", "http://notify.internal:8080/notify"),
    ],
)
def test_the_address_is_the_configurations(host: str, url: str) -> None:
    assert configured(Config(server=ServerConfig(host=host)), options()).url == url


def test_the_record_and_the_token_are_the_configurations() -> None:
    config = Config(
        auth=AuthConfig.model_validate({"callback_token": "sesame-open"}),
        store=StoreConfig(url="sqlite:////var/lib/notify.db"),
    )
    daemon = configured(config, options())
    assert (daemon.record, daemon.token) == (Path("/var/lib/notify.db"), "sesame-open")


def test_arguments_take_precedence_over_the_configuration() -> None:
    daemon = configured(Config(), options(url="https://a/b", store=Path("c.db")))
    assert (daemon.url, daemon.record, daemon.tls) == ("https://a/b", Path("c.db"), True)


def test_any_free_port_is_no_address() -> None:
    with pytest.raises(SimulationError, match="--url"):
        configured(Config(server=ServerConfig(port=0)), options())


def test_a_certificate_in_the_configuration_makes_the_address_https(tmp_path: Path) -> None:
    certificate = trustme.CA().issue_cert("localhost")
    paths = [tmp_path / "certificate.pem", tmp_path / "key.pem"]
    certificate.cert_chain_pems[0].write_to_path(str(paths[0]))
    certificate.private_key_pem.write_to_path(str(paths[1]))
    daemon = configured(Config(server=ServerConfig(ssl_certificate=paths[0], ssl_key=paths[1])), options())
    assert daemon.url.startswith("https://127.0.0.1")
    assert isinstance(daemon.tls, ssl.SSLContext)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--missing", "0.7", "--slow", "0.7"], "the shares of files come to"),
        (["--missing", "1.5"], "--missing"),
        (["--batches", "0"], "--batches"),
        (["--keep", "x"], "--own-daemon"),
        (["--own-daemon", "--url", "http://a/"], "--url"),
        (["--url", "nowhere"], "absolute"),
    ],
)
def test_bad_options_exit_2_and_say_which(arguments: list[str], problem: str) -> None:
    end = CliRunner().invoke(app, ["simulate", *arguments])
    assert (end.exit_code, end.stdout) == (2, "")
    assert problem in end.stderr


def test_a_bad_configuration_exits_2_with_a_line_for_the_key(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text("[server]\nport = 99999\n")
    with pytest.raises(SystemExit) as end:
        run(Plan(seed=1), options(config=tmp_path / "bad.toml"))
    assert end.value.code == 2
    assert capfd.readouterr() == ("", "[server] port: must be from 0 to 65535, not 99999\n")


def test_an_unreachable_daemon_is_reported_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/notify"
    with pytest.raises(SystemExit) as end:
        run(Plan(seed=1), options(url=url))
    assert end.value.code == 1
    assert capfd.readouterr() == (
        "seed 1\n",
        f"notify_server: {url}: cannot be reached (Connection refused): "
        "start the daemon, or name its address with --url\n",
    )


def test_an_unusable_directory_is_reported_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        run(Plan(seed=1), options(own_daemon=True, keep=tmp_path / "file"))
    assert end.value.code == 1
    problem = f"notify_server: {tmp_path}/file: cannot be used (File exists): name another with --keep\n"
    assert capfd.readouterr().err == problem


# Receivers


def event(batch_id: str, revision: int, verdict: str) -> bytes:
    return json.dumps({"data": {"batch_id": batch_id, "revision": revision, "verdict": verdict}}).encode()


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        ([("k1", 1, "complete")], None),
        ([("k1", 1, "incomplete"), ("k2", 2, "complete")], None),
        ([], "1 batches are missing"),
        ([("k1", 1, "incomplete")], "another verdict than planted"),
        ([("k2", 2, "complete"), ("k1", 1, "incomplete")], "1 events came after a newer one of the same batch"),
        ([("k1", 1, "complete"), ("k1", 1, "complete")], "1 events came a second time, though it was accepted"),
        ([("unsigned", 1, "complete"), ("k1", 1, "complete")], "1 events came with a wrong signature"),
    ],
)
async def test_receiver_reports_events_that_differ_from_the_plan(
    events: list[tuple[str, int, str]], fault: str | None
) -> None:
    expected = {"b": Verdict.COMPLETE}
    async with Receivers([Behaviour.STEADY]) as receivers, aiohttp.ClientSession() as session:
        (table,) = receivers.tables()
        for key, revision, verdict in events:
            body, now = event("b", revision, verdict), datetime.now(UTC)
            signature = "v1,no" if key == "unsigned" else Webhook(receivers.secret).sign(key, now, body.decode())
            headers = {
                "webhook-id": key,
                "webhook-timestamp": str(int(now.timestamp())),
                "webhook-signature": signature,
            }
            async with session.post(table["url"], data=body, headers=headers) as answer:
                assert await answer.json() == {"code": "000"}
        await receivers.settled(expected, 0.01)
        (tally,) = receivers.compare(expected, [])
        assert tally.fault == fault
        (tally,) = receivers.compare(expected, ["steady"])
        assert tally.fault == "is stopped"


async def test_gone_receiver_must_have_been_stopped() -> None:
    async with Receivers([Behaviour.GONE]) as receivers:
        expected = {"b": Verdict.COMPLETE}
        assert [each.fault for each in receivers.compare(expected, [])] == ["answered 410 and is not stopped"]
        assert [each.fault for each in receivers.compare(expected, ["gone"])] == [None]


def test_unknown_receiver_is_named() -> None:
    with pytest.raises(ValueError, match="--receivers: stedy is not a receiver, did you mean steady"):
        receivers_named("slow,stedy")
    assert receivers_named("slow, steady,slow") == [Behaviour.SLOW, Behaviour.STEADY]
    assert receivers_named("") == []
