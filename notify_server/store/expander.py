"""From the inbox to batches and files: off the ack path, in bounded chunks, in the order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

import structlog

from notify_server.contract.signature import open_envelope
from notify_server.contract.wire import parse_notification, unknown_fields
from notify_server.errors import ContractError, StoreUnavailableError
from notify_server.model import BatchVerdict, FileEntry, FileState, InboxItem, ReportedStatus
from notify_server.store.base import Expansion, NewFile, Store
from notify_server.verify.guard import Guard, harmless

log = structlog.get_logger("notify_server.store")

# Files in one transaction: an ack that arrives meanwhile waits for a few ms at most.
CHUNK_FILES = 500
INBOX_ITEMS = 64
RETRY_SECONDS = 1.0


class _UnreadableError(Exception):
    def __init__(self, item: InboxItem, error: ContractError) -> None:
        super().__init__(str(error))
        self.item = item


class Expander:
    """Runs until cancelled. `on_files` is told the hosts that have new files, `on_verdicts` what is settled at once."""

    def __init__(
        self,
        store: Store,
        guard: Guard,
        *,
        now: Callable[[], int],
        on_files: Callable[[set[str]], None],
        on_verdicts: Callable[[Sequence[BatchVerdict]], None],
        on_unknown_fields: Callable[[int], None],
    ) -> None:
        self._store = store
        self._guard = guard
        self._now = now
        self._on_files = on_files
        self._on_verdicts = on_verdicts
        self._on_unknown_fields = on_unknown_fields

    async def run(self) -> None:
        """Expand what the inbox holds, and what it comes to hold."""
        while True:
            await self._store.wait_inbox()
            try:
                items = await self._store.inbox(INBOX_ITEMS)
                for chunk in _group(self._expansions(items)):
                    await self._expand(chunk)
            except _UnreadableError as error:
                log.error("an acked notification cannot be expanded, it is kept in rejection", error=str(error))
                await self._store.discard(error.item, str(error), self._now())
            except StoreUnavailableError as error:
                log.warning("cannot expand the inbox, trying again", error=str(error))
                await asyncio.sleep(RETRY_SECONDS)

    async def _expand(self, chunk: Sequence[Expansion]) -> None:
        verdicts = await self._store.expand(chunk, self._now())
        hosts = {file.host for expansion in chunk for file in expansion.files if file.state is FileState.PENDING}
        if hosts:
            self._on_files(hosts)
        if verdicts:
            self._on_verdicts(verdicts)

    def _expansions(self, items: Sequence[InboxItem]) -> Iterator[Expansion]:
        for item in items:
            # It was within the limit when it was acked; a limit lowered since must not lose it.
            try:
                envelope = open_envelope(item.body)
                bare = item.body if envelope is None else envelope.notification
                notification = parse_notification(bare, max_files=2**31)
            except ContractError as error:
                raise _UnreadableError(item, error) from error
            if unknown := unknown_fields(bare):
                self._on_unknown_fields(unknown)
            files = notification.file_list
            for start in range(0, max(1, len(files)), CHUNK_FILES):
                part = files[start : start + CHUNK_FILES]
                yield Expansion(
                    item,
                    notification.batch_id,
                    notification.api_code,
                    [self._admit(entry) for entry in part],
                    start + CHUNK_FILES >= len(files),
                )

    def _admit(self, entry: FileEntry) -> NewFile:
        if entry.status is ReportedStatus.FAILED:
            return NewFile(
                entry.oss_object_name, entry.target_url, "", entry.status, FileState.UPLOAD_FAILED, None
            )  # fmt: skip
        assert entry.target_url is not None
        target = self._guard.examine(entry.target_url)
        if target.refusal is None:
            return NewFile(entry.oss_object_name, entry.target_url, target.host, entry.status, FileState.PENDING, None)
        # What is refused may be hostile, and is kept to be shown.
        shown = harmless(entry.target_url)
        return NewFile(entry.oss_object_name, shown, target.host, entry.status, FileState.BLOCKED, target.refusal)


def _group(expansions: Iterator[Expansion]) -> Iterator[list[Expansion]]:
    """Whole transactions' worth: small notifications together, a large one in parts."""
    group: list[Expansion] = []
    size = 0
    for expansion in expansions:
        if group and size + len(expansion.files) > CHUNK_FILES:
            yield group
            group, size = [], 0
        group.append(expansion)
        size += len(expansion.files)
    if group:
        yield group
