"""The messages between the daemon and its keeper, the process that writes the record on SQLite.

The daemon's first frame is a `KeeperConfig`, every later one a `Call`. The keeper's first frame is an `Opened`, every
later one a `Reply`, an `Expanded` or a `Logged`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from notify_server.errors import NonceReusedError, NotifyServerError, RejectionGoneError, StoreUnavailableError
from notify_server.expect.expectation import NewExpectation
from notify_server.expect.quiet import QuietLimit
from notify_server.model import BatchVerdict, Delivery, DueFile, FileResult, HostDue, Rejection, Restart
from notify_server.store.expectations import Registered
from notify_server.store.journal import KeptSample, NewAcknowledgement, NewAction
from notify_server.store.outbox import Claimed, DeliveryResult, EndpointState, Notice, Subscription

# Errors that callers distinguish, by the name that is sent.
ERRORS: dict[str, type[NotifyServerError]] = {
    kind.__name__: kind for kind in (NonceReusedError, RejectionGoneError, StoreUnavailableError)
}


class KeeperError(NotifyServerError):
    """A mistake of the keeper, which its log reports."""


class KeeperConfig(msgspec.Struct, frozen=True):
    """The settings of a keeper: the database, the process id of the daemon, and the guard's settings as text."""

    path: str
    owner: int
    allowed_hosts: list[str] = []
    allowed_networks: list[str] = []
    allowed_ports: list[int] = []
    refused_networks: list[str] = []
    own_networks: list[str] = []


class Opened(msgspec.Struct, frozen=True, array_like=True):
    """The result of opening the database: `refused` is the error, None when it is open."""

    refused: str | None
    backlog: int


class Call(msgspec.Struct, frozen=True, array_like=True):
    """A verb of the store. `now` is the daemon's time, Unix ms: the keeper has no clock."""

    id: int
    now: int
    verb: str
    arguments: msgspec.Raw


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An error instead of an answer; `kind` is a name in ERRORS, or the class of a mistake of ours."""

    kind: str
    text: str

    def error(self) -> NotifyServerError:
        """Return the exception to raise."""
        return ERRORS[self.kind](self.text) if self.kind in ERRORS else KeeperError(f"{self.kind}: {self.text}")

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return the message for an exception."""
        return cls(type(error).__name__, str(error))


class Reply(msgspec.Struct, frozen=True, array_like=True, tag="reply"):
    """The answer to a call, and the store's backlog after it."""

    id: int
    backlog: int
    answer: msgspec.Raw
    failure: Failure | None = None


class Expanded(msgspec.Struct, frozen=True, array_like=True, tag="expanded"):
    """The result of an expansion (base.ExpansionListener), and the store's backlog after it."""

    backlog: int
    hosts: set[str] = set()
    verdicts: list[BatchVerdict] = []
    unknown_fields: int = 0
    reported_failed: int = 0


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
    # Begin to expand the inbox, until the keeper ends.
    "expand_inbox": Verb(tuple[()], None),
    "due_hosts": Verb(tuple[str, int], list[HostDue]),
    "claim": Verb(tuple[list[tuple[str, int]], int], list[DueFile]),
    "release": Verb(tuple[list[DueFile]], None),
    "record": Verb(tuple[list[FileResult], int], list[BatchVerdict]),
    "recheck": Verb(tuple[list[int], int], Restart),
    "ping": Verb(tuple[int], None),
    "make_due": Verb(tuple[int, int, int], Restart),
    "end_session": Verb(tuple[str, int], None),
    "prune": Verb(tuple[int, int, int], int),
    # The outbox (store/outbox.py).
    "subscribe": Verb(tuple[list[Subscription], str | None, int], None),
    "claim_deliveries": Verb(tuple[list[tuple[str, int]], int], Claimed),
    "release_deliveries": Verb(tuple[list[int]], None),
    "record_deliveries": Verb(tuple[list[DeliveryResult], int], list[Notice]),
    "find_at_risk": Verb(tuple[int, list[int], int], int),
    "find_expiring": Verb(tuple[int, int], int),
    "ping_endpoint": Verb(tuple[str, int], int | None),
    "replay_deliveries": Verb(tuple[str, int, int, int, bool], int),
    "stop_endpoint": Verb(tuple[str, str | None, int], bool),
    "endpoint_states": Verb(tuple[()], list[EndpointState]),
    "open_problems": Verb(tuple[str], list[bytes]),
    # Expectations (store/expectations.py).
    "register": Verb(tuple[list[NewExpectation], int], list[Registered]),
    "check_limits": Verb(tuple[list[int], int], int),
    "check_quiet": Verb(tuple[list[QuietLimit], int], int),
    "remove_expectation": Verb(tuple[int], bool),
    # The journal (store/journal.py).
    "add_action": Verb(tuple[NewAction], None),
    "acknowledge": Verb(tuple[NewAcknowledgement], int),
    "keep_samples": Verb(tuple[list[KeptSample]], None),
}
