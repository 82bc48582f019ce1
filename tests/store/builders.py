"""What the store's cases are made of. Every value has a default, so that a case names only what it is about."""

from __future__ import annotations

from itertools import count
from typing import Any

import msgspec

from notify_server.model import (
    AttemptRow,
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
from notify_server.store.base import Engine, Expansion, NewFile

NOW = 1_760_000_000_123
HOST = "files.example.com"
API_CODE = "rent.dcentralize.room.add"

_serial = count(1)


def delivery(batch_id: str = "batch", **changes: Any) -> Delivery:
    fields: dict[str, Any] = {
        "api_code": API_CODE,
        "body": b'{"batch_id":"batch"}',
        "files": 1,
        "received_at": NOW,
        "remote_addr": "198.18.0.1",
        "signature": "none",
        "request_id": f"request-{next(_serial)}",
    }
    return Delivery(batch_id=batch_id, **fields | changes)


def rejection(**changes: Any) -> Rejection:
    fields: dict[str, Any] = {
        "received_at": NOW,
        "remote_addr": "198.18.0.1",
        "code": "400",
        "detail": "batch_id: missing",
        "body": b"{}",
        "request_id": f"request-{next(_serial)}",
    }
    return Rejection(**fields | changes)


def finished(name: str = "key", *, url: str | None = None, host: str = HOST, expires_at: int | None = None) -> NewFile:
    """A file to be probed."""
    address = url or f"https://{host}/{name}"
    return NewFile(name, address, host, ReportedStatus.FINISHED, FileState.PENDING, None, expires_at)


def failed(name: str = "key", *, url: str | None = None) -> NewFile:
    """A file that the platform could not upload."""
    return NewFile(name, url, "", ReportedStatus.FAILED, FileState.UPLOAD_FAILED, None)


def blocked(name: str = "key", *, url: str = "https://127.0.0.1/key") -> NewFile:
    """A file whose address the guard refuses."""
    return NewFile(name, url, "127.0.0.1", ReportedStatus.FINISHED, FileState.BLOCKED, Reason.PRIVATE_ADDRESS)


def chunk(item: InboxItem, *files: NewFile, batch_id: str = "batch", last: bool = True) -> Expansion:
    return Expansion(item, batch_id, API_CODE, files, last)


def request(**changes: Any) -> AttemptRow:
    fields: dict[str, Any] = {
        "started_at": NOW + 10,
        "method": "HEAD",
        "url": None,
        "http_status": 200,
        "reason": None,
        "dns_ms": 1.5,
        "connect_ms": 2.5,
        "tls_ms": 3.5,
        "first_byte_ms": 4.5,
        "total_ms": 5.5,
        "remote_addr": "198.18.0.9",
        "vendor_request_id": "5F7C0A1B2C3D4E5F60718293",
        "vendor_code": None,
    }
    return AttemptRow(**fields | changes)


def found(file: DueFile, **changes: Any) -> FileResult:
    """The outcome of an attempt that found the file."""
    fields: dict[str, Any] = {
        "state": FileState.AVAILABLE,
        "reason": None,
        "attempts": file.attempts + 1,
        "next_attempt_at": None,
        "http_status": 200,
        "content_length": 12_345,
        "content_type": "image/jpeg",
        "etag": '"5d41402a"',
        "last_modified": "Wed, 21 Oct 2015 07:28:00 GMT",
        "final_url": None,
        "remote_addr": "198.18.0.9",
        "elapsed_ms": 12.5,
        "verified_at": NOW + 20,
        "requests": (request(),),
        "vendor_request_id": "5F7C0A1B2C3D4E5F60718293",
        "vendor_code": "NoSuchKey",
        "flags": '["octet_stream","plain_http"]',
        "headers": '{"server":"AliyunOSS","date":"Fri, 27 Nov 2026 21:00:00 GMT"}',
    }
    return FileResult(file, **fields | changes)


def missing(file: DueFile, **changes: Any) -> FileResult:
    """The outcome of an attempt that settled that the file is not there."""
    answer = found(file, state=FileState.UNAVAILABLE, reason="http_410", http_status=410, content_length=None)
    return msgspec.structs.replace(answer, **changes)


def again(file: DueFile, at: int, **changes: Any) -> FileResult:
    """The outcome of an attempt after which the file is to be tried again."""
    answer = found(file, state=FileState.PENDING, reason="timeout", next_attempt_at=at, http_status=None)
    return msgspec.structs.replace(answer, verified_at=None, **changes)


async def deliver(store: Engine, files: int = 1, *, batch_id: str = "batch", **changes: Any) -> InboxItem:
    """Accept a delivery of so many files, and return it as the inbox has it."""
    id = await store.accept(delivery(batch_id, files=files, **changes))
    (item,) = [item for item in await store.inbox(1000) if item.id == id]
    return item


async def take_in(
    store: Engine, *files: NewFile, batch_id: str = "batch", now: int = NOW, **changes: Any
) -> list[BatchVerdict]:
    """Accept a delivery of these files and expand it at once."""
    item = await deliver(store, len(files), batch_id=batch_id, **changes)
    return await store.expand([chunk(item, *files, batch_id=batch_id)], now)


async def claim(store: Engine, host: str = HOST, *, now: int = NOW, n: int = 1000) -> list[DueFile]:
    return await store.claim([(host, n)], now)


async def claim_one(store: Engine, host: str = HOST, *, now: int = NOW) -> DueFile:
    (file,) = await claim(store, host, now=now)
    return file


async def settle(store: Engine, *, now: int = NOW) -> list[BatchVerdict]:
    """Find every file that is due."""
    return await store.record([found(file) for file in await claim(store, now=now)], now)
