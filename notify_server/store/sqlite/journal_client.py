"""The journal on SQLite as the daemon has it: every verb is carried out by the keeper."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from notify_server.store.base import valid_ids
from notify_server.store.journal import KeptSample, NewAcknowledgement, NewAction


class SqliteJournalClient:
    """The verbs of store.journal.Journal. `call` sends one to the keeper."""

    def __init__(self, call: Callable[..., asyncio.Future[Any]]) -> None:
        self._call = call

    async def add_action(self, action: NewAction) -> None:
        await self._call("add_action", action)

    async def acknowledge(self, wanted: NewAcknowledgement) -> int:
        wanted = msgspec.structs.replace(
            wanted, batches=valid_ids(wanted.batches), rejections=valid_ids(wanted.rejections)
        )
        number: int = await self._call("acknowledge", wanted)
        return number

    async def keep_samples(self, samples: Sequence[KeptSample]) -> None:
        await self._call("keep_samples", samples)
