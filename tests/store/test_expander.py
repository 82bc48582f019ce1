"""The expander over a real store: whatever lies in the inbox, all that can be expanded is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from notify_server.expansion.expander import CHUNK_FILES
from notify_server.model import BatchVerdict
from notify_server.store.base import Engine, ExpansionListener
from notify_server.verify.guard import Guard
from tests.store.backends import Backend
from tests.store.builders import API_CODE, NOW, delivery, found


def body(batch_id: str, *entries: dict[str, Any]) -> bytes:
    return json.dumps({"batch_id": batch_id, "api_code": API_CODE, "file_list": entries}).encode()


def entry(name: str, status: str = "FAILED", **fields: str) -> dict[str, str]:
    return {"oss_object_name": name, "status": status} | fields


async def expand_all(store: Engine, backend: Backend) -> list[BatchVerdict]:
    """Run the expander until the inbox is empty."""
    verdicts: list[BatchVerdict] = []

    def on_verdicts(reached: Sequence[BatchVerdict]) -> None:
        verdicts.extend(reached)

    told = ExpansionListener(lambda hosts: None, on_verdicts, lambda count: None, lambda count: None)
    task = asyncio.create_task(backend.expand_inbox(Guard([], [], [80, 443]), told))
    async with asyncio.timeout(20):
        while await backend.rows("SELECT count(*) FROM notification WHERE expanded_at IS NULL") != [(0,)]:
            await store.ping(NOW)
        # The results of the last expansion are reported before this is answered.
        await store.ping(NOW)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return verdicts


async def test_an_unreadable_delivery_is_set_aside_and_those_before_and_after_it_are_expanded(
    store: Engine, backend: Backend
) -> None:
    for n in range(6):
        unreadable = n in (1, 2, 5)
        content = b'{"batch_id":1}' if unreadable else body(f"batch {n}", entry("a"))
        await store.accept(delivery(f"batch {n}", body=content))
    verdicts = await expand_all(store, backend)
    assert [verdict.batch_id for verdict in verdicts] == ["batch 0", "batch 3", "batch 4"]
    assert await backend.rows("SELECT count(*) FROM rejection") == [(3,)]
    assert await backend.rows("SELECT count(*) FROM notification WHERE expanded_at IS NULL") == [(0,)]
    assert await store.inbox(10) == []
    assert store.backlog == 0


async def test_a_key_listed_twice_far_apart_is_a_no_op_when_its_delivery_comes_again(
    store: Engine, backend: Backend
) -> None:
    first, second = (entry("twice", "FINISHED", target_url=f"https://store.example.com/{n}") for n in range(2))
    content = body("batch", first, *(entry(str(n)) for n in range(CHUNK_FILES)), second)
    await store.accept(delivery(body=content, files=CHUNK_FILES + 2))
    assert await expand_all(store, backend) == []
    (file,) = await store.claim([("store.example.com", 9)], NOW)
    assert file.target_url == "https://store.example.com/1"
    assert len(await store.record([found(file)], NOW)) == 1
    await store.accept(delivery(body=content, files=CHUNK_FILES + 2))
    assert await expand_all(store, backend) == []
    assert await backend.rows("SELECT verdict, files, available FROM batch_summary") == [
        ("incomplete", CHUNK_FILES + 1, 1)
    ]
    assert await backend.rows("SELECT deliveries FROM batch") == [(2,)]
    assert store.backlog == 0
