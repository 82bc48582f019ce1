"""Actions on the record: recheck files, reprocess rejected notifications, acknowledge, delete old data.

The API of a running server and the command line share them. Each works in small transactions, so that callbacks are
not delayed, and stops after ACTION_SECONDS with `more` set; the next call does the rest.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Annotated, Literal, NamedTuple
from uuid import uuid4

import msgspec
import structlog
from msgspec import Meta, Struct

from notify_server.action_log import CALLER, MAX_CALLER, ActionKind, ActionLog
from notify_server.config import Config
from notify_server.contract import wire
from notify_server.contract.envelope import open_envelope
from notify_server.errors import ContractError, NotifyServerError, RejectionGoneError
from notify_server.model import UNSIGNED, Delivery, FileState, Reason, Verdict, http_reason
from notify_server.store.base import MAX_ID, Editable
from notify_server.store.journal import MAX_ACKNOWLEDGED, Group, NewAcknowledgement
from notify_server.store.reading.types import BatchFilter, FileFilter, Records

log = structlog.get_logger("notify_server")

ACTION_SECONDS = 15.0
ACTION_ROWS = 500
NOT_AVAILABLE = (FileState.PENDING, FileState.UNAVAILABLE, FileState.BLOCKED)

REASON_PATTERN = f"^(?:{'|'.join(Reason)}|http_[1-9][0-9]{{2}})$"

Id = Annotated[int, Meta(ge=1, le=MAX_ID)]
Text = Annotated[str, Meta(min_length=1, max_length=2000)]
ReasonCode = Annotated[str, Meta(pattern=REASON_PATTERN, description="Why a file is not available.")]
Note = Annotated[str, Meta(max_length=500, description="Why it is known, for those who read it later.")]
Time = Annotated[datetime, Meta(tz=True, description="RFC 3339, with an offset or Z.")]


class ActionRefusedError(NotifyServerError):
    """An action cannot be done as requested; the text says why, and what to do."""


class Recheck(Struct, frozen=True, forbid_unknown_fields=True):
    """Which files to recheck: one file in any state; or the files of a batch, or those with a reason (at a host), that
    are in one of `states`, of all batches or of those with an api_code or received in a period. With `dry_run` they are
    only counted.
    """

    file: Id | None = None
    batch: Id | None = None
    reason: ReasonCode | None = None
    host: Text | None = None
    api_code: Text | None = None
    received_from: Time | None = None
    received_before: Time | None = None
    states: list[FileState] = msgspec.field(default_factory=lambda: list(NOT_AVAILABLE))
    dry_run: bool = False


class Rechecked(Struct, frozen=True):
    """The number of files queued for a recheck (with `dry_run`: to be queued). `more` is true when some are left."""

    files: int
    more: bool = False


class Acknowledge(Struct, frozen=True, forbid_unknown_fields=True):
    """What to acknowledge, with a note: an incomplete batch, a rejection, a group of failing files (`state`, `reason`,
    `host`; those reported FAILED have no reason), or `all` that is new of a kind. With `dry_run` it is only counted.
    """

    note: Note = ""
    batch: Id | None = None
    rejection: Id | None = None
    state: FileState | None = None
    reason: ReasonCode | None = None
    host: Annotated[str, Meta(max_length=2000)] | None = None
    all: Literal["batches", "rejections", "failures"] | None = None
    api_code: Text | None = None
    dry_run: bool = False


class AcknowledgedCount(Struct, frozen=True):
    """The number of batches, rejections or files that were new and are acknowledged now (with `dry_run`: would be).
    `more` is true when some are left.
    """

    acknowledged: int
    more: bool = False


class Prune(Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of a prune: batches completed and rejections received before a time; by default those of [retention].
    With `dry_run` the rows are only counted.
    """

    completed_before: Time | None = None
    rejections_before: Time | None = None
    dry_run: bool = False


class Pruned(Struct, frozen=True):
    """The number of deleted rows. `more` is true when some are left. With `dry_run` no row is deleted, and `batches`,
    `files` and `rejections` are the numbers to be deleted.
    """

    rows: int
    more: bool = False
    batches: int | None = None
    files: int | None = None
    rejections: int | None = None


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
        self.log = ActionLog(store.journal, now)

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
            files = await self._restart([file.id])
            await self.log.add(ActionKind.RECHECK, files, file=file.id, batch_id=file.batch_id)
            return Rechecked(files)
        if not any((wanted.batch, wanted.reason, wanted.host, wanted.api_code, wanted.states != list(NOT_AVAILABLE))):
            raise ActionRefusedError("file, batch, reason, host, api_code or states: name one, to say which files")
        batch = None if wanted.batch is None else await self._records.batch(wanted.batch)
        if wanted.batch is not None and batch is None:
            return None
        done = await self._recheck_matching(wanted)
        if not wanted.dry_run:
            await self.log.add(
                ActionKind.RECHECK,
                done.files,
                batch_id=None if batch is None else batch.batch_id,
                api_code=wanted.api_code if batch is None else batch.api_code,
                reason=wanted.reason,
                host=wanted.host,
                state=None if wanted.states == list(NOT_AVAILABLE) else " ".join(wanted.states),
                received_from=_iso(wanted.received_from),
                received_before=_iso(wanted.received_before),
            )
        return done

    async def _recheck_matching(self, wanted: Recheck) -> Rechecked:
        # Rechecked files become pending, so pending ones come first: no file is rechecked twice.
        states = sorted(set(wanted.states), key=lambda state: (state is not FileState.PENDING, state))
        period = to_ms(wanted.received_from), to_ms(wanted.received_before)
        filters = [
            FileFilter(wanted.batch, state, wanted.reason, wanted.host, wanted.api_code, *period) for state in states
        ]
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
        await self.log.add(ActionKind.REPLAY, rejection=id, batch_id=delivery.batch_id, request_id=delivery.request_id)
        return Replayed(taken, delivery.request_id)

    async def prune(self, wanted: Prune) -> Pruned:
        """Delete old data."""
        if wanted.completed_before is None and wanted.rejections_before is None:
            completed = self._now() - round(self._retention.completed * 1000)
            rejections = self._now() - round(self._retention.rejections * 1000)
        else:
            completed, rejections = to_ms(wanted.completed_before) or 0, to_ms(wanted.rejections_before) or 0
        if wanted.dry_run:
            found = await self._records.prunable(completed, rejections)
            return Pruned(0, batches=found.batches, files=found.files, rejections=found.rejections)
        rows, deadline, more = 0, time.monotonic() + ACTION_SECONDS, False
        while not more and (deleted := await self._store.prune(completed, rejections, ACTION_ROWS)):
            rows += deleted
            more = time.monotonic() >= deadline
        bounds = {"completed_before": completed, "rejections_before": rejections}
        times = {name: _iso(datetime.fromtimestamp(at / 1000, UTC)) for name, at in bounds.items() if at > 0}
        await self.log.add(ActionKind.PRUNE, rows, **times)
        return Pruned(rows, more)

    async def acknowledge(self, wanted: Acknowledge) -> AcknowledgedCount | None:
        """Acknowledge what is known. Returns None for an unknown batch or rejection. Raises ActionRefusedError."""
        named = [wanted.batch, wanted.rejection, wanted.state, wanted.all]
        if sum(each is not None for each in named) != 1:
            raise ActionRefusedError("batch, rejection, state or all: name one of them, to say what is acknowledged")
        if (wanted.reason is not None or wanted.host is not None) and wanted.state is None:
            raise ActionRefusedError("reason, host: name them with a state")
        batch = None if wanted.batch is None else await self._records.batch(wanted.batch)
        if wanted.batch is not None and batch is None:
            return None
        if wanted.rejection is not None and await self._records.rejection(wanted.rejection) is None:
            return None
        done = await self._acknowledge_matching(wanted)
        if not wanted.dry_run:
            await self.log.add(
                ActionKind.ACKNOWLEDGE,
                done.acknowledged,
                batch_id=None if batch is None else batch.batch_id,
                api_code=wanted.api_code if batch is None else batch.api_code,
                rejection=wanted.rejection,
                reason=wanted.reason,
                host=wanted.host,
                state=wanted.state,
                all=wanted.all,
                note=wanted.note or None,
            )
        return done

    async def _acknowledge_matching(self, wanted: Acknowledge) -> AcknowledgedCount:
        number, deadline, cursor = 0, time.monotonic() + ACTION_SECONDS, None
        while True:
            chosen, cursor = await self._chosen(wanted, cursor)
            if wanted.dry_run:
                number += chosen.number
            else:
                by = NewAcknowledgement(
                    self._now(), CALLER.get()[:MAX_CALLER], wanted.note, chosen.batches, chosen.rejections,
                    chosen.groups,
                )  # fmt: skip
                number += await self._store.journal.acknowledge(by)
            if cursor is None:
                return AcknowledgedCount(number)
            if time.monotonic() >= deadline:
                return AcknowledgedCount(number, more=True)

    async def _chosen(self, wanted: Acknowledge, cursor: str | None) -> tuple[Chosen, str | None]:
        """Return what is to be acknowledged, some at a time, and the cursor of the rest."""
        if wanted.batch is not None or wanted.all == "batches":
            if wanted.batch is not None:
                batch = await self._records.batch(wanted.batch)
                is_new = batch is not None and batch.verdict is Verdict.INCOMPLETE and batch.acknowledged is None
                return Chosen(batches=[wanted.batch] if is_new else []), None
            new = BatchFilter(api_code=wanted.api_code, acknowledged=False)
            page = await self._records.batches(new, cursor, MAX_ACKNOWLEDGED)
            return Chosen(batches=[each.id for each in page.items]), page.next
        if wanted.rejection is not None or wanted.all == "rejections":
            if wanted.rejection is not None:
                ids, following = [wanted.rejection], None
            else:
                rejections = await self._records.rejections(cursor, MAX_ACKNOWLEDGED)
                ids, following = [each.id for each in rejections.items], rejections.next
            known = await self._records.journal.rejections(ids)
            return Chosen(rejections=[id for id in ids if id not in known]), following
        groups = [
            group
            for group in await self._records.failures(MAX_ACKNOWLEDGED)
            if group.new
            and (
                wanted.all == "failures"
                or (
                    (group.state is wanted.state and group.reason == wanted.reason)
                    and wanted.host in (None, group.host)
                )
            )
        ]
        names = [Group(group.reason or "", group.host, str(group.state)) for group in groups]
        return Chosen(groups=names, files=sum(group.new for group in groups)), None


class Chosen(NamedTuple):
    """What one transaction acknowledges; `files` counts the new files of its groups."""

    batches: Sequence[int] = ()
    rejections: Sequence[int] = ()
    groups: Sequence[Group] = ()
    files: int = 0

    @property
    def number(self) -> int:
        """How many batches, rejections and files it is."""
        return len(self.batches) + len(self.rejections) + self.files


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


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def to_ms(moment: datetime | None) -> int | None:
    """Convert a time to Unix ms, as the tables have it."""
    return None if moment is None else round(moment.timestamp() * 1000)
