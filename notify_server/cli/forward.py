"""The commands about events and forwarding. All of them call the running daemon, the only process that sends."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

from rich.text import Text

from notify_server.cli.acting import confirm
from notify_server.cli.common import EXIT_FAILED, new_table, output, printable
from notify_server.cli.listing import local, moment, print_json
from notify_server.cli.source import Remote, Source, SourceError
from notify_server.forward.service import (
    EventPage,
    ForwardChanged,
    ForwardEndpointItem,
    ForwardReplayed,
    ForwardTested,
)
from notify_server.store.reading.types import Page

FOLLOW_WAIT = "10s"
STYLES = {"ok": "green", "failing": "yellow", "stopped": "red"}


def _daemon(source: Source) -> Remote:
    if source.daemon is None:
        raise SourceError("no server runs on this database: start it, or name it with --url")
    return source.daemon


def _unknown(name: str) -> SourceError:
    return SourceError(f'no endpoint is called "{printable(name)}": `notify-server forward list` lists them')


def _why(item: ForwardEndpointItem) -> str:
    if item.stopped_reason is not None or not item.failures:
        return item.stopped_reason or ""
    return "last attempt failed" if item.failures == 1 else f"{item.failures:,} failures in a row"


async def list_endpoints(source: Source, *, as_json: bool) -> int:
    """List the endpoints with their health. Returns 1 when one is stopped or failing."""
    found = await _daemon(source).ask(Page[ForwardEndpointItem], "GET", "forward")
    items = found.items if found is not None else []
    if as_json:
        for item in items:
            print_json(item)
    else:
        table = new_table()
        for heading in ("name", "kind", "target", "state", "pending", "last success", "why"):
            table.add_column(heading, overflow="fold", justify="right" if heading == "pending" else "left")
        for item in items:
            table.add_row(
                item.name,
                item.kind,
                Text(printable(item.target)),
                Text(item.state, STYLES[item.state]),
                f"{item.pending:,}",
                local(item.last_success_at),
                Text(printable(_why(item))),
            )
        output().print(table if items else "nothing is forwarded: add [[forward]] to the configuration")
    return EXIT_FAILED if any(item.state != "ok" for item in items) else 0


async def test(source: Source, name: str, *, as_json: bool) -> int:
    """Send test.ping to the endpoint and show the answer. Returns 1 when it was not delivered."""
    tested = await _daemon(source).ask(ForwardTested, "POST", f"forward/{name}/test")
    if tested is None:
        raise _unknown(name)
    if as_json:
        print_json(tested)
    elif tested.delivered:
        print(
            f"{name}: delivered in {tested.elapsed_ms:.0f} ms" + (f", status {tested.status}" if tested.status else "")
        )
    else:
        print(f"{name}: not delivered: {printable(tested.error or '')}")
        if tested.response:
            print(printable(tested.response[:500]))
    return 0 if tested.delivered else EXIT_FAILED


async def replay(
    source: Source, name: str, since: str, until: str | None, *, dry_run: bool, yes: bool, as_json: bool
) -> int:
    """Send the events of a period again, after confirming their number."""
    daemon = _daemon(source)
    body = {"since": moment(since).astimezone(UTC), "until": (_moment(until) or datetime.now(UTC)), "dry_run": True}
    counted = await daemon.ask(ForwardReplayed, "POST", f"forward/{name}/replay", body)
    if counted is None:
        raise _unknown(name)
    if not dry_run and counted.deliveries:
        if not await confirm(f"Send {counted.deliveries:,} events to {name} again?", yes=yes):
            print("nothing was sent", file=sys.stderr)
            return EXIT_FAILED
        counted = await daemon.ask(ForwardReplayed, "POST", f"forward/{name}/replay", body | {"dry_run": False})
        assert counted is not None
    if as_json:
        print_json(counted)
    else:
        print(f"{name}: {counted.deliveries:,} events " + ("would be sent again" if dry_run else "are sent again"))
    return 0


def _moment(text: str | None) -> datetime | None:
    return None if text is None else moment(text).astimezone(UTC)


async def change(source: Source, name: str, what: str, *, as_json: bool) -> int:
    """Stop or start the endpoint."""
    changed = await _daemon(source).ask(ForwardChanged, "POST", f"forward/{name}/{what}")
    if changed is None:
        raise _unknown(name)
    if as_json:
        print_json(changed)
    else:
        print(f"{name}: " + ("stopped, its events stay pending" if what == "stop" else "started"))
    return 0


async def events(
    source: Source,
    after: int | None,
    types: str,
    api_code: str | None,
    limit: int,
    *,
    follow: bool,
    as_json: bool,
) -> int:
    """Print events, oldest first; with `follow`, also new ones as they occur."""
    daemon = _daemon(source)
    cursor, left = after or 0, limit
    while left > 0 or follow:
        page = await daemon.ask(
            EventPage,
            "GET",
            "events",
            after=cursor,
            types=types,
            api_code=api_code,
            limit=500 if follow else min(left, 500),
            wait=FOLLOW_WAIT if follow else None,
        )
        assert page is not None
        for item in page.items:
            if as_json:
                print_json(item)
            else:
                print(f"{item.id}  {item.timestamp}  {item.type}  {printable(bytes(item.data).decode())}", flush=True)
        left -= len(page.items)
        if not page.items and not follow:
            break
        cursor = page.next
    return 0
