"""The store on SQLite: one file, one writer. Nothing is leased on disk: what is claimed is held in memory, and is
simply still pending after a crash. See base.Store for what each verb means.

Methods named `_write_…` and `_read_…` run in the writer's thread, one at a time; what they remember (`_held`,
`_restarted`, the size of the rejections) is theirs alone. The rest belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from notify_server.errors import NonceReusedError, StoreRefusedError
from notify_server.model import (
    BatchVerdict,
    Delivery,
    DueFile,
    FileResult,
    FileState,
    InboxItem,
    Rejection,
    ReportedStatus,
    Verdict,
)
from notify_server.store.base import Expansion, HostDue, NewFile
from notify_server.store.queries import load_queries, with_rows
from notify_server.store.sqlite_writer import FileLock, Writer, connect

T = TypeVar("T")

# Kept of what was refused: enough to look at and replay, too little to fill a disk.
REJECTIONS_KEPT = 10_000
REJECTION_BYTES_KEPT = 256 * 1024 * 1024
# Requests kept of one file, the latest.
ATTEMPTS_KEPT = 50
# Bodies kept in memory between their commit and their expansion.
RECENT_BYTES = 8 * 1024 * 1024

# Statements carry at most this many rows; SQLite takes 32,766 parameters in one.
_ROWS = 256

_SETTLED = (FileState.AVAILABLE, FileState.UNAVAILABLE, FileState.BLOCKED, FileState.UPLOAD_FAILED)

SQL = load_queries("sqlite")

_decode_due = msgspec.json.Decoder(list[tuple[int, int, str, str, int]]).decode
_decode_hosts = msgspec.json.Decoder(list[HostDue]).decode
_decode_batches = msgspec.json.Decoder(list[tuple[int, int, str, str]]).decode
_decode_existing = msgspec.json.Decoder(list[tuple[int, str, str | None, ReportedStatus, FileState, str]]).decode


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

        # Ids claimed, by host; and those among them that have started anew since they were claimed.
        self._held: dict[str, set[int]] = {}
        self._restarted: set[int] = set()
        self._rejections, self._rejection_bytes = connection.execute(SQL["rejection_size"]).fetchone()

        self._writer = Writer(path, connection)
        self._accept = self._writer.group(_write_deliveries, self._accepted)
        self._reject = self._writer.group(self._write_rejections)

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Open or create the database at `path`, its directory included.

        Raises StoreRefusedError when another daemon has it, or the file cannot be used; the text says what to do.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreRefusedError(
                f"{path.parent}: cannot be created ({error.strerror}): name another directory in [store] url"
            ) from error
        lock = FileLock(path)
        try:
            return cls(lock, path, connect(path))
        except BaseException:
            lock.close()
            raise

    @property
    def backlog(self) -> int:
        return self._backlog

    async def close(self) -> None:
        await self._writer.close()
        self._lock.close()

    # The inbox

    async def accept(self, delivery: Delivery) -> int:
        return await self._accept(delivery)

    def _accepted(self, delivery: Delivery, notification: int) -> None:
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
                )
            )
        self._backlog += delivery.files
        self._inbox_news.set()

    async def reject(self, rejection: Rejection) -> None:
        await self._reject(rejection)

    def _write_rejections(self, connection: sqlite3.Connection, rejections: Sequence[Rejection]) -> list[None]:
        for chunk in _chunks(rejections):
            _insert(connection, "reject", [(r.received_at, r.remote_addr, r.code, r.detail, r.body) for r in chunk])
        count = self._rejections + len(rejections)
        size = self._rejection_bytes + sum(len(rejection.body) for rejection in rejections)
        while count > REJECTIONS_KEPT or size > REJECTION_BYTES_KEPT:
            oldest = connection.execute(SQL["rejection_oldest"], (_ROWS,)).fetchall()
            last = None
            for last, length in oldest:  # noqa: B007
                count, size = count - 1, size - length
                if count <= REJECTIONS_KEPT and size <= REJECTION_BYTES_KEPT:
                    break
            connection.execute(SQL["rejection_delete_through"], (last,))
        # Wrong by a group when the commit then fails; the next prune counts anew.
        self._rejections, self._rejection_bytes = count, size
        return [None] * len(rejections)

    async def wait_inbox(self) -> None:
        await self._inbox_news.wait()

    async def inbox(self, limit: int) -> list[InboxItem]:
        self._inbox_news.clear()
        recent = self._recent
        while recent and recent[0].id <= self._expanded_through:
            self._recent_bytes -= len(recent.popleft().body)
        if self._expanded_through >= self._on_disk_through:
            items = list(islice(recent, limit))
        else:
            bounds = (self._expanded_through, self._on_disk_through, limit)
            rows = await self._writer.read(lambda connection: connection.execute(SQL["inbox"], bounds).fetchall())
            items = [InboxItem(id, body.encode(), *rest) for id, body, *rest in rows]
            if not items:
                # What was there has been deleted by hand.
                self._expanded_through = self._on_disk_through
        if items or recent:
            self._inbox_news.set()
        return items

    async def expand(self, expansions: Sequence[Expansion], now: int) -> list[BatchVerdict]:
        def write(connection: sqlite3.Connection) -> tuple[int, list[BatchVerdict]]:
            pending = 0
            verdicts: list[BatchVerdict] = []
            for part in _distinct_batches(expansions):
                merges = _merge(connection, part, now)
                for merge in merges:
                    pending += merge.pending
                    self._restarted.update(id for id, host in merge.restarted if id in self._held.get(host, ()))
                verdicts += _write_verdicts(connection, [merge.batch for merge in merges], now)
            return pending, verdicts

        pending, verdicts = await self._writer.transaction(write)
        self._backlog += pending - sum(len(expansion.files) for expansion in expansions)
        self._expanded_through = max((e.item.id for e in expansions if e.last), default=self._expanded_through)
        return verdicts

    async def discard(self, item: InboxItem, detail: str, now: int) -> None:
        rejection = Rejection(item.received_at, item.remote_addr, "500", detail, item.body)

        def write(connection: sqlite3.Connection) -> None:
            self._write_rejections(connection, [rejection])
            connection.execute(SQL["inbox_done"], (now, f"[{item.id}]"))

        await self._writer.transaction(write)
        self._backlog -= item.files
        self._expanded_through = item.id

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
        claimed: list[DueFile] = []
        for host, n in wanted:
            held = self._held.get(host, set())
            # What is held is still pending on disk: as many more are read, and left out.
            (answer,) = connection.execute(SQL["claim"], (host, now, n + len(held))).fetchone()
            free = [DueFile(*row) for row in _decode_due(answer) if row[0] not in held][:n]
            if free:
                self._held.setdefault(host, held).update(file.id for file in free)
                claimed += free
        return claimed

    def release(self, files: Sequence[DueFile]) -> None:
        self._writer.call(lambda connection: self._forget(files))

    def _forget(self, files: Iterable[DueFile]) -> None:
        for file in files:
            held = self._held.get(file.host)
            if held is not None:
                held.discard(file.id)
                if not held:
                    del self._held[file.host]
            self._restarted.discard(file.id)

    async def record(self, results: Sequence[FileResult], now: int) -> list[BatchVerdict]:
        def write(connection: sqlite3.Connection) -> tuple[int, list[BatchVerdict]]:
            current = [result for result in results if result.file.id not in self._restarted]
            return _write_results(connection, current, now)

        settled, verdicts = await self._writer.transaction(
            write, committed=lambda: self._forget(result.file for result in results)
        )
        self._backlog -= settled
        return verdicts

    # Housekeeping

    async def ping(self, now: int) -> None:
        await self._writer.transaction(lambda connection: connection.execute(SQL["heartbeat"], (now,)))

    async def prune(self, completed_before: int, rejected_before: int, limit: int) -> int:
        def write(connection: sqlite3.Connection) -> int:
            deleted = _prune(connection, completed_before, rejected_before, limit)
            self._rejections, self._rejection_bytes = connection.execute(SQL["rejection_size"]).fetchone()
            return deleted

        return await self._writer.transaction(write)


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _ROWS):
        yield items[start : start + _ROWS]


def _insert(connection: sqlite3.Connection, query: str, rows: Sequence[tuple[object, ...]]) -> sqlite3.Cursor:
    """Run a `:rows` query with at most _ROWS rows, in one step."""
    return connection.execute(with_rows(SQL[query], len(rows[0]), len(rows)), [value for row in rows for value in row])


def _write_deliveries(connection: sqlite3.Connection, deliveries: Sequence[Delivery]) -> list[int | NonceReusedError]:
    reused = _consume_nonces(connection, deliveries)
    rows = [
        (d.batch_id, d.api_code, d.received_at, d.remote_addr, d.signature, d.request_id, d.files, d.body)
        for d in deliveries
        if id(d) not in reused
    ]
    ids: list[int] = []
    for chunk in _chunks(rows):
        last = _insert(connection, "accept", chunk).lastrowid
        assert last is not None
        ids.extend(range(last - len(chunk) + 1, last + 1))
    fresh = iter(ids)
    return [reused.get(id(delivery)) or next(fresh) for delivery in deliveries]


def _consume_nonces(connection: sqlite3.Connection, deliveries: Sequence[Delivery]) -> dict[int, NonceReusedError]:
    signed = [delivery for delivery in deliveries if delivery.nonce is not None]
    if signed:
        connection.execute(SQL["nonce_purge"], (min(delivery.received_at for delivery in signed),))
    return {
        id(delivery): NonceReusedError(f"the nonce of batch {delivery.batch_id!r} has been consumed before")
        for delivery in signed
        if not connection.execute(SQL["nonce_consume"], delivery.nonce or ()).rowcount
    }


def _distinct_batches(expansions: Sequence[Expansion]) -> Iterator[list[Expansion]]:
    """The expansions in their order, cut wherever a batch comes up again: each merges with what the last one left."""
    part: dict[tuple[str, str], Expansion] = {}
    for expansion in expansions:
        key = (expansion.batch_id, expansion.api_code)
        if key in part or len(part) == _ROWS:
            yield list(part.values())
            part = {}
        part[key] = expansion
    if part:
        yield list(part.values())


class _Merge:
    """What an expansion does to its batch: files by state, and (id, host) of pending files that start anew."""

    def __init__(self, batch: int, expansion: Expansion) -> None:
        self.batch = batch
        self.expansion = expansion
        self.added: list[NewFile] = []
        self.delta: Counter[FileState] = Counter()
        self.restarted: list[tuple[int, str]] = []

    @property
    def pending(self) -> int:
        return self.delta[FileState.PENDING]

    @property
    def reopens(self) -> bool:
        # Files in other states bring about a verdict too: one that was complete may be incomplete with them.
        return any(self.delta.values())

    def batch_row(self) -> tuple[object, ...]:
        item, last = self.expansion.item, self.expansion.last
        counts = (self.delta[state] for state in FileState)
        return self.batch, *counts, None if last else item.id, last, item.received_at, self.reopens


def _merge(connection: sqlite3.Connection, expansions: Sequence[Expansion], now: int) -> list[_Merge]:
    """Merge expansions of different batches, at most _ROWS, in a few statements."""
    keys = [(expansion.batch_id, expansion.api_code) for expansion in expansions]
    times = [expansion.item.received_at for expansion in expansions]
    _insert(connection, "batch_insert", [(*key, time, time) for key, time in zip(keys, times, strict=True)])
    (answer,) = _insert(connection, "batch_find", keys).fetchone()
    found = {(batch_id, api_code): (id, size) for id, size, batch_id, api_code in _decode_batches(answer)}

    merges = []
    for key, expansion in zip(keys, expansions, strict=True):
        id, size = found[key]
        merge = _Merge(id, expansion)
        # A key that is listed twice: its last entry counts, as if it had been delivered later.
        files = {file.oss_object_name: file for file in expansion.files}
        if size:
            _merge_existing(connection, merge, files, now)
        merge.added = list(files.values())
        merge.delta.update(file.state for file in merge.added)
        merges.append(merge)

    added = [(merge.batch, file.oss_object_name, *_columns(file, now)) for merge in merges for file in merge.added]
    for chunk in _chunks(added):
        _insert(connection, "files_insert", chunk)
    _insert(connection, "batch_expanded", [merge.batch_row() for merge in merges])
    done = [expansion.item.id for expansion in expansions if expansion.last]
    connection.execute(SQL["inbox_done"], (now, msgspec.json.encode(done).decode()))
    return merges


def _merge_existing(connection: sqlite3.Connection, merge: _Merge, files: dict[str, NewFile], now: int) -> None:
    """Take what the batch has already out of `files`, and start anew what has changed."""
    names = msgspec.json.encode(list(files)).decode()
    (answer,) = connection.execute(SQL["files_existing"], (merge.batch, names)).fetchone()
    for id, name, target_url, reported_status, state, host in _decode_existing(answer):
        file = files.pop(name)
        if not _starts_anew(target_url, reported_status, file):
            continue
        connection.execute(SQL["file_replace"], (*_columns(file, now), id))
        merge.delta[state] -= 1
        merge.delta[file.state] += 1
        if state is FileState.PENDING:
            merge.restarted.append((id, host))


def _starts_anew(target_url: str | None, reported_status: ReportedStatus, file: NewFile) -> bool:
    if file.reported_status is ReportedStatus.FAILED:
        return False
    return reported_status is ReportedStatus.FAILED or target_url != file.target_url


def _columns(file: NewFile, now: int) -> tuple[object, ...]:
    waits = file.state is FileState.PENDING
    return (
        file.target_url,
        file.host,
        file.reported_status,
        file.state,
        file.reason,
        now if waits else None,
        None if waits else now,
    )


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
    for result in results:
        # Few files come near the bound: most have one request an attempt, and few attempts.
        if result.attempts * max(1, len(result.requests)) > ATTEMPTS_KEPT // 4:
            connection.execute(SQL["attempts_trim"], {"file": result.file.id, "kept": ATTEMPTS_KEPT - 1})

    settled: dict[int, Counter[FileState]] = {}
    for result in results:
        if result.state is not FileState.PENDING:
            settled.setdefault(result.file.batch, Counter())[result.state] += 1
    batches = [
        (batch, count[FileState.AVAILABLE], count[FileState.UNAVAILABLE], count[FileState.BLOCKED])
        for batch, count in settled.items()
    ]
    for chunk_of_batches in _chunks(batches):
        _insert(connection, "record_batches", chunk_of_batches)
    count = sum(sum(states.values()) for states in settled.values())
    return count, _write_verdicts(connection, settled, now)


def _write_verdicts(connection: sqlite3.Connection, batches: Iterable[int], now: int) -> list[BatchVerdict]:
    changed = list(batches)
    if not changed:
        return []
    parameters = {"now": now, "batches": msgspec.json.encode(changed).decode()}
    rows = connection.execute(SQL["verdicts"], parameters).fetchall()
    return [BatchVerdict(id, batch_id, api_code, Verdict(v), *rest) for id, batch_id, api_code, v, *rest in rows]


def _prune(connection: sqlite3.Connection, completed_before: int, rejected_before: int, limit: int) -> int:
    deleted = 0
    for (batch,) in connection.execute(SQL["prune_batches"], (completed_before, limit)).fetchall():
        files = connection.execute(SQL["prune_files"], (batch, limit)).fetchall()
        ids = msgspec.json.encode([id for id, _ in files]).decode()
        deleted += connection.execute(SQL["prune_attempts_of"], (ids,)).rowcount
        deleted += connection.execute(SQL["prune_files_of"], (ids,)).rowcount
        if len(files) == limit:
            # More may be left. The batch stays, and tells the truth of what is left, until a later round.
            gone = Counter(state for _, state in files)
            connection.execute(SQL["prune_counted"], (len(files), *(gone[state] for state in _SETTLED), batch))
        else:
            deleted += connection.execute(SQL["prune_batch"], (batch,)).rowcount
        if deleted >= limit:
            break
    parameters = {"before": completed_before, "limit": limit}
    deleted += connection.execute(SQL["prune_notifications"], parameters).rowcount
    deleted += connection.execute(SQL["prune_rejections"], (rejected_before, limit)).rowcount
    return deleted
