"""The commands and their options."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="notify-server",
    help="The callback endpoint for the platform's asynchronous batch file notifications (异步批处理文件通知).",
    no_args_is_help=False,
    add_completion=True,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="PATH", help="Configuration file. Default: config.toml here, else built-in defaults."
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("notify-server"))
        raise typer.Exit


@app.callback(invoke_without_command=True)
def default(
    context: typer.Context,
    config: ConfigOption = None,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Without a command, serve."""
    context.obj = config
    if context.invoked_subcommand is None:
        serve(context)


@app.command()
def serve(context: typer.Context, config: ConfigOption = None) -> None:
    """Take notifications, verify their files, keep the record. Stops on SIGTERM or Ctrl-C."""
    from notify_server.cli.serve import run

    run(config or context.obj)


def main() -> None:
    """The entry point of `notify-server` and `python -m notify_server`."""
    app(prog_name="notify-server")
