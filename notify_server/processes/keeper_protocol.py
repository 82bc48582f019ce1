"""What the daemon and the process that keeps its record on SQLite say to each other.

The daemon's first frame is a `KeeperConfig`, every later one a `Call`. The keeper's first is an `Opened`, every later
one a `Reply`, an `Expanded` or a `Logged`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from notify_server.errors import NonceReusedError, NotifyServerError, RejectionGoneError, StoreUnavailableError
from notify_server.model import BatchVerdict, Delivery, DueFile, FileResult, InboxItem, Rejection
from notify_server.store.base import Expansion, HostDue, Restart

# Errors that callers tell apart, by the names under which they cross.
ERRORS: dict[str, type[NotifyServerError]] = {
    kind.__name__: kind for kind in (NonceReusedError, RejectionGoneError, StoreUnavailableError)
}


class KeeperError(NotifyServerError):
    """The keeper has made a mistake, which its log tells of."""


class KeeperConfig(msgspec.Struct, frozen=True):
    """What the keeper is told once: the database, the process that it is kept for, and how long to wait for a lock."""

    path: str
    owner: int
    busy_timeout_ms: int


class Opened(msgspec.Struct, frozen=True, array_like=True):
    """Whether the database could be opened: `refused` is what to tell of it when not."""

    refused: str | None
    backlog: int


class Call(msgspec.Struct, frozen=True, array_like=True):
    """A verb of the store. `now` is the daemon's time, Unix ms: the keeper has no clock."""

    id: int
    now: int
    verb: str
    arguments: msgspec.Raw


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An error in the place of an answer; `kind` is a name in ERRORS, or that of a mistake of ours."""

    kind: str
    text: str

    def error(self) -> NotifyServerError:
        """It as an exception."""
        return ERRORS[self.kind](self.text) if self.kind in ERRORS else KeeperError(f"{self.kind}: {self.text}")

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """An exception as what crosses."""
        return cls(type(error).__name__, str(error))


class Reply(msgspec.Struct, frozen=True, array_like=True, tag="reply"):
    """The answer to a call, and the store's backlog after it."""

    id: int
    backlog: int
    answer: msgspec.Raw
    failure: Failure | None = None


class Expanded(msgspec.Struct, frozen=True, array_like=True, tag="expanded"):
    """What an expansion has told (base.Expanding), and the store's backlog after it."""

    backlog: int
    hosts: set[str] = set()
    verdicts: list[BatchVerdict] = []
    unknown_fields: int = 0


class Logged(msgspec.Struct, frozen=True, array_like=True, tag="logged"):
    """A line for the daemon's log."""

    level: str
    event: str
    fields: dict[str, Any]


class Verb(NamedTuple):
    """The types of a verb's arguments and of its answer."""

    arguments: Any
    answer: Any


VERBS = {
    "accept_all": Verb(tuple[list[Delivery]], list[int | Failure]),
    "reject": Verb(tuple[Rejection], None),
    "wait_inbox": Verb(tuple[()], None),
    "inbox": Verb(tuple[int], list[InboxItem]),
    "expand": Verb(tuple[list[Expansion], int], list[BatchVerdict]),
    "discard": Verb(tuple[InboxItem, str, int], list[BatchVerdict]),
    "due_hosts": Verb(tuple[str, int], list[HostDue]),
    "claim": Verb(tuple[list[tuple[str, int]], int], list[DueFile]),
    "release": Verb(tuple[list[DueFile]], None),
    "record": Verb(tuple[list[FileResult], int], list[BatchVerdict]),
    "recheck": Verb(tuple[list[int], int], Restart),
    "ping": Verb(tuple[int], None),
    "prune": Verb(tuple[int, int, int], int),
    # The guard's hosts, networks and ports.
    "expand_inbox": Verb(tuple[list[str], list[str], list[int]], None),
}
