"""Actions on the record: recheck files, reprocess rejected notifications, delete old data.

The API of a running server and the command line share them. Each works in small transactions, so that callbacks are
not delayed, and stops after ACTION_SECONDS with `more` set; the next call does the rest.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import datetime
from difflib import get_close_matches
from typing import Annotated
from uuid import uuid4

import msgspec
import structlog
from msgspec import Meta, Struct

from notify_server.config import Config
from notify_server.contract import wire
from notify_server.contract.envelope import open_envelope
from notify_server.errors import ContractError, NotifyServerError, RejectionGoneError
from notify_server.model import UNSIGNED, Delivery, FileState, Reason, http_reason
from notify_server.store.base import MAX_ID, Editable
from notify_server.store.reading.types import FileFilter, Records

log = structlog.get_logger("notify_server")

ACTION_SECONDS = 15.0
ACTION_ROWS = 500
NOT_AVAILABLE = (FileState.PENDING, FileState.UNAVAILABLE, FileState.BLOCKED)

REASON_PATTERN = f"^(?:{'|'.join(Reason)}|http_[1-9][0-9]{{2}})$"

Id = Annotated[int, Meta(ge=1, le=MAX_ID)]
Text = Annotated[str, Meta(min_length=1, max_length=2000)]
ReasonCode = Annotated[str, Meta(pattern=REASON_PATTERN, description="Why a file is not available.")]
Time = Annotated[datetime, Meta(tz=True, description="RFC 3339, with an offset or Z.")]


class ActionRefusedError(NotifyServerError):
    """An action cannot be done as requested; the text says why, and what to do."""


class Recheck(Struct, frozen=True, forbid_unknown_fields=True):
    """Which files to recheck: one file in any state; or the files of a batch, or those with a reason (at a host), that
    are in one of `states`. With `dry_run` they are only counted.
    """

    file: Id | None = None
    batch: Id | None = None
    reason: ReasonCode | None = None
    host: Text | None = None
    states: list[FileState] = msgspec.field(default_factory=lambda: list(NOT_AVAILABLE))
    dry_run: bool = False


class Rechecked(Struct, frozen=True):
    """The number of files queued for a recheck (with `dry_run`: to be queued). `more` is true when some are left."""

    files: int
    more: bool = False


class Prune(Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of a prune: batches completed and rejections received before a time; by default those of [retention]."""

    completed_before: Time | None = None
    rejections_before: Time | None = None


class Pruned(Struct, frozen=True):
    """The number of deleted rows. `more` is true when some are left."""

    rows: int
    more: bool = False


class Replayed(Struct, frozen=True):
    """The delivery as which a rejection was accepted."""

    delivery: int
    request_id: str


class Actions:
    """Runs the actions. `now` gives Unix ms; `add_hosts` gets the hosts of rechecked files."""

    def __init__(
        self,
        config: Config,
        store: Editable,
        records: Records,
        *,
        now: Callable[[], int],
        add_hosts: Callable[[frozenset[str]], None] = lambda hosts: None,
    ) -> None:
        self._retention = config.retention
        self._max_files = config.contract.max_files
        self._store = store
        self._records = records
        self._now = now
        self._add_hosts = add_hosts

    async def recheck(self, wanted: Recheck) -> Rechecked | None:
        """Recheck files. Returns None for an unknown file or batch. Raises ActionRefusedError."""
        if wanted.reason is not None and (wrong := unknown_reason(wanted.reason)) is not None:
            raise ActionRefusedError(f"reason: {wrong}")
        if wanted.file is not None:
            if wanted.batch is not None or wanted.reason is not None or wanted.host is not None:
                raise ActionRefusedError("file: name it alone, without batch, reason or host")
            file = await self._records.file(wanted.file)
            if file is None:
                return None
            if wanted.dry_run:
                asked = file.state is not FileState.UPLOAD_FAILED and file.reason != Reason.INVALID_URL
                return Rechecked(int(asked))
            return Rechecked(await self._restart([file.id]))
        if wanted.batch is None and wanted.reason is None:
            raise ActionRefusedError("file, batch or reason: name one of them, to say which files")
        if wanted.batch is not None and await self._records.batch(wanted.batch) is None:
            return None
        # Rechecked files become pending, so pending ones come first: no file is rechecked twice.
        states = sorted(set(wanted.states), key=lambda state: (state is not FileState.PENDING, state))
        filters = [FileFilter(wanted.batch, state, wanted.reason, wanted.host) for state in states]
        if wanted.dry_run:
            return Rechecked(sum([await self._count(files) for files in filters]))
        files, deadline = 0, time.monotonic() + ACTION_SECONDS
        for chosen in filters:
            cursor: str | None = None
            while True:
                page = await self._records.files(chosen, cursor, ACTION_ROWS)
                files += await self._restart([file.id for file in page.items])
                if (cursor := page.next) is None:
                    break
                if time.monotonic() >= deadline:
                    return Rechecked(files, more=True)
        return Rechecked(files)

    async def _count(self, wanted: FileFilter) -> int:
        """Count the files that Store.recheck would change."""
        if wanted.state is FileState.UPLOAD_FAILED or wanted.reason == Reason.INVALID_URL:
            return 0
        number = await self._records.count(wanted)
        if wanted.state is FileState.BLOCKED and wanted.reason is None:
            number -= await self._records.count(msgspec.structs.replace(wanted, reason=Reason.INVALID_URL))
        return number

    async def _restart(self, files: list[int]) -> int:
        restart = await self._store.recheck(files, self._now())
        self._add_hosts(restart.hosts)
        return restart.files

    async def replay(self, id: int) -> Replayed | None:
        """Validate a rejected body again and accept it as a new delivery; its sender was authorized at the time.

        Returns None for an unknown rejection. Raises ActionRefusedError when the body is still invalid.
        """
        rejection, body = await self._records.rejection(id), await self._records.rejected_body(id)
        if rejection is None or body is None:
            return None
        try:
            envelope = open_envelope(body)
            bare = body if envelope is None else envelope.notification
            notification = wire.parse_notification(bare, max_files=self._max_files)
        except ContractError as error:
            raise ActionRefusedError(f"it is still refused: {error}") from error
        delivery = Delivery(
            notification.batch_id,
            notification.api_code,
            body,
            len(notification.file_list),
            self._now(),
            rejection.remote_addr,
            UNSIGNED,
            str(uuid4()),
            replays=id,
        )
        try:
            taken = await self._store.accept(delivery)
        except RejectionGoneError:
            return None
        log.info("replayed", request_id=delivery.request_id, rejection=id, batch_id=delivery.batch_id)
        return Replayed(taken, delivery.request_id)

    async def prune(self, wanted: Prune) -> Pruned:
        """Delete old data."""
        if wanted.completed_before is None and wanted.rejections_before is None:
            completed = self._now() - round(self._retention.completed * 1000)
            rejections = self._now() - round(self._retention.rejections * 1000)
        else:
            completed, rejections = to_ms(wanted.completed_before) or 0, to_ms(wanted.rejections_before) or 0
        rows, deadline = 0, time.monotonic() + ACTION_SECONDS
        while deleted := await self._store.prune(completed, rejections, ACTION_ROWS):
            rows += deleted
            if time.monotonic() >= deadline:
                return Pruned(rows, more=True)
        return Pruned(rows)


def unknown_reason(reason: str) -> str | None:
    """Return an error text for an unknown reason code, with the nearest known one; None when the code is known."""
    if re.fullmatch(REASON_PATTERN, reason):
        return None
    shown = reason[:80]
    if shown.startswith("http_"):
        return f"{shown} is not a reason: http_ is followed by the three digits of a status, like {http_reason(404)}"
    if near := get_close_matches(shown, [*Reason, http_reason(404)], 1):
        return f"{shown} is not a reason, did you mean {near[0]}?"
    return f"{shown} is not a reason: there are {', '.join(Reason)}, and http_404, http_500 and so on"


def to_ms(moment: datetime | None) -> int | None:
    """Convert a time to Unix ms, as the tables have it."""
    return None if moment is None else round(moment.timestamp() * 1000)
