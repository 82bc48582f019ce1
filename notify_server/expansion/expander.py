"""Expands the inbox into batches and files: off the ack path, in bounded chunks, in the order of arrival."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence

import structlog

from notify_server.contract.envelope import open_envelope
from notify_server.contract.expiry import expiry
from notify_server.contract.trace_context import trace_fields
from notify_server.contract.wire import parse_notification, unknown_fields
from notify_server.errors import ContractError, StoreUnavailableError
from notify_server.model import FileEntry, FileState, InboxItem, Notification, ReportedStatus, UrlGuard
from notify_server.store.base import Expansion, ExpansionListener, Inbox, NewFile
from notify_server.verify.guard import printable_url

log = structlog.get_logger("notify_server.store")

# Files per transaction; the second value applies while acks are pending (it keeps the writer busy for 1 to 2 ms).
CHUNK_FILES = 250
SMALL_CHUNK_FILES = 100
INBOX_ITEMS = 64
# When the last notifications came less than LINGER_SECONDS ago, and were fewer than ENOUGH_ITEMS, wait for more: a
# transaction costs more than a file. One that comes alone does not wait.
LINGER_SECONDS = 0.02
ENOUGH_ITEMS = 16
RETRY_SECONDS = 1.0


class Expander:
    """Runs until cancelled."""

    def __init__(self, inbox: Inbox, guard: UrlGuard, now: Callable[[], int], listener: ExpansionListener) -> None:
        self._inbox = inbox
        self._guard = guard
        self._now = now
        self._listener = listener

    async def run(self) -> None:
        """Expand what is in the inbox and what arrives."""
        items: Sequence[InboxItem] = ()
        last_at = -math.inf
        while True:
            await self._inbox.wait_inbox()
            if len(items) < ENOUGH_ITEMS and time.monotonic() - last_at < LINGER_SECONDS:
                await asyncio.sleep(LINGER_SECONDS)
            last_at = time.monotonic()
            try:
                items = await self._inbox.inbox(INBOX_ITEMS)
                await self._take(items)
            except StoreUnavailableError as error:
                log.warning("cannot expand the inbox, trying again", error=str(error))
                await asyncio.sleep(RETRY_SECONDS)

    async def _take(self, items: Sequence[InboxItem]) -> None:
        """Expand items in order: small ones share a transaction, a large one takes several."""
        most = SMALL_CHUNK_FILES if self._inbox.prefers_small_batches else CHUNK_FILES
        group: list[Expansion] = []
        size = 0
        for item in items:
            try:
                notification = self._read(item)
            except ContractError as error:
                await self._expand(group)
                group, size = [], 0
                log.error(
                    "an acked notification cannot be expanded, it is kept in rejection",
                    request_id=item.request_id,
                    **trace_fields(item.traceparent),
                    error=str(error),
                )
                self._listener.on_verdicts(await self._inbox.discard(item, str(error), self._now()))
                continue
            for expansion in self._expansions(item, notification, most):
                if group and size + len(expansion.files) > most:
                    await self._expand(group)
                    group, size = [], 0
                group.append(expansion)
                size += len(expansion.files)
        await self._expand(group)

    async def _expand(self, group: Sequence[Expansion]) -> None:
        if not group:
            return
        verdicts = await self._inbox.expand(group, self._now())
        hosts = {file.host for expansion in group for file in expansion.files if file.state is FileState.PENDING}
        if hosts:
            self._listener.on_files(hosts)
        if verdicts:
            self._listener.on_verdicts(verdicts)
        failed = sum(file.state is FileState.UPLOAD_FAILED for expansion in group for file in expansion.files)
        if failed:
            self._listener.on_reported_failed(failed)

    def _read(self, item: InboxItem) -> Notification:
        envelope = open_envelope(item.body)
        bare = item.body if envelope is None else envelope.notification
        # It was within the limit when it was acked: a limit lowered since must not lose it.
        notification = parse_notification(bare, max_files=2**31)
        if unknown := unknown_fields(bare):
            self._listener.on_unknown_fields(unknown)
        return notification

    def _expansions(self, item: InboxItem, notification: Notification, most: int) -> Iterator[Expansion]:
        files = _latest_entries(notification.file_list)
        for start in range(0, max(1, len(files)), most):
            yield Expansion(
                item,
                notification.batch_id,
                notification.api_code,
                [self._admit(entry) for entry in files[start : start + most]],
                start + most >= len(files),
            )

    def _admit(self, entry: FileEntry) -> NewFile:
        if entry.status is ReportedStatus.FAILED:
            return NewFile(entry.oss_object_name, entry.target_url, "", entry.status, FileState.UPLOAD_FAILED, None)
        assert entry.target_url is not None
        target = self._guard.examine(entry.target_url)
        if target.refusal is None:
            return NewFile(
                *(entry.oss_object_name, entry.target_url, target.host, entry.status, FileState.PENDING, None),
                expiry(entry.target_url),
            )
        # The address may be hostile, and is stored for display.
        shown = printable_url(entry.target_url)
        return NewFile(entry.oss_object_name, shown, target.host, entry.status, FileState.BLOCKED, target.refusal)


def _latest_entries(entries: Sequence[FileEntry]) -> Sequence[FileEntry]:
    """Return one entry per key. The last entry of a key counts, as if it had been delivered later."""
    files: dict[str, FileEntry] = {}
    for entry in entries:
        known = files.get(entry.oss_object_name)
        if known is None or entry.status is ReportedStatus.FINISHED or known.status is ReportedStatus.FAILED:
            files[entry.oss_object_name] = entry
    return entries if len(files) == len(entries) else list(files.values())
