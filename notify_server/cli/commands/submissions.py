"""The commands about submissions that a notification is expected for."""

from __future__ import annotations

from typing import Annotated

import typer

from notify_server.cli.options import ApiCodeOption, Commands, ConfigOption, UrlOption

app = Commands()
FileOption = Annotated[
    str,
    typer.Option(
        "--file",
        "-f",
        metavar="PATH",
        help="The submissions: CSV (with a header, or columns batch_id, api_code, files, reference) or NDJSON; - is "
        "standard input.",
    ),
]
WITHIN = 'A duration like "30m", for lines without one.'


@app.command()
def expect(
    file: FileOption,
    config: ConfigOption = None,
    url: UrlOption = None,
    api_code: ApiCodeOption = None,
    notify_within: Annotated[str | None, typer.Option(metavar="TIME", help=WITHIN)] = None,
    verdict_within: Annotated[str | None, typer.Option(metavar="TIME", help=WITHIN)] = None,
) -> None:
    """Register submissions: those that are not notified in time, or list too few files, raise an event."""
    from notify_server.cli import session, submissions

    session.run(
        config,
        url,
        lambda config, source: submissions.expect(source, file, api_code, notify_within, verdict_within),
    )


@app.command()
def reconcile(
    file: FileOption,
    config: ConfigOption = None,
    url: UrlOption = None,
    api_code: ApiCodeOption = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help='Only batches received since: RFC 3339, a date, or "2h" ago.')
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV of every submission instead of a table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for every submission.")] = False,
) -> None:
    """Compare submissions with what was notified (对账). Exits 1 when one was not notified, is short or incomplete."""
    from notify_server.cli import session, submissions

    shape: submissions.Format = "json" if as_json else "csv" if as_csv else "table"
    session.run(config, url, lambda config, source: submissions.reconcile(source, file, api_code, since, shape))
