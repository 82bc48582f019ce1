"""The transactions of the SQLite store, as functions of a connection. They commit nothing themselves."""

from __future__ import annotations

import sqlite3
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec

from notify_server.errors import NonceReusedError, NotifyServerError
from notify_server.model import (
    BatchVerdict,
    Delivery,
    FileResult,
    FileState,
    InboxItem,
    Rejection,
    Restart,
    Verdict,
)
from notify_server.store.base import Expansion, rejection_gone
from notify_server.store.limits import DELIVERY_WAIT_MS, MAX_ATTEMPT_ROWS, MAX_REJECTION_BYTES, MAX_REJECTIONS
from notify_server.store.merge import (
    Known,
    Merge,
    by_batch,
    columns,
    distinct_batches,
    latest_arrivals,
    settled_by_batch,
)
from notify_server.store.sql import expand_rows, load_queries
from notify_server.store.sqlite import journal
from notify_server.store.sqlite.ends import note_deletions
from notify_server.store.sqlite.expecting import SQL as EXPECTATION_SQL
from notify_server.store.sqlite.expecting import match_batches
from notify_server.store.sqlite.outbox import SqliteOutbox, prune_batch, prune_plain
from notify_server.store.sqlite.quiet import note_arrivals

T = TypeVar("T")

# Statements carry at most this many rows; SQLite takes 32,766 parameters in one.
_ROWS = 256
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, _ROWS)

_SETTLED = (FileState.AVAILABLE, FileState.UNAVAILABLE, FileState.BLOCKED, FileState.UPLOAD_FAILED)

SQL = load_queries("sqlite")

_decode_batches = msgspec.json.Decoder(list[tuple[int, int, str, str, int | None]]).decode
_decode_recheck = msgspec.json.Decoder(list[tuple[int, int, str, FileState]]).decode
_decode_existing = msgspec.json.Decoder(list[Known]).decode


def write_deliveries(
    connection: sqlite3.Connection, deliveries: Sequence[Delivery], rejections: Rejections
) -> list[int | NotifyServerError]:
    """Insert deliveries into the inbox; return the id of each, or why it alone was refused."""
    refused = _consume_nonces(connection, deliveries)
    refused |= rejections.consume(connection, [(i, d) for i, d in enumerate(deliveries) if i not in refused])
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
    return [refused.get(place) or next(fresh) for place in range(len(deliveries))]


class Rejections:
    """Keeps refused bodies within MAX_REJECTIONS and MAX_REJECTION_BYTES; the oldest go first."""

    def __init__(self) -> None:
        # The newest rejection, how many there are, and of how many bytes. They hold as long as the newest is the same.
        self._known: tuple[int | None, int, int] = (0, 0, 0)

    def forget(self) -> None:
        """Count again at the next write, since rejections are being deleted."""
        self._known = (0, 0, 0)

    def write(self, connection: sqlite3.Connection, rejections: Sequence[Rejection]) -> list[None]:
        """Insert rejections and delete the oldest beyond the limits."""
        (newest,) = connection.execute(SQL["rejection_newest"]).fetchone()
        if newest != self._known[0]:
            self._known = (newest, *connection.execute(SQL["rejection_size"]).fetchone())
        _, count, size = self._known
        for chunk in _chunks(rejections):
            rows = [(r.received_at, r.remote_addr, r.code, r.detail, r.body, r.request_id) for r in chunk]
            newest = _insert(connection, "reject", rows).lastrowid
        count += len(rejections)
        size += sum(len(rejection.body) for rejection in rejections)
        while count > MAX_REJECTIONS or size > MAX_REJECTION_BYTES:
            oldest = connection.execute(SQL["rejection_oldest"], (_ROWS,)).fetchall()
            if not oldest:
                # Fewer than remembered: some were deleted by hand.
                count = size = 0
                break
            for last, length in oldest:  # noqa: B007 (the last one is where the deleting ends)
                count, size = count - 1, size - length
                if count <= MAX_REJECTIONS and size <= MAX_REJECTION_BYTES:
                    break
            connection.execute(SQL["rejection_delete_through"], (last,))
        self._known = newest, count, size
        return [None] * len(rejections)

    def consume(
        self, connection: sqlite3.Connection, deliveries: Iterable[tuple[int, Delivery]]
    ) -> dict[int, NotifyServerError]:
        """Delete the rejections that are replayed; return an error for the places whose rejection was not there."""
        gone: dict[int, NotifyServerError] = {}
        for place, delivery in deliveries:
            if delivery.replays is None:
                continue
            # As text: an id may be beyond what SQLite takes for a number, and must not fail the others.
            if connection.execute(SQL["rejection_replayed"], (str(delivery.replays),)).rowcount:
                self.forget()
            else:
                gone[place] = rejection_gone(delivery.replays)
        return gone


def write_expansions(
    connection: sqlite3.Connection, outbox: SqliteOutbox, expansions: Sequence[Expansion], now: int
) -> tuple[int, set[int], list[BatchVerdict]]:
    """Merge files into their batches; return how many files are pending now, the ids of those that were pending before
    and are reset, and the verdicts that were reached.
    """
    merges = [merge for part in distinct_batches(expansions, _ROWS) for merge in _merge(connection, part, now)]
    match_batches(connection, [merge.batch for merge in merges], now)
    note_arrivals(connection, latest_arrivals(expansions))
    verdicts = _write_verdicts(connection, outbox, {merge.batch for merge in merges}, now)
    return sum(merge.pending for merge in merges), {id for merge in merges for id in merge.restarted}, verdicts


def write_discard(
    connection: sqlite3.Connection,
    outbox: SqliteOutbox,
    item: InboxItem,
    detail: str,
    now: int,
    rejections: Rejections,
) -> list[BatchVerdict]:
    """Move an inbox item to the rejections; return the verdicts that its batch reaches without it."""
    rejections.write(
        connection, [Rejection(item.received_at, item.remote_addr, "500", detail, item.body, item.request_id)]
    )
    _insert(connection, "inbox_done", [(item.id,)], now)
    # Its beginning may have been expanded: the batch no longer waits for the rest.
    batches = [batch for (batch,) in connection.execute(SQL["batch_of_discarded"], (item.id,)).fetchall()]
    for batch in batches:
        connection.execute(SQL["batch_not_expanding"], (batch,))
    return _write_verdicts(connection, outbox, batches, now)


def write_recheck(connection: sqlite3.Connection, files: Sequence[int], now: int) -> tuple[int, set[int], Restart]:
    """Set files back to their beginning; return how many were settled before, the ids of all, and the answer."""
    ids = msgspec.json.encode(files).decode()
    (answer,) = connection.execute(SQL["recheck_find"], (ids,)).fetchone()
    found = _decode_recheck(answer)
    settled: dict[int, Counter[FileState]] = {}
    for _, batch, _, state in found:
        if state is not FileState.PENDING:
            settled.setdefault(batch, Counter())[state] += 1
    restarted = {id for id, *_ in found}
    connection.execute(SQL["recheck_files"], (now, msgspec.json.encode(list(restarted)).decode()))
    for rows in _chunks(by_batch(settled)):
        _insert(connection, "recheck_batches", rows)
    reopened = sum(sum(states.values()) for states in settled.values())
    return reopened, restarted, Restart(len(found), frozenset(host for _, _, host, _ in found))


def make_due(connection: sqlite3.Connection, beyond: int, now: int, limit: int) -> tuple[set[int], Restart]:
    """Return the files that were made due, and the answer. See base.Store.make_due."""
    parameters = {"beyond": beyond, "limit": limit}
    (answer,) = connection.execute(SQL["late_files"], parameters).fetchone()
    found: list[tuple[int, str]] = msgspec.json.decode(answer, type=list[tuple[int, str]])
    ids = {id for id, _ in found}
    connection.execute(SQL["late_files_due"], (now, msgspec.json.encode(list(ids)).decode()))
    connection.execute(SQL["late_deliveries_due"], (now, beyond + DELIVERY_WAIT_MS))
    return ids, Restart(len(ids), frozenset(host for _, host in found))


def write_results(
    connection: sqlite3.Connection, outbox: SqliteOutbox, results: Sequence[FileResult], now: int
) -> tuple[int, list[BatchVerdict]]:
    """Write outcomes with their attempts; return how many files they settle, and the verdicts that were reached."""
    for chunk in _chunks(results):
        _insert(
            connection,
            "record_files",
            [
                (
                    r.file.id, r.state, r.reason, r.attempts, r.next_attempt_at, r.http_status, r.content_length,
                    r.content_type, r.etag, r.last_modified, r.final_url, r.remote_addr, r.elapsed_ms, r.verified_at,
                    r.vendor_request_id, r.vendor_code, r.headers, r.flags,
                )
                for r in chunk
            ],
        )  # fmt: skip
    attempts = [
        (
            r.file.id, a.started_at, a.method, a.url, a.http_status, a.reason, a.dns_ms, a.connect_ms, a.tls_ms,
            a.first_byte_ms, a.total_ms, a.remote_addr, a.vendor_request_id, a.vendor_code,
        )
        for r in results
        for a in r.requests
    ]  # fmt: skip
    for rows in _chunks(attempts):
        _insert(connection, "record_attempts", rows)
    files = msgspec.json.encode([result.file.id for result in results]).decode()
    connection.execute(SQL["attempts_trim"], {"files": files, "others": MAX_ATTEMPT_ROWS - 1})

    note_deletions(connection, results)
    settled = settled_by_batch(results)
    for chunk_of_batches in _chunks(by_batch(settled)):
        _insert(connection, "record_batches", chunk_of_batches)
    count = sum(sum(states.values()) for states in settled.values())
    outbox.note_retrying(
        connection, {r.file.batch for r in results if r.state is FileState.PENDING and r.reason is not None}
    )
    return count, _write_verdicts(connection, outbox, settled, now)


def _write_verdicts(
    connection: sqlite3.Connection, outbox: SqliteOutbox, batches: Iterable[int], now: int
) -> list[BatchVerdict]:
    verdicts: list[BatchVerdict] = []
    for chunk in _chunks([(batch,) for batch in batches]):
        rows = _insert(connection, "verdicts", chunk, now).fetchall()
        verdicts += [BatchVerdict(id, batch, api_code, Verdict(v), *rest) for id, batch, api_code, v, *rest in rows]
    return outbox.add_verdicts(connection, verdicts, now)


def prune(connection: sqlite3.Connection, completed_before: int, rejected_before: int, limit: int) -> int:
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
        # While some files are left the batch stays, with its counts updated, until a later round.
        gone = Counter(state for _, state in files)
        connection.execute(SQL["prune_counted"], (len(files), *(gone[state] for state in _SETTLED), batch))
        deleted += rows
        if connection.execute(SQL["prune_batch"], (batch,)).rowcount:
            deleted += 1 + prune_batch(connection, batch)
        if deleted >= limit:
            break
    parameters = {"before": completed_before, "limit": limit}
    deleted += connection.execute(SQL["prune_notifications"], parameters).rowcount
    deleted += connection.execute(EXPECTATION_SQL["prune_unmatched"], (completed_before, limit)).rowcount
    parameters = {"before": rejected_before, "limit": limit}
    deleted += connection.execute(SQL["prune_rejections"], parameters).rowcount
    deleted += prune_plain(connection, rejected_before, limit)
    return deleted + journal.prune(connection, completed_before, rejected_before, limit)


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _ROWS):
        yield items[start : start + _ROWS]


def _insert(
    connection: sqlite3.Connection, query: str, rows: Sequence[tuple[object, ...]], *more: object
) -> sqlite3.Cursor:
    """Run a `:rows` query with at most _ROWS rows, and `more` parameters behind them, in one step.

    Rows of NULLs are added, which the queries leave out: one statement for every number of rows would mostly be
    prepared again, which costs as much as running it, or fill the memory if it were kept.
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
    found = {
        (batch_id, api_code): (id, size, probed_at)
        for id, size, batch_id, api_code, probed_at in _decode_batches(answer)
    }

    merges = []
    added: list[tuple[object, ...]] = []
    for key, expansion in zip(keys, expansions, strict=True):
        id, size, probed_again_at = found[key]
        merge = Merge(id, expansion, probed_again_at)
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
