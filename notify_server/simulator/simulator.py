"""Plays the platform and its object store against a running daemon, and checks what the daemon makes of it.

    Plan --seed--> Platform (batches, order of deliveries) --POST--> daemon --HEAD--> ObjectStore (planted objects)
                       |                                               |
                       +---- compare <- RecordViews <-- its record ----+

What is planted depends on the plan alone; only the addresses hold the port that the object store was given.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import ssl
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Self

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from notify_server.errors import NotifyServerError
from notify_server.model import FileState, Reason, ReportedStatus, Verdict, http_reason
from notify_server.simulator.record import BatchRow, FileRow, RecordViews

API_CODE = "rent.dcentralize.room.add"
CONTENT_TYPE = "image/jpeg"
# Objects are smaller than this, in bytes; a full GET gets as many of these.
LARGEST = 1 << 20
PIXELS = bytes(LARGEST)

# The waits of a platform between deliveries of the same notification, in seconds; then it gives up.
RETRY_WAITS = (0.2, 0.5, 1.0, 2.0, 4.0)
MAX_RETRY_AFTER = 5.0
RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
ACK_TIMEOUT = 30.0
POLL_SECONDS = 0.2
MAX_DIFFERENCES = 10
ABSENT = "not in the record"

_APP_ID = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SOURCE_NAME = "0123456789abcdefghijklmnopqrstuv"


class SimulationError(NotifyServerError):
    """The simulation cannot be played to its end. One line, with what to do."""


class Kind(StrEnum):
    """How a planted file behaves, in the order in which they are shown."""

    PRESENT = "present"
    SLOW = "slow"
    REFUSES_HEAD = "refuses HEAD"
    FAILS_FIRST = "fails at first"
    MISSING = "missing"
    FAILED = "reported FAILED"


EXPECTED: Mapping[Kind, FileState] = MappingProxyType(
    dict.fromkeys((Kind.PRESENT, Kind.SLOW, Kind.REFUSES_HEAD, Kind.FAILS_FIRST), FileState.AVAILABLE)
    | {Kind.MISSING: FileState.UNAVAILABLE, Kind.FAILED: FileState.UPLOAD_FAILED}
)


# --- What is planted ---


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to plant. `shares` are of all files, from 0 to 1, the rest is present; `redelivered` is a share of the
    batches. Raises ValueError, one line naming the share, when they cannot be.
    """

    seed: int
    batches: int = 20
    files: int = 50
    shares: Mapping[Kind, float] = MappingProxyType({})
    redelivered: float = 0.0

    def __post_init__(self) -> None:
        for name, share in [*self.shares.items(), ("redelivered", self.redelivered)]:
            if not 0 <= share <= 1:
                raise ValueError(f"the share of {name} must be from 0 to 1, not {share:g}")
        # A tenth ten times is a little more than 1 in binary.
        if (total := sum(self.shares.values())) > 1 + 1e-9:
            named = " + ".join(f"{name} {share:g}" for name, share in self.shares.items() if share)
            raise ValueError(f"the shares of files come to {total:g}, more than 1: {named}")


class PlantedFile(msgspec.Struct, frozen=True, gc=False):
    """A file and its object. `size` is in bytes; `status` is what the object answers when it does not answer 200, and
    `failures` how many requests it answers so before it is there.
    """

    key: str
    kind: Kind
    size: int = 0
    status: int = 0
    failures: int = 0


class PlantedBatch(msgspec.Struct, frozen=True):
    """A batch to be notified; `files` by key."""

    batch_id: str
    api_code: str
    files: Mapping[str, PlantedFile]

    def body(self, objects: str) -> bytes:
        """The notification as the platform posts it. `objects` is the object store's address, ending in a slash."""
        entries = [
            # Every other FAILED file has no address: the document does not say that it has one.
            {"status": ReportedStatus.FAILED, "oss_object_name": file.key, "target_url": ""}
            if file.kind is Kind.FAILED and file.size % 2
            else {
                "status": ReportedStatus.FAILED if file.kind is Kind.FAILED else ReportedStatus.FINISHED,
                "oss_object_name": file.key,
                "target_url": objects + file.key,
            }
            for file in self.files.values()
        ]
        return msgspec.json.encode({"batch_id": self.batch_id, "api_code": self.api_code, "file_list": entries})

    def count(self, state: FileState) -> int:
        """How many of its files should end in this state."""
        return sum(EXPECTED[file.kind] is state for file in self.files.values())


class Platform:
    """Makes a plan's batches and delivers them. `batches` and `deliveries`, in the order of their first post, are the
    same for the same plan.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        random = Random(plan.seed)  # noqa: S311 - to be repeatable, not to be secret
        self.batches = list(_batches(plan, random))
        self.deliveries = list(self.batches)
        for batch in random.sample(self.batches, round(plan.redelivered * plan.batches)):
            self.deliveries.insert(random.randrange(len(self.deliveries) + 1), batch)
        self.posted = 0
        self.repeated = 0
        # One for each delivery acked: milliseconds from the request to the whole answer, of the post that was acked.
        self.latencies_ms: list[float] = []

    @property
    def acked(self) -> int:
        return len(self.latencies_ms)

    @property
    def files(self) -> Iterator[PlantedFile]:
        """Every file of every batch."""
        return (file for batch in self.batches for file in batch.files.values())

    async def deliver(
        self,
        url: str,
        objects: str,
        *,
        token: str | None = None,
        tls: ssl.SSLContext | bool = True,
        rate: float = 0.0,
        concurrency: int = 16,
    ) -> None:
        """Post every delivery and return when the last is acked.

        `rate` is posts a second, 0 as fast as they are acked; at most `concurrency` are under way at once. What is
        answered 5xx, 408 or 429, or not at all, is posted again a few times. Raises SimulationError when that does not
        help, or at any other refusal.
        """
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        clock = asyncio.get_running_loop().time
        started = clock()
        turns = iter(enumerate(self.deliveries))

        async def work(session: aiohttp.ClientSession) -> None:
            for turn, batch in turns:
                if rate and (early := started + turn / rate - clock()) > 0:
                    await asyncio.sleep(early)
                await self._deliver(session, url, batch, batch.body(objects))

        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=concurrency, ssl=tls),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=ACK_TIMEOUT),
        ) as session:
            workers = [asyncio.create_task(work(session)) for _ in range(min(concurrency, len(self.deliveries)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _deliver(self, session: aiohttp.ClientSession, url: str, batch: PlantedBatch, body: bytes) -> None:
        self.posted += 1
        for wait in (*RETRY_WAITS, None):
            # The event loop's own clock ticks in whole milliseconds.
            started = time.perf_counter()
            asked = 0.0
            try:
                async with session.post(url, data=body, allow_redirects=False) as response:
                    answer = await response.text(errors="replace")
            except (aiohttp.ClientError, TimeoutError) as error:
                trouble = f"does not answer ({_what(error)})"
            else:
                if 200 <= response.status < 300:
                    self.latencies_ms.append((time.perf_counter() - started) * 1000)
                    return
                trouble = f"answers {response.status}: {' '.join(answer.split())[:200]}"
                if response.status not in RETRIED_STATUS:
                    raise SimulationError(f"{url} {trouble}")
                with contextlib.suppress(ValueError):
                    asked = min(float(response.headers.get("Retry-After", "0")), MAX_RETRY_AFTER)
            if wait is None:
                raise SimulationError(f"{url} {trouble}: gave up on batch {batch.batch_id}")
            self.repeated += 1
            await asyncio.sleep(max(wait, asked))


def _batches(plan: Plan, random: Random) -> Iterator[PlantedBatch]:
    app_id = "".join(random.choices(_APP_ID, k=16))
    kinds = _kinds(plan, plan.batches * plan.files)
    random.shuffle(kinds)
    # 13 digits of milliseconds and 4 more, as in the published example; the moment is part of what the seed gives.
    moment = random.randrange(10**16, 4 * 10**16)
    for start in range(0, len(kinds), plan.files):
        moment += random.randrange(1, 10**6)
        batch_id = f"{random.getrandbits(128):032x}.{random.randrange(1, 200)}.{moment}"
        files = [_file(kind, _key(app_id, random), random) for kind in kinds[start : start + plan.files]]
        yield PlantedBatch(batch_id, API_CODE, {file.key: file for file in files})


def _kinds(plan: Plan, total: int) -> list[Kind]:
    """Exactly the shares, to within rounding: chance alone would leave small runs without the rare kinds."""
    kinds: list[Kind] = []
    reached = 0.0
    for kind in Kind:
        reached += plan.shares.get(kind, 0.0)
        kinds += [kind] * (min(round(reached * total), total) - len(kinds))
    return kinds + [Kind.PRESENT] * (total - len(kinds))


def _key(app_id: str, random: Random) -> str:
    # The name is the first 24 bytes of the source file's path.
    path = f"/apt_common/o_{''.join(random.choices(_SOURCE_NAME, k=10))}"
    return f"{app_id}/IMAGE/{random.randrange(-(2**31), 2**31)}/{base64.b64encode(path.encode()).decode()}"


def _file(kind: Kind, key: str, random: Random) -> PlantedFile:
    size = random.randrange(1, LARGEST)
    match kind:
        case Kind.REFUSES_HEAD:
            return PlantedFile(key, kind, size, random.choice((405, 403)))
        case Kind.FAILS_FIRST:
            return PlantedFile(key, kind, size, random.choice((500, 503)), random.choice((1, 2)))
        case Kind.MISSING:
            return PlantedFile(key, kind, size, 404)
        case _:
            return PlantedFile(key, kind, size)


def _what(error: BaseException) -> str:
    """An error in a few words: sockets' errors are buried in aiohttp's, and a time-out has no text."""
    if isinstance(error, TimeoutError):
        return "timed out"
    cause = getattr(error, "os_error", None) or error
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


# --- Where the files are ---


class ObjectStore:
    """An object store on loopback that answers as planted; 404 for what is not. Use it as an async context manager."""

    def __init__(self, *, slow_seconds: float = 1.0) -> None:
        self.requests: Counter[str] = Counter()
        self._slow_seconds = slow_seconds
        self._files: dict[str, PlantedFile] = {}
        # A server without the routing and middleware of an application: it must not be what a run waits for.
        self._runner = web.ServerRunner(web.Server(self._answer, access_log=None), shutdown_timeout=1.0)

    def plant(self, files: Iterable[PlantedFile]) -> None:
        """Have these objects, from now on."""
        self._files.update((file.key, file) for file in files)

    async def start(self) -> None:
        """Listen on a free port of 127.0.0.1."""
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024).start()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def address(self) -> str:
        """What an object's key is appended to. There is none before it is started."""
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}/"

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        key = request.path[1:]
        self.requests[key] += 1
        file = self._files.get(key)
        if file is None:
            return web.Response(status=404)
        match file.kind:
            case Kind.SLOW:
                await asyncio.sleep(self._slow_seconds)
            case Kind.MISSING:
                return web.Response(status=file.status)
            case Kind.FAILS_FIRST if self.requests[key] <= file.failures:
                return web.Response(status=file.status)
            case Kind.REFUSES_HEAD if request.method == "HEAD":
                return web.Response(status=file.status)
        return _object(request, file)


def _object(request: web.BaseRequest, file: PlantedFile) -> web.Response:
    """The object, or the range of it that is asked for (RFC 9110 14.2: in answer to GET only)."""
    headers = {
        "Content-Type": CONTENT_TYPE,
        "ETag": f'"{file.key[-8:]}-{file.size:x}"',
        "Last-Modified": "Thu, 30 Dec 2021 08:10:07 GMT",
        "Accept-Ranges": "bytes",
    }
    if request.method == "HEAD":
        return web.Response(headers=headers | {"Content-Length": str(file.size)})
    if "Range" not in request.headers:
        return web.Response(headers=headers, body=PIXELS[: file.size])
    try:
        span = range(file.size)[request.http_range]
    except ValueError:
        span = range(0)
    if not span:
        return web.Response(status=416, headers={"Content-Range": f"bytes */{file.size}"})
    headers["Content-Range"] = f"bytes {span[0]}-{span[-1]}/{file.size}"
    return web.Response(status=206, headers=headers, body=PIXELS[: len(span)])


# --- What the daemon says of them ---


class Tally(msgspec.Struct):
    """Of one kind: how many were planted and how many came out as expected, are still being retried, or differ."""

    planted: int = 0
    as_expected: int = 0
    retried: int = 0
    different: int = 0


class Difference(msgspec.Struct, frozen=True):
    """Something that is not as planted. `key` is a file's key, or a batch's id when `planted` is `batch`."""

    key: str
    planted: str
    expected: str
    state: str
    reason: str


class Comparison(msgspec.Struct):
    """What was expected against what the record says. All differences are counted and the first few are kept, of a
    batch only when its files do not explain it.

    `verified_at` has the moment of every file's last answer, in Unix seconds, in order.
    """

    files: dict[Kind, Tally]
    batches: Tally
    differences: list[Difference]
    refused_loopback: bool = False
    verified_at: list[float] = msgspec.field(default_factory=list)

    @property
    def different_files(self) -> int:
        return sum(tally.different for tally in self.files.values())

    @property
    def different(self) -> bool:
        """Whether anything is."""
        return bool(self.different_files or self.batches.different)

    def note(self, difference: Difference) -> None:
        """Keep the difference if it is one of the first."""
        if len(self.differences) < MAX_DIFFERENCES:
            self.differences.append(difference)


async def compare(
    batches: Iterable[PlantedBatch], record: RecordViews, objects: str, requests: Mapping[str, int]
) -> Comparison:
    """Hold the record against what was planted. `objects` is the object store's address, `requests` what it counted."""
    result = Comparison({kind: Tally() for kind in Kind}, Tally(), [])
    for batch in batches:
        before = result.different_files
        rows = record.files(batch.batch_id, batch.api_code)
        states = await _compare_files(result, batch, rows, objects, requests)
        # Read after its files: a verdict that comes in between then shows as what it is, instead of as a missing one.
        found = await record.batches([(batch.batch_id, batch.api_code)])
        tally = result.batches
        tally.planted += 1
        fault = _batch_fault(batch, found[0], states) if found else ("in the record", ABSENT, "")
        if fault is None:
            tally.as_expected += 1
        elif fault[1] == Verdict.PENDING and _only_missing_left(batch, found[0]):
            tally.retried += 1
        else:
            tally.different += 1
            if result.different_files == before:
                result.note(Difference(batch.batch_id, "batch", *fault))
    result.verified_at.sort()
    return result


async def _compare_files(
    result: Comparison, batch: PlantedBatch, rows: AsyncIterable[FileRow], objects: str, requests: Mapping[str, int]
) -> Counter[str]:
    """Compare one batch's files; the states found, counted."""
    states: Counter[str] = Counter()
    unseen = dict(batch.files)
    async for row in rows:
        states[row.state] += 1
        if row.state in (FileState.AVAILABLE, FileState.UNAVAILABLE) and row.verified_at is not None:
            result.verified_at.append(datetime.fromisoformat(row.verified_at).timestamp())
        file = unseen.pop(row.oss_object_name, None)
        if file is None:
            # Never planted: the batch then has too many.
            continue
        tally = result.files[file.kind]
        tally.planted += 1
        if row.state is FileState.BLOCKED and row.reason in (Reason.PRIVATE_ADDRESS, Reason.PORT_NOT_ALLOWED):
            result.refused_loopback = True
        fault = _file_fault(file, row, objects, requests)
        if fault is None:
            tally.as_expected += 1
        elif file.kind is Kind.MISSING and row.state is FileState.PENDING and row.reason == http_reason(file.status):
            tally.retried += 1
        else:
            tally.different += 1
            result.note(Difference(file.key, file.kind, EXPECTED[file.kind], row.state, fault))
    for file in unseen.values():
        tally = result.files[file.kind]
        tally.planted += 1
        tally.different += 1
        result.note(Difference(file.key, file.kind, EXPECTED[file.kind], ABSENT, ""))
    return states


def _file_fault(file: PlantedFile, row: FileRow, objects: str, requests: Mapping[str, int]) -> str | None:
    """What is wrong with a file's row: its reason when its state is, else which of its columns; None when nothing."""
    if row.state is not EXPECTED[file.kind]:
        return row.reason or "no reason given"
    if file.kind is Kind.FAILED:
        return f"reported FAILED, yet asked for {requests[file.key]} times" if requests.get(file.key) else None
    if row.target_url != objects + file.key:
        return f"target_url {row.target_url}"
    if file.kind is Kind.MISSING:
        return None if row.reason == http_reason(file.status) else f"reason {row.reason}"
    for column, found, planted in (
        ("reason", row.reason, None),
        ("content_length", row.content_length, file.size),
        ("content_type", row.content_type, CONTENT_TYPE),
    ):
        if found != planted:
            return f"{column} {found}, planted {planted}"
    return None if requests.get(file.key) else "never asked for"


def _batch_fault(batch: PlantedBatch, row: BatchRow, states: Mapping[str, int]) -> tuple[str, str, str] | None:
    """(expected, found, what is wrong) of a batch's row, None when nothing is."""
    if row.files != len(batch.files):
        return f"{len(batch.files)} files", f"{row.files} files", "not what was planted"
    expected = Verdict.COMPLETE if batch.count(FileState.AVAILABLE) == len(batch.files) else Verdict.INCOMPLETE
    if row.verdict is not expected:
        return expected, row.verdict, f"{row.pending} files pending" if row.pending else "wrong verdict"
    for state in FileState:
        if (says := getattr(row, state)) != states.get(state, 0):
            return expected, row.verdict, f"says {says} {state}, its files say {states.get(state, 0)}"
    return None


def _only_missing_left(batch: PlantedBatch, row: BatchRow) -> bool:
    """Whether all that the batch waits for can be its missing files."""
    return row.available == batch.count(FileState.AVAILABLE) and row.upload_failed == batch.count(
        FileState.UPLOAD_FAILED
    )


# --- All of it together ---


class Report(msgspec.Struct, frozen=True):
    """How a run went. Latencies and durations are milliseconds and seconds; `busiest` is the most files verified
    within one second.
    """

    comparison: Comparison
    posted: int
    acked: int
    repeated: int
    ack_p50_ms: float
    ack_p99_ms: float
    ack_max_ms: float
    verified: int
    verified_per_second: float
    busiest: int
    seconds: float
    timed_out: bool


class Simulation:
    """One run against a daemon. `posted`, `acked` and `verified` can be looked at while it goes on."""

    def __init__(
        self,
        platform: Platform,
        *,
        url: str,
        record: Path,
        token: str | None = None,
        tls: ssl.SSLContext | bool = True,
        rate: float = 0.0,
        slow_seconds: float = 1.0,
        timeout: float = 120.0,
        settle: float = 10.0,
    ) -> None:
        """`timeout` is how many seconds to wait for verdicts after the last ack; `settle` how many of them to wait on
        when only missing files have none. `tls` is aiohttp's `ssl`.
        """
        self.platform = platform
        self.verified = 0
        self._url = url
        self._record = record
        self._token = token
        self._tls = tls
        self._rate = rate
        self._slow_seconds = slow_seconds
        self._timeout = timeout
        self._settle = settle

    async def run(self) -> Report:
        """Deliver everything, wait for the verdicts, compare. Raises SimulationError, StoreRefusedError,
        StoreUnavailableError.
        """
        clock = asyncio.get_running_loop().time
        await self._reach()
        async with ObjectStore(slow_seconds=self._slow_seconds) as objects:
            objects.plant(self.platform.files)
            async with await RecordViews.open(self._record) as record:
                before = await record.last_delivery()
                started = clock()
                await self._deliver(record, objects.address)
                last = await record.last_delivery()
                if last - before < self.platform.acked:
                    raise SimulationError(
                        f"{self._url} has acked {self.platform.acked} deliveries, {self._record} has "
                        f"{last - before} of them: name that daemon's database with --store"
                    )
                timed_out = not await self._verdicts(record, last)
                seconds = clock() - started
                comparison = await compare(self.platform.batches, record, objects.address, objects.requests)
        return self._report(comparison, seconds, timed_out)

    async def _reach(self) -> None:
        """Raise SimulationError when nothing listens at the address: a platform's retries would only hide it."""
        url = URL(self._url)
        try:
            async with asyncio.timeout(5):
                _, writer = await asyncio.open_connection(url.host, url.port)
        except (OSError, TimeoutError) as error:
            raise SimulationError(
                f"{self._url}: cannot be reached ({_what(error)}): start the daemon, or name its address with --url"
            ) from None
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _deliver(self, record: RecordViews, objects: str) -> None:
        delivering = asyncio.create_task(
            self.platform.deliver(self._url, objects, token=self._token, tls=self._tls, rate=self._rate)
        )
        try:
            while not (await asyncio.wait([delivering], timeout=POLL_SECONDS))[0]:
                await self._look(record, self.platform.batches)
            await delivering
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)

    async def _look(self, record: RecordViews, batches: Sequence[PlantedBatch], settled: int = 0) -> list[BatchRow]:
        """The batches' rows, and how far the daemon is with them and `settled` files of others."""
        rows = await record.batches([(batch.batch_id, batch.api_code) for batch in batches])
        self.verified = settled + sum(row.files - row.pending for row in rows)
        return rows

    async def _verdicts(self, record: RecordViews, delivery: int) -> bool:
        """Wait for the verdicts on what came up to `delivery`; whether all are there that can be expected."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._timeout
        # Before, a verdict may be that of an earlier run of the same plan.
        while not await record.expanded(delivery):
            if clock() >= deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
        waiting = {(batch.batch_id, batch.api_code): batch for batch in self.platform.batches}
        settled = 0
        only_missing_since: float | None = None
        while True:
            rows = await self._look(record, list(waiting.values()), settled)
            only_missing = len(rows) == len(waiting)
            for row in rows:
                batch = waiting[row.batch_id, row.api_code]
                if row.verdict is not Verdict.PENDING:
                    settled += row.files
                    del waiting[row.batch_id, row.api_code]
                elif not _only_missing_left(batch, row):
                    only_missing = False
            now = clock()
            if not waiting:
                return True
            only_missing_since = (only_missing_since or now) if only_missing else None
            if only_missing_since is not None and now >= only_missing_since + self._settle:
                return True
            if now >= deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)

    def _report(self, comparison: Comparison, seconds: float, timed_out: bool) -> Report:
        latencies = sorted(self.platform.latencies_ms)
        moments = comparison.verified_at
        return Report(
            comparison,
            self.platform.posted,
            self.platform.acked,
            self.platform.repeated,
            percentile(latencies, 0.5),
            percentile(latencies, 0.99),
            percentile(latencies, 1.0),
            len(moments),
            len(moments) / seconds,
            busiest_second(moments),
            seconds,
            timed_out,
        )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that this share of the values does not exceed (nearest rank); 0 of none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def busiest_second(ordered: Sequence[float]) -> int:
    """The most of these moments, in seconds and in order, that lie within one second."""
    return max((end - bisect_left(ordered, moment - 1) for end, moment in enumerate(ordered, start=1)), default=0)
