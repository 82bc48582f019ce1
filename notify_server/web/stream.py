"""What happens, as it happens, to whoever listens: Server-Sent Events (HTML Standard, 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import msgspec

# Listeners at a time: each costs a connection.
MAX_LISTENERS = 64
# Events that a listener may be behind; then it is cut off, and its browser connects again.
MAX_BEHIND = 256


class Stream:
    """Events go to all who listen; nobody is waited for."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[bytes | None]] = set()
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether nobody more may listen: there are as many as there may be, or it is closed."""
        return self._closed or len(self._listeners) >= MAX_LISTENERS

    def publish(self, event: str, data: object) -> None:
        """Send an event; `data` becomes JSON."""
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
        """The events from now on, each as the bytes to send."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            yield self._messages(queue)
        finally:
            self._listeners.discard(queue)

    def close(self) -> None:
        """End every listener's events, after those that are on their way, for good."""
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
