"""What every store does, whatever engine carries it. One conformance suite (tests/store) holds each of them to this.

Every verb is one transaction unless it says otherwise, and is durable when it returns. A verb that cannot commit
raises StoreUnavailableError, has written nothing, and may be called again. `now` is always passed in, Unix ms.
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
    InboxItem,
    Reason,
    Rejection,
    ReportedStatus,
)
from notify_server.verify.guard import Guard

# The largest number that both engines hold, and so the largest id there can be.
MAX_ID = 2**63 - 1


def valid_ids(ids: Iterable[int]) -> list[int]:
    """Those that can be the id of anything, each once and in their order."""
    return sorted({id for id in ids if 0 < id <= MAX_ID})


def rejection_gone(id: int) -> RejectionGoneError:
    """What to tell of a rejection that is to be replayed and is not there."""
    return RejectionGoneError(f"rejection {id} is not there: it may have been replayed")


class NewFile(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A file as the notification and the guard leave it: `state` is pending, blocked or upload_failed."""

    oss_object_name: str
    target_url: str | None
    host: str
    reported_status: ReportedStatus
    state: FileState
    reason: Reason | None


class Expansion(msgspec.Struct, frozen=True, array_like=True):
    """Some or all files of one inbox item. The last one of an item has `last` set, and may have no files."""

    item: InboxItem
    batch_id: str
    api_code: str
    files: Sequence[NewFile]
    last: bool


class Restart(msgspec.Struct, frozen=True, array_like=True):
    """What a recheck has set going: how many files, and which hosts they are at."""

    files: int
    hosts: frozenset[str]


class HostDue(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A host with pending files, and when the first of them is due (it may be claimed already)."""

    host: str
    next_attempt_at: int


class Nodes(msgspec.Struct, frozen=True):
    """The daemons that share the work: the id of this one, and those of all that were alive a moment ago, by what they
    do. An id is never given twice.
    """

    me: int
    taking: Sequence[int]
    probing: Sequence[int]


class FileQueue(Protocol):
    """Where the verifier's work comes from, and goes to."""

    @property
    def prefers_small_batches(self) -> bool:
        """Whether callbacks, of which some have come lately, wait for what is recorded, so that little at a time is
        better.
        """

    async def due_hosts(self, after: str, limit: int) -> list[HostDue]:
        """Hosts with pending files in the order of their names, from behind `after`. Costs a seek a host."""

    async def claim(self, wanted: Sequence[tuple[str, int]], now: int) -> list[DueFile]:
        """Claim due files: for each (host, n) at most n, longest due first. Nobody else gets them before they are
        recorded or released. A crash releases every claim."""

    def release(self, files: Sequence[DueFile]) -> None:
        """Give claims back untouched: no attempt is spent."""

    async def record(self, results: Sequence[FileResult], now: int) -> list[BatchVerdict]:
        """Write outcomes with their attempts, end the claims, and return the verdicts that this brings about.

        A result of a file that has started anew since it was claimed is dropped: it speaks of what was before. So is
        one of a file that is not claimed, and all but the first of several of one file.
        """


class ExpansionListener(msgspec.Struct, frozen=True):
    """What an expansion of the inbox tells as it goes on: the hosts that have new files, the verdicts of batches that
    are settled at once, and how many fields the contract does not know.
    """

    on_files: Callable[[set[str]], object]
    on_verdicts: Callable[[Sequence[BatchVerdict]], object]
    on_unknown_fields: Callable[[int], object]


class Editable(Protocol):
    """What people do about the record, beside the daemon or through it."""

    def accept(self, delivery: Delivery) -> Awaitable[int]:
        """Write a delivery to the inbox and return its id.

        Calls that arrive together share a transaction. When the delivery has a nonce it is consumed in the same
        transaction; a nonce consumed before raises NonceReusedError for that delivery alone. When it replays a
        rejection, that is deleted in the same transaction; RejectionGoneError when it is not there.
        """

    async def recheck(self, files: Sequence[int], now: int) -> Restart:
        """Ask for these files anew, at once: pending, nothing known, no attempt spent; their batches have no verdict.

        Left as they are: ids of no file, files reported FAILED, and addresses that cannot be read.
        """

    async def prune(self, completed_before: int, rejected_before: int, limit: int) -> int:
        """Delete some of what is older: batches completed, deliveries and rejections received before. Returns the
        number of rows deleted, at most about `limit`; 0 when nothing is left to delete."""


class Store(FileQueue, Editable, Protocol):
    """The verbs. Those marked (single caller) are for one task of the daemon at a time."""

    @property
    def backlog(self) -> int:
        """Files accepted and not settled: in the inbox, or pending. Kept in memory; exact to within what is in
        flight.
        """

    @property
    def nodes(self) -> Nodes:
        """This daemon among those that share the work; a store of one daemon has it alone, as 0."""

    async def close(self, grace: float = 30.0) -> None:
        """Finish what is being written, for at most about `grace` seconds, and close. Callers still waiting get
        StoreUnavailableError.
        """

    async def reject(self, rejection: Rejection) -> None:
        """Keep a refused body. The number and total size kept are bounded; the oldest go first."""

    async def wait_inbox(self) -> None:
        """Return when the inbox may hold something to expand (at once when it does)."""

    async def expand_inbox(self, guard: Guard, now: Callable[[], int], told: ExpansionListener) -> None:
        """Expand what the inbox holds, and what it comes to hold, until cancelled (single caller)."""

    async def inbox(self, limit: int) -> list[InboxItem]:
        """The oldest deliveries that have not been expanded, at most `limit` (single caller)."""

    async def expand(self, expansions: Sequence[Expansion], now: int) -> list[BatchVerdict]:
        """Merge files into their batches and return the verdicts that this brings about (single caller).

        New files are added. A file whose address has changed, or that was FAILED and is FINISHED now, starts anew.
        FINISHED outweighs FAILED in whichever order they come, since deliveries may be repeated in any order and a
        probe tells the truth of it. Anything else leaves the file as it is. Repeating an expansion changes nothing,
        so an item that was cut off half-way is expanded from its beginning again. A delivery is counted, and its item
        leaves the inbox, with its last expansion; a batch has no verdict before that.
        """

    async def discard(self, item: InboxItem, detail: str, now: int) -> list[BatchVerdict]:
        """Move an inbox item that cannot be expanded to the rejections, so that it is neither lost nor in the way.

        What of it was expanded before stays; returns the verdict that this brings about for its batch.
        """

    async def ping(self, now: int) -> None:
        """Commit a trivial write, to learn whether the store can."""
