"""The types of the API's requests and answers that are not the record's own."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Literal

from msgspec import Struct

from notify_server.config import Role
from notify_server.model import CircuitState, FileState, HostView, Verdict
from notify_server.operations import Id, ReasonCode, Text, Time, to_ms
from notify_server.store.base import Nodes
from notify_server.store.reading.types import Cursor, FileFilter, Limit
from notify_server.telemetry.history import Sample
from notify_server.telemetry.host_rates import HostRate


class BatchQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of the list of batches, and a page of it."""

    verdict: Verdict | None = None
    api_code: Text | None = None
    batch_id: Text | None = None
    received_from: Time | None = None
    received_before: Time | None = None
    acknowledged: bool | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


class BatchFileQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of the files of a batch, and a page of them."""

    state: FileState | None = None
    reason: ReasonCode | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


class FileQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of the files of all batches, and a page of them."""

    state: FileState | None = None
    reason: ReasonCode | None = None
    host: Text | None = None
    api_code: Text | None = None
    received_from: Time | None = None
    received_before: Time | None = None
    cursor: Cursor | None = None
    limit: Limit = 50

    def filter(self) -> FileFilter:
        """Return the filters as the record takes them."""
        period = to_ms(self.received_from), to_ms(self.received_before)
        return FileFilter(None, self.state, self.reason, self.host, self.api_code, *period)


class ExportQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The format of an export, and filters of its files. A CSV begins with a byte order mark, by which Excel knows that
    it is UTF-8, unless `bom` is false.
    """

    format: Literal["csv", "ndjson"] = "csv"
    batch: Id | None = None
    state: FileState | None = None
    reason: ReasonCode | None = None
    host: Text | None = None
    api_code: Text | None = None
    received_from: Time | None = None
    received_before: Time | None = None
    bom: bool = True

    def filter(self) -> FileFilter:
        """Return the filters as the record takes them."""
        period = to_ms(self.received_from), to_ms(self.received_before)
        return FileFilter(self.batch, self.state, self.reason, self.host, self.api_code, *period)


class BundleQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """With `with_secrets` addresses keep their queries, which may hold signatures."""

    with_secrets: bool = False


class PageQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """A page of a list."""

    cursor: Cursor | None = None
    limit: Limit = 50


class SearchQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """A batch_id, a file key, a target_url, a source path, a request_id or an api_code, or the beginning of one."""

    q: Text


class SeriesQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Resolution of the time series: the last ten minutes by the second, or the last day by the minute."""

    step: Literal["second", "minute"] = "second"


class Host(Struct, frozen=True):
    """A storage host: its pending files, its circuit, its requests in flight, and its last minute. `rate` is the
    requests a second that it is paced to, null when it is not, and `resting_for` the seconds of rest that it asked for.
    """

    host: str
    pending: int
    next_attempt_at: datetime | None
    circuit: CircuitState
    open_for: float
    in_flight: int
    limit: int | None
    last_minute: HostRate
    rate: float | None = None
    resting_for: float = 0.0


class NodeCounts(Struct, frozen=True):
    """Number of live servers that share the record, by role."""

    callbacks: int
    probes: int


class Status(Struct, frozen=True):
    """The server process, its queues, and its last second, minute and ten minutes."""

    version: str
    started_at: datetime
    roles: tuple[Role, ...]
    nodes: NodeCounts
    backlog: int
    in_flight: int
    last: Sample | None
    last_minute: Sample | None = None
    last_ten_minutes: Sample | None = None


class RuntimeState(Struct, frozen=True):
    """Access to the live state of the process, which is not in the record."""

    version: str
    started_at: datetime
    roles: tuple[Role, ...]
    nodes: Callable[[], Nodes]
    backlog: Callable[[], int]
    in_flight: Callable[[], int]
    hosts: Callable[[], list[HostView]]
