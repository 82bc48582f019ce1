"""What `doctor` looks at when the record is on PostgreSQL. It changes nothing there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

from notify_server.cli.doctor.checks import (
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
from notify_server.store.postgres.schema import OLDEST_SERVER, copied_from, schema_version
from notify_server.store.postgres.session import (
    Connection,
    close,
    connect,
    refuse_on_error,
    translate_errors,
)
from notify_server.store.sql import load_migrations, load_queries, unfinished

# What one server has open at most.
CONNECTIONS = postgres.CONNECTIONS + postgres_records.CONNECTIONS

_ABOUT = """
SELECT
    current_setting('server_version'),
    pg_is_in_recovery(),
    current_setting('server_encoding'),
    current_schema(),
    current_setting('fsync')::boolean,
    current_setting('full_page_writes')::boolean
"""
# Superusers have some to themselves; a database and a role may have a limit of their own, -1 is none.
_CONNECTIONS = """
SELECT least(
    current_setting('max_connections')::int
        - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true)::int, 0),
    (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database()),
    (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user)
)
"""


def look(subject: Subject) -> Iterator[Finding]:
    """What there is to find."""
    url = subject.config.store.url
    try:
        yield from asyncio.run(refuse_on_error(url, _look(url, subject.config.verify.backlog_limit)))
    except StoreRefusedError as error:
        text, _, mend = str(error).rpartition(": ")
        yield problem("database", text, mend)


async def _look(url: str, backlog_limit: int) -> list[Finding]:
    place = without_secrets(url)
    began = time.monotonic()
    with translate_errors(place):
        async with asyncio.timeout(ASK_SECONDS):
            connection = await connect(url)
        try:
            about = await connection.fetchrow(_ABOUT)
            assert about is not None
            milliseconds = (time.monotonic() - began) * 1000
            return [
                *_server(place, connection.get_server_version().major, milliseconds, *about),
                *await _record(connection, place, backlog_limit),
            ]
        finally:
            await close(connection)


def _server(
    place: str,
    major: int,
    milliseconds: float,
    version: str,
    standby: bool,
    encoding: str,
    schema: str | None,
    fsync: bool,
    pages: bool,
) -> Iterator[Finding]:
    if major < OLDEST_SERVER:
        yield problem("database", f"{place}: is PostgreSQL {version}", f"{OLDEST_SERVER} or newer is needed")
    elif standby:
        yield problem("database", f"{place}: is a standby", "name the primary in [store] url")
    elif schema is None:
        yield problem("database", f"{place}: has no schema to be used", "create the one that search_path names")
    else:
        yield ok("database", f"{place}: PostgreSQL {version}, connected in {milliseconds:.0f} ms, schema {schema}")
    if encoding == "UTF8":
        yield ok("encoding", encoding)
    else:
        yield problem("encoding", f"{encoding}: not every text can be kept", "create the database with ENCODING 'UTF8'")
    off = [name for name, on in (("fsync", fsync), ("full_page_writes", pages)) if not on]
    if off:
        text = f"{' and '.join(off)} off: what is acked may be lost in a power cut"
        yield problem("durability", text, "set fsync and full_page_writes to on")
    else:
        yield ok("durability", "fsync and full_page_writes are on")


async def _record(connection: Connection, place: str, backlog_limit: int) -> list[Finding]:
    sql, known = load_queries("postgres"), len(load_migrations("postgres"))
    version = await schema_version(connection)
    found: list[Finding] = []
    servers: Sequence[tuple[str, int]] = []
    if not version:
        found.append(ok("schema", "there is none yet, the daemon makes it"))
    elif (source := await copied_from(connection)) is not None:
        text, _, mend = str(unfinished(place, source)).rpartition(": ")
        found.append(problem("schema", text, mend))
    else:
        found.append(schema_finding(version, known))
    if version:
        servers = [(name, seconds) for name, seconds in await connection.fetch(sql["nodes_named"])]
    names = ", ".join(f"{name} (for {seconds} s, if it is heard of no more)" for name, seconds in servers)
    found.append(ok("servers", names or "none is alive"))
    limit = int(await connection.fetchval(_CONNECTIONS))
    found.append(_connections(limit, len(servers)))
    if version == known:
        backlog = int(await connection.fetchval(sql["backlog"]))
        found.append(backlog_finding(backlog, backlog_limit))
    return found


def _connections(limit: int, servers: int) -> Finding:
    text = f"{limit:,} may be open, a server has up to {CONNECTIONS}: enough for {limit // CONNECTIONS:,} servers"
    mend = "raise max_connections, or the limit of this database or role"
    if limit < CONNECTIONS:
        return problem("connections", text, mend)
    if limit < CONNECTIONS * servers:
        return warning("connections", f"{text}, {servers:,} are alive", mend)
    return ok("connections", text)
