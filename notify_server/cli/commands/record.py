"""The commands that read the record, or change it: from where it is stored, or over a daemon's API (`--url`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from notify_server.cli.options import (
    ApiCodeOption,
    BatchArgument,
    BatchOption,
    Commands,
    ConfigOption,
    DryRunOption,
    HostOption,
    JsonOption,
    LimitOption,
    ReasonOption,
    StateOption,
    UrlOption,
    YesOption,
)
from notify_server.model import FileState, Verdict

app = Commands()
ExportFormat = Literal["csv", "ndjson"]


@app.command()
def status(
    config: ConfigOption = None,
    url: UrlOption = None,
    once: Annotated[bool, typer.Option("--once", help="Show it once, also on a terminal.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show live status, refreshed every second (Ctrl-C stops, exit status 130), and totals."""
    from notify_server.cli import session
    from notify_server.cli import status as status_command

    session.run(config, url, lambda _, source: status_command.status(source, once=once, as_json=as_json))


@app.command()
def batches(
    config: ConfigOption = None,
    url: UrlOption = None,
    verdict: Annotated[
        Verdict | None, typer.Option(metavar="VERDICT", help=f"Only batches with this verdict: {', '.join(Verdict)}.")
    ] = None,
    api_code: ApiCodeOption = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help='Only those received since: RFC 3339, a date, or "2h" ago.')
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Only those received before.")] = None,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
) -> None:
    """List batches, newest first."""
    from notify_server.cli import listing, session

    session.run(
        config,
        url,
        lambda _, source: listing.batches(source, verdict, api_code, since, until, limit, as_json=as_json),
    )


@app.command()
def show(
    batch: BatchArgument,
    config: ConfigOption = None,
    url: UrlOption = None,
    api_code: ApiCodeOption = None,
    state: StateOption = None,
    every: Annotated[bool, typer.Option("--all", help="Available files, too.")] = False,
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """Show a batch, and which of its files are missing and why. Exits 1 when its verdict is incomplete."""
    from notify_server.cli import listing, session

    session.run(
        config,
        url,
        lambda _, source: listing.show(source, batch, api_code, state, limit, every=every, as_json=as_json),
    )


@app.command()
def rejections(
    config: ConfigOption = None,
    url: UrlOption = None,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
) -> None:
    """List rejected notifications, newest first."""
    from notify_server.cli import listing, session

    session.run(config, url, lambda _, source: listing.rejections(source, limit, as_json=as_json))


@app.command()
def export(
    config: ConfigOption = None,
    url: UrlOption = None,
    form: Annotated[
        ExportFormat, typer.Option("--format", metavar="FORMAT", help="csv, safe to open in a spreadsheet, or ndjson.")
    ] = "csv",
    batch: BatchOption = None,
    api_code: ApiCodeOption = None,
    state: StateOption = None,
    reason: ReasonOption = None,
    host: HostOption = None,
    target: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="The file to write. Default: standard output.")
    ] = None,
) -> None:
    """Export files as CSV or NDJSON."""
    from notify_server.cli import listing, session

    session.run(
        config,
        url,
        lambda _, source: listing.export(source, batch, api_code, state, reason, host, form, target),
    )


@app.command()
def bundle(
    batch: BatchArgument,
    target: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="The ZIP file to write.")],
    config: ConfigOption = None,
    url: UrlOption = None,
    api_code: ApiCodeOption = None,
    with_secrets: Annotated[
        bool, typer.Option("--with-secrets", help="Keep the queries of URLs, which may hold signatures.")
    ] = False,
) -> None:
    """Write the evidence of a batch as a ZIP: notifications as received, results, requests, checksums."""
    from notify_server.cli import bundle as bundle_command
    from notify_server.cli import session

    session.run(
        config,
        url,
        lambda _, source: bundle_command.bundle(source, batch, api_code, target, with_secrets=with_secrets),
    )


@app.command()
def recheck(
    config: ConfigOption = None,
    url: UrlOption = None,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="One file: its row id, its oss_object_name, or with --batch a beginning of that."
        ),
    ] = None,
    batch: BatchOption = None,
    api_code: ApiCodeOption = None,
    reason: ReasonOption = None,
    host: HostOption = None,
    states: Annotated[
        list[FileState] | None,
        typer.Option(
            "--state",
            metavar="STATE",
            help="Only files in this state; may be repeated. Default: pending, unavailable and blocked.",
        ),
    ] = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Recheck files now: one file, a batch, or all that fail for a reason. Shows the count and asks first."""
    from notify_server.cli import acting, session

    chosen = acting.RecheckSelection(file, batch, api_code, reason, host, states, dry_run)
    session.run(
        config,
        url,
        lambda config, source: acting.recheck(config, source, chosen, yes=yes, as_json=as_json),
    )


@app.command()
def replay(
    ids: Annotated[list[int], typer.Argument(metavar="ID", min=1, help="Rejections, by id.", show_default=False)],
    config: ConfigOption = None,
    url: UrlOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Process rejected notifications again, after the limits or this program have changed."""
    from notify_server.cli import acting, session

    session.run(
        config, url, lambda config, source: acting.replay(config, source, ids, dry_run=dry_run, as_json=as_json)
    )


@app.command()
def prune(
    config: ConfigOption = None,
    url: UrlOption = None,
    completed: Annotated[
        str | None, typer.Option(metavar="TIME", help='Batches completed before: RFC 3339, a date, or "90d" ago.')
    ] = None,
    refused: Annotated[
        str | None, typer.Option("--rejections", metavar="TIME", help="Rejections received before.")
    ] = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Delete data older than [retention], as the server does by itself. Shows the counts and asks first."""
    from notify_server.cli import acting, session

    session.run(
        config,
        url,
        lambda config, source: acting.prune(
            config, source, completed, refused, dry_run=dry_run, yes=yes, as_json=as_json
        ),
    )
