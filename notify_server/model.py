"""The types that all layers share. They are frozen, do no I/O, and import nothing from this package.

Times are integer Unix milliseconds, UTC (`_at`), unless a name says otherwise; durations are milliseconds (`_ms`)
or, in configuration, seconds.

The life of a file::

    FAILED reported ------------------------------------------> upload_failed
    refused by the guard -------------------------------------> blocked
    pending --(attempt: accepted status)----------------------> available
    pending --(attempt: final answer, or schedule spent)------> unavailable
    pending --(attempt: anything else)------------------------> pending, next_attempt_at later
    any state --(redelivered with another address or status)--> pending again

and of a batch: `pending` until its last file has settled, then `complete` when every file is available, else
`incomplete`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

import msgspec


class ReportedStatus(StrEnum):
    """The status of a file as reported by the platform (`file_list[].status`)."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"


class FileState(StrEnum):
    """The state of a file."""

    PENDING = "pending"
    AVAILABLE = "available"
    UNAVAILABLE = "unavailable"
    BLOCKED = "blocked"
    UPLOAD_FAILED = "upload_failed"


class Verdict(StrEnum):
    """The verdict on a batch."""

    PENDING = "pending"
    COMPLETE = "complete"
    INCOMPLETE = "incomplete"


class CircuitState(StrEnum):
    """Whether requests go to a host: normally, not at all for a while, or on trial after that."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Reason(StrEnum):
    """Why a file is not (yet) available; answers with a status have `http_<status>` instead, see `http_reason`."""

    TIMEOUT = "timeout"
    DNS_ERROR = "dns_error"
    CONNECT_ERROR = "connect_error"
    TLS_ERROR = "tls_error"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    BAD_REDIRECT = "bad_redirect"
    PROTOCOL_ERROR = "protocol_error"
    PRIVATE_ADDRESS = "private_address"
    PORT_NOT_ALLOWED = "port_not_allowed"
    HOST_NOT_ALLOWED = "host_not_allowed"
    INVALID_URL = "invalid_url"
    EMPTY = "empty"
    NOT_MEDIA = "not_media"
    ARCHIVED = "archived"
    HOTLINK = "hotlink"
    EXPIRED = "expired"


def http_reason(status: int) -> str:
    """Return the reason code of an answer that was not accepted, e.g. `http_404`."""
    return f"http_{status}"


class FileEntry(msgspec.Struct, frozen=True, gc=False):
    """One entry of `file_list` (platform document; lengths as in the contract).

    `target_url` is an absolute http(s) address when the status is FINISHED, and may be None when it is FAILED.
    """

    oss_object_name: str
    status: ReportedStatus
    target_url: str | None = None


class Notification(msgspec.Struct, frozen=True):
    """A validated notification: 异步批处理文件通知 in the platform's document."""

    batch_id: str
    api_code: str
    file_list: list[FileEntry]


# Value of `Delivery.signature` for an unsigned request.
UNSIGNED = "none"


class Delivery(msgspec.Struct, frozen=True, array_like=True):
    """An accepted request on its way to the inbox (`notification`).

    `body` is the request's body as it came; `files` the length of its file_list; `signature` how it was proven:
    `none`, or the fingerprint of the platform key that verified it; `request_id` the id given in the ack.
    `nonce` is (key, expires_at) and must be consumed in the same transaction, or None when the request was not signed.
    `traceparent` is the caller's (W3C Trace Context). `replays` is the id of the rejection that is taken after all, and
    goes in the same transaction.
    """

    batch_id: str
    api_code: str
    body: bytes
    files: int
    received_at: int
    remote_addr: str
    signature: str
    request_id: str
    nonce: tuple[str, int] | None = None
    traceparent: str | None = None
    replays: int | None = None


class Rejection(msgspec.Struct, frozen=True, array_like=True):
    """A refused body of an authorized sender; kept for inspection and replay."""

    received_at: int
    remote_addr: str
    code: str
    detail: str
    body: bytes
    request_id: str


class InboxItem(msgspec.Struct, frozen=True, array_like=True):
    """A row of the inbox that has not been expanded yet."""

    id: int
    body: bytes
    received_at: int
    remote_addr: str
    request_id: str
    files: int
    traceparent: str | None = None


class Target(msgspec.Struct, frozen=True, gc=False):
    """An address as the guard reads it, before anything is looked up.

    `url` is what a prober is handed: the canonical origin, then path and query as they were given. `hostname` is the
    canonical host (IDNs as punycode, no trailing dot); `host` is how it is counted and paced: `hostname`, or
    `hostname:port` off the scheme's default port. All three are empty when the address cannot be read.
    `refusal` is None when the address may be probed.
    """

    url: str
    hostname: str
    host: str
    refusal: Reason | None = None


class UrlGuard(Protocol):
    """Decides which addresses may be probed (verify/guard.py)."""

    def examine(self, url: str) -> Target:
        """Parse an address, and refuse it if it must not be contacted."""


class DueFile(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A claimed file: pending, due, and reserved until it is recorded or released. `expires_at` is when its signed
    address ends, None when that is unknown or never.
    """

    id: int
    batch: int
    host: str
    target_url: str
    attempts: int
    oss_object_name: str = ""
    expires_at: int | None = None


class HostDue(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A host with pending files, and when the first of them is due (it may be claimed already)."""

    host: str
    next_attempt_at: int


class Restart(msgspec.Struct, frozen=True, array_like=True):
    """The result of a recheck: the number of files reset, and their hosts."""

    files: int
    hosts: frozenset[str]


class HostView(msgspec.Struct, frozen=True):
    """A host as the verifier sees it: its circuit and for how many seconds that stays open, files under way and
    claimed, how many may be under way, the requests a second that it is paced to (None: not paced), and the seconds of
    rest that it asked for.
    """

    host: str
    circuit: CircuitState
    open_for: float
    in_flight: int
    queued: int
    limit: int
    rate: float | None = None
    resting_for: float = 0.0


class Request(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One HTTP request for a prober to make. `id` is echoed in the evidence; times are milliseconds.

    `fresh` requires a new connection; `keep` allows the connection to be reused afterwards. A `ranged` GET requests the
    first byte only; any other GET requests the whole object and is cut off after the headers. With `sniff` a GET reads
    the first 512 bytes, from which the type of the file is detected. `address_limit` is the maximum of requests that
    this prober may have under way to one address and port (0: no limit). `headers` are whole lines
    to add.
    """

    id: int
    method: str
    url: str
    timeout_ms: int
    connect_timeout_ms: int
    fresh: bool = False
    keep: bool = True
    ranged: bool = True
    address_limit: int = 0
    sniff: bool = False
    headers: tuple[str, ...] = ()


class Evidence(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The result of one HTTP request. Its strings come from untrusted servers; the prober sanitises them.

    `failure` is None exactly when a final status line and its headers arrived; otherwise `status` is None.
    `reused` is true when the answer came on a connection that had carried another answer before.
    Phases are durations in milliseconds, None when the phase did not take place; `total_ms` is always there.
    `content_length` is the length of the whole object, also for an answer to a ranged GET.
    `refused` is true when the host, or a machine on the way to it, refused the connection.
    `shortage` is true when this machine had no port or descriptor left, so that nothing was sent; `crowded` when as
    many requests as allowed were under way to the address, which is `remote_addr` then, or as many look-ups of names.
    `vendor_request_id` and `vendor_code` are the storage vendor's id of the request and code of its error; `headers`
    are further header fields, by their name in lower case. `sniffed` is the media type that the first bytes show.
    """

    id: int
    status: int | None
    failure: Reason | None
    reused: bool
    remote_addr: str | None
    dns_ms: float | None
    connect_ms: float | None
    tls_ms: float | None
    first_byte_ms: float | None
    total_ms: float
    content_length: int | None = None
    content_type: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    retry_after: str | None = None
    location: str | None = None
    refused: bool = False
    shortage: bool = False
    crowded: bool = False
    vendor_request_id: str | None = None
    vendor_code: str | None = None
    headers: dict[str, str] | None = None
    sniffed: str | None = None


class AttemptRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request made for a file, as it is kept in `attempt`. `url` is None when it was the file's target_url."""

    started_at: int
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
    vendor_request_id: str | None = None
    vendor_code: str | None = None


class FileResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The outcome of one attempt on a claimed file, to be recorded with the requests it took.

    `state` is PENDING with `next_attempt_at` set when the file is to be tried again. `attempts` is the new total.
    `headers` is a JSON object, see `Evidence`; `flags` a JSON list of what is remarkable and no reason to fail.
    """

    file: DueFile
    state: FileState
    reason: str | None
    attempts: int
    next_attempt_at: int | None
    http_status: int | None
    content_length: int | None
    content_type: str | None
    etag: str | None
    last_modified: str | None
    final_url: str | None
    remote_addr: str | None
    elapsed_ms: float | None
    verified_at: int | None
    requests: tuple[AttemptRow, ...] = ()
    vendor_request_id: str | None = None
    vendor_code: str | None = None
    headers: str | None = None
    flags: str | None = None


class BatchVerdict(msgspec.Struct, frozen=True):
    """A verdict that has just been reached and committed. `request_id` and `traceparent` are those of the batch's
    latest delivery, None when retention has deleted it. `event` and `revision` are the id and the revision of the event
    that was written; None when the batch's last event had the same verdict, so that no event was written.
    """

    batch: int
    batch_id: str
    api_code: str
    verdict: Verdict
    files: int
    available: int
    first_received_at: int
    completed_at: int
    request_id: str | None = None
    traceparent: str | None = None
    event: int | None = None
    revision: int | None = None
