"""Publishes live events to listeners as Server-Sent Events (HTML Standard, 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
from msgspec import Struct

from notify_server.model import BatchVerdict
from notify_server.store.reading.outbox import EventItem

# Max listeners: each holds a connection.
MAX_LISTENERS = 64
# Max events queued for a listener; beyond that it is disconnected, and its browser reconnects.
MAX_BEHIND = 256


class Message(NamedTuple):
    """An event as it is sent, with the id of its row if it has one."""

    id: int | None
    data: bytes


class VerdictMessage(Struct, frozen=True):
    """`data` of a `verdict`."""

    batch_id: str
    verdict: str
    api_code: str
    revision: int | None
    files: int
    available: int
    first_received_at: datetime
    completed_at: datetime | None


def verdict_message(verdict: BatchVerdict) -> VerdictMessage:
    """Return a verdict as it is streamed."""
    return VerdictMessage(
        verdict.batch_id,
        verdict.verdict,
        verdict.api_code,
        verdict.revision,
        verdict.files,
        verdict.available,
        datetime.fromtimestamp(verdict.first_received_at / 1000, UTC),
        datetime.fromtimestamp(verdict.completed_at / 1000, UTC),
    )


def missed_verdict(item: EventItem) -> bytes:
    """Return the event of a verdict as it would have been streamed."""
    return _encode("verdict", msgspec.json.decode(item.data, type=VerdictMessage), item.id)


def _encode(event: str, data: object, id: int | None) -> bytes:
    head = b"" if id is None else b"id: %d\n" % id
    return head + b"event: %s\ndata: %s\n\n" % (event.encode(), msgspec.json.encode(data))


class Stream:
    """Sends each event to all listeners without waiting for any."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[Message | None]] = set()
        self._closed = False

    @property
    def full(self) -> bool:
        """True when no listener can be added: MAX_LISTENERS are connected, or the stream is closed."""
        return self._closed or len(self._listeners) >= MAX_LISTENERS

    def publish(self, event: str, data: object, id: int | None = None) -> None:
        """Send an event; `data` becomes JSON. With an id, a returning listener gets the events that it has missed."""
        if not self._listeners:
            return
        message = Message(id, _encode(event, data, id))
        for queue in list(self._listeners):
            if queue.qsize() >= MAX_BEHIND:
                self._end(queue)
            else:
                queue.put_nowait(message)

    @contextmanager
    def listen(self) -> Iterator[AsyncIterator[Message]]:
        """The events from now on, each with the bytes to send."""
        queue: asyncio.Queue[Message | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            yield self._messages(queue)
        finally:
            self._listeners.discard(queue)

    def close(self) -> None:
        """Disconnect all listeners after their queued events, and accept no more."""
        self._closed = True
        for queue in list(self._listeners):
            self._end(queue)

    def _end(self, queue: asyncio.Queue[Message | None]) -> None:
        self._listeners.discard(queue)
        queue.put_nowait(None)

    @staticmethod
    async def _messages(queue: asyncio.Queue[Message | None]) -> AsyncIterator[Message]:
        while (message := await queue.get()) is not None:
            yield message
