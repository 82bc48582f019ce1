"""The store on SQLite: one file, one writer. Nothing is leased on disk: what is claimed is held in memory, and is
simply still pending after a crash. See base.Store for what each verb means.

Each verb keeps the event loop for as long as the disk takes: the daemon has it in a process of its own (keeper.py).
"""

from __future__ import annotations

import asyncio
import sqlite3
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from notify_server.errors import NonceReusedError, NotifyServerError, StoreRefusedError
from notify_server.expansion.expander import Expander
from notify_server.expansion.merge import (
    Known,
    Merge,
    by_batch,
    columns,
    distinct_batches,
    first_of_each,
    settled_by_batch,
)
from notify_server.model import (
    BatchVerdict,
    Delivery,
    DueFile,
    FileResult,
    FileState,
    InboxItem,
    Rejection,
    Verdict,
)
from notify_server.store.base import Expansion, ExpansionListener, HostDue, Nodes, Restart, rejection_gone
from notify_server.store.limits import MAX_ATTEMPT_ROWS, MAX_REJECTION_BYTES, MAX_REJECTIONS
from notify_server.store.sql import expand_rows, load_queries
from notify_server.store.sqlite.writer import FileLock, Writer, connect, refusal, reserve_log
from notify_server.verify.guard import Guard

T = TypeVar("T")

# Bodies kept in memory between their commit and their expansion.
RECENT_BYTES = 8 * 1024 * 1024
# A caller that brings more counts for several.
CALLER_BYTES = 32 * 1024

# Due files that are read at once where fewer are asked for: those who claim little at a time do not pay for what they
# hold each time. And how many may be kept so, of all hosts together.
READ_AHEAD = 512
MAX_AHEAD = 4096

# Statements carry at most this many rows; SQLite takes 32,766 parameters in one.
_ROWS = 256
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, _ROWS)

_SETTLED = (FileState.AVAILABLE, FileState.UNAVAILABLE, FileState.BLOCKED, FileState.UPLOAD_FAILED)

SQL = load_queries("sqlite")

_decode_due = msgspec.json.Decoder(list[tuple[int, int, str, int, int]]).decode
_decode_hosts = msgspec.json.Decoder(list[HostDue]).decode
_decode_batches = msgspec.json.Decoder(list[tuple[int, int, str, str]]).decode
_decode_recheck = msgspec.json.Decoder(list[tuple[int, int, str, FileState]]).decode
_decode_existing = msgspec.json.Decoder(list[Known]).decode


class _Ahead:
    """Due files of a host that were read and that nobody has asked for yet, each with when it is due."""

    __slots__ = ("files", "last", "more")

    def __init__(self) -> None:
        self.files: deque[tuple[int, DueFile]] = deque()
        # When the last one that was read is due, its id, and whether there were others behind it.
        self.last = (-1, -1)
        self.more = True


class SqliteStore:
    """Open it with `open`; close it when done."""

    def __init__(self, lock: FileLock, path: Path, connection: sqlite3.Connection) -> None:
        self._lock = lock
        (self._expanded_through,) = connection.execute(SQL["inbox_start"]).fetchone()
        (in_inbox,) = connection.execute(SQL["inbox_files"], (self._expanded_through,)).fetchone()
        (pending,) = connection.execute(SQL["backlog"]).fetchone()
        self._backlog: int = in_inbox + pending
        self._inbox_news = asyncio.Event()
        self._inbox_news.set()
        # What has just been accepted is expanded from memory, as far as that is bounded; the rest is read from disk.
        self._recent: deque[InboxItem] = deque()
        self._recent_bytes = 0
        (self._on_disk_through,) = connection.execute(SQL["inbox_end"]).fetchone()

        # Files claimed, with the host they were claimed of; and those among them that have started anew since then,
        # maybe at another host.
        self._held: dict[int, str] = {}
        self._held_of: Counter[str] = Counter()
        self._restarted: set[int] = set()
        self._ahead: dict[str, _Ahead] = {}
        # The newest rejection, how many there are, and of how many bytes.
        self._rejections: tuple[int | None, int, int] = (0, 0, 0)

        self._writer = Writer(path, connection)
        self._accept = self._writer.group(self._write_deliveries, self._accepted, _callers)
        self._reject = self._writer.group(self._write_rejections)

    @classmethod
    async def open(cls, path: Path, *, owner: int | None = None) -> Self:
        """Open or create the database at `path`, its directory included. `owner` is the process
        that it is opened for (see FileLock).

        Raises StoreRefusedError when another daemon has it, or the file cannot be used; the text says what to do.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreRefusedError(
                f"{path.parent}: cannot be created ({error.strerror}): name another directory in [store] url"
            ) from error
        lock = FileLock(path, owner)
        try:
            connection = connect(path)
            try:
                reserve_log(connection, path)
                return cls(lock, path, connection)
            except sqlite3.DatabaseError as error:
                connection.close()
                raise refusal(path, error) from error
        except BaseException:
            lock.close()
            raise

    @property
    def backlog(self) -> int:
        return self._backlog

    @property
    def prefers_small_batches(self) -> bool:
        return self._writer.callers_lately

    @property
    def nodes(self) -> Nodes:
        return Nodes(0, (0,), (0,))

    async def close(self, grace: float = 30.0) -> None:
        await self._writer.close()
        self._lock.close()

    # The inbox

    async def accept(self, delivery: Delivery) -> int:
        (answer,) = await self.accept_all([delivery])
        if isinstance(answer, NotifyServerError):
            raise answer
        return answer

    def accept_all(self, deliveries: Sequence[Delivery]) -> asyncio.Future[list[int | NotifyServerError]]:
        """`accept` for several at once: the id of each, or why it alone was refused."""
        return self._accept(deliveries)

    def _accepted(self, deliveries: Sequence[Delivery], answers: Sequence[int | NotifyServerError]) -> None:
        for delivery, answer in zip(deliveries, answers, strict=True):
            if isinstance(answer, int):
                self._remember(delivery, answer)
        self._inbox_news.set()

    def _remember(self, delivery: Delivery, notification: int) -> None:
        size = len(delivery.body)
        if self._recent_bytes + size > RECENT_BYTES:
            self._on_disk_through = notification
        else:
            self._recent_bytes += size
            self._recent.append(
                InboxItem(
                    notification,
                    delivery.body,
                    delivery.received_at,
                    delivery.remote_addr,
                    delivery.request_id,
                    delivery.files,
                    delivery.traceparent,
                )
            )
        self._backlog += delivery.files

    def _write_deliveries(
        self, connection: sqlite3.Connection, groups: Sequence[Sequence[Delivery]]
    ) -> list[list[int | NotifyServerError]]:
        deliveries = [delivery for group in groups for delivery in group]
        refused = _consume_nonces(connection, deliveries)
        refused |= self._consume_rejections(connection, deliveries, refused)
        rows = [
            (
                d.batch_id,
                d.api_code,
                d.received_at,
                d.remote_addr,
                d.signature,
                d.request_id,
                d.files,
                d.traceparent,
                d.body,
            )
            for place, d in enumerate(deliveries)
            if place not in refused
        ]
        ids: list[int] = []
        for chunk in _chunks(rows):
            last = _insert(connection, "accept", chunk).lastrowid
            assert last is not None
            ids.extend(range(last - len(chunk) + 1, last + 1))
        fresh = iter(ids)
        answers = iter([refused.get(place) or next(fresh) for place in range(len(deliveries))])
        return [list(islice(answers, len(group))) for group in groups]

    def _consume_rejections(
        self, connection: sqlite3.Connection, deliveries: Sequence[Delivery], refused: Container[int]
    ) -> dict[int, NotifyServerError]:
        """Delete the rejections that are replayed; the places of the deliveries whose rejection was not there."""
        gone: dict[int, NotifyServerError] = {}
        for place, delivery in enumerate(deliveries):
            if delivery.replays is None or place in refused:
                continue
            # As text: an id may be beyond what SQLite takes for a number, and must not fail the others.
            if connection.execute(SQL["rejection_replayed"], (str(delivery.replays),)).rowcount:
                self._rejections = (0, 0, 0)
            else:
                gone[place] = rejection_gone(delivery.replays)
        return gone

    async def reject(self, rejection: Rejection) -> None:
        await self._reject(rejection)

    def _write_rejections(self, connection: sqlite3.Connection, rejections: Sequence[Rejection]) -> list[None]:
        # What is remembered holds only if it was committed, and nobody has deleted since.
        (newest,) = connection.execute(SQL["rejection_newest"]).fetchone()
        if newest != self._rejections[0]:
            self._rejections = (newest, *connection.execute(SQL["rejection_size"]).fetchone())
        _, count, size = self._rejections
        for chunk in _chunks(rejections):
            rows = [(r.received_at, r.remote_addr, r.code, r.detail, r.body, r.request_id) for r in chunk]
            newest = _insert(connection, "reject", rows).lastrowid
        count += len(rejections)
        size += sum(len(rejection.body) for rejection in rejections)
        while count > MAX_REJECTIONS or size > MAX_REJECTION_BYTES:
            oldest = connection.execute(SQL["rejection_oldest"], (_ROWS,)).fetchall()
            if not oldest:
                # Fewer than remembered: some have been deleted by hand.
                count = size = 0
                break
            for last, length in oldest:  # noqa: B007 (the last one is where the deleting ends)
                count, size = count - 1, size - length
                if count <= MAX_REJECTIONS and size <= MAX_REJECTION_BYTES:
                    break
            connection.execute(SQL["rejection_delete_through"], (last,))
        self._rejections = newest, count, size
        return [None] * len(rejections)

    async def wait_inbox(self) -> None:
        await self._inbox_news.wait()

    async def expand_inbox(self, guard: Guard, now: Callable[[], int], told: ExpansionListener) -> None:
        await Expander(self, guard, now, told).run()

    async def inbox(self, limit: int) -> list[InboxItem]:
        self._inbox_news.clear()
        recent = self._recent
        while recent and recent[0].id <= self._expanded_through:
            self._recent_bytes -= len(recent.popleft().body)
        if self._expanded_through >= self._on_disk_through:
            items = list(islice(recent, limit))
        else:
            bounds = (self._expanded_through, self._on_disk_through, limit)
            # Set before what may fail: then it is tried again.
            self._inbox_news.set()
            rows = await self._writer.read(lambda connection: connection.execute(SQL["inbox"], bounds).fetchall())
            self._inbox_news.clear()
            items = [InboxItem(id, body.encode(), *rest) for id, body, *rest in rows]
            if not items:
                # What was there has been deleted by hand.
                self._expanded_through = self._on_disk_through
        if items or recent:
            self._inbox_news.set()
        return items

    async def expand(self, expansions: Sequence[Expansion], now: int) -> list[BatchVerdict]:
        # What has been expanded to its end is not expanded again, whatever its caller remembers.
        expansions = [expansion for expansion in expansions if expansion.item.id > self._expanded_through]

        def write(connection: sqlite3.Connection) -> tuple[int, list[BatchVerdict]]:
            merges = [merge for part in distinct_batches(expansions, _ROWS) for merge in _merge(connection, part, now)]
            restarted.update(id for merge in merges for id in merge.restarted)
            batches = {merge.batch for merge in merges}
            return sum(merge.pending for merge in merges), _write_verdicts(connection, batches, now)

        restarted: set[int] = set()
        pending, verdicts = await self._writer.transaction(write, committed=lambda: self._restart(restarted))
        self._backlog += pending
        for item in [expansion.item for expansion in expansions if expansion.last]:
            self._expanded_through = item.id
            self._backlog -= item.files
        return verdicts

    async def discard(self, item: InboxItem, detail: str, now: int) -> list[BatchVerdict]:
        rejection = Rejection(item.received_at, item.remote_addr, "500", detail, item.body, item.request_id)

        def write(connection: sqlite3.Connection) -> list[BatchVerdict]:
            self._write_rejections(connection, [rejection])
            _insert(connection, "inbox_done", [(item.id,)], now)
            # Its beginning may have been expanded: the batch no longer waits for the rest.
            batches = [batch for (batch,) in connection.execute(SQL["batch_of_discarded"], (item.id,)).fetchall()]
            for batch in batches:
                connection.execute(SQL["batch_not_expanding"], (batch,))
            return _write_verdicts(connection, batches, now)

        verdicts = await self._writer.transaction(write)
        self._backlog -= item.files
        self._expanded_through = item.id
        return verdicts

    # Due files

    async def due_hosts(self, after: str, limit: int) -> list[HostDue]:
        parameters = {"after": after, "limit": limit}
        (answer,) = await self._writer.read(
            lambda connection: connection.execute(SQL["due_hosts"], parameters).fetchone()
        )
        return _decode_hosts(answer)

    async def claim(self, wanted: Sequence[tuple[str, int]], now: int) -> list[DueFile]:
        return await self._writer.read(lambda connection: self._read_claims(connection, wanted, now))

    def _read_claims(
        self, connection: sqlite3.Connection, wanted: Sequence[tuple[str, int]], now: int
    ) -> list[DueFile]:
        # A host may be named twice, and asks for the sum.
        sums: Counter[str] = Counter()
        for host, n in wanted:
            sums[host] += n
        if sum(1 + len(ahead.files) for ahead in self._ahead.values()) > MAX_AHEAD:
            self._ahead.clear()
        for host, n in sums.items():
            self._look_ahead(connection, host, n, max(n, READ_AHEAD // len(sums)), now)
        # Held only now: a read that fails half-way must not keep what nobody got.
        claimed: list[DueFile] = []
        for host, n in sums.items():
            ahead = self._ahead[host]
            while n and ahead.files and ahead.files[0][0] <= now:
                claimed.append(ahead.files.popleft()[1])
                n -= 1
            if not ahead.files and not ahead.more:
                del self._ahead[host]
        for file in claimed:
            self._held[file.id] = file.host
            self._held_of[file.host] += 1
        return claimed

    def _look_ahead(self, connection: sqlite3.Connection, host: str, n: int, most: int, now: int) -> None:
        """Have `n` due files of the host ahead, or all that there are; read `most` where there are fewer."""
        ahead = self._ahead.get(host)
        if ahead is not None:
            if ahead.more and len(ahead.files) < n:
                self._read_on(connection, host, ahead, most, now)
            if len(ahead.files) >= n:
                return
        # From the beginning: some may have become due behind what was read. What is held is still pending on disk, so
        # as many more are read, and left out.
        ahead = self._ahead[host] = _Ahead()
        self._read_on(connection, host, ahead, most + self._held_of[host] + len(self._restarted), now)

    def _read_on(self, connection: sqlite3.Connection, host: str, ahead: _Ahead, most: int, now: int) -> None:
        due, id = ahead.last
        parameters = {"host": host, "due": due, "id": id, "now": now, "most": most}
        (answer,) = connection.execute(SQL["claim"], parameters).fetchone()
        rows = _decode_due(answer)
        ahead.files += (
            (due, DueFile(id, batch, host, url, attempts))
            for id, batch, url, attempts, due in rows
            if id not in self._held
        )
        ahead.more = len(rows) == most
        if rows:
            ahead.last = rows[-1][4], rows[-1][0]

    def release(self, files: Sequence[DueFile]) -> None:
        def forget() -> None:
            self._forget(files)
            # They have been due for longer than what was read behind them.
            self._ahead.clear()

        self._writer.call(forget)

    def _restart(self, files: set[int]) -> None:
        """These files have started anew, and are not what was read of them any more."""
        self._restarted.update(self._held.keys() & files)
        if files:
            self._ahead.clear()

    def _forget(self, files: Iterable[DueFile]) -> None:
        for file in files:
            host = self._held.pop(file.id, None)
            if host is not None:
                self._held_of[host] -= 1
                if not self._held_of[host]:
                    del self._held_of[host]
            self._restarted.discard(file.id)

    async def record(self, results: Sequence[FileResult], now: int) -> list[BatchVerdict]:
        def write(connection: sqlite3.Connection) -> tuple[int, list[BatchVerdict]]:
            current = first_of_each(
                r for r in results if r.file.id in self._held and r.file.id not in self._restarted
            )  # fmt: skip
            return _write_results(connection, current, now)

        settled, verdicts = await self._writer.transaction(
            write, committed=lambda: self._forget(result.file for result in results)
        )
        self._backlog -= settled
        return verdicts

    async def recheck(self, files: Sequence[int], now: int) -> Restart:
        def write(connection: sqlite3.Connection) -> tuple[int, Restart]:
            ids = msgspec.json.encode(files).decode()
            (answer,) = connection.execute(SQL["recheck_find"], (ids,)).fetchone()
            found = _decode_recheck(answer)
            settled: dict[int, Counter[FileState]] = {}
            for id, batch, _, state in found:
                restarted.add(id)
                if state is not FileState.PENDING:
                    settled.setdefault(batch, Counter())[state] += 1
            ids = msgspec.json.encode(list(restarted)).decode()
            connection.execute(SQL["recheck_files"], (now, ids))
            for rows in _chunks(by_batch(settled)):
                _insert(connection, "recheck_batches", rows)
            reopened = sum(sum(states.values()) for states in settled.values())
            return reopened, Restart(len(found), frozenset(host for _, _, host, _ in found))

        restarted: set[int] = set()
        reopened, restart = await self._writer.transaction(write, committed=lambda: self._restart(restarted))
        self._backlog += reopened
        return restart

    # Housekeeping

    async def ping(self, now: int) -> None:
        await self._writer.transaction(lambda connection: connection.execute(SQL["heartbeat"], (now,)))

    async def prune(self, completed_before: int, rejected_before: int, limit: int) -> int:
        def write(connection: sqlite3.Connection) -> int:
            self._rejections = (0, 0, 0)
            return _prune(connection, completed_before, rejected_before, limit)

        return await self._writer.transaction(write)


def _callers(deliveries: Sequence[Delivery]) -> int:
    # Who brings much counts for several: what fills the time of the writer is no less of a crowd.
    return sum(1 + len(delivery.body) // CALLER_BYTES for delivery in deliveries)


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _ROWS):
        yield items[start : start + _ROWS]


def _insert(
    connection: sqlite3.Connection, query: str, rows: Sequence[tuple[object, ...]], *more: object
) -> sqlite3.Cursor:
    """Run a `:rows` query with at most _ROWS rows, and `more` parameters behind them, in one step.

    Rows of NULLs are added, which the queries leave out: one statement for every number of rows would mostly be
    prepared anew, which costs as much as it does, or fill the memory if it were kept.
    """
    columns = len(rows[0])
    size = _SIZES[bisect_left(_SIZES, len(rows))]
    parameters = [value for row in rows for value in row]
    parameters += [None] * (columns * (size - len(rows)))
    return connection.execute(expand_rows(SQL[query], columns, size), [*parameters, *more])


def _consume_nonces(connection: sqlite3.Connection, deliveries: Sequence[Delivery]) -> dict[int, NotifyServerError]:
    """Consume the nonces; the places of the deliveries whose nonce had been consumed before."""
    signed = [(place, d.nonce, d) for place, d in enumerate(deliveries) if d.nonce is not None]
    if signed:
        connection.execute(SQL["nonce_purge"], (min(d.received_at for _, _, d in signed),))
    return {
        place: NonceReusedError(f"the nonce of batch {d.batch_id!r} has been consumed before")
        for place, nonce, d in signed
        if not connection.execute(SQL["nonce_consume"], nonce).rowcount
    }


def _merge(connection: sqlite3.Connection, expansions: Sequence[Expansion], now: int) -> list[Merge]:
    """Merge expansions of different batches, at most _ROWS, in a few statements."""
    keys = [(expansion.batch_id, expansion.api_code) for expansion in expansions]
    times = [expansion.item.received_at for expansion in expansions]
    _insert(connection, "batch_insert", [(*key, time, time) for key, time in zip(keys, times, strict=True)])
    (answer,) = _insert(connection, "batch_find", keys).fetchone()
    found = {(batch_id, api_code): (id, size) for id, size, batch_id, api_code in _decode_batches(answer)}

    merges = []
    added: list[tuple[object, ...]] = []
    for key, expansion in zip(keys, expansions, strict=True):
        id, size = found[key]
        merge = Merge(id, expansion)
        files = merge.settle(_existing(connection, merge) if size else ())
        added += [(id, file.oss_object_name, *columns(file, now)) for file in files]
        for replaced, file in merge.replaced:
            connection.execute(SQL["file_replace"], (*columns(file, now), replaced))
        merges.append(merge)
    for chunk in _chunks(added):
        _insert(connection, "files_insert", chunk)
    _insert(connection, "batch_expanded", [merge.batch_row() for merge in merges])
    if done := [(expansion.item.id,) for expansion in expansions if expansion.last]:
        _insert(connection, "inbox_done", done, now)
    return merges


def _existing(connection: sqlite3.Connection, merge: Merge) -> list[Known]:
    names = msgspec.json.encode(list(merge.files)).decode()
    (answer,) = connection.execute(SQL["files_existing"], (merge.batch, names)).fetchone()
    return _decode_existing(answer)


def _write_results(
    connection: sqlite3.Connection, results: Sequence[FileResult], now: int
) -> tuple[int, list[BatchVerdict]]:
    for chunk in _chunks(results):
        _insert(
            connection,
            "record_files",
            [
                (
                    r.file.id, r.state, r.reason, r.attempts, r.next_attempt_at, r.http_status, r.content_length,
                    r.content_type, r.etag, r.last_modified, r.final_url, r.remote_addr, r.elapsed_ms, r.verified_at,
                )
                for r in chunk
            ],
        )  # fmt: skip
    attempts = [
        (
            r.file.id, a.started_at, a.method, a.url, a.http_status, a.reason, a.dns_ms, a.connect_ms, a.tls_ms,
            a.first_byte_ms, a.total_ms, a.remote_addr,
        )
        for r in results
        for a in r.requests
    ]  # fmt: skip
    for rows in _chunks(attempts):
        _insert(connection, "record_attempts", rows)
    files = msgspec.json.encode([result.file.id for result in results]).decode()
    connection.execute(SQL["attempts_trim"], {"files": files, "others": MAX_ATTEMPT_ROWS - 1})

    settled = settled_by_batch(results)
    for chunk_of_batches in _chunks(by_batch(settled)):
        _insert(connection, "record_batches", chunk_of_batches)
    count = sum(sum(states.values()) for states in settled.values())
    return count, _write_verdicts(connection, settled, now)


def _write_verdicts(connection: sqlite3.Connection, batches: Iterable[int], now: int) -> list[BatchVerdict]:
    verdicts: list[BatchVerdict] = []
    for chunk in _chunks([(batch,) for batch in batches]):
        rows = _insert(connection, "verdicts", chunk, now).fetchall()
        verdicts += [BatchVerdict(id, batch, api_code, Verdict(v), *rest) for id, batch, api_code, v, *rest in rows]
    return verdicts


def _prune(connection: sqlite3.Connection, completed_before: int, rejected_before: int, limit: int) -> int:
    deleted = 0
    for (batch,) in connection.execute(SQL["prune_batches"], (completed_before, limit)).fetchall():
        # A file goes with its attempts, so the first goes however many it has.
        files: list[tuple[int, str]] = []
        rows = 0
        for id, state, attempts in connection.execute(SQL["prune_files"], (batch, limit)).fetchall():
            if files and deleted + rows + 1 + attempts > limit:
                break
            files.append((id, state))
            rows += 1 + attempts
        ids = msgspec.json.encode([id for id, _ in files]).decode()
        connection.execute(SQL["prune_attempts_of"], (ids,))
        connection.execute(SQL["prune_files_of"], (ids,))
        # While some are left the batch stays, and tells the truth of them, until a later round.
        gone = Counter(state for _, state in files)
        connection.execute(SQL["prune_counted"], (len(files), *(gone[state] for state in _SETTLED), batch))
        deleted += rows + connection.execute(SQL["prune_batch"], (batch,)).rowcount
        if deleted >= limit:
            break
    parameters = {"before": completed_before, "limit": limit}
    deleted += connection.execute(SQL["prune_notifications"], parameters).rowcount
    parameters = {"before": rejected_before, "limit": limit}
    deleted += connection.execute(SQL["prune_rejections"], parameters).rowcount
    return deleted
