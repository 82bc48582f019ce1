"""The commands about events and the endpoints that they are forwarded to."""

from __future__ import annotations

from typing import Annotated

import typer

from notify_server.cli.options import (
    ApiCodeOption,
    Commands,
    ConfigOption,
    DryRunOption,
    JsonOption,
    LimitOption,
    TypesOption,
    UrlOption,
    YesOption,
)

app = Commands()
endpoints = Commands()
EndpointArgument = Annotated[str, typer.Argument(metavar="NAME", help="The endpoint's name.", show_default=False)]


@endpoints.command("list")
def forward_list(config: ConfigOption = None, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """List the endpoints with their health. Exits 1 when one is failing or stopped."""
    from notify_server.cli import forward, session

    session.run(config, url, lambda config, source: forward.list_endpoints(source, as_json=as_json))


@endpoints.command("test")
def forward_test(
    name: EndpointArgument,
    config: ConfigOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send test.ping to an endpoint and show the answer. Exits 1 when it was not delivered."""
    from notify_server.cli import forward, session

    session.run(config, url, lambda config, source: forward.test(source, name, as_json=as_json))


@endpoints.command("replay")
def forward_replay(
    name: EndpointArgument,
    since: Annotated[str, typer.Option(metavar="TIME", help='Events since: RFC 3339, a date, or "2h" ago.')],
    config: ConfigOption = None,
    url: UrlOption = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Events before. Default: now.")] = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send events to an endpoint again. Confirms the number first."""
    from notify_server.cli import forward, session

    session.run(
        config,
        url,
        lambda config, source: forward.replay(source, name, since, until, dry_run=dry_run, yes=yes, as_json=as_json),
    )


@endpoints.command("stop")
def forward_stop(
    name: EndpointArgument,
    config: ConfigOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop an endpoint. Its events stay pending."""
    from notify_server.cli import forward, session

    session.run(config, url, lambda config, source: forward.change(source, name, "stop", as_json=as_json))


@endpoints.command("start")
def forward_start(
    name: EndpointArgument,
    config: ConfigOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start an endpoint. Its pending events are sent."""
    from notify_server.cli import forward, session

    session.run(config, url, lambda config, source: forward.change(source, name, "start", as_json=as_json))


@app.command()
def events(
    config: ConfigOption = None,
    url: UrlOption = None,
    after: Annotated[int | None, typer.Option(min=0, metavar="ID", help="Events after this id.")] = None,
    types: TypesOption = "*",
    api_code: ApiCodeOption = None,
    limit: LimitOption = 100,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new events as they occur, until Ctrl-C.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print events, oldest first."""
    from notify_server.cli import forward, session

    session.run(
        config,
        url,
        lambda config, source: forward.events(source, after, types, api_code, limit, follow=follow, as_json=as_json),
    )
