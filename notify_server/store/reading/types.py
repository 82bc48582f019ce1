"""The read side of the record: its types, and the calls that every engine answers.

Every call is one short read. Pages follow keys, so that the last page costs as much as the first. Times are UTC. The
JSON of the API, its OpenAPI document and the dashboard use the same types.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Generic, Protocol, TypeVar

from msgspec import Meta, Struct

from notify_server.model import FileState, ReportedStatus, Verdict
from notify_server.store.reading.evidence import EvidenceRecords
from notify_server.store.reading.expectations import ExpectationRecords
from notify_server.store.reading.journal import Acknowledged, JournalRecords
from notify_server.store.reading.outbox import OutboxRecords

T = TypeVar("T")

Limit = Annotated[int, Meta(ge=1, le=1000, description="Max items in the answer.")]
Cursor = Annotated[str, Meta(max_length=2000, description="`next` of the previous page; omit it for the first page.")]


class Page(Struct, Generic[T], frozen=True):
    """Items and the cursor of the next page; `next` is null on the last page.

    A page may have fewer items than its limit, even none, and still have a next one: a page scans a bounded number of
    rows.
    """

    items: list[T]
    next: str | None = None


class BatchItem(Struct, frozen=True):
    """A batch and the number of its files in each state."""

    id: int
    batch_id: str
    api_code: str
    verdict: Verdict
    files: int
    pending: int
    available: int
    unavailable: int
    blocked: int
    upload_failed: int
    deliveries: int
    first_received_at: datetime
    last_received_at: datetime
    completed_at: datetime | None


class DeliveryItem(Struct, frozen=True):
    """A delivery. `signature` is `none`, or the fingerprint of the key that verified it."""

    id: int
    received_at: datetime
    remote_addr: str
    signature: str
    request_id: str
    files: int
    traceparent: str | None = None


class BatchDetail(BatchItem, frozen=True):
    """A batch with its latest delivery, unless that is deleted by retention, and the acknowledgement of its verdict."""

    last_delivery: DeliveryItem | None = None
    acknowledged: Acknowledged | None = None


class FileItem(Struct, frozen=True):
    """A file: what the platform reported, and the check result. `vendor_request_id` and `vendor_code` are the storage
    vendor's; a signed address ends at `expires_at`; `headers` are further header fields of the answer, `flags` what is
    remarkable and no reason to fail.
    """

    id: int
    batch: int
    batch_id: str
    api_code: str
    oss_object_name: str
    target_url: str | None
    host: str
    reported_status: ReportedStatus
    state: FileState
    reason: str | None
    attempts: int
    next_attempt_at: datetime | None
    http_status: int | None
    content_length: int | None
    content_type: str | None
    etag: str | None
    last_modified: str | None
    final_url: str | None
    remote_addr: str | None
    elapsed_ms: float | None
    verified_at: datetime | None
    vendor_request_id: str | None
    vendor_code: str | None
    expires_at: datetime | None
    headers: dict[str, str] | None
    flags: list[str]


class AttemptItem(Struct, frozen=True):
    """A request made for a file. `url` is null when it was the file's target_url. Phases are in milliseconds."""

    id: int
    started_at: datetime
    method: str
    url: str | None
    http_status: int | None
    reason: str | None
    dns_ms: float | None
    connect_ms: float | None
    tls_ms: float | None
    first_byte_ms: float | None
    total_ms: float
    remote_addr: str | None
    vendor_request_id: str | None
    vendor_code: str | None


class FileDetail(FileItem, frozen=True):
    """A file with its requests, newest last; at most 50 are kept."""

    requests: list[AttemptItem] = []


class FailureGroup(Struct, frozen=True):
    """The number of files with the same reason, host and state; those reported FAILED have no reason. Pending ones have
    failed at least once. `new` counts those that are not acknowledged.
    """

    reason: str | None
    host: str
    state: FileState
    files: int
    new: int
    acknowledged: Acknowledged | None = None


class HostBacklog(Struct, frozen=True):
    """The pending files of a host, and when the first is due."""

    host: str
    pending: int
    next_attempt_at: datetime


class RejectionItem(Struct, frozen=True):
    """A rejected notification: the code and text of the answer, and the size of its body in bytes."""

    id: int
    received_at: datetime
    remote_addr: str
    code: str
    detail: str
    request_id: str | None
    size: int


class RejectionDetail(RejectionItem, frozen=True):
    """A rejection with its body; bytes that are not UTF-8 are shown as \\xNN."""

    body: str = ""


class Totals(Struct, frozen=True):
    """Totals of the record: batches by verdict, files by state, rejections."""

    batches: int
    batches_pending: int
    batches_complete: int
    batches_incomplete: int
    files: int
    pending: int
    available: int
    unavailable: int
    blocked: int
    upload_failed: int
    rejections: int
    oldest_pending_at: datetime | None


class Attention(Struct, frozen=True):
    """The numbers of incomplete batches and rejections that are not acknowledged."""

    batches: int
    rejections: int


class Found(Struct, frozen=True):
    """Search results: batches, files, rejections, and api_codes that begin with the text."""

    batches: list[BatchItem]
    files: list[FileItem]
    rejections: list[RejectionItem] = []
    api_codes: list[str] = []


class ReasonCount(Struct, frozen=True):
    """How many files of a batch have a reason; those that have failed and are available now are among them."""

    reason: str
    files: int


class BatchFiles(Struct, frozen=True):
    """Which files of a batch, in which order, and which of them; `text` is a part of the key or the beginning of the
    source path. `sort` is a column of SORTS.
    """

    batch: int
    state: FileState | None = None
    reason: str | None = None
    text: str | None = None
    sort: str = "key"
    descending: bool = False
    offset: int = 0
    limit: int = 50


class Numbered(Struct, Generic[T], frozen=True):
    """Some items of a list, and how many the list has."""

    items: list[T]
    total: int


class BatchFilter(Struct, frozen=True):
    """Filters of batches. Times are Unix ms, `received_before` is exclusive; None is no filter. `acknowledged` False is
    those whose incomplete verdict is not acknowledged; True is no filter.
    """

    verdict: Verdict | None = None
    api_code: str | None = None
    batch_id: str | None = None
    received_from: int | None = None
    received_before: int | None = None
    acknowledged: bool | None = None


class FileFilter(Struct, frozen=True):
    """Filters of files, of one batch or of all; None is no filter. Those by the batch's api_code and its first arrival
    (Unix ms, `received_before` is exclusive) are examined row by row.
    """

    batch: int | None = None
    state: FileState | None = None
    reason: str | None = None
    host: str | None = None
    api_code: str | None = None
    received_from: int | None = None
    received_before: int | None = None

    @property
    def is_of_batches(self) -> bool:
        """Return True when a filter is about the file's batch."""
        return self.api_code is not None or self.received_from is not None or self.received_before is not None


class Prunable(Struct, frozen=True):
    """The numbers of batches, of their files, and of rejections that a prune would delete."""

    batches: int
    files: int
    rejections: int


class Records(Protocol):
    """Reads the record. Every call raises StoreUnavailableError when the record cannot be read now or in time, and
    ValueError for a cursor that it did not return."""

    @property
    def outbox(self) -> OutboxRecords:
        """Events, deliveries and endpoints."""

    @property
    def expectations(self) -> ExpectationRecords:
        """The expectations."""

    @property
    def journal(self) -> JournalRecords:
        """Actions, acknowledgements, and the samples of the charts."""

    @property
    def evidence(self) -> EvidenceRecords:
        """Deliveries with their bodies, and requests."""

    async def close(self) -> None:
        """Close after the calls in progress."""

    async def totals(self) -> Totals:
        """Return the totals. Scans all batches."""

    async def attention(self) -> Attention:
        """Return the numbers of what is not acknowledged."""

    async def batches(self, wanted: BatchFilter, cursor: str | None, limit: int) -> Page[BatchItem]:
        """Return batches, newest first."""

    async def batch(self, id: int) -> BatchDetail | None:
        """Return a batch by its `id`."""

    async def files(self, wanted: FileFilter, cursor: str | None, limit: int) -> Page[FileItem]:
        """Return files. Their order follows the filter: those of a batch by key; those with a reason by host and state;
        pending ones by host and due time; those in another state that needs attention by host; all others by id, the
        newest first when a filter is about their batch."""

    async def count(self, wanted: FileFilter) -> int:
        """Count files. Scans what it counts, unless only a batch or a state is given."""

    async def file(self, id: int) -> FileDetail | None:
        """Return a file by its `id`."""

    async def failures(self, limit: int) -> list[FailureGroup]:
        """Return unconfirmed files by reason, host and state, largest group first. Scans all of them."""

    async def backlog(self, limit: int) -> list[HostBacklog]:
        """Return hosts with pending files, most files first. Scans all pending files."""

    async def rejections(self, cursor: str | None, limit: int) -> Page[RejectionItem]:
        """Return rejections, newest first."""

    async def rejection(self, id: int) -> RejectionDetail | None:
        """Return a rejection by its `id`."""

    async def rejected_body(self, id: int) -> bytes | None:
        """Return the body of a rejection as received."""

    async def prunable(self, completed_before: int, rejected_before: int) -> Prunable:
        """Count what `Store.prune` would delete, by the same bounds. Scans what it counts."""

    async def ended_sessions(self) -> list[str]:
        """Return the log-ins that were ended and would not have ended by themselves long ago."""

    async def search(self, text: str, limit: int) -> Found:
        """Return batches by the beginning of their batch_id and files of the newest batches by the beginning of their
        key. When there are none: what has this request_id, files by their target_url, a part of their key or the
        beginning of their source path, and batches by a part of their batch_id, among the newest of each kind."""

    async def batch_files(self, wanted: BatchFiles) -> Numbered[FileItem]:
        """Return files of a batch in any order. Scans the files of the batch."""

    async def batch_reasons(self, batch: int, limit: int) -> list[ReasonCount]:
        """Return the reasons of a batch's files, the most frequent first. Scans the files of the batch."""

    async def api_codes(self, limit: int) -> list[str]:
        """Return the first api_codes of the record in their order. Costs one seek for each."""
