"""Endpoints of several nodes whose configurations differ, as during a rolling restart."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from notify_server.events.payload import EventType
from notify_server.store.outbox import Subscription
from notify_server.store.postgres.store import PostgresStore
from tests.store.backends import PostgresBackend
from tests.store.builders import NOW, failed, take_in
from tests.support.postgres import fetch
from tests.support.postgres_faults import opened

STATES = "SELECT endpoint, state, count(*)::int FROM forward GROUP BY endpoint, state ORDER BY endpoint, state"
LONG_AGO = "UPDATE endpoint SET wanted_until = '-infinity'"


@pytest.fixture
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The address of an empty schema that is up to date."""
    backend = PostgresBackend(tmp_path_factory.mktemp("store"))
    yield await backend.url()
    await backend.close()


async def subscribe(node: PostgresStore, *names: str) -> None:
    await node.outbox.subscribe([Subscription(name, list(EventType)) for name in names], None, NOW)


async def due(node: PostgresStore, endpoint: str) -> int:
    return len((await node.outbox.claim_deliveries([(endpoint, 100)], NOW + 1)).deliveries)


async def test_rolling_restart_loses_and_cancels_nothing(url: str) -> None:
    # The first one expands the inbox, and is restarted last.
    olds = [await PostgresStore.open(url) for _ in range(3)]
    news: list[PostgresStore] = []
    try:
        for node in olds:
            await subscribe(node, "both", "old")
        while olds:
            await take_in(olds[0], failed("k"), batch_id=f"before-{len(news)}")
            await olds.pop().close()
            news.append(await PostgresStore.open(url))
            await subscribe(news[-1], "both", "new")
            for node in olds + news:
                await node.outbox.renew_endpoints()
        # The first batch came before the first new node.
        assert await fetch(url, STATES) == [("both", "pending", 3), ("new", "pending", 2), ("old", "pending", 3)]
        await fetch(url, LONG_AGO)
        for node in news:
            await node.outbox.renew_endpoints()
        assert await fetch(url, STATES) == [("both", "pending", 3), ("new", "pending", 2), ("old", "cancelled", 3)]
        assert [state.name for state in await news[0].outbox.endpoint_states()] == ["both", "new"]
    finally:
        for node in olds + news:
            await node.close()


async def test_endpoint_of_one_node_gets_the_events_of_all_and_stays_while_that_node_lives(url: str) -> None:
    async with opened(url) as one, opened(url) as other:
        await subscribe(one, "a")
        await subscribe(other)
        for _ in range(2):
            await fetch(url, LONG_AGO)
            await one.outbox.renew_endpoints()
            await other.outbox.renew_endpoints()
        await take_in(one, failed("k"))
        assert await due(one, "a") == 1


async def test_node_that_could_not_renew_its_endpoint_in_time_brings_it_back(url: str) -> None:
    async with opened(url) as one, opened(url) as other:
        await subscribe(one, "a")
        await fetch(url, LONG_AGO)
        await other.outbox.renew_endpoints()
        assert await one.outbox.endpoint_states() == []
        await one.outbox.renew_endpoints()
        await take_in(one, failed("k"))
        assert await due(one, "a") == 1


async def test_stopped_endpoint_stays_stopped_through_a_rolling_restart(url: str) -> None:
    async with opened(url) as old:
        await subscribe(old, "a")
        assert await old.outbox.stop_endpoint("a", "stopped by hand", NOW)
        async with opened(url) as new:
            await subscribe(new, "a")
            await new.outbox.renew_endpoints()
            (state,) = await new.outbox.endpoint_states()
            assert state.stopped_at == NOW
