"""Examines a record on PostgreSQL for `doctor`, without changing anything there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

from notify_server.cli.doctor.findings import (
    ASK_SECONDS,
    Finding,
    Subject,
    backlog_finding,
    ok,
    problem,
    schema_finding,
    warning,
)
from notify_server.config import without_secrets
from notify_server.errors import StoreRefusedError
from notify_server.store.postgres import records as postgres_records
from notify_server.store.postgres import store as postgres
from notify_server.store.postgres.pooler import check_sessions
from notify_server.store.postgres.schema import OLDEST_SERVER, copied_from, schema_version
from notify_server.store.postgres.session import (
    Connection,
    close,
    connect,
    refuse_on_error,
    translate_errors,
)
from notify_server.store.sql import load_migrations, load_queries, unfinished

# The most connections that one server opens.
CONNECTIONS = postgres.CONNECTIONS + postgres_records.CONNECTIONS

_ABOUT = """
SELECT
    current_setting('server_version'),
    pg_is_in_recovery(),
    current_setting('server_encoding'),
    current_schema(),
    current_setting('fsync')::boolean,
    current_setting('full_page_writes')::boolean,
    current_setting('synchronous_commit'),
    (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit')
"""
# The server reserves some for superusers; a database and a role may have a limit of their own, -1 for none.
_CONNECTIONS = """
SELECT least(
    current_setting('max_connections')::int
        - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true)::int, 0),
    (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database()),
    (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user)
)
"""


class _About(NamedTuple):
    """The columns of _ABOUT; `commit` is the setting in our sessions, `commit_default` that of the role or database."""

    version: str
    standby: bool
    encoding: str
    schema: str | None
    fsync: bool
    pages: bool
    commit: str
    commit_default: str


def check_database(subject: Subject) -> Iterator[Finding]:
    """Yield the findings about the database."""
    url = subject.config.store.url
    try:
        endpoints = {each.name for each in subject.config.forward}
        yield from asyncio.run(refuse_on_error(url, _look(url, subject.config.verify.backlog_limit, endpoints)))
    except StoreRefusedError as error:
        text, _, remedy = str(error).rpartition(": ")
        yield problem("database", text, remedy)


async def _look(url: str, backlog_limit: int, endpoints: Set[str]) -> list[Finding]:
    place = without_secrets(url)
    began = time.monotonic()
    with translate_errors(place):
        async with asyncio.timeout(ASK_SECONDS):
            pooled = await check_sessions(url, place)
            connection = await connect(url)
        try:
            row = await connection.fetchrow(_ABOUT)
            assert row is not None
            about = _About(*row)
            milliseconds = (time.monotonic() - began) * 1000
            return [
                _server(place, connection.get_server_version().major, milliseconds, about),
                ok("pooler", "a connection pooler, in session mode" if pooled else "none, connections are direct"),
                _encoding(about),
                *_durability(about),
                *await _record(connection, place, backlog_limit, endpoints),
            ]
        finally:
            await close(connection)


def _server(place: str, major: int, milliseconds: float, about: _About) -> Finding:
    if major < OLDEST_SERVER:
        return problem("database", f"{place}: is PostgreSQL {about.version}", f"{OLDEST_SERVER} or newer is needed")
    if about.standby:
        return problem("database", f"{place}: is a standby", "name the primary in [store] url")
    if about.schema is None:
        return problem("database", f"{place}: has no schema to be used", "create the one that search_path names")
    return ok(
        "database", f"{place}: PostgreSQL {about.version}, connected in {milliseconds:.0f} ms, schema {about.schema}"
    )


def _encoding(about: _About) -> Finding:
    if about.encoding == "UTF8":
        return ok("encoding", about.encoding)
    return problem("encoding", f"{about.encoding}: cannot hold every text", "create the database with ENCODING 'UTF8'")


def _durability(about: _About) -> Iterator[Finding]:
    off = [name for name, on in (("fsync", about.fsync), ("full_page_writes", about.pages)) if not on]
    if off:
        text = f"{' and '.join(off)} off: a power cut may lose or damage acked notifications"
        yield problem("durability", text, "set fsync and full_page_writes to on")
    if about.commit != "on":
        text = f"synchronous_commit stays {about.commit}: a crash of PostgreSQL may lose acked notifications"
        yield problem("durability", text, "allow this user to set synchronous_commit")
    elif not off and about.commit_default != "on":
        yield ok(
            "durability",
            f"fsync and full_page_writes are on; synchronous_commit is {about.commit_default} by default, "
            "the server sets it to on for its own sessions",
        )
    elif not off:
        yield ok("durability", "fsync, full_page_writes and synchronous_commit are on")


async def _record(connection: Connection, place: str, backlog_limit: int, endpoints: Set[str]) -> list[Finding]:
    sql, known = load_queries("postgres"), len(load_migrations("postgres"))
    version = await schema_version(connection)
    found: list[Finding] = []
    servers: Sequence[tuple[str, int]] = []
    if not version:
        found.append(ok("schema", "there is none yet; the server creates it"))
    elif (source := await copied_from(connection)) is not None:
        text, _, remedy = str(unfinished(place, source)).rpartition(": ")
        found.append(problem("schema", text, remedy))
    else:
        found.append(schema_finding(version, known))
    if version:
        servers = [(name, seconds) for name, seconds in await connection.fetch(sql["nodes_named"])]
    names = ", ".join(f"{name} (lease ends in {seconds} s unless renewed)" for name, seconds in servers)
    found.append(ok("servers", names or "none is alive"))
    limit = int(await connection.fetchval(_CONNECTIONS))
    found.append(_connections(limit, len(servers)))
    if version == known:
        backlog = int(await connection.fetchval(sql["backlog"]))
        found.append(backlog_finding(backlog, backlog_limit))
        present = {name for (name,) in await connection.fetch("SELECT name FROM endpoint")}
        if servers and endpoints and present != endpoints:
            found.append(_different_endpoints(present, endpoints))
    return found


def _different_endpoints(present: Set[str], configured: Set[str]) -> Finding:
    parts = [
        f"{place} {', '.join(sorted(names))}"
        for place, names in (("only here:", configured - present), ("only on other servers:", present - configured))
        if names
    ]
    return warning(
        "endpoints",
        f"the servers of this database have different [[forward]] tables ({'; '.join(parts)})",
        "after a rolling restart this ends by itself in ten minutes; otherwise give all of them the same",
    )


def _connections(limit: int, servers: int) -> Finding:
    text = f"{limit:,} may be open, a server has up to {CONNECTIONS}: enough for {limit // CONNECTIONS:,} servers"
    remedy = "raise max_connections, or the limit of this database or role"
    if limit < CONNECTIONS:
        return problem("connections", text, remedy)
    if limit < CONNECTIONS * servers:
        return warning("connections", f"{text}, {servers:,} are alive", remedy)
    return ok("connections", text)
