"""Notes who did what: one log line and one row of the record for each action of a person or a script."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from enum import StrEnum

import msgspec
import structlog

from notify_server.errors import StoreUnavailableError
from notify_server.store.journal import Journal, NewAction

log = structlog.get_logger("notify_server")

# The channel and the caller of the request or command in progress: `page 192.0.2.7`, `api 192.0.2.7`, `command root`.
CALLER: ContextVar[str] = ContextVar("caller", default="server")
# A command names its user to the server by this User-Agent.
COMMAND_AGENT = "notify-server-command/"
MAX_CALLER = 200


class ActionKind(StrEnum):
    """What people and scripts do."""

    RECHECK = "recheck"
    REPLAY = "replay"
    PRUNE = "prune"
    ACKNOWLEDGE = "acknowledge"
    TEST_PING = "test.ping"
    FORWARD_REPLAY = "forward.replay"
    FORWARD_STOP = "forward.stop"
    FORWARD_START = "forward.start"
    EXPECTATION_DELETE = "expectation.delete"


class ActionLog:
    """`now` gives Unix ms."""

    def __init__(self, journal: Journal, now: Callable[[], int]) -> None:
        self._journal = journal
        self._now = now

    async def add(self, what: ActionKind, files: int | None = None, **subject: str | int | None) -> None:
        """Note an action that has been done: what, how many files (rows, deliveries) it changed, and its subject or
        filter.
        """
        who = CALLER.get()[:MAX_CALLER]
        fields = {name: value for name, value in subject.items() if value is not None}
        counted = {} if files is None else {"files": files}
        log.info("action", what=str(what), who=who, **counted, **fields)
        try:
            await self._journal.add_action(
                NewAction(self._now(), who, str(what), msgspec.json.encode(fields).decode(), files)
            )
        except StoreUnavailableError as error:
            # It is done, and in the log.
            log.warning("cannot write the action to the record", what=str(what), error=str(error))
