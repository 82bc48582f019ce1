"""The transactions of the PostgreSQL store, as functions of a connection. They commit nothing themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence

from notify_server.errors import NonceReusedError, NotifyServerError
from notify_server.model import BatchVerdict, Delivery, FileResult, FileState, InboxItem, Rejection, Restart
from notify_server.store.base import rejection_gone, valid_ids
from notify_server.store.limits import DELIVERY_WAIT_MS, MAX_ATTEMPT_ROWS, MAX_REJECTION_BYTES, MAX_REJECTIONS
from notify_server.store.merge import by_batch, settled_by_batch
from notify_server.store.postgres import journal
from notify_server.store.postgres.ends import note_deletions
from notify_server.store.postgres.events import Events
from notify_server.store.postgres.expansion import write_settled, write_verdicts
from notify_server.store.postgres.expecting import SQL as EXPECTATION_SQL
from notify_server.store.postgres.session import LOCK_KEY, LOCK_SPACE, PRUNING, Connection, arrays, row_count, strip_nul
from notify_server.store.sql import load_queries

SQL = load_queries("postgres")

ATTEMPT_COLUMNS = (
    "file", "started_at", "method", "url", "http_status", "reason", "dns_ms", "connect_ms", "tls_ms", "first_byte_ms",
    "total_ms", "remote_addr", "vendor_request_id", "vendor_code",
)  # fmt: skip

HEARTBEAT_LOCK_MS = 500

_SETTLED = (FileState.AVAILABLE, FileState.UNAVAILABLE, FileState.BLOCKED, FileState.UPLOAD_FAILED)


async def write_deliveries(
    connection: Connection, deliveries: Sequence[Delivery]
) -> list[int | NotifyServerError]:  # fmt: skip
    """Insert deliveries into the inbox; return the id of each, or its refusal."""
    refused = await _consume_nonces(connection, deliveries)
    refused |= await _consume_rejections(connection, deliveries, refused)
    written = [delivery for place, delivery in enumerate(deliveries) if place not in refused]
    fresh = iter(await insert_deliveries(connection, written))
    return [refused.get(place) or next(fresh) for place in range(len(deliveries))]


async def insert_deliveries(connection: Connection, deliveries: Sequence[Delivery]) -> list[int]:
    """Insert deliveries; return their ids."""
    rows = [
        (
            d.batch_id, d.api_code, d.received_at, d.remote_addr, d.signature, d.request_id, d.files, d.traceparent,
            d.body.decode(),
        )
        for d in deliveries
    ]  # fmt: skip
    return [id for (id,) in await connection.fetch(SQL["accept"], *arrays(rows, 9))]


async def _consume_nonces(connection: Connection, deliveries: Sequence[Delivery]) -> dict[int, NotifyServerError]:
    """Consume the nonces; return the places of the deliveries whose nonce had been consumed before."""
    refused: dict[int, NotifyServerError] = {}
    first: dict[str, tuple[int, Delivery]] = {}
    expires: dict[str, int] = {}
    for place, delivery in enumerate(deliveries):
        if delivery.nonce is None:
            continue
        key = strip_nul(delivery.nonce[0])
        if key in first:
            refused[place] = _reused(delivery)
        else:
            first[key], expires[key] = (place, delivery), delivery.nonce[1]
    if first:
        before = min(delivery.received_at for _, delivery in first.values())
        rows = await connection.fetch(SQL["nonces_consume"], list(expires), list(expires.values()), before)
        consumed = {key for (key,) in rows}
        for key, (place, delivery) in first.items():
            if key not in consumed:
                refused[place] = _reused(delivery)
    return refused


def _reused(delivery: Delivery) -> NonceReusedError:
    return NonceReusedError(f"the nonce of batch {delivery.batch_id!r} has been consumed before")


async def _consume_rejections(
    connection: Connection, deliveries: Sequence[Delivery], refused: Container[int]
) -> dict[int, NotifyServerError]:
    """Delete the rejections that are replayed; the places of the deliveries whose rejection was not there."""
    wanted = {
        place: delivery.replays
        for place, delivery in enumerate(deliveries)
        if delivery.replays is not None and place not in refused
    }
    if not wanted:
        return {}
    rows = await connection.fetch(SQL["rejections_replayed"], valid_ids(wanted.values()))
    there = {id for (id,) in rows}
    gone: dict[int, NotifyServerError] = {}
    for place, id in wanted.items():
        if id in there:
            there.remove(id)
        else:
            gone[place] = rejection_gone(id)
    return gone


async def write_heartbeat(connection: Connection, now: int) -> None:
    """Write what proves that callbacks can be accepted. Takes the same locks on their tables as they do, and gives up
    long before they would, so that callbacks are not kept waiting behind it.
    """
    await connection.execute(
        f"SET LOCAL lock_timeout = '{HEARTBEAT_LOCK_MS}ms'; LOCK TABLE notification, nonce IN ROW EXCLUSIVE MODE"
    )
    await connection.execute(SQL["heartbeat"], now)


async def write_rejections(connection: Connection, rejections: Sequence[Rejection]) -> None:
    """Keep them, and no more than is kept of all."""
    rows = [
        (
            r.received_at,
            strip_nul(r.remote_addr),
            strip_nul(r.code),
            strip_nul(r.detail),
            r.body,
            strip_nul(r.request_id),
        )
        for r in rejections
    ]
    await connection.execute(SQL["reject"], *arrays(rows, 6))
    await connection.execute(SQL["rejections_bound"], MAX_REJECTIONS, MAX_REJECTION_BYTES)


async def write_discard(
    connection: Connection, events: Events, item: InboxItem, detail: str, now: int
) -> tuple[int, list[BatchVerdict]]:
    """Move an inbox item to the rejections; return how many files leave the inbox, and the verdicts."""
    if not await connection.fetch(SQL["inbox_still"], [item.id]):
        return 0, []
    # Its beginning may have been expanded: the batch no longer waits for the rest.
    batches = [batch for (batch,) in await connection.fetch(SQL["batch_of_discarded"], item.id)]
    for batch in batches:
        await connection.execute(SQL["batch_not_expanding"], batch)
    rejection = Rejection(item.received_at, item.remote_addr, "500", detail, item.body, item.request_id)
    await write_rejections(connection, [rejection])
    await connection.execute(SQL["inbox_done"], [item.id], now)
    return item.files, await write_verdicts(connection, events, batches, now)


async def write_results(
    connection: Connection, events: Events, node: int, results: Sequence[FileResult], now: int
) -> tuple[int, int, list[BatchVerdict]]:
    """Write outcomes; return how many of these claims this node still had, how many files it settled, and the
    verdicts.
    """
    ids = [result.file.id for result in results]
    rows = await connection.fetch(SQL["record_begin"], list({result.file.batch for result in results}), ids, node)
    pending = {id for id, state, _ in rows if state == FileState.PENDING}
    ended = {id: restarted for id, _, restarted in rows if restarted is not None}
    current = [r for r in results if not ended.get(r.file.id, True) and r.file.id in pending]
    if not current:
        return len(ended), 0, []
    await connection.copy_records_to_table(
        "attempt",
        records=[
            (
                r.file.id, a.started_at, a.method, a.url, a.http_status, a.reason, a.dns_ms, a.connect_ms, a.tls_ms,
                a.first_byte_ms, a.total_ms, a.remote_addr, a.vendor_request_id, a.vendor_code,
            )
            for r in current
            for a in r.requests
        ],
        columns=ATTEMPT_COLUMNS,
    )  # fmt: skip
    outcomes = [
        (
            r.file.id, r.state, r.reason, r.attempts, r.next_attempt_at, r.http_status, r.content_length,
            r.content_type, r.etag, r.last_modified, r.final_url, r.remote_addr, r.elapsed_ms, r.verified_at,
            r.vendor_request_id, r.vendor_code, r.headers, r.flags,
        )
        for r in current
    ]  # fmt: skip
    await connection.execute(SQL["record_files"], *arrays(outcomes, 18), MAX_ATTEMPT_ROWS)
    await note_deletions(connection, current)
    settled = settled_by_batch(current)
    await events.note_retrying(
        connection, {r.file.batch for r in current if r.state is FileState.PENDING and r.reason is not None}
    )
    verdicts = await write_settled(connection, events, by_batch(settled), now)
    return len(ended), sum(sum(states.values()) for states in settled.values()), verdicts


async def write_recheck(connection: Connection, files: Sequence[int], now: int) -> tuple[int, Restart]:
    """Reset files; return how many are pending that were not, and the answer."""
    wanted = valid_ids(files)
    batches = {batch for (batch,) in await connection.fetch(SQL["batches_of"], wanted)}
    await connection.execute(SQL["batches_lock"], list(batches))
    found = [
        (id, batch, host, FileState(s)) for id, batch, host, s in await connection.fetch(SQL["recheck_find"], wanted)
    ]
    ids = [id for id, *_ in found]
    await connection.execute(SQL["recheck_files"], ids, now)
    await connection.execute(SQL["leases_restart"], ids)
    settled: dict[int, Counter[FileState]] = {}
    for _, batch, _, state in found:
        if state is not FileState.PENDING:
            settled.setdefault(batch, Counter())[state] += 1
    await connection.execute(SQL["recheck_batches"], *arrays(by_batch(settled), 4))
    reopened = sum(sum(states.values()) for states in settled.values())
    return reopened, Restart(len(found), frozenset(host for _, _, host, _ in found))


async def make_due(connection: Connection, beyond: int, now: int, limit: int) -> Restart:
    """Make files and deliveries due that wait for too long. See base.Store.make_due."""
    found = await connection.fetch(SQL["late_files_due"], beyond, now, limit)
    await connection.execute(SQL["leases_restart"], [id for id, _ in found])
    await connection.execute(SQL["late_deliveries_due"], now, beyond + DELIVERY_WAIT_MS)
    return Restart(len(found), frozenset(host for _, host in found))


async def prune(connection: Connection, events: Events, completed_before: int, rejected_before: int, limit: int) -> int:
    """Delete old rows; return how many. See base.Store.prune."""
    # One node at a time: others would find the same rows.
    await connection.execute(f"SELECT pg_advisory_xact_lock({LOCK_KEY})", LOCK_SPACE, PRUNING)
    found = await connection.fetch(SQL["prune_batches"], completed_before, limit)
    batches = [batch for batch, _ in sorted(found, key=lambda row: int(row[1]))]
    files: list[int] = []
    gone: dict[int, Counter[str]] = {batch: Counter() for batch in batches}
    deleted = 0
    for id, batch, state, attempts in await connection.fetch(SQL["prune_files"], batches, limit):
        # A file goes with its attempts, so the first goes however many it has.
        if files and deleted + 1 + attempts > limit:
            break
        files.append(id)
        gone[batch][state] += 1
        deleted += 1 + attempts
    await connection.execute(SQL["prune_attempts_of"], files)
    await connection.execute(SQL["prune_files_of"], files)
    rows = await connection.fetch(SQL["prune_batches_of"], list(gone), [states.total() for states in gone.values()])
    deleted += len(rows) + await events.prune_batches(connection, [id for (id,) in rows])
    for batch in gone.keys() - {id for (id,) in rows}:
        # While some files are left the batch stays, with its counts updated, until a later round.
        if states := gone[batch]:
            counts = [states[state] for state in _SETTLED]
            await connection.execute(SQL["prune_counted"], batch, states.total(), *counts)
    deleted += row_count(await connection.execute(SQL["prune_notifications"], completed_before, limit))
    deleted += row_count(await connection.execute(EXPECTATION_SQL["prune_unmatched"], completed_before, limit))
    deleted += row_count(await connection.execute(SQL["prune_rejections"], rejected_before, limit))
    deleted += await events.prune_plain(connection, rejected_before, limit)
    return deleted + await journal.prune(connection, completed_before, rejected_before, limit)
