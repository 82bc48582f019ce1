"""The queue of deliveries between their commit and their expansion, as far as memory holds it."""

from __future__ import annotations

from collections import deque
from itertools import islice

from notify_server.model import Delivery, InboxItem

# Bodies kept in memory between their commit and their expansion.
MAX_BYTES = 8 * 1024 * 1024


class InboxQueue:
    """Holds the newest deliveries in memory and knows which older ones must be read from disk.

    Everything up to `expanded_through` has been expanded; what lies between that and `on_disk_through` is on disk only.
    """

    def __init__(self, expanded_through: int, on_disk_through: int) -> None:
        self.expanded_through = expanded_through
        self.on_disk_through = on_disk_through
        self._items: deque[InboxItem] = deque()
        self._bytes = 0

    def __bool__(self) -> bool:
        """True if memory holds deliveries that are not expanded."""
        return bool(self._items)

    @property
    def must_read(self) -> bool:
        """True if the oldest deliveries that are not expanded are on disk only."""
        return self.expanded_through < self.on_disk_through

    def add(self, delivery: Delivery, id: int) -> None:
        """Remember a committed delivery, or that it must be read from disk when memory is full."""
        size = len(delivery.body)
        if self._bytes + size > MAX_BYTES:
            self.on_disk_through = id
            return
        self._bytes += size
        self._items.append(
            InboxItem(
                id,
                delivery.body,
                delivery.received_at,
                delivery.remote_addr,
                delivery.request_id,
                delivery.files,
                delivery.traceparent,
            )
        )

    def drop_expanded(self) -> None:
        """Forget the deliveries that have been expanded."""
        while self._items and self._items[0].id <= self.expanded_through:
            self._bytes -= len(self._items.popleft().body)

    def first(self, limit: int) -> list[InboxItem]:
        """Return the oldest deliveries in memory."""
        return list(islice(self._items, limit))

    def skip_disk(self) -> None:
        """Note that nothing is left on disk: the rows were deleted by hand."""
        self.expanded_through = self.on_disk_through
