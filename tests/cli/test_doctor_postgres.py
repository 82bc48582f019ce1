"""`doctor` where the record is on PostgreSQL."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from notify_server.cli.doctor.findings import Level
from notify_server.cli.doctor.postgres import CONNECTIONS
from notify_server.store.postgres.schema import migrate_at
from tests.cli.test_doctor import BEFORE_ALL, configure, examine, run_doctor, snapshot
from tests.support import postgres
from tests.support.daemon import Daemon
from tests.support.origin import SILENCE, Origin
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import PostgresServer, fetch, new_schema
from tests.support.waiting import free_port

OF_POSTGRES = {"database", "pooler", "encoding", "durability", "schema", "servers", "connections"}


@pytest.fixture
async def url() -> str:
    return await new_schema()


@pytest.fixture(scope="module")
def poor() -> Iterator[PostgresServer]:
    """A server that is set up as it should not be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(postgres.SETTINGS, "fsync", "off")
        patch.setitem(postgres.SETTINGS, "max_connections", str(CONNECTIONS + 2))
        with PostgresServer() as server:
            yield server


@pytest.fixture(scope="module")
def local() -> Iterator[PostgresServer]:
    """A server that listens on TCP."""
    with PostgresServer({**postgres.SETTINGS, "listen_addresses": "127.0.0.1", "port": str(free_port())}) as server:
        yield server


async def test_a_sound_database_has_no_problem_and_nothing_is_changed(tmp_path: Path, url: str) -> None:
    configure(tmp_path, store={"url": url})
    (tmp_path / "config.toml").chmod(0o600)
    before = snapshot(tmp_path)
    seen = await run_doctor(tmp_path)
    assert seen.code == 0
    files_only = {"directory", "disk", "daemon", "wal"}
    assert seen.findings.keys() == BEFORE_ALL | OF_POSTGRES | {
        "listen", "secrets", "exposure", "dns", "trust", "descriptors"
    }  # fmt: skip
    assert not files_only & seen.findings.keys()
    assert all(seen.worst(check).level is Level.OK for check in OF_POSTGRES)
    assert "PostgreSQL 1" in seen.worst("database").text and "connected in" in seen.worst("database").text
    assert seen.worst("schema").text == "there is none yet; the server creates it"
    assert snapshot(tmp_path) == before
    assert await fetch(url, "SELECT count(*) FROM pg_class WHERE relnamespace = current_schema()::regnamespace") == [
        (0,)
    ]
    await migrate_at(url)
    seen = await examine(tmp_path)
    assert seen.worst("schema").text.endswith("the latest")
    assert seen.worst("servers").text == "none is alive"
    assert seen.worst("backlog").text.startswith("0 files wait")


async def test_beside_a_server_it_names_it_and_what_waits(tmp_path: Path, url: str) -> None:
    settings = {"server": {"shutdown_grace": "1s"}, "store": {"url": url, "lease": "90s"}}
    async with Daemon(tmp_path, settings) as daemon, Origin() as origin:
        origin.default = SILENCE
        await daemon.deliver("b", [origin.url(f"/{number}") for number in range(7)])
        await origin.reached(7)
        seen = await examine(tmp_path)
        assert f":{daemon.pid} (lease ends in " in seen.worst("servers").text
        assert seen.worst("backlog").text.startswith("7 files wait")
        assert seen.worst("connections").level is Level.OK
        assert "endpoints" not in seen.findings
        configure(tmp_path, store={"url": url}, forward=[{"name": "listings", "command": ["/bin/true"]}])
        different = (await examine(tmp_path)).worst("endpoints")
        assert different.level is Level.WARNING
        assert "different [[forward]] tables (only here: listings)" in different.text


async def test_a_database_server_short_of_connections_is_reported(tmp_path: Path, poor: PostgresServer) -> None:
    async with Daemon(tmp_path, {"store": {"url": poor.url}}) as daemon, Origin() as origin:
        for n in range(20):
            await daemon.deliver(f"b{n}", [origin.url(f"/{n}/{file}") for file in range(10)])
        for n in range(20):
            await daemon.verdict(f"b{n}")
        ((own,),) = await fetch(
            poor.url, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'notify_server'"
        )
        assert 4 < own <= CONNECTIONS


async def test_problems_of_a_database_server_are_reported_with_a_remedy(tmp_path: Path, poor: PostgresServer) -> None:
    configure(tmp_path, store={"url": poor.url})
    seen = await examine(tmp_path)
    assert seen.code == 1
    assert seen.worst("durability").level is Level.PROBLEM and "fsync off" in seen.worst("durability").text
    # Superusers have some to themselves.
    assert seen.worst("connections").level is Level.PROBLEM
    assert seen.worst("connections").text.startswith(f"{CONNECTIONS - 1} may be open, a server has up to {CONNECTIONS}")
    await fetch(
        poor.url, "CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0"
    )
    configure(tmp_path, store={"url": poor.url.replace("/postgres?", "/ascii?")})
    assert (await examine(tmp_path)).worst("encoding").level is Level.PROBLEM
    configure(tmp_path, store={"url": f"{poor.url}&search_path=none"})
    assert (await examine(tmp_path)).worst("database").text.endswith("has no schema to be used")


async def test_a_default_of_asynchronous_commits_is_reported_and_overridden(tmp_path: Path, url: str) -> None:
    """Row 130."""
    server_default = f"{url}&options=-csynchronous_commit%3Doff"
    configure(tmp_path, store={"url": server_default})
    finding = (await examine(tmp_path)).worst("durability")
    assert finding.level is Level.OK
    assert "synchronous_commit is off by default" in finding.text


@pytest.mark.parametrize(("mode", "level"), [("transaction", Level.PROBLEM), ("session", Level.OK)])
async def test_a_pooler_is_named_and_transaction_mode_is_a_problem(
    tmp_path: Path, local: PostgresServer, mode: str, level: Level
) -> None:
    """Row 129."""
    with PgBouncer(local, mode) as pooler:
        configure(tmp_path, store={"url": pooler.url})
        seen = await examine(tmp_path)
    if mode == "transaction":
        assert "transaction mode" in seen.worst("database").text
        assert "pool_mode = session" in (seen.worst("database").remedy or "")
    else:
        assert seen.worst("pooler").text == "a connection pooler, in session mode"
    assert seen.worst("database").level is level


async def test_a_limit_for_fewer_servers_than_there_are_is_warned_of(tmp_path: Path, url: str) -> None:
    await migrate_at(url)
    await fetch(
        url,
        "INSERT INTO node SELECT n, 'host:' || n, clock_timestamp() + interval '1 h', '' FROM generate_series(1, 99) n",
    )
    configure(tmp_path, store={"url": url})
    finding = (await examine(tmp_path)).worst("connections")
    assert (finding.level, finding.text.endswith(" servers, 99 are alive")) == (Level.WARNING, True)


async def test_another_schema_is_reported(tmp_path: Path, url: str) -> None:
    await migrate_at(url)
    configure(tmp_path, store={"url": url})
    for version, level in ((999, Level.PROBLEM), (-1, Level.WARNING)):
        await fetch(url, f"UPDATE schema_version SET version = {version}")
        seen = await examine(tmp_path)
        assert seen.worst("schema").level is level
        assert "backlog" not in seen.findings


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("postgresql://u:geheim@127.0.0.1:1/d", "cannot be reached"),
        ("postgresql://u:geheim@127.0.0.1:{silent}/d", "cannot be reached"),
        ("{none}", 'does not exist (database "none" does not exist)'),
    ],
)
async def test_an_unreachable_database_is_a_problem_and_its_password_is_not_shown(
    tmp_path: Path, url: str, address: str, said: str
) -> None:
    # Whoever connects is not accepted, and waits.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        configure(
            tmp_path, store={"url": address.format(silent=port, none=re.sub("(://[^/]*)/[^?]*", r"\1/none", url))}
        )
        (tmp_path / "config.toml").chmod(0o600)
        seen = await run_doctor(tmp_path)
    finding = seen.worst("database")
    assert (seen.code, finding.level) == (1, Level.PROBLEM)
    assert said in finding.text and "[store] url" in (finding.remedy or "")
    assert not any("geheim" in str(each) for found in seen.findings.values() for each in found)


async def test_a_password_in_a_file_that_everybody_can_read_is_a_problem(tmp_path: Path) -> None:
    for url in ("postgresql://u:geheim@127.0.0.1:1/d", "postgresql://127.0.0.1:1/d?password=geheim"):
        configure(tmp_path, store={"url": url})
        (tmp_path / "config.toml").chmod(0o644)
        assert (await examine(tmp_path)).worst("secrets").level is Level.PROBLEM
        (tmp_path / "config.toml").chmod(0o640)
        assert (await examine(tmp_path)).worst("secrets").level is Level.OK
