"""Decides which connection gives way when `max_connections` are open. Has no sockets and no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from notify_server.callbacks.access import source_of, within
from notify_server.config import IPNetwork

# When `max_connections` are open, a connection whose request has not arrived may be closed after SILENT_SECONDS, and an
# idle kept-alive one after IDLE_SECONDS. Connections of a source with more than its share may be closed at once.
SILENT_SECONDS = 1.0
IDLE_SECONDS = 5.0
# A source's share is `max_connections` divided by this number.
SHARE = 4


class Member(Protocol):
    """An open connection. `since` is when its caller last sent something, in monotonic seconds."""

    peer: str
    since: float

    @property
    def awaits_request(self) -> bool:
        """True while the server waits for its caller to send a request, or the rest of one, or to read an answer."""
        ...

    @property
    def is_idle(self) -> bool:
        """True while it is kept alive between two requests."""
        ...

    def close(self) -> None:
        """Close it, whatever is under way."""
        ...


class ConnectionLimit:
    """Counts the open connections by their source.

    When all are taken, a new connection replaces the oldest idle or waiting one of the source that has the most, if
    that is more than its share; trusted proxies and the new connection's own source are excepted. Without such a source
    it replaces the oldest connection that has been silent for SILENT_SECONDS or IDLE_SECONDS.
    """

    def __init__(self, limit: int, trusted: Sequence[IPNetwork], clock: Callable[[], float]) -> None:
        self._limit = limit
        self._trusted = trusted
        self._clock = clock
        # Oldest first.
        self._sources: dict[str, dict[Member, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def join(self, member: Member) -> bool:
        """Count a new connection, and close the one that it replaces; False when there is no room for it."""
        source = source_of(member.peer)
        if self._count >= self._limit and not self._make_room(source):
            return False
        self._sources.setdefault(source, {})[member] = None
        self._count += 1
        return True

    def replace(self, old: Member, new: Member) -> bool:
        """Count a connection under another object; False when the old one is not counted."""
        members = self._sources.get(source_of(old.peer))
        if members is None or old not in members:
            return False
        del members[old]
        members[new] = None
        return True

    def leave(self, member: Member) -> None:
        """Stop counting a connection; nothing happens when it is not counted."""
        source = source_of(member.peer)
        if (members := self._sources.get(source)) is None or member not in members:
            return
        del members[member]
        self._count -= 1
        if not members:
            del self._sources[source]

    def _make_room(self, source: str) -> bool:
        victim = self._greedy_one(source) or self._silent_one()
        if victim is None:
            return False
        self.leave(victim)
        victim.close()
        return True

    def _greedy_one(self, source: str) -> Member | None:
        by_share = sorted(self._sources, key=lambda each: -len(self._sources[each]))
        for greedy in by_share:
            if len(self._sources[greedy]) * SHARE <= self._limit:
                return None
            if greedy != source and not within(greedy.partition("/")[0], self._trusted):
                return _oldest(each for each in self._sources[greedy] if each.awaits_request or each.is_idle)
        return None

    def _silent_one(self) -> Member | None:
        now = self._clock()
        members = [each for group in self._sources.values() for each in group]
        return _oldest(
            each for each in members if each.awaits_request and now - each.since >= SILENT_SECONDS
        ) or _oldest(each for each in members if each.is_idle and now - each.since >= IDLE_SECONDS)


def _oldest(members: Iterable[Member]) -> Member | None:
    return min(members, key=lambda each: each.since, default=None)
