"""PostgreSQL only: several nodes on one database, and failures of it and of them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import asyncpg
import pytest

from notify_server.errors import NonceReusedError, StoreRefusedError, StoreUnavailableError
from notify_server.model import DueFile, InboxItem
from notify_server.store.base import Nodes
from notify_server.store.postgres import expansion as postgres_expansion
from notify_server.store.postgres import pool
from notify_server.store.postgres import records as postgres_records
from notify_server.store.postgres import schema as postgres_schema
from notify_server.store.postgres import session as postgres_session
from notify_server.store.postgres import store as postgres
from notify_server.store.postgres import writes as postgres_writes
from notify_server.store.postgres.node import INBOX, WORK
from notify_server.store.postgres.pool import POOL_SIZE
from notify_server.store.postgres.records import PostgresRecords
from notify_server.store.postgres.store import PostgresStore
from notify_server.store.reading.types import BatchFilter, FileFilter, Found, Page
from notify_server.store.sql import load_migrations
from tests.store.backends import PostgresBackend
from tests.store.builders import (
    API_CODE,
    HOST,
    NOW,
    again,
    chunk,
    claim,
    claim_one,
    deliver,
    delivery,
    finished,
    found,
    missing,
    rejection,
    settle,
    take_in,
)
from tests.support.postgres import SETTINGS, PostgresServer, fetch, new_schema
from tests.support.postgres_faults import cut, expire, locked, opened, until_behind, until_waiting
from tests.support.waiting import eventually


@pytest.fixture
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The address of an empty schema that is up to date."""
    backend = PostgresBackend(tmp_path_factory.mktemp("store"))
    yield await backend.url()
    await backend.close()


@pytest.fixture
async def one(url: str) -> AsyncIterator[PostgresStore]:
    """A node; it is the one that expands."""
    async with opened(url) as store:
        yield store


@pytest.fixture
async def other(url: str, one: PostgresStore) -> AsyncIterator[PostgresStore]:
    async with opened(url) as store:
        yield store


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """No node looks by itself; it only hears. Must come before the stores."""
    monkeypatch.setattr(postgres, "TICK_SECONDS", 3600.0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes look all the time. Must come before the stores."""
    monkeypatch.setattr(postgres, "TICK_SECONDS", 0.02)


async def expand_one(store: PostgresStore, *names: str, batch_id: str = "batch") -> None:
    (item,) = await store.inbox(10)
    await store.expand([chunk(item, *map(finished, names), batch_id=batch_id)], NOW)


# Claims


async def test_every_file_is_claimed_once_whatever_nodes_race_for_it(one: PostgresStore, other: PostgresStore) -> None:
    hosts = [f"h{n}.example" for n in range(5)]
    await take_in(one, *(finished(f"{host} {n}", host=host) for host in hosts for n in range(80)))
    chance = random.Random(1)

    async def claim_all(store: PostgresStore) -> list[DueFile]:
        mine: list[DueFile] = []
        for _ in range(60):
            wanted = chance.sample(hosts, 3)
            mine += await store.claim([(host, chance.randrange(1, 9)) for host in wanted], NOW)
        for host in hosts:
            mine += await claim(store, host)
        return mine

    # A node connects for its first claim: on a busy machine the other could have everything by then.
    for store in (one, other):
        assert await claim(store, "nowhere.example") == []
    shares = await asyncio.gather(*(claim_all(store) for store in (one, other, one, other)))
    every = [file.id for share in shares for file in share]
    assert len(every) == len(set(every)) == 400
    assert all(shares)


async def test_what_one_node_gives_back_another_may_claim(url: str, one: PostgresStore, other: PostgresStore) -> None:
    await take_in(one, finished())
    file = await claim_one(one)
    assert await claim(other) == []
    one.release([file])
    assert await claim(one, "elsewhere") == []
    assert await claim(other) == [file]


@pytest.mark.usefixtures("quick")
async def test_claims_go_on_where_the_last_one_ended_and_come_back_for_what_was_given_back(
    url: str, one: PostgresStore
) -> None:
    await take_in(one, *(finished(name) for name in "abcdef"))
    a, b = await claim(one, n=2)
    c, d = await claim(one, n=2)
    assert a.id < b.id < c.id < d.id
    one.release([b])
    assert await claim(one, n=1) == [b]
    assert [file.target_url[-1] for file in await claim(one)] == ["e", "f"]
    assert await claim(one) == []


@pytest.mark.usefixtures("blind")
async def test_what_lies_before_where_claims_have_got_to_is_found_when_there_is_too_little_behind(
    one: PostgresStore, other: PostgresStore
) -> None:
    await take_in(one, *(finished(name) for name in "abcd"))
    (a,) = await claim(other, n=1)
    b, c = await claim(one, n=2)
    other.release([a])
    assert await claim(other, "nowhere.example.com") == []
    (d, again_a) = await claim(one, n=9)
    assert again_a == a
    assert len({a.id, b.id, c.id, d.id}) == 4


@pytest.mark.usefixtures("quick")
async def test_what_lies_before_where_claims_have_got_to_is_found_soon_though_there_is_enough_behind(
    one: PostgresStore, other: PostgresStore
) -> None:
    await take_in(one, *(finished(f"{n:04}") for n in range(1000)))
    (first,) = await claim(other, n=1)
    await claim(one, n=1)
    other.release([first])
    assert await claim(other, "nowhere.example.com") == []

    async def came_back() -> bool:
        (file,) = await claim(one, n=1)
        return file == first

    await eventually(came_back)


async def test_a_released_file_is_free_though_its_node_claims_nothing_more(
    one: PostgresStore, other: PostgresStore
) -> None:
    await take_in(one, finished())
    one.release([await claim_one(one)])
    assert len(await eventually(lambda: claim(other))) == 1


async def test_what_a_node_has_claimed_is_free_when_it_closes(url: str, one: PostgresStore) -> None:
    await take_in(one, finished("a"), finished("b"))
    async with opened(url) as other:
        assert len(await claim(other)) == 2
        assert await claim(one) == []
    assert len(await claim(one)) == 2
    assert await fetch(url, "SELECT id FROM node") == [(one.node.id,)]


async def test_what_a_node_had_that_was_not_heard_of_in_time_is_claimed_by_another(
    url: str, one: PostgresStore, other: PostgresStore
) -> None:
    await take_in(one, *(finished(str(n)) for n in range(50)))
    files = await claim(one)
    assert await claim(other) == []
    await expire(url, one)
    assert sorted(file.id for file in await claim(other)) == sorted(file.id for file in files)


async def test_a_stale_node_that_records_changes_nothing_and_works_again_under_another_id(
    url: str, one: PostgresStore, other: PostgresStore, capsys: pytest.CaptureFixture[str]
) -> None:
    await take_in(one, finished("a"), finished("b"), finished("c"))
    first = one.node.id
    a, b, c = await claim(one)
    await expire(url, one)
    assert [file.id for file in await claim(other, n=1)] == [a.id]
    # One file belongs to another node by now, the second to none, and the third is not due.
    assert await one.record([missing(a), missing(b), again(c, NOW + 5)], NOW) == []
    assert await fetch(url, "SELECT DISTINCT state, attempts FROM file") == [("pending", 0)]
    assert await fetch(url, "SELECT pending FROM batch") == [(3,)]
    assert await fetch(url, "SELECT count(*) FROM attempt") == [(0,)]
    assert one.backlog == 3

    async def registered() -> bool:
        return await fetch(url, "SELECT id FROM node WHERE alive_until > now() AND id > $1", other.node.id) != []

    await eventually(registered)
    assert one.node.id > other.node.id > first
    assert "did not renew its lease in time" in capsys.readouterr().out
    assert await one.record([found(a)], NOW) == []
    assert len(await other.record([found(a)], NOW)) == 0
    assert {file.id for file in await claim(one)} == {b.id, c.id}
    (verdict,) = await one.record([found(b), found(c)], NOW)
    assert verdict.available == 3


async def test_a_file_that_has_changed_hands_is_recorded_by_who_has_it_now(
    url: str, one: PostgresStore, other: PostgresStore
) -> None:
    await take_in(one, finished("a"), finished("b"))
    a, b = await claim(one)
    await fetch(url, "UPDATE lease SET node = $1 WHERE file = $2", other.node.id, a.id)
    assert await one.record([missing(a), found(b)], NOW) == []
    assert await fetch(url, "SELECT state FROM file ORDER BY id") == [("pending",), ("available",)]
    assert await fetch(url, "SELECT file, node FROM lease") == [(a.id, other.node.id)]
    one.release([a])
    await claim(one)
    assert await fetch(url, "SELECT file, node FROM lease") == [(a.id, other.node.id)]


async def test_a_node_that_has_lost_its_lease_claims_nothing_before_it_registers_again(
    url: str, one: PostgresStore
) -> None:
    await take_in(one, finished())
    first = one.node.id
    await expire(url, one)
    assert await claim(one) == []

    async def registered() -> bool:
        # It has no id between the two.
        with contextlib.suppress(StoreUnavailableError):
            return one.node.id > first
        return False

    await eventually(registered)
    (file,) = await claim(one)
    assert len(await one.record([found(file)], NOW)) == 1


async def test_leases_of_nodes_that_are_not_alive_are_cleaned_up_by_any_other(url: str, one: PostgresStore) -> None:
    await take_in(one, finished("a"), finished("b"))
    await claim(one)
    await fetch(url, "INSERT INTO lease (file, node) SELECT 1000 + n, 77 FROM generate_series(1, 5) AS n")
    async with opened(url):
        assert await fetch(url, "SELECT DISTINCT node FROM lease") == [(one.node.id,)]


async def test_a_claim_whose_answer_was_lost_is_not_held_for_ever(url: str, one: PostgresStore) -> None:
    await take_in(one, finished("a"), finished("b"))
    (held,) = await claim(one, n=1)
    async with locked(url, "lease") as holder:
        claiming = asyncio.create_task(claim(one))
        await cut(holder)
        with pytest.raises(StoreUnavailableError):
            await claiming
    # As if it had been committed.
    await fetch(url, "INSERT INTO lease (file, node) SELECT id, $1 FROM file ON CONFLICT DO NOTHING", one.node.id)
    (file,) = await claim(one)
    assert file.id != held.id
    (verdict,) = await one.record([found(held), found(file)], NOW)
    assert verdict.available == 2


async def test_a_result_that_was_committed_in_spite_of_an_error_changes_nothing_when_repeated(
    url: str, one: PostgresStore
) -> None:
    await take_in(one, finished("a"), finished("b"))
    first, second = await claim(one)
    assert await one.record([found(first)], NOW) == []
    before = await fetch(url, "SELECT * FROM batch"), await fetch(url, "SELECT * FROM file ORDER BY id")
    # This node does not know that it was done.
    one.claims.hold(first)
    assert await one.record([missing(first)], NOW + 1) == []
    assert (await fetch(url, "SELECT * FROM batch"), await fetch(url, "SELECT * FROM file ORDER BY id")) == before
    assert await fetch(url, "SELECT count(*) FROM attempt") == [(1,)]
    assert one.backlog == 1
    assert len(await one.record([found(second)], NOW)) == 1


# Record, recheck


async def test_of_nodes_that_settle_a_batch_together_exactly_one_gets_its_verdict(
    url: str, one: PostgresStore, other: PostgresStore
) -> None:
    batches = [f"batch {n}" for n in range(25)]
    for batch_id in batches:
        await take_in(one, *(finished(str(n)) for n in range(4)), batch_id=batch_id)
    shares: list[list[DueFile]] = [[], []]
    for n in range(100):
        shares[n % 2] += await claim((one, other)[n % 2], n=1)
    chance = random.Random(2)
    calls = []
    for store, share in zip((one, other), shares, strict=True):
        # In another order on each node, and of many batches at a time.
        chance.shuffle(share)
        calls += [store.record([found(file) for file in share[start : start + 10]], NOW) for start in range(0, 50, 10)]
    verdicts = [verdict for part in await asyncio.gather(*calls) for verdict in part]
    assert sorted(verdict.batch_id for verdict in verdicts) == sorted(batches)
    assert {verdict.available for verdict in verdicts} == {4}
    assert await fetch(url, "SELECT DISTINCT pending, available, verdict FROM batch") == [(0, 4, "complete")]


async def test_an_attempt_in_flight_elsewhere_is_dropped_when_its_file_starts_over(
    url: str, one: PostgresStore, other: PostgresStore
) -> None:
    await take_in(one, finished("a"), finished("b"))
    a, b = await claim(other)
    await one.recheck([a.id], NOW + 1)
    await take_in(one, finished("b", url=f"https://{HOST}/elsewhere"), now=NOW + 1)
    assert await claim(one, now=NOW + 1) == []
    assert await other.record([missing(a), missing(b)], NOW + 1) == []
    assert await fetch(url, "SELECT DISTINCT state, attempts FROM file") == [("pending", 0)]
    (verdict,) = await settle(one, now=NOW + 1)
    assert verdict.available == 2


async def test_recheck_and_record_of_the_same_files_on_two_nodes_leave_counters_that_are_true(
    url: str, one: PostgresStore, other: PostgresStore
) -> None:
    for n in range(10):
        await take_in(one, *(finished(str(m)) for m in range(6)), batch_id=str(n))
    for _ in range(5):
        files = await claim(other)
        ids = [file.id for file in files]
        await asyncio.gather(
            *(other.record([found(file) for file in files[start::6]], NOW) for start in range(6)),
            *(one.recheck(ids[start::4], NOW) for start in range(4)),
        )
        counted = "SELECT batch, count(*) FILTER (WHERE state = 'pending') FROM file GROUP BY batch ORDER BY batch"
        assert await fetch(url, "SELECT id, pending FROM batch ORDER BY id") == await fetch(url, counted)


async def test_a_file_that_starts_over_while_its_result_waits_for_the_batch_drops_the_result(
    url: str, one: PostgresStore
) -> None:
    await take_in(one, finished())
    file = await claim_one(one)
    connection = await asyncpg.connect(url)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("SELECT FROM batch FOR NO KEY UPDATE")
    recording = asyncio.create_task(one.record([missing(file)], NOW))
    await until_behind(connection)
    # As an expansion or a recheck on another node.
    await connection.execute("UPDATE file SET next_attempt_at = $1", NOW + 1)
    await connection.execute("UPDATE lease SET restarted = true")
    await transaction.commit()
    await connection.close()
    assert await recording == []
    assert await fetch(url, "SELECT state, attempts, next_attempt_at FROM file") == [("pending", 0, NOW + 1)]
    assert await fetch(url, "SELECT count(*) FROM lease") == [(0,)]
    assert len(await settle(one, now=NOW + 1)) == 1


async def test_a_file_that_is_settled_elsewhere_while_its_result_waits_for_it_drops_the_result(
    url: str, one: PostgresStore
) -> None:
    await take_in(one, finished("a"), finished("b"))
    a, b = await claim(one)
    connection = await asyncpg.connect(url)
    # Counted first, so that the batch is not locked: the statement would wait for it instead.
    await connection.execute("UPDATE batch SET pending = pending - 1, available = available + 1")
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("UPDATE file SET state = 'available', next_attempt_at = NULL WHERE id = $1", a.id)
    recording = asyncio.create_task(one.record([missing(a), found(b)], NOW))
    await until_behind(connection)
    await transaction.commit()
    await connection.close()
    (verdict,) = await recording
    assert verdict.available == 2


# Expansion


async def test_one_node_expands_and_another_does_when_that_is_gone(url: str) -> None:
    async with opened(url) as one, opened(url) as other:
        await other.accept(delivery())
        assert await other.inbox(10) == []
        (item,) = await one.inbox(10)
        with pytest.raises(StoreUnavailableError):
            await other.expand([chunk(item, finished())], NOW)
        # It does not spin meanwhile.
        waiting = asyncio.create_task(other.wait_inbox())
        await other.ping(NOW)
        assert not waiting.done()
        await one.close()
        async with asyncio.timeout(20):
            await waiting
        assert await other.inbox(10) == [item]
        await other.expand([chunk(item, finished())], NOW)
    assert await fetch(url, "SELECT deliveries, files FROM batch") == [(1, 1)]


@pytest.mark.usefixtures("quick")
async def test_a_delivery_that_is_seen_later_than_those_behind_it_is_expanded_all_the_same(
    url: str, one: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_expansion, "MARK_SECONDS", 0.0)
    connection = await asyncpg.connect(url)
    transaction = connection.transaction()
    await transaction.start()
    # It has its id, and another node has not committed it yet.
    await connection.execute(
        "INSERT INTO notification (batch_id, api_code, received_at, remote_addr, signature, request_id, files, body)"
        " VALUES ('late', 'a', 1, 'r', 'none', 'id', 1, '{}')"
    )
    for n in range(3):
        await take_in(one, finished(), batch_id=str(n))
        assert await one.inbox(10) == []
    await transaction.commit()
    await connection.close()
    assert len(await one.inbox(10)) == 1

    # Once nothing before them can come any more, it begins behind those that have been expanded.
    await take_in(one, finished(), batch_id="last")
    monkeypatch.setattr(postgres_expansion, "UNSEEN_SECONDS", 0.0)
    first = (await one.inbox(10))[0].id
    await expand_one(one, "k", batch_id="late")
    assert await one.inbox(10) == []
    await deliver(one)
    assert len(await one.inbox(10)) == 1
    assert one._expansion_lock.first > first


async def test_a_node_whose_connection_for_expansion_is_cut_commits_nothing_and_may_take_it_up_again(
    url: str, one: PostgresStore
) -> None:
    item = await deliver(one)
    async with locked(url, "file", readable=True) as holder:
        expanding = asyncio.create_task(one.expand([chunk(item, finished())], NOW))
        await cut(holder)
        with pytest.raises(StoreUnavailableError):
            await expanding
    assert await fetch(url, "SELECT count(*) FROM batch") == [(0,)]
    assert one.backlog == 1
    async with asyncio.timeout(20):
        while not (items := await one.inbox(10)):
            await one.wait_inbox()
    assert items == [item]
    await one.expand([chunk(item, finished())], NOW)
    assert await fetch(url, "SELECT deliveries, files FROM batch") == [(1, 1)]


async def test_an_item_that_another_node_has_expanded_meanwhile_is_not_expanded_again(url: str) -> None:
    async with opened(url) as one:
        item = await deliver(one)
        await one.expand([chunk(item, finished())], NOW)
    async with opened(url) as other:
        assert await other.expand([chunk(item, finished(), finished("b"))], NOW) == []
        assert await other.discard(item, "unreadable", NOW) == []
        assert other.backlog == 1
    assert await fetch(url, "SELECT deliveries, files FROM batch") == [(1, 1)]
    assert await fetch(url, "SELECT count(*) FROM rejection") == [(0,)]


@pytest.mark.usefixtures("blind")
async def test_the_node_that_expands_hears_what_another_has_accepted(one: PostgresStore, other: PostgresStore) -> None:
    assert await one.inbox(10) == []
    waiting = asyncio.create_task(one.wait_inbox())
    id = await other.accept(delivery())
    async with asyncio.timeout(20):
        await waiting
    assert [item.id for item in await one.inbox(10)] == [id]


@pytest.mark.usefixtures("blind")
async def test_nodes_hear_that_another_has_made_files_due(url: str, one: PostgresStore) -> None:
    heard = asyncio.Event()
    async with opened(url, on_work=heard.set):
        await take_in(one, finished())
        async with asyncio.timeout(20):
            await heard.wait()
        heard.clear()
        await settle(one)
        await one.recheck([1], NOW)
        async with asyncio.timeout(20):
            await heard.wait()


@pytest.mark.usefixtures("quick")
async def test_the_backlog_of_a_node_comes_to_what_others_have_made_of_it(
    url: str, one: PostgresStore, other: PostgresStore
) -> None:
    async def is_now(store: PostgresStore, backlog: int) -> bool:
        return store.backlog == backlog

    await other.accept(delivery(files=3))
    assert other.backlog == 3
    await eventually(lambda: is_now(one, 3))
    await expand_one(one, "a", "b")
    assert one.backlog == 2
    await eventually(lambda: is_now(other, 2))
    await settle(other)
    assert other.backlog == 0
    await eventually(lambda: is_now(one, 0))


# Shared work


async def test_of_deliveries_with_one_nonce_on_two_nodes_exactly_one_is_stored(
    url: str, one: PostgresStore, other: PostgresStore
) -> None:
    for n in range(10):
        nonces = [(f"{n} {m}", NOW + 60_000) for m in range(10)]
        calls = [store.accept(delivery(nonce=nonce)) for nonce in nonces for store in (one, other)]
        calls += [other.accept(delivery(nonce=nonce)) for nonce in reversed(nonces)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(answer, int) for answer in answers) == 10
        assert sum(isinstance(answer, NonceReusedError) for answer in answers) == 20
    assert await fetch(url, "SELECT count(*) FROM notification") == [(100,)]


async def test_nodes_that_bring_one_schema_up_to_date_at_once_all_open(caplog: pytest.LogCaptureFixture) -> None:
    url = await new_schema()
    stores = await asyncio.gather(*(PostgresStore.open(url) for _ in range(6)))
    await asyncio.gather(*(store.close() for store in stores))
    assert await fetch(url, "SELECT version FROM schema_version") == [(len(load_migrations("postgres")),)]


async def test_rejections_are_bounded_together(
    url: str, one: PostgresStore, other: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_writes, "MAX_REJECTIONS", 5)
    await asyncio.gather(*(store.reject(rejection()) for store in (one, other) for _ in range(20)))
    await one.reject(rejection())
    assert await fetch(url, "SELECT count(*) FROM rejection") == [(5,)]


async def test_nodes_that_prune_at_once_delete_everything_once(
    url: str, one: PostgresStore, other: PostgresStore
) -> None:
    for n in range(20):
        await take_in(one, finished("a"), finished("b"), batch_id=str(n))
    await settle(one)

    async def prune(store: PostgresStore) -> int:
        rows = 0
        while deleted := await store.prune(NOW + 1, NOW + 1, 7):
            rows += deleted
        return rows

    assert (
        sum(await asyncio.gather(prune(one), prune(other), prune(one))) == 20 + 20 + 40 + 40 + 20
    )  # Deliveries, batches, files, attempts, events.
    assert await fetch(url, "SELECT count(*) FROM file") == [(0,)]


# What goes wrong with the server


async def test_a_connection_cut_in_the_middle_of_a_commit_of_acks_tells_each_caller_and_the_next_is_taken(
    url: str, one: PostgresStore
) -> None:
    async with locked(url, "notification") as holder:
        calls = [asyncio.ensure_future(one.accept(delivery())) for _ in range(20)]
        await cut(holder)
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(answer, StoreUnavailableError) for answer in answers)
    assert len({id(answer) for answer in answers}) == 20
    assert await fetch(url, "SELECT count(*) FROM notification") == [(0,)]
    assert one.backlog == 0
    await one.accept(delivery())


async def test_a_connection_cut_in_the_middle_of_recording_leaves_nothing_behind_and_the_same_call_succeeds_later(
    url: str, one: PostgresStore
) -> None:
    await take_in(one, finished())
    file = await claim_one(one)
    async with locked(url, "attempt", readable=True) as holder:
        recording = asyncio.create_task(one.record([found(file)], NOW))
        await cut(holder)
        with pytest.raises(StoreUnavailableError):
            await recording
    assert await fetch(url, "SELECT state, attempts FROM file") == [("pending", 0)]
    assert one.backlog == 1
    assert len(await one.record([found(file)], NOW)) == 1


async def test_without_a_free_connection_callers_get_an_error_and_the_others_go_on(
    url: str, one: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(POOL_SIZE):
        await take_in(one, finished(), batch_id=f"b{n}")
    files = [id for (id,) in await fetch(url, "SELECT id FROM file")]
    async with locked(url, "lease") as holder:
        rechecks = [asyncio.create_task(one.recheck([file], NOW)) for file in files]
        await until_waiting(holder, POOL_SIZE)
        # Only now: the first ones had to wait for their connections to be made.
        monkeypatch.setattr(pool, "ACQUIRE_SECONDS", 0.2)
        with pytest.raises(StoreUnavailableError, match="in time"):
            await one.due_hosts("", 9)
        # Acks do not depend on it.
        await one.accept(delivery())
    await asyncio.gather(*rechecks)
    assert [due.host for due in await one.due_hosts("", 9)] == [HOST]


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server of the case's own."""
    with PostgresServer() as server:
        yield server


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("crash", [False, True], ids=["in order", "by a crash"])
async def test_when_the_server_is_restarted_everything_goes_on_by_itself_and_nothing_acked_is_lost(
    server: PostgresServer, crash: bool
) -> None:
    heard = asyncio.Event()
    url = server.url
    async with opened(url, lease=1.5) as store, opened(url, lease=1.5, on_work=heard.set) as other:
        await take_in(store, finished("a"), finished("b"))
        (held,) = await claim(store, n=1)
        acked = await other.accept(delivery("later"))
        records = await PostgresRecords.open(url)
        assert (await records.totals()).files == 2
        server.stop(signal_of(crash))

        for call in down(store, held):
            with pytest.raises(StoreUnavailableError):
                await call()
        with pytest.raises(StoreUnavailableError):
            await records.totals()
        server.start()

        async def works() -> bool:
            try:
                await other.accept(delivery("after"))
                return (await records.totals()).files == 2
            except StoreUnavailableError:
                return False

        await eventually(works)
        # One of them expands again, whichever it is; the other hears of it.
        heard.clear()
        items: list[int] = []
        while acked not in items:
            for node in (store, other):
                try:
                    inbox = await node.inbox(10)
                    for item in inbox:
                        await node.expand([chunk(item, finished(), batch_id=f"{item.id}")], NOW)
                        items.append(item.id)
                except StoreUnavailableError:
                    pass
        assert items == sorted(set(items))

        async def all_claimed() -> bool:
            try:
                for node in (store, other):
                    await node.record([found(file) for file in await claim(node)], NOW)
                return await fetch(url, "SELECT count(*) FROM file WHERE state = 'pending'") == [(0,)]
            except StoreUnavailableError:
                return False

        if not crash:
            await eventually(lambda: recorded(store, held))
        await eventually(all_claimed)
        assert await fetch(url, "SELECT count(*) FROM lease") == [(0,)]
        await records.close()


def signal_of(crash: bool) -> signal.Signals:
    return signal.SIGQUIT if crash else signal.SIGINT


def down(store: PostgresStore, held: DueFile) -> list[Callable[[], Awaitable[object]]]:
    """What fails while the server is not there."""
    return [
        lambda: store.accept(delivery()),
        lambda: store.reject(rejection()),
        lambda: store.claim([(HOST, 1)], NOW),
        lambda: store.due_hosts("", 1),
        lambda: store.record([again(held, NOW)], NOW),
        lambda: store.ping(NOW),
    ]


async def recorded(store: PostgresStore, file: DueFile) -> bool:
    try:
        await store.record([found(file)], NOW)
    except StoreUnavailableError:
        return False
    return True


# Opening


async def test_what_cannot_be_opened_is_refused_in_one_line_that_never_shows_the_password(url: str) -> None:
    options = url.partition("?")[2]
    cases = {
        "postgresql://u:hunter2@127.0.0.1:1/d": "postgresql://127.0.0.1:1/d: cannot be reached",
        "postgresql://u:hunter2@nowhere.invalid/d": "postgresql://nowhere.invalid/d: cannot be reached",
        f"postgresql:///hunter3?password=hunter2&{options}": "does not exist",
        f"postgresql://nobody_here:hunter2@/postgres?{options}&user=nobody_here": "refuses this user",
        f"{url}&default_transaction_read_only=on": "is read-only",
        f"{url}&sslmode=hunter2": "cannot be",
        "postgresql://u:hunter2@h:port/d": "cannot be",
    }
    for address, wanted in cases.items():
        with pytest.raises(StoreRefusedError) as refused:
            await PostgresStore.open(address.replace("&user=notify", "") if "nobody_here" in address else address)
        text = str(refused.value)
        assert wanted in text, address
        assert "hunter2" not in text
        assert len(text.splitlines()) == 1
        assert refused.value.__context__ is None


async def test_a_newer_schema_is_refused_and_left_as_it_is(url: str) -> None:
    url = await new_schema()
    async with opened(url):
        pass
    known = len(load_migrations("postgres"))
    await fetch(url, "UPDATE schema_version SET version = version + 1")
    with pytest.raises(StoreRefusedError, match=f"has schema version {known + 1}, this program knows {known}: run the"):
        await PostgresStore.open(url)
    assert await fetch(url, "SELECT version FROM schema_version") == [(known + 1,)]


async def test_a_schema_with_tables_of_another_program_is_refused() -> None:
    url = await new_schema()
    await fetch(url, "CREATE TABLE file (name text)")
    with pytest.raises(StoreRefusedError, match="has a table file of another program"):
        await PostgresStore.open(url)
    assert await fetch(url, "SELECT to_regclass('batch')") == [(None,)]


async def test_a_migration_that_fails_leaves_nothing_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    url = await new_schema()
    (first, *_) = load_migrations("postgres")
    broken = first._replace(script=f"{first.script}; NONSENSE;")
    monkeypatch.setattr(postgres_schema, "load_migrations", lambda dialect: (broken,))
    with pytest.raises(StoreRefusedError, match="cannot be used"):
        await PostgresStore.open(url)
    assert await fetch(url, "SELECT to_regclass('batch'), to_regclass('schema_version')") == [(None, None)]
    monkeypatch.undo()
    async with opened(url) as store:
        await take_in(store, finished())


def _without_nulls(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [[value for value in row if value is not None] for row in rows]


async def test_a_database_of_the_first_version_is_migrated_with_its_contents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = await new_schema()
    (first, *_) = load_migrations("postgres")
    references = (
        "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND connamespace = current_schema()::regnamespace"
    )
    contents = "SELECT file.*, attempt.*, notification.* FROM file JOIN attempt ON file = file.id, notification"
    with monkeypatch.context() as patch:
        patch.setattr(postgres_schema, "load_migrations", lambda dialect: (first,))
        await postgres_schema.migrate_at(url)
    # Today's store needs today's columns, so what the first version had written is written by hand.
    for statement in (
        "INSERT INTO notification (batch_id, api_code, received_at, remote_addr, signature, request_id, files,"
        f" expanded_at, body) VALUES ('batch', '{API_CODE}', {NOW}, '192.0.2.1', 'none', 'id', 2, {NOW}, '{{}}')",
        "INSERT INTO batch (batch_id, api_code, first_received_at, last_received_at, deliveries, files, pending,"
        f" available, last_notification) VALUES ('batch', '{API_CODE}', {NOW}, {NOW}, 1, 2, 1, 1, 1)",
        "INSERT INTO file (batch, oss_object_name, target_url, host, reported_status, state, attempts, http_status,"
        f" verified_at) VALUES (1, 'a', 'https://{HOST}/a', '{HOST}', 'FINISHED', 'available', 1, 200, {NOW})",
        "INSERT INTO file (batch, oss_object_name, target_url, host, reported_status, state, next_attempt_at)"
        f" VALUES (1, 'b', 'https://{HOST}/b', '{HOST}', 'FINISHED', 'pending', {NOW})",
        f"INSERT INTO attempt (file, started_at, method, http_status, total_ms) VALUES (1, {NOW}, 'HEAD', 200, 1.5)",
    ):
        await fetch(url, statement)
    assert await fetch(url, references) == [(2,)]
    before = await fetch(url, contents)
    async with opened(url) as store:
        assert await fetch(url, "SELECT version FROM schema_version") == [(len(load_migrations("postgres")),)]
        assert await fetch(url, references) == [(0,)]
        # Later columns are empty.
        assert _without_nulls(await fetch(url, contents)) == _without_nulls(before) != []
        # Debian's is built with it.
        assert await fetch(
            url,
            "SELECT attcompression FROM pg_attribute WHERE attrelid = 'notification'::regclass AND attname = 'body'",
        ) == [(b"l",)]
        (verdict,) = await settle(store)
        assert verdict.available == 2


async def test_commits_wait_for_the_disk_whatever_the_settings_of_user_and_database(url: str) -> None:
    async with opened(f"{url}&synchronous_commit=off") as store:
        for session in (store._acks, store._expansion_lock._session):
            async with session.use() as connection:
                assert await connection.fetchval("SHOW synchronous_commit") == "on"
        async with store._pool.connection() as pooled:
            assert await pooled.fetchval("SHOW synchronous_commit") == "on"


async def test_no_ack_is_lost_in_a_crash_of_a_server_whose_role_commits_asynchronously() -> None:
    """Row 130."""
    # Without the setting of the session nothing of this would reach the disk before the crash.
    with PostgresServer({**SETTINGS, "wal_writer_delay": "10s"}) as server:
        await fetch(server.url, "ALTER ROLE notify SET synchronous_commit = off")
        assert await fetch(server.url, "SHOW synchronous_commit") == [("off",)]
        async with opened(server.url) as store:
            ids = [await store.accept(delivery(f"b{n}")) for n in range(20)]
            await store.reject(rejection())
            server.stop(signal.SIGQUIT)
        server.start()
        assert await fetch(server.url, "SELECT id FROM notification ORDER BY id") == [(id,) for id in ids]
        assert await fetch(server.url, "SELECT count(*) FROM rejection") == [(1,)]


async def test_records_cannot_write_and_are_cut_off_in_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_records, "READ_SECONDS", 0.2)
    async with opened(url):
        records = await PostgresRecords.open(url)
        async with records._pool.acquire() as connection:
            assert await connection.fetchval("SHOW default_transaction_read_only") == "on"
        async with locked(url, "batch"):
            with pytest.raises(StoreUnavailableError, match="too much to read at once"):
                await records.totals()
        assert (await records.totals()).batches == 0
        await records.close()


async def test_what_postgresql_cannot_hold_is_found_nowhere_and_kept_as_it_can_be(url: str, one: PostgresStore) -> None:
    await one.reject(rejection(detail="a\0b\ud800c"))
    assert await fetch(url, "SELECT detail FROM rejection") == [("a\ufffdb\ufffdc",)]
    records = await PostgresRecords.open(url)
    await take_in(one, finished())
    for text in ("\0", "batch\0", "\ud800"):
        assert await records.search(text, 9) == Found([], [])
        assert await records.batches(BatchFilter(batch_id=text), None, 9) == Page([])
        assert await records.files(FileFilter(reason=text), None, 9) == Page([])
        assert await records.count(FileFilter(host=text)) == 0
    await records.close()


@pytest.mark.usefixtures("quick")
async def test_each_node_knows_who_is_alive(url: str, one: PostgresStore) -> None:
    def knows(taking: list[PostgresStore], probing: list[PostgresStore]) -> Callable[[], Awaitable[bool]]:
        async def look() -> bool:
            return one.nodes == Nodes(one.node.id, ids(taking), ids(probing))

        return look

    def ids(nodes: list[PostgresStore]) -> list[int]:
        return sorted(node.node.id for node in nodes)

    assert one.nodes == Nodes(one.node.id, [one.node.id], [one.node.id])
    async with opened(url, roles=["probes"]) as other:
        assert other.nodes == Nodes(other.node.id, [one.node.id], [one.node.id, other.node.id])
        await eventually(knows([one], [one, other]))
        async with opened(url, roles=["callbacks"]) as third:
            await eventually(knows([one, third], [one, other]))
        await expire(url, other)
        await eventually(knows([one], [one]))


@pytest.mark.usefixtures("quick")
async def test_the_inbox_is_left_to_nodes_that_probe_and_taken_care_of_by_others_while_there_are_none(url: str) -> None:
    async with opened(url, roles=["callbacks"]) as taking:
        first = await taking.accept(delivery("first"))
        assert [item.id for item in await taking.inbox(10)] == [first]
        async with opened(url, roles=["probes"]) as probing:
            (item,) = await eventually(lambda: passed_on(taking, probing))
            assert item.id == first
            await probing.expand([chunk(item, finished(), batch_id="first")], NOW)
            assert await taking.inbox(10) == []
            with pytest.raises(StoreUnavailableError, match="another node expands"):
                await taking.expand([chunk(item, finished(), batch_id="first")], NOW)
            # It is notified of what another node accepts as if it had accepted it itself.
            await probing.inbox(10)
            waiting = asyncio.create_task(probing.wait_inbox())
            second = await taking.accept(delivery("second"))
            await waiting
        assert [item.id for item in await eventually(lambda: taking.inbox(10))] == [second]


async def passed_on(taking: PostgresStore, probing: PostgresStore) -> list[InboxItem]:
    """What the node that probes finds in the inbox, while the other looks too."""
    await taking.inbox(10)
    return await probing.inbox(10)


async def test_only_nodes_that_probe_are_called_when_files_are_due(url: str) -> None:
    async def called(store: PostgresStore) -> set[str]:
        async with store.node._session.use() as connection:
            return {channel for (channel,) in await connection.fetch("SELECT pg_listening_channels()")}

    async with opened(url, roles=["callbacks"]) as taking, opened(url, roles=["probes"]) as probing:
        assert await called(taking) == {INBOX}
        assert await called(probing) == {INBOX, WORK}


@pytest.mark.usefixtures("quick")
async def test_a_node_stopped_in_a_transaction_delays_others_no_longer_than_its_lease(
    url: str, one: PostgresStore
) -> None:
    await take_in(one, finished())
    file = await claim_one(one)
    async with opened(url, lease=1.0) as stopped, stopped._acks.use() as connection:
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
            async with connection.transaction():
                await connection.execute("SELECT FROM batch FOR UPDATE")
                (verdict,) = await one.record([found(file)], NOW)
    assert verdict.available == 1


async def test_what_a_node_had_in_flight_when_it_lost_its_claims_is_dropped_though_it_has_the_file_again(
    url: str, one: PostgresStore
) -> None:
    await take_in(one, finished())
    stale = await claim_one(one)
    await expire(url, one)
    await take_in(one, finished(url=f"https://{HOST}/elsewhere"))
    assert await claim(one) == []
    (fresh,) = await eventually(lambda: claim(one))
    assert await one.record([missing(stale)], NOW) == []
    assert await fetch(url, "SELECT state, attempts FROM file") == [("pending", 0)]
    (verdict,) = await one.record([found(fresh)], NOW)
    assert verdict.available == 1


def test_a_secret_that_the_driver_tells_of_is_not_passed_on() -> None:
    url = "postgresql://u:hunt%40er2@h/d?password=hunter3&sslpassword=hunter4"
    error = ValueError("hunt%40er2 and hunt@er2, hunter3 and hunter4")
    assert "(*** and ***, *** and ***)" in str(postgres_session._refusal(url, error))


async def test_sort_columns_sort_byte_by_byte_in_any_locale(url: str) -> None:
    keys = ["api_code", "batch_id", "host", "key", "oss_object_name", "reason", "state", "verdict"]
    rows = await fetch(
        url,
        "SELECT DISTINCT table_name, column_name FROM information_schema.columns WHERE table_schema = current_schema()"
        " AND table_name IN ('batch', 'file', 'nonce') AND column_name = ANY($1)"
        " AND collation_name IS DISTINCT FROM 'C'",
        keys,
    )
    assert rows == []
