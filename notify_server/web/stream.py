"""Publishes live events to listeners as Server-Sent Events (HTML Standard, 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import msgspec

# Max listeners: each holds a connection.
MAX_LISTENERS = 64
# Max events queued for a listener; beyond that it is disconnected, and its browser reconnects.
MAX_BEHIND = 256


class Stream:
    """Sends each event to all listeners without waiting for any."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[bytes | None]] = set()
        self._closed = False

    @property
    def full(self) -> bool:
        """True when no listener can be added: MAX_LISTENERS are connected, or the stream is closed."""
        return self._closed or len(self._listeners) >= MAX_LISTENERS

    def publish(self, event: str, data: object) -> None:
        """Send an event; `data` is encoded as JSON."""
        if not self._listeners:
            return
        message = b"event: %s\ndata: %s\n\n" % (event.encode(), msgspec.json.encode(data))
        for queue in list(self._listeners):
            if queue.qsize() >= MAX_BEHIND:
                self._end(queue)
            else:
                queue.put_nowait(message)

    @contextmanager
    def listen(self) -> Iterator[AsyncIterator[bytes]]:
        """Yield the events from now on, encoded for sending."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
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

    def _end(self, queue: asyncio.Queue[bytes | None]) -> None:
        self._listeners.discard(queue)
        queue.put_nowait(None)

    @staticmethod
    async def _messages(queue: asyncio.Queue[bytes | None]) -> AsyncIterator[bytes]:
        while (message := await queue.get()) is not None:
            yield message
