"""PgBouncer between the daemon and PostgreSQL: transaction mode is refused at start, session mode works as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from notify_server.errors import StoreRefusedError
from notify_server.store.postgres.store import PostgresStore
from tests.store.builders import finished as entry
from tests.store.builders import settle, take_in
from tests.support.daemon import Daemon
from tests.support.notification import finished
from tests.support.origin import Origin
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import SETTINGS, PostgresServer, fetch, new_schema
from tests.support.postgres_faults import opened
from tests.support.waiting import free_port


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer({**SETTINGS, "listen_addresses": "127.0.0.1", "port": str(free_port())}) as server:
        yield server


async def through(pooler: PgBouncer, server: PostgresServer) -> str:
    """The address of an empty schema behind the pooler."""
    own = await new_schema(server.url)
    return f"{pooler.url}?search_path={own.rpartition('=')[2]}"


@pytest.mark.parametrize("settings", [{}, {"server_round_robin": "1"}, {"min_pool_size": "5"}], ids=str)
@pytest.mark.parametrize("mode", ["transaction", "statement"])
async def test_a_pooler_in_transaction_mode_is_refused_with_what_to_do_and_nothing_is_left_behind(
    server: PostgresServer, mode: str, settings: dict[str, str]
) -> None:
    with PgBouncer(server, mode, **settings) as pooler:
        url = await through(pooler, server)
        for _ in range(3):
            with pytest.raises(StoreRefusedError, match=r"transaction mode.*: set pool_mode = session") as refused:
                await PostgresStore.open(url)
            assert "\n" not in str(refused.value)
        # The backends that other programs get next have their own settings.
        connection = await asyncpg.connect(pooler.url, statement_cache_size=0)
        assert await connection.fetchval("SHOW enable_seqscan") == "on"
        await connection.close()
    assert await fetch(server.url, "SELECT to_regclass($1 || '.node') IS NULL", url.rpartition("=")[2]) == [(True,)]


async def test_session_mode_works_without_a_setting_of_the_pooler(server: PostgresServer) -> None:
    with PgBouncer(server, "session", default_pool_size="40") as pooler:
        url = await through(pooler, server)
        heard: list[None] = []
        async with opened(url) as one, opened(url, on_work=lambda: heard.append(None)) as other:
            await take_in(one, entry())
            (verdict,) = await settle(other)
            assert verdict.available == 1
            async with one._acks.use() as connection:
                assert await connection.fetchval("SHOW synchronous_commit") == "on"
                assert await connection.fetchval("SHOW enable_seqscan") == "off"


async def test_two_daemons_behind_a_pooler_in_session_mode_share_the_work(
    tmp_path: Path, server: PostgresServer
) -> None:
    with PgBouncer(server, "session", default_pool_size="40") as pooler:
        url = await through(pooler, server)
        config: dict[str, dict[str, Any]] = {"store": {"url": url, "lease": "5s"}}
        async with Origin() as origin, Daemon(tmp_path / "a", config) as one, Daemon(tmp_path / "b", config) as two:
            await one.line("sharing the work", nodes=2)
            assert one.count("connected through a connection pooler in session mode") == 1
            for number, daemon in enumerate((one, two, one, two)):
                await daemon.deliver(f"b{number}", [finished(origin.url(f"/{number}/{n}"), f"{n}") for n in range(20)])

            # The node that does not expand must take over when the other one ends.
            assert await one.terminate() == 0
            await two.line("sharing the work", nodes=1)
            await two.deliver("last", [finished(origin.url("/last"), "last")])
            await two.verdict("last")
            assert await fetch(f"{server.url}?search_path={url.rpartition('=')[2]}", "SELECT count(*) FROM batch") == [
                (5,)
            ]
            assert await two.terminate() == 0


async def test_a_direct_connection_is_not_taken_for_a_pooler(server: PostgresServer, capsys: Any) -> None:
    async with opened(await new_schema(server.url)):
        pass
    assert "pooler" not in capsys.readouterr().out
