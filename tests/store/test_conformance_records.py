"""What a store tells of the record is what is in it: each answer is worked out once more, in plain Python, from the
tables.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notify_server.errors import StoreUnavailableError
from notify_server.model import FileState, Verdict
from notify_server.store.base import Engine, Expansion, NewFile
from notify_server.store.reading.types import (
    AttemptItem,
    BatchDetail,
    BatchFilter,
    BatchItem,
    DeliveryItem,
    FailureGroup,
    FileDetail,
    FileFilter,
    FileItem,
    Found,
    HostBacklog,
    Page,
    Records,
    RejectionDetail,
    RejectionItem,
)
from notify_server.store.reading.walk import MISSING
from tests.store.backends import Backend
from tests.store.builders import (
    API_CODE,
    NOW,
    again,
    blocked,
    claim_one,
    deliver,
    delivery,
    failed,
    finished,
    found,
    missing,
    rejection,
    request,
    settle,
    take_in,
)

T = TypeVar("T")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
HUGE = (2**63 - 1, 2**63, 2**64, 10**30, -(2**63) - 1, -(10**30))
HOSTS = ("a.example", "b.example:8443", "ü.example")
NAMES = (
    "plain",
    "100%",
    "1_0",
    "it's",
    'a "quote"',
    "批次/1.jpg",
    "e\u0301",
    "\u00e9",
    "\U0001f3e0",
    "back\\slash",
    " ",
)

# In order: id, batch_id, api_code, verdict, files, …
BATCHES = (
    "SELECT id, batch_id, api_code, verdict, files, pending, available, unavailable, blocked, upload_failed,"
    " deliveries, first_received_at, last_received_at, completed_at FROM batch"
)
FILES = (
    "SELECT file.id, file.batch, batch.batch_id, batch.api_code, oss_object_name, target_url, host, reported_status,"
    " state, reason, attempts, next_attempt_at, http_status, content_length, content_type, etag, last_modified,"
    " final_url, remote_addr, elapsed_ms, verified_at, vendor_request_id, vendor_code, expires_at, headers, flags"
    " FROM file JOIN batch ON batch.id = file.batch"
)
ATTEMPTS = (
    "SELECT id, started_at, method, url, http_status, reason, dns_ms, connect_ms, tls_ms, first_byte_ms, total_ms,"
    " remote_addr, vendor_request_id, vendor_code FROM attempt"
)
REJECTIONS = "SELECT id, received_at, remote_addr, code, detail, request_id, length(body) FROM rejection"


def moment(ms: int) -> datetime:
    return EPOCH + timedelta(milliseconds=ms)


def _read(name: str, value: Any) -> Any:
    if value is None:
        return [] if name == "flags" else None
    return (
        moment(value) if name.endswith("_at") else msgspec.json.decode(value) if name in ("headers", "flags") else value
    )


def items(kind: type[T], rows: Sequence[tuple[Any, ...]]) -> list[T]:
    """Rows of all columns of a type, with their times as times."""
    names: tuple[str, ...] = kind.__struct_fields__  # type: ignore[attr-defined]
    return [
        msgspec.convert(
            {name: _read(name, value) for name, value in zip(names, row, strict=False)},
            kind,
        )
        for row in rows
    ]


async def all_batches(backend: Backend) -> list[BatchItem]:
    """The latest first."""
    batches = items(BatchItem, await backend.rows(BATCHES))
    return sorted(batches, key=lambda batch: (batch.first_received_at, batch.id), reverse=True)


async def all_files(backend: Backend) -> list[FileItem]:
    return items(FileItem, await backend.rows(f"{FILES} ORDER BY file.id"))


async def take_in_much(store: Engine) -> None:
    """Batches of every verdict, files in every state and for many reasons, some of them at the same time."""
    chance = random.Random(5)
    for n in range(30):
        at = NOW + chance.randrange(20)
        item = await deliver(store, 4, batch_id=f"batch {n % 20}", received_at=at)
        files: list[NewFile] = []
        for name in chance.sample(NAMES, 4):
            url = f"https://host/{name}?{chance.randrange(3)}"
            kind = chance.choice((finished, finished, finished, failed, blocked))
            files.append(
                finished(name, url=url, host=chance.choice(HOSTS)) if kind is finished else kind(name, url=url)
            )
        await store.expand([Expansion(item, f"batch {n % 20}", chance.choice(("x", "y")), files, True)], at)
        results = []
        for file in await store.claim([(host, 2) for host in HOSTS], at):
            reason = chance.choice(("timeout", "dns_error", "http_404"))
            requests = tuple(request(started_at=at + m, reason=reason) for m in range(chance.randrange(4)))
            match chance.choice(("found", "found", "missing", "again")):
                case "found":
                    results.append(found(file, requests=requests))
                case "missing":
                    results.append(missing(file, requests=requests))
                case _:
                    results.append(again(file, at + chance.randrange(3), reason=reason, requests=requests))
        await store.record(results, at)
    for n in range(5):
        await take_in(store, batch_id=f"empty {n}", received_at=NOW + n, now=NOW + n)
    refused = [rejection(received_at=NOW + n, body=b"x" * n, code=str(400 + n), detail=f"签名 {n}") for n in range(15)]
    await asyncio.gather(*map(store.reject, refused))


@pytest.fixture
async def much(store: Engine, backend: Backend) -> Records:
    await take_in_much(store)
    return await backend.records()


async def walk(call: Callable[[str | None], Awaitable[Page[T]]], limit: int) -> list[T]:
    """Everything on all pages."""
    seen: list[T] = []
    cursor: str | None = None
    while True:
        page = await call(cursor)
        assert len(page.items) <= limit
        seen += page.items
        if page.next is None:
            return seen
        assert page.next != cursor
        cursor = page.next


# Listings


def batch_filters() -> list[BatchFilter]:
    values = product((None, *Verdict), (None, "x", "nowhere"), (None, "batch 7"), (None, NOW + 5), (None, NOW + 9))
    return [BatchFilter(*each) for each in values]


def batch_wanted(batch: BatchItem, wanted: BatchFilter) -> bool:
    return (
        wanted.verdict in (None, batch.verdict)
        and wanted.api_code in (None, batch.api_code)
        and wanted.batch_id in (None, batch.batch_id)
        and (wanted.received_from is None or batch.first_received_at >= moment(wanted.received_from))
        and (wanted.received_before is None or batch.first_received_at < moment(wanted.received_before))
    )


@pytest.mark.parametrize("walked", [2, 7, 50_000])
async def test_batches_are_the_latest_first_each_once_with_any_filter_and_page_size(
    much: Records, backend: Backend, monkeypatch: pytest.MonkeyPatch, walked: int
) -> None:
    backend.walk(monkeypatch, walked)
    every = await all_batches(backend)
    assert {batch.verdict for batch in every} == set(Verdict)
    for wanted in batch_filters():
        expected = [batch for batch in every if batch_wanted(batch, wanted)]
        for limit in (1, 3, 1000):
            assert await walk(lambda cursor: much.batches(wanted, cursor, limit), limit) == expected, wanted  # noqa: B023


def file_filters(batch: int) -> list[FileFilter]:
    reasons = (None, "timeout", "http_410", "private_address", "nothing")
    hosts = (None, HOSTS[0], "127.0.0.1", "nowhere")
    return [FileFilter(*each) for each in product((None, batch), (None, *FileState), reasons, hosts)]


def file_wanted(file: FileItem, wanted: FileFilter) -> bool:
    return (
        wanted.batch in (None, file.batch)
        and wanted.state in (None, file.state)
        and wanted.reason in (None, file.reason)
        and wanted.host in (None, file.host)
    )


def file_order(wanted: FileFilter) -> Callable[[FileItem], Any]:
    if wanted.batch is not None:
        return lambda file: file.oss_object_name.encode()
    if wanted.reason is not None:
        return lambda file: (file.host.encode(), file.state, file.id)
    if wanted.state is FileState.PENDING:
        return lambda file: (file.host.encode(), file.next_attempt_at, file.id)
    if wanted.state in MISSING:
        return lambda file: (file.host.encode(), file.id)
    return lambda file: file.id


@pytest.mark.parametrize("walked", [2, 7, 50_000])
async def test_files_come_in_order_each_once_with_any_filter_and_page_size(
    much: Records, backend: Backend, monkeypatch: pytest.MonkeyPatch, walked: int
) -> None:
    backend.walk(monkeypatch, walked)
    every = await all_files(backend)
    assert {file.state for file in every} == set(FileState)
    for wanted in file_filters(every[0].batch):
        expected = sorted((file for file in every if file_wanted(file, wanted)), key=file_order(wanted))
        # Pages of one file are for when there are few.
        for limit in (1, 3, 1000) if len(expected) < 30 and walked > 2 else (5,):
            assert await walk(lambda cursor: much.files(wanted, cursor, limit), limit) == expected, wanted  # noqa: B023
        assert await much.count(wanted) == len(expected), wanted


async def test_rejections_are_the_latest_first_each_once_however_few_at_a_time(much: Records, backend: Backend) -> None:
    expected = items(RejectionItem, await backend.rows(f"{REJECTIONS} ORDER BY id DESC"))
    assert len(expected) == 15
    for limit in (1, 2, 14, 15, 16, 1000):
        assert await walk(lambda cursor: much.rejections(cursor, limit), limit) == expected  # noqa: B023


async def test_what_was_there_at_the_start_is_on_the_pages_once_while_more_is_added(
    store: Engine, much: Records, backend: Backend
) -> None:
    at = NOW + 100

    async def more() -> None:
        nonlocal at
        at += 1
        await take_in(store, finished("0"), finished("~"), blocked("m"), batch_id=f"{at}", received_at=at, now=at)
        await take_in(store, finished("1"), batch_id="batch 1", received_at=at, now=at)
        await store.reject(rejection(received_at=at))

    async def seen(call: Callable[[str | None], Awaitable[Page[Any]]]) -> list[int]:
        async def page(cursor: str | None) -> Page[Any]:
            await more()
            return await call(cursor)

        return [item.id for item in await walk(page, 3)]

    batch = (await all_batches(backend))[0].id
    listings: list[Callable[[str | None], Awaitable[Page[Any]]]] = [
        lambda cursor: much.batches(BatchFilter(received_before=NOW + 100), cursor, 3),
        lambda cursor: much.batches(BatchFilter(), cursor, 3),
        lambda cursor: much.files(FileFilter(batch=batch), cursor, 3),
        lambda cursor: much.files(FileFilter(reason="private_address"), cursor, 3),
        lambda cursor: much.rejections(cursor, 3),
    ]
    for call in listings:
        before = [item.id for item in await walk(call, 3)]
        while_added = await seen(call)
        assert len(set(while_added)) == len(while_added)
        assert [id for id in while_added if id in before] == before


# Cursors

ALL_LISTINGS: dict[str, Callable[[Records, str | None], Awaitable[Page[Any]]]] = {
    "batches": lambda records, cursor: records.batches(BatchFilter(), cursor, 1),
    "files": lambda records, cursor: records.files(FileFilter(), cursor, 1),
    "files of a batch": lambda records, cursor: records.files(FileFilter(batch=1), cursor, 1),
    "files that fail": lambda records, cursor: records.files(FileFilter(reason="private_address"), cursor, 1),
    "files that wait": lambda records, cursor: records.files(FileFilter(state=FileState.PENDING), cursor, 1),
    "rejections": lambda records, cursor: records.rejections(cursor, 1),
}


async def page_or_refusal(call: Awaitable[Page[Any]]) -> Page[Any] | None:
    try:
        return await call
    except ValueError as error:
        assert str(error) == "cursor: is not one that was given out, begin again without it"
        return None


@pytest.mark.parametrize("listing", ALL_LISTINGS)
async def test_a_cursor_that_is_not_one_of_ours_is_refused_in_one_line(records: Records, listing: str) -> None:
    for cursor in ("", " ", "1", "zz", "00", "5b5d", "5b", "7b7d", "nonsense", "٣٣", "\ud800", "6e756c6c", "f" * 2000):
        assert await page_or_refusal(ALL_LISTINGS[listing](records, cursor)) is None


async def test_a_cursor_of_another_listing_is_refused_or_taken_for_a_place_in_this_one(much: Records) -> None:
    for call, (name, other) in product(ALL_LISTINGS.values(), ALL_LISTINGS.items()):
        cursor = (await other(much, None)).next
        assert cursor is not None, name
        page = await page_or_refusal(call(much, cursor))
        assert page is not None if call is other else page is None or len(page.items) <= 1


def test_no_cursor_at_all_makes_a_listing_fail(new_backend: Callable[[], Backend]) -> None:
    keys = st.lists(
        st.one_of(st.integers(), st.text(), st.booleans(), st.none(), st.floats(allow_nan=False)), max_size=4
    )
    texts = st.one_of(st.text(), keys.map(lambda keys: msgspec.json.encode(keys).hex()), st.binary().map(bytes.hex))
    with asyncio.Runner() as runner:
        backend = new_backend()
        store = runner.run(backend.open())
        runner.run(take_in(store, finished(), failed("a")))
        records = runner.run(backend.records())

        @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(sorted(ALL_LISTINGS)), texts)
        def check(listing: str, cursor: str) -> None:
            runner.run(page_or_refusal(ALL_LISTINGS[listing](records, cursor)))

        try:
            check()
        finally:
            runner.run(backend.close())


# Numbers


async def test_totals_and_groups_agree_with_the_tables(much: Records, backend: Backend) -> None:
    batches, files = await all_batches(backend), await all_files(backend)
    verdicts = Counter(batch.verdict for batch in batches)
    states = Counter(file.state for file in files)
    pending = [batch.first_received_at for batch in batches if batch.verdict is Verdict.PENDING]
    assert msgspec.structs.astuple(await much.totals()) == (
        len(batches),
        *(verdicts[verdict] for verdict in Verdict),
        len(files),
        *(states[state] for state in FileState),
        15,
        min(pending),
    )
    failing = Counter(
        (file.reason, file.host, file.state)
        for file in files
        if file.reason is not None or file.state is FileState.UPLOAD_FAILED
    )
    failures = [FailureGroup(reason, host, state, n, n) for (reason, host, state), n in failing.items()]
    failures.sort(key=lambda group: (-group.files, group.reason or "", group.host.encode(), group.state))
    assert len(failures) > 5
    waiting: dict[str, list[datetime]] = {}
    for file in files:
        if file.next_attempt_at is not None:
            waiting.setdefault(file.host, []).append(file.next_attempt_at)
    backlog = [HostBacklog(host, len(times), min(times)) for host, times in waiting.items()]
    backlog.sort(key=lambda host: (-host.pending, host.host.encode()))
    assert len(backlog) == 3
    for limit in (1, 2, 1000):
        assert await much.failures(limit) == failures[:limit]
        assert await much.backlog(limit) == backlog[:limit]


async def test_an_empty_record_has_nothing_to_tell(records: Records) -> None:
    assert msgspec.structs.astuple(await records.totals()) == (*[0] * 11, None)
    for call in ALL_LISTINGS.values():
        assert await call(records, None) == Page([])
    assert await records.failures(9) == []
    assert await records.backlog(9) == []
    assert await records.search("", 9) == Found([], [])
    assert await records.count(FileFilter()) == 0


# One by one


async def test_one_batch_has_its_latest_delivery(store: Engine, records: Records, backend: Backend) -> None:
    traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    await take_in(store, finished("a"), received_at=NOW + 1, now=NOW + 1)
    item = await deliver(
        store, 2, received_at=NOW + 999, remote_addr="2001:db8::1", signature="9f86", request_id="r-2",
        traceparent=traceparent,
    )  # fmt: skip
    files = [finished("a"), failed("b")]
    await store.expand([Expansion(item, "batch", API_CODE, files[:1], False)], NOW)
    latest = DeliveryItem(item.id, moment(NOW + 999), "2001:db8::1", "9f86", "r-2", 2, traceparent)
    for _ in range(2):
        (batch,) = await all_batches(backend)
        assert await records.batch(batch.id) == BatchDetail(**msgspec.structs.asdict(batch), last_delivery=latest)
        await store.expand([Expansion(item, "batch", API_CODE, files[1:], True)], NOW)


async def test_a_batch_whose_deliveries_are_pruned_is_still_shown(
    store: Engine, records: Records, backend: Backend
) -> None:
    await take_in(store, finished("a"))
    while await store.prune(NOW + 1, NOW + 1, 100):
        pass
    assert await backend.rows("SELECT count(*) FROM notification") == [(0,)]
    detail = await records.batch(1)
    assert detail is not None
    assert (detail.batch_id, detail.last_delivery) == ("batch", None)


async def test_one_file_has_the_requests_made_for_it_the_latest_last(much: Records, backend: Backend) -> None:
    for file in await all_files(backend):
        requests = items(AttemptItem, await backend.rows(f"{ATTEMPTS} WHERE file = {file.id} ORDER BY id"))
        assert await much.file(file.id) == FileDetail(**msgspec.structs.asdict(file), requests=requests)


async def test_every_column_of_a_file_is_shown(store: Engine, records: Records) -> None:
    await take_in(store, finished("批次", expires_at=NOW + 9), now=NOW)
    outcome = found(
        await claim_one(store), reason="http_302", content_length=2**53 + 1, etag='W/"é\\\u2028"',
        content_type="a/b;\x7f", final_url="https://cdn/ü?'\"", elapsed_ms=0.125, remote_addr="::1",
        verified_at=NOW + 77,
    )  # fmt: skip
    await store.record([outcome], NOW)
    detail = await records.file(outcome.file.id)
    assert detail is not None
    for name in ("reason", "attempts", "http_status", "content_length", "content_type", "etag", "last_modified",
                 "final_url", "remote_addr", "elapsed_ms", "vendor_request_id", "vendor_code"):  # fmt: skip
        assert getattr(detail, name) == getattr(outcome, name), name
    assert (detail.batch_id, detail.api_code, detail.oss_object_name) == ("batch", API_CODE, "批次")
    assert (detail.verified_at, detail.next_attempt_at, detail.expires_at) == (moment(NOW + 77), None, moment(NOW + 9))
    assert detail.headers == {"server": "AliyunOSS", "date": "Fri, 27 Nov 2026 21:00:00 GMT"}
    assert detail.flags == ["octet_stream", "plain_http"]


@pytest.mark.parametrize(
    "body", [b"", b"{}", "签名 \U0001f3e0".encode(), b"\xff\0{", b"caf\xe9 \xf0\x9f", bytes(range(256)) * 100]
)
async def test_a_rejection_has_its_body_byte_for_byte_and_as_text_that_shows_every_byte(
    store: Engine, records: Records, body: bytes
) -> None:
    await store.reject(rejection(received_at=NOW + 5, body=body, request_id="r-9", code="401001", detail="d\n'"))
    detail = await records.rejection(1)
    text = body.decode(errors="backslashreplace")
    assert detail == RejectionDetail(
        1, moment(NOW + 5), "198.18.0.1", "401001", "d\n'", "r-9", len(body), body=text
    )  # fmt: skip
    assert await records.rejected_body(1) == body


async def test_an_id_of_nothing_finds_nothing_however_large_it_is(much: Records) -> None:
    for id in (0, -1, 999, *HUGE):
        assert await much.batch(id) is None
        assert await much.file(id) is None
        assert await much.rejection(id) is None
        assert await much.rejected_body(id) is None
        assert await much.files(FileFilter(batch=id), None, 9) == Page([])
        for wanted in (FileFilter(batch=id), FileFilter(batch=id, reason="timeout")):
            assert await much.count(wanted) == 0


async def test_a_time_beyond_all_times_bounds_nothing_or_everything(much: Records, backend: Backend) -> None:
    every = len(await all_batches(backend))
    for time in HUGE:
        after = await much.batches(BatchFilter(received_from=time), None, 1000)
        before = await much.batches(BatchFilter(received_before=time), None, 1000)
        assert (len(after.items), len(before.items)) == ((0, every) if time > 0 else (every, 0))


async def test_times_are_utc_and_exact_to_the_millisecond(store: Engine, records: Records) -> None:
    chance = random.Random(1)
    times = [0, 1, 999, 1000, 59_999, NOW - NOW % 1000, NOW - NOW % 1000 + 999, 4_102_444_799_999]
    times += [chance.randrange(4_102_444_800_000) for _ in range(200)]
    for n, time in enumerate(times):
        await take_in(store, failed(), batch_id=str(n), received_at=time, now=time)
    batches = {batch.batch_id: batch for batch in (await records.batches(BatchFilter(), None, 1000)).items}
    for n, time in enumerate(times):
        batch = batches[str(n)]
        assert batch.first_received_at == batch.last_received_at == batch.completed_at == moment(time)
        assert batch.first_received_at.utcoffset() == timedelta(0)


# Search


async def test_a_search_finds_batches_by_their_beginning_and_a_file_of_each_by_that_of_its_key(
    store: Engine, records: Records, backend: Backend
) -> None:
    for n, batch_id in enumerate((*NAMES, *(f"{name}!" for name in NAMES), "plainer", "PLAIN", "批次/1.jpgx", "10")):
        at = NOW + n
        await take_in(store, failed("plain"), failed(batch_id), batch_id=batch_id, received_at=at, now=at)
    batches, files = await all_batches(backend), await all_files(backend)
    for text in (
        *NAMES,
        "",
        "p",
        "%",
        "_",
        "1",
        "'",
        '"',
        "批",
        "批次/1.jpg!",
        "e",
        "nowhere",
        "*",
        "?",
        "plain' OR '1",
    ):
        begin = sorted(
            (batch for batch in batches if batch.batch_id.startswith(text)),
            key=lambda batch: (batch.batch_id.encode(), batch.api_code),
        )
        # Of each batch the first such file, the latest batches first.
        named = [
            min(found, key=lambda file: file.oss_object_name.encode())
            for batch in sorted(batches, key=lambda batch: -batch.id)
            if (found := [each for each in files if each.batch == batch.id and each.oss_object_name.startswith(text)])
        ]
        api_codes = [API_CODE] if API_CODE.startswith(text) else []
        for limit in (1, 5, 1000):
            assert await records.search(text, limit) == Found(begin[:limit], named[:limit], [], api_codes), text
    assert len((await records.search("plain", 1000)).files) == 26


def test_a_search_finds_any_batch_by_any_beginning_of_its_name(new_backend: Callable[[], Backend]) -> None:
    # Lone surrogates cannot be in a name, and U+10FFFF is no character.
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0\U0010ffff")
    names = st.lists(st.text(letters, min_size=1, max_size=8), min_size=1, max_size=8, unique=True)

    with asyncio.Runner() as runner:

        @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(names, st.data())
        def check(names: list[str], data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(names))
            text = name[: data.draw(st.integers(0, len(name)))]
            backend = new_backend()

            async def search() -> Found:
                store = await backend.open()
                for name in names:
                    await take_in(store, batch_id=name)
                try:
                    return await (await backend.records()).search(text, 1000)
                finally:
                    await backend.close()

            answer = runner.run(search())
            assert [batch.batch_id for batch in answer.batches] == sorted(
                (name for name in names if name.startswith(text)), key=str.encode
            )

        check()


# Beside the writer


async def test_a_commit_is_visible_to_readers_at_once(store: Engine, records: Records) -> None:
    for n in range(20):
        await take_in(store, finished(), batch_id=str(n))
        assert (await records.totals()).pending == 1
        await settle(store)
        totals = await records.totals()
        assert (totals.batches_complete, totals.available, totals.pending) == (n + 1, n + 1, 0)


async def test_reading_and_writing_at_once_each_see_whole_batches(store: Engine, records: Records) -> None:
    async def write() -> None:
        for n in range(40):
            await take_in(store, finished("a"), finished("b"), blocked("c"), batch_id=str(n))
            await settle(store)

    async def read() -> None:
        while not writing.done():
            totals, page = await asyncio.gather(records.totals(), records.batches(BatchFilter(), None, 1000))
            assert totals.files == 3 * totals.batches == 3 * totals.blocked
            assert all(batch.pending + batch.available == 2 for batch in page.items)

    writing = asyncio.create_task(write())
    await asyncio.gather(*(read() for _ in range(3)))
    await writing


async def test_closing_waits_for_the_calls_under_way_and_refuses_what_comes_later(
    much: Records, backend: Backend
) -> None:
    calls = [asyncio.create_task(much.totals()) for _ in range(50)]
    await asyncio.sleep(0)
    await backend.close()
    answers = await asyncio.gather(*calls)
    assert len({msgspec.json.encode(answer) for answer in answers}) == 1
    for call in (much.totals(), much.batch(1), much.search("a", 1), much.files(FileFilter(), None, 1)):
        with pytest.raises(StoreUnavailableError, match="closed"):
            await call


async def test_ended_sessions_are_kept_and_no_nonce_is_taken_for_one(store: Engine, backend: Backend) -> None:
    records = await backend.records()
    assert await records.ended_sessions() == []
    for session in ("2.b", "1.a", "2.b"):
        await store.end_session(session, NOW + 1)
    await store.accept(delivery(nonce=("session&1", NOW + 1)))
    await store.accept(delivery(nonce=("sessions&1", NOW + 1)))
    assert sorted(await records.ended_sessions()) == ["1.a", "2.b"]
