"""The command `status`: live figures, hosts and totals."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from notify_server.cli.common import new_table, output, printable
from notify_server.cli.source import Source, SourceError
from notify_server.model import CircuitState, FileState
from notify_server.store.reading.types import Totals

if TYPE_CHECKING:
    from notify_server.telemetry.history import Sample
    from notify_server.web.api.types import Host, Status
from notify_server.cli.listing import local, print_json

MAX_HOSTS_SHOWN = 15


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


async def status(source: Source, *, once: bool, as_json: bool) -> int:
    """Show totals and the current activity of a running daemon; on a terminal again every second until stopped."""
    if as_json:
        look = await _look(source)
        if look.problem:
            print(look.problem, file=sys.stderr)
        print_json({"totals": look.totals, "status": look.status, "hosts": look.hosts})
        return 0
    console = output()
    if once or not console.is_terminal:
        console.print(_screen(source, await _look(source)))
        return 0
    with Live(console=console, screen=True, auto_refresh=False) as screen:
        while True:
            began = time.monotonic()
            screen.update(_screen(source, await _look(source)), refresh=True)
            await asyncio.sleep(max(0.1, 1.0 - (time.monotonic() - began)))


class Look(NamedTuple):
    """The totals, and the daemon's activity if one runs and can be called."""

    totals: Totals
    status: Status | None = None
    hosts: list[Host] | None = None
    problem: str = ""


async def _look(source: Source) -> Look:
    totals = await source.records.totals()
    if source.daemon is None:
        return Look(totals)
    try:
        return Look(totals, await source.daemon.status(), (await source.daemon.hosts()).items)
    except SourceError as error:
        return Look(totals, problem=str(error))


def _screen(source: Source, look: Look) -> RenderableType:
    totals = look.totals
    parts: list[RenderableType] = [Text(source.name, "bold")]
    if look.status is not None:
        parts += [_now(look.status.last), _hosts_table(look.hosts or ())]
        nodes = look.status.nodes
        if nodes.callbacks != 1 or nodes.probes != 1:
            here = " and ".join(look.status.roles)
            parts.append(Text(f"servers: {nodes.callbacks} take callbacks, {nodes.probes} probe; this one: {here}"))
    counts = new_table(title="totals", title_justify="left")
    counts.add_column("")
    for heading in ("all", "pending", "complete", "incomplete"):
        counts.add_column(heading, justify="right")
    numbers = (totals.batches, totals.batches_pending, totals.batches_complete, totals.batches_incomplete)
    counts.add_row("batches", *(f"{number:,}" for number in numbers))
    files = new_table()
    for heading in ("files", *FileState):
        files.add_column(heading, justify="right")
    files.add_row(f"{totals.files:,}", *(f"{getattr(totals, state.value):,}" for state in FileState))
    parts += [counts, files]
    if look.problem:
        parts.append(Text(f"current activity is unknown: {printable(look.problem)}", "yellow"))
    if totals.oldest_pending_at is not None:
        parts.append(Text(f"oldest unfinished batch: received {local(totals.oldest_pending_at)}"))
    if totals.rejections:
        parts.append(Text(f"{totals.rejections:,} rejected notifications are kept: `notify-server rejections`"))
    return Group(*parts)


def _now(sample: Sample | None) -> Table:
    table = new_table(title="the last second", title_justify="left")
    for heading in (
        "acks/s",
        "ack p99 ms",
        "rejected/s",
        "checks/s",
        "failed/s",
        "check p99 ms",
        "waiting",
        "in flight",
    ):
        table.add_column(heading, justify="right")
    if sample is not None:
        values = (
            sample.accepted, sample.ack_p99_ms, sample.refused, sample.requests, sample.failed_requests,
            sample.probe_p99_ms, sample.backlog, sample.in_flight,
        )  # fmt: skip
        table.add_row(*(_number(value) for value in values))
    return table


def _hosts_table(hosts: Sequence[Host]) -> Table:
    more = len(hosts) - MAX_HOSTS_SHOWN
    table = new_table(
        title="hosts", title_justify="left", caption=f"and {more:,} more" if more > 0 else None, caption_justify="left"
    )
    table.add_column("host", overflow="fold")
    for heading in ("pending", "in flight", "circuit", "attempts (1 min)", "failed", "avg. ms"):
        table.add_column(heading, justify="left" if heading == "circuit" else "right", no_wrap=True)
    for host in hosts[:MAX_HOSTS_SHOWN]:
        closed = host.circuit is CircuitState.CLOSED
        table.add_row(
            Text(printable(host.host)),
            f"{host.pending:,}",
            f"{host.in_flight}" + (f" of {host.limit}" if host.limit is not None else ""),
            Text(
                host.circuit.replace("_", " ") + (f" for {host.open_for:.0f} s" if host.open_for else ""),
                "" if closed else "red",
            ),
            f"{host.last_minute.attempts:,}",
            f"{host.last_minute.failed:,}",
            _number(host.last_minute.mean_ms),
        )
    return table
