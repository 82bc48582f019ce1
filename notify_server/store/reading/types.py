"""What people and programs look at: the record as types, and what every store can tell of it.

Nothing here changes anything. Every call is one short read; pages follow keys, so that the last costs what the first
does. Times are UTC. The same types make the JSON of the API, its OpenAPI document and the dashboard.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Generic, Protocol, TypeVar

from msgspec import Meta, Struct

from notify_server.model import FileState, ReportedStatus, Verdict

T = TypeVar("T")

Limit = Annotated[int, Meta(ge=1, le=1000, description="The most items in the answer.")]
Cursor = Annotated[str, Meta(max_length=2000, description="`next` of the page before; the first page has none.")]


class Page(Struct, Generic[T], frozen=True):
    """Some items, and where the next ones begin; `next` is null on the last page.

    A page may hold fewer items than asked for, even none, and have a next one: it has looked at as many as it may.
    """

    items: list[T]
    next: str | None = None


class BatchItem(Struct, frozen=True):
    """A batch, and how many of its files are in each state."""

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
    """A delivery as it came: `signature` is `none`, or the fingerprint of the key that proved it."""

    id: int
    received_at: datetime
    remote_addr: str
    signature: str
    request_id: str
    files: int
    traceparent: str | None = None


class BatchDetail(BatchItem, frozen=True):
    """A batch with its latest delivery, as long as that is kept."""

    last_delivery: DeliveryItem | None = None


class FileItem(Struct, frozen=True):
    """A file: what the platform reported, and what is known of it."""

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


class AttemptItem(Struct, frozen=True):
    """A request made for a file; `url` is null when it was the file's target_url. Phases are milliseconds."""

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


class FileDetail(FileItem, frozen=True):
    """A file with the requests made for it, the latest last; at most the 50 that are kept."""

    requests: list[AttemptItem] = []


class FailureGroup(Struct, frozen=True):
    """How many files of a host are in a state for a reason. Those still pending have failed at least once."""

    reason: str
    host: str
    state: FileState
    files: int


class HostBacklog(Struct, frozen=True):
    """What waits for a host, and when its first file is due."""

    host: str
    pending: int
    next_attempt_at: datetime


class RejectionItem(Struct, frozen=True):
    """A refused body that was kept: the code and text of the answer, and how many bytes it has."""

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
    """The whole record in numbers: batches by verdict, their files by state, and what else is kept."""

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


class Found(Struct, frozen=True):
    """What a search has found: batches whose batch_id begins with the text, and files whose key is the text."""

    batches: list[BatchItem]
    files: list[FileItem]


class BatchFilter(Struct, frozen=True):
    """Which batches. Times are Unix ms, `before` not included; what is None does not count."""

    verdict: Verdict | None = None
    api_code: str | None = None
    batch_id: str | None = None
    received_from: int | None = None
    received_before: int | None = None


class FileFilter(Struct, frozen=True):
    """Which files, of one batch (`batch`), or of all; what is None does not count."""

    batch: int | None = None
    state: FileState | None = None
    reason: str | None = None
    host: str | None = None


class Records(Protocol):
    """What a store tells. Every call raises StoreUnavailableError when the record cannot be read now, or not in time;
    a cursor that is not one of ours raises ValueError."""

    async def close(self) -> None:
        """Close once the calls under way have ended."""

    async def totals(self) -> Totals:
        """The record in numbers. Costs a walk over the batches."""

    async def batches(self, wanted: BatchFilter, cursor: str | None, limit: int) -> Page[BatchItem]:
        """Batches, the latest first."""

    async def batch(self, id: int) -> BatchDetail | None:
        """One batch by its `id`."""

    async def files(self, wanted: FileFilter, cursor: str | None, limit: int) -> Page[FileItem]:
        """Return files. Their order follows the filter: those of a batch by key; those with a reason by host and state;
        pending ones by host and due time; all others by id."""

    async def count(self, wanted: FileFilter) -> int:
        """How many files that is. Costs what it counts."""

    async def file(self, id: int) -> FileDetail | None:
        """One file by its `id`."""

    async def failures(self, limit: int) -> list[FailureGroup]:
        """What fails, the largest groups first. Costs a walk over what fails."""

    async def backlog(self, limit: int) -> list[HostBacklog]:
        """Hosts with pending files, those with most of them first. Costs a walk over what is pending."""

    async def rejections(self, cursor: str | None, limit: int) -> Page[RejectionItem]:
        """Refused bodies, the latest first."""

    async def rejection(self, id: int) -> RejectionDetail | None:
        """One rejection by its `id`."""

    async def rejected_body(self, id: int) -> bytes | None:
        """The body of a rejection as it came."""

    async def search(self, text: str, limit: int) -> Found:
        """Batches by the beginning of their batch_id, and files by their whole key, in the latest batches."""
