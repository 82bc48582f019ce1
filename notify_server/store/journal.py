"""The journal of every store: actions, acknowledgements, and the samples of the charts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct

MINUTE = 60
TEN_MINUTES = 600
# How long samples of each step are kept, in milliseconds.
KEPT_MS = {MINUTE: 24 * 3_600_000, TEN_MINUTES: 7 * 24 * 3_600_000}
# Batches, rejections or groups that one transaction acknowledges.
MAX_ACKNOWLEDGED = 500


class NewAction(Struct, frozen=True, array_like=True):
    """An action. `who` is the channel and the caller, `filter` a JSON object; `files` is None when it changes none."""

    at: int
    who: str
    what: str
    filter: str
    files: int | None


class Group(NamedTuple):
    """A group of failing files; the empty reason is that of files reported FAILED."""

    reason: str
    host: str
    state: str


class NewAcknowledgement(Struct, frozen=True, array_like=True):
    """An acknowledgement of incomplete batches, rejections or groups, at most MAX_ACKNOWLEDGED in all."""

    at: int
    who: str
    note: str
    batches: Sequence[int] = ()
    rejections: Sequence[int] = ()
    groups: Sequence[Group] = ()


class KeptSample(Struct, frozen=True, array_like=True):
    """A sample of `step` seconds until `at` (Unix ms) of one server; `sample` is a JSON object."""

    step: int
    at: int
    server: str
    sample: str


class Journal(Protocol):
    """The verbs. Each is one transaction, and raises StoreUnavailableError when it cannot commit."""

    async def add_action(self, action: NewAction) -> None:
        """Write an action."""

    async def acknowledge(self, wanted: NewAcknowledgement) -> int:
        """Acknowledge; return the number of batches, rejections and files that were new. Unknown ids, batches that are
        not incomplete and groups without files are left out. A later acknowledgement of a group replaces the former.
        """

    async def keep_samples(self, samples: Sequence[KeptSample]) -> None:
        """Write samples, and delete those that are older than KEPT_MS before them."""
