"""Reads the evidence of a batch: its deliveries with their bodies, and the requests that were made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from notify_server.store.sql import load_queries

T = TypeVar("T")

Run = Callable[[str, Mapping[str, object]], Awaitable[tuple[Any, ...] | None]]

# Deliveries that are looked through, back from the batch's latest.
MAX_WALKED = 200_000
MAX_DELIVERIES = 1000


class DeliveryRow(Struct, frozen=True, array_like=True):
    """A delivery. `received_at` is Unix ms; `signature` is the fingerprint of the key that verified it, or `none`."""

    id: int
    received_at: int
    remote_addr: str
    signature: str
    request_id: str
    files: int


class AttemptOfFile(Struct, frozen=True, array_like=True):
    """A request for a file. `started_at` is Unix ms; `url` is None when it was the file's target_url."""

    file: int
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
    vendor_request_id: str | None
    vendor_code: str | None


class EvidenceRecords:
    """`run` runs one statement that returns one row. Calls raise StoreUnavailableError as those of Records do."""

    def __init__(self, dialect: str, run: Run) -> None:
        self._queries = load_queries(dialect, "evidence")
        self._run = run

    async def deliveries(self, batch: int, count: int) -> list[DeliveryRow]:
        """Return the deliveries of a batch that are kept, oldest first; `count` is how many the batch has had."""
        found = await self._run(self._queries["last"], {"id": batch})
        if found is None or found[0] is None:
            return []
        parameters = {"id": batch, "last": found[0], "most": MAX_WALKED, "limit": min(count, MAX_DELIVERIES)}
        row = await self._run(self._queries["deliveries"], parameters)
        return _decode(DeliveryRow, row)[::-1]

    async def body(self, delivery: int) -> bytes | None:
        """Return the body of a delivery as it was received, None when it is not kept any more."""
        row = await self._run(self._queries["body"], {"id": delivery})
        return None if row is None else bytes(row[0])

    async def attempts(self, files: Sequence[int]) -> list[AttemptOfFile]:
        """Return the requests for these files, by file and in their order."""
        ids = msgspec.json.encode(list(files)).decode()
        return _decode(AttemptOfFile, await self._run(self._queries["attempts"], {"files": ids}))


def _decode(kind: type[T], row: tuple[Any, ...] | None) -> list[T]:
    return [] if row is None or row[0] is None else msgspec.json.decode(row[0], type=list[kind])  # type: ignore[valid-type]
