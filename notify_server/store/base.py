"""The verbs of a store, whatever engine carries it. One conformance suite (tests/store) holds each engine to them.

Every verb is one transaction unless it says otherwise, and is durable when it returns. A verb that cannot commit raises
StoreUnavailableError and may be called again. `now` is always passed in, Unix ms.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from notify_server.errors import RejectionGoneError
from notify_server.model import (
    BatchVerdict,
    Delivery,
    DueFile,
    FileResult,
    FileState,
    HostDue,
    InboxItem,
    Reason,
    Rejection,
    ReportedStatus,
    Restart,
)
from notify_server.store.expectations import Expectations
from notify_server.store.journal import Journal
from notify_server.store.outbox import Outbox

# Begins the keys of ended sessions among those of the platform's nonces, which have an & in them.
SESSION_PREFIX = "session/"
# The largest integer of both engines, and so the largest id.
MAX_ID = 2**63 - 1
# How long closing a store may take unless its caller says otherwise.
CLOSE_SECONDS = 30.0


def valid_ids(ids: Iterable[int]) -> list[int]:
    """Return the numbers that can be ids, each once, in ascending order."""
    return sorted({id for id in ids if 0 < id <= MAX_ID})


def rejection_gone(id: int) -> RejectionGoneError:
    """Return the error for a rejection that is to be replayed and does not exist."""
    return RejectionGoneError(f"rejection {id} is not there: it may have been replayed")


class NewFile(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A file as the notification and the guard leave it: `state` is pending, blocked or upload_failed. `expires_at` is
    when its signed address ends, None when that is unknown or never.
    """

    oss_object_name: str
    target_url: str | None
    host: str
    reported_status: ReportedStatus
    state: FileState
    reason: Reason | None
    expires_at: int | None = None


class Expansion(msgspec.Struct, frozen=True, array_like=True):
    """Some or all files of one inbox item. The last one of an item has `last` set, and may have no files."""

    item: InboxItem
    batch_id: str
    api_code: str
    files: Sequence[NewFile]
    last: bool


class Nodes(msgspec.Struct, frozen=True):
    """The daemons that share the work: the id of this one, and the ids of all that are alive, by role. Ids are never
    reused.
    """

    me: int
    taking: Sequence[int]
    probing: Sequence[int]


class ExpansionListener(msgspec.Struct, frozen=True):
    """The callbacks of an expansion: hosts that have new files, verdicts of batches that settle at once, the number of
    fields that the contract does not know, and of files reported as FAILED.
    """

    on_files: Callable[[set[str]], object]
    on_verdicts: Callable[[Sequence[BatchVerdict]], object]
    on_unknown_fields: Callable[[int], object]
    on_reported_failed: Callable[[int], object]


class FileQueue(Protocol):
    """The queue of due files that the verifier works on."""

    @property
    def prefers_small_batches(self) -> bool:
        """True while callbacks share the writer with the verifier: write small batches so acks are not delayed."""

    async def due_hosts(self, after: str, limit: int) -> list[HostDue]:
        """Return hosts with pending files, ordered by name, from behind `after`. Costs one index seek per host."""

    async def claim(self, wanted: Sequence[tuple[str, int]], now: int) -> list[DueFile]:
        """Claim up to n due files of each (host, n), the longest due first. They are reserved until they are
        recorded or released. A crash releases every claim.
        """

    def release(self, files: Sequence[DueFile]) -> None:
        """Give claims back. No attempt is spent."""

    async def record(self, results: Sequence[FileResult], now: int) -> list[BatchVerdict]:
        """Write outcomes with their attempts, end the claims, and return the verdicts that were reached.

        Results are dropped if their file was reset after the claim (they are about the old address) or is not claimed.
        Of several results of one file only the first is written.
        """


class Editable(Protocol):
    """The verbs by which people change the record, through the daemon or beside it."""

    def accept(self, delivery: Delivery) -> Awaitable[int]:
        """Write a delivery to the inbox and return its id.

        Calls that arrive together share a transaction, which also consumes the nonce and the replayed rejection of a
        delivery, if it has them. Raises NonceReusedError or RejectionGoneError for that delivery alone when they are
        gone already.
        """

    async def recheck(self, files: Sequence[int], now: int) -> Restart:
        """Reset files: pending, due at once, no attempt spent, no result; their batches have no verdict.

        Skipped are unknown ids, files that were reported FAILED, and addresses that cannot be parsed.
        """

    async def prune(self, completed_before: int, rejected_before: int, limit: int) -> int:
        """Delete batches that were completed, and deliveries and rejections that were received, before these times.
        Returns the number of rows deleted, at most about `limit`; 0 when nothing is left to delete.
        """

    @property
    def journal(self) -> Journal:
        """Actions, acknowledgements, and the samples of the charts."""


class Store(FileQueue, Editable, Protocol):
    """The verbs that the daemon uses."""

    @property
    def backlog(self) -> int:
        """The number of files accepted and not settled: in the inbox, or pending. Kept in memory; exact to within what
        is in flight.
        """

    @property
    def nodes(self) -> Nodes:
        """This daemon among those that share the work; a store of one daemon has it alone, as 0."""

    @property
    def outbox(self) -> Outbox:
        """The events and their deliveries."""

    @property
    def expectations(self) -> Expectations:
        """The submissions that a notification is expected for."""

    async def close(self, grace: float = CLOSE_SECONDS) -> None:
        """Finish what is being written, for at most about `grace` seconds, and close. Callers still waiting get
        StoreUnavailableError.
        """

    async def reject(self, rejection: Rejection) -> None:
        """Keep a refused body, within MAX_REJECTIONS and MAX_REJECTION_BYTES; the oldest go first."""

    async def make_due(self, beyond: int, now: int, limit: int) -> Restart:
        """Make at most `limit` pending files due whose next attempt is later than `beyond`. No schedule leads to such a
        time: a clock was wrong when it was written. Deliveries of events are made due in the same way when their next
        attempt is later than `beyond` by more than DELIVERY_WAIT_MS.
        """

    async def end_session(self, session: str, ends_at: int) -> None:
        """Remember that a log-in was ended, until it would have ended by itself at `ends_at` (Unix ms)."""

    async def ping(self, now: int) -> None:
        """Commit a trivial write, to learn whether the store can."""


class Inbox(Protocol):
    """The inbox as the expander sees it. One task in one daemon uses it at a time."""

    @property
    def prefers_small_batches(self) -> bool:
        """As in FileQueue."""

    async def wait_inbox(self) -> None:
        """Return when the inbox may hold something to expand (at once when it does)."""

    async def inbox(self, limit: int) -> list[InboxItem]:
        """Return the oldest deliveries that have not been expanded, at most `limit`."""

    async def expand(self, expansions: Sequence[Expansion], now: int) -> list[BatchVerdict]:
        """Merge files into their batches and return the verdicts that were reached.

        New files are added. A file whose address has changed, or that was FAILED and is FINISHED now, is reset.
        FINISHED outweighs FAILED in whichever order they come, since deliveries may be repeated in any order and a
        probe decides. Anything else leaves the file unchanged. Repeating an expansion changes nothing, so an item that
        was cut off half-way is expanded from its beginning again. A delivery is counted, and its item leaves the inbox,
        with its last expansion; a batch has no verdict before that.
        """

    async def discard(self, item: InboxItem, detail: str, now: int) -> list[BatchVerdict]:
        """Move an inbox item that cannot be expanded to the rejections, so that it is neither lost nor blocks the rest.

        Files of it that were expanded before stay; returns the verdict that its batch reaches by this.
        """


class Engine(Store, Inbox, Protocol):
    """A store in the process that has the database."""
