"""The look for batches at risk."""

from __future__ import annotations

import asyncio

import pytest

from notify_server.config import VerifyConfig
from notify_server.forward import risk
from notify_server.store.sqlite import outbox
from notify_server.store.sqlite.store import SqliteStore
from tests.forward.conftest import Time
from tests.store.builders import again, claim, finished, take_in
from tests.support.waiting import eventually


async def test_one_look_finds_more_batches_than_one_transaction_takes(
    store: SqliteStore, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_AT_RISK", 2)
    monkeypatch.setattr(risk, "SECONDS", 0.01)
    for number in range(5):
        await take_in(store, finished("k"), batch_id=f"b{number}", now=time())
    await store.record([again(file, time() + 60_000, attempts=1) for file in await claim(store, now=time())], time())
    time.at += 60_000
    looks: list[int] = []

    def is_cut_off() -> bool:
        looks.append(time())
        return len(looks) > 1

    found: list[int] = []
    task = asyncio.create_task(
        risk.watch_at_risk(store.outbox, VerifyConfig(), 30.0, time, is_cut_off, lambda: found.append(time()))
    )
    try:
        await eventually(lambda: len(looks) > 1)
        events = await store._writer.read(lambda connection: connection.execute("SELECT type FROM event").fetchall())
        assert events == [("batch.at_risk",)] * 5
    finally:
        task.cancel()
    assert len(found) == 3
