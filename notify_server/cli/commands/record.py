"""The commands that read the record, or change it: from where it is stored, or over a daemon's API (`--url`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from notify_server.cli.options import (
    ApiCodeOption,
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

app = typer.Typer()
ExportFormat = Literal["csv", "ndjson"]


@app.command()
def status(
    config: ConfigOption = None,
    url: UrlOption = None,
    once: Annotated[bool, typer.Option("--once", help="Show it once, also on a terminal.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show current activity and totals; on a terminal every second until Ctrl-C (exit status 130)."""
    from notify_server.cli import session
    from notify_server.cli import status as status_command

    session.run(config, url, lambda _, source: status_command.status(source, once=once, as_json=as_json))


@app.command()
def batches(
    config: ConfigOption = None,
    url: UrlOption = None,
    verdict: Annotated[Verdict | None, typer.Option(help="Only batches with this verdict.")] = None,
    api_code: ApiCodeOption = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help='Only those received since: RFC 3339, a date, or "2h" ago.')
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Only those received before.")] = None,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
) -> None:
    """List batches, the latest first."""
    from notify_server.cli import listing, session

    session.run(
        config,
        url,
        lambda _, source: listing.batches(source, verdict, api_code, since, until, limit, as_json=as_json),
    )


@app.command()
def show(
    batch_id: Annotated[str, typer.Argument(metavar="BATCH", help="The batch_id.", show_default=False)],
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
        lambda _, source: listing.show(source, batch_id, api_code, state, limit, every=every, as_json=as_json),
    )


@app.command()
def rejections(
    config: ConfigOption = None,
    url: UrlOption = None,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
) -> None:
    """List refused bodies that were kept, the latest first."""
    from notify_server.cli import listing, session

    session.run(config, url, lambda _, source: listing.rejections(source, limit, as_json=as_json))


@app.command()
def export(
    config: ConfigOption = None,
    url: UrlOption = None,
    form: Annotated[ExportFormat, typer.Option("--format", help="CSV is safe to open in a spreadsheet.")] = "csv",
    batch_id: Annotated[str | None, typer.Option("--batch", metavar="BATCH", help="Only this batch.")] = None,
    api_code: ApiCodeOption = None,
    state: StateOption = None,
    reason: ReasonOption = None,
    host: HostOption = None,
    target: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="The file to write. Default: standard output.")
    ] = None,
) -> None:
    """Write files with all their columns, as a stream."""
    from notify_server.cli import listing, session

    session.run(
        config,
        url,
        lambda _, source: listing.export(source, batch_id, api_code, state, reason, host, form, target),
    )


@app.command()
def bundle(
    batch_id: Annotated[str, typer.Argument(metavar="BATCH", help="The batch_id.", show_default=False)],
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
        lambda _, source: bundle_command.bundle(source, batch_id, api_code, target, with_secrets=with_secrets),
    )


@app.command()
def recheck(
    config: ConfigOption = None,
    url: UrlOption = None,
    file: Annotated[int | None, typer.Option(min=1, metavar="ID", help="This file, by its id.")] = None,
    batch_id: Annotated[str | None, typer.Option("--batch", metavar="BATCH", help="Files of this batch.")] = None,
    api_code: ApiCodeOption = None,
    reason: ReasonOption = None,
    host: HostOption = None,
    states: Annotated[
        list[FileState] | None,
        typer.Option("--state", help="Only files in these states. Default: all that are not available."),
    ] = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check files again at once: one, those of a batch, or those that fail for a reason. Confirms the number first."""
    from notify_server.cli import acting, session

    chosen = acting.RecheckSelection(file, batch_id, api_code, reason, host, states, dry_run)
    session.run(
        config,
        url,
        lambda config, source: acting.recheck(config, source, chosen, yes=yes, as_json=as_json),
    )


@app.command()
def replay(
    ids: Annotated[list[int], typer.Argument(metavar="ID...", min=1, help="Rejections, by id.", show_default=False)],
    config: ConfigOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accept refused bodies, after the limits or this program have changed."""
    from notify_server.cli import acting, session

    session.run(config, url, lambda config, source: acting.replay(config, source, ids, as_json=as_json))


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
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Delete data older than the retention, as a daemon does by itself. Confirms the numbers first."""
    from notify_server.cli import acting, session

    session.run(
        config,
        url,
        lambda config, source: acting.prune(config, source, completed, refused, yes=yes, as_json=as_json),
    )
