"""The keeper of the conformance suite: it serves the verbs of the inbox, and SIGUSR1 sets its limits while it runs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from notify_server.model import BatchVerdict, InboxItem
from notify_server.processes import keeper
from notify_server.processes.keeper_protocol import VERBS, Verb
from notify_server.store.base import Expansion
from notify_server.store.sqlite import writes
from notify_server.store.sqlite.store import SqliteStore

INBOX_VERBS = {
    "wait_inbox": Verb(tuple[()], None),
    "inbox": Verb(tuple[int], list[InboxItem]),
    "expand": Verb(tuple[list[Expansion], int], list[BatchVerdict]),
    "discard": Verb(tuple[InboxItem, str, int], list[BatchVerdict]),
}


class InboxKeeper(keeper.Keeper):
    """Serves the verbs of the inbox too."""

    def verbs(self, store: SqliteStore) -> Mapping[str, Callable[..., Awaitable[object]]]:
        return {
            **super().verbs(store),
            "wait_inbox": store.wait_inbox,
            "inbox": store.inbox,
            "expand": store.expand,
            "discard": store.discard,
        }


def set_limits(path: Path) -> None:
    """Use the limits of this file, if it exists."""
    if path.exists():
        vars(writes).update(json.loads(path.read_text()))


if __name__ == "__main__":
    VERBS.update(INBOX_VERBS)
    limits = Path(sys.argv[1])
    signal.signal(signal.SIGUSR1, lambda *_: set_limits(limits))
    set_limits(limits)
    keeper.main(InboxKeeper)
