"""The commands and their options."""

from __future__ import annotations

import secrets
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

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


PLANTED = "What is planted"


def _share(text: str) -> Any:
    return typer.Option(min=0.0, max=1.0, metavar="SHARE", rich_help_panel=PLANTED, help=text)


@app.command()
def simulate(
    context: typer.Context,
    config: ConfigOption = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="The callback address. Default: from the configuration.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The daemon's database. Default: from the configuration.")
    ] = None,
    own_daemon: Annotated[
        bool, typer.Option("--own-daemon", help="Start a daemon for this run, in a temporary directory.")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --own-daemon: the directory, instead of a temporary one.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0.0, help="Posts a second; 0 is as fast as they are acked.")] = 0.0,
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for the verdicts after the last ack.")] = 120,
    settle: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Seconds to wait on when only missing files are left; then being retried is right for them.",
        ),
    ] = 10,
    batches: Annotated[int, typer.Option(min=1, help="Batches.", rich_help_panel=PLANTED)] = 20,
    files: Annotated[int, typer.Option(min=1, help="Files in a batch.", rich_help_panel=PLANTED)] = 50,
    seed: Annotated[
        int | None,
        typer.Option(help="Plants the same again. Default: random, and shown.", rich_help_panel=PLANTED),
    ] = None,
    missing: Annotated[float, _share("Share of files that are not there.")] = 0.05,
    slow: Annotated[float, _share("Share of files that answer late.")] = 0.05,
    refuse_head: Annotated[float, _share("Share of files that refuse HEAD.")] = 0.1,
    fail_first: Annotated[float, _share("Share of files that answer 500 or 503 at first.")] = 0.05,
    failed: Annotated[float, _share("Share of files reported as FAILED.")] = 0.05,
    redelivered: Annotated[float, _share("Share of batches that are delivered twice.")] = 0.2,
    slow_seconds: Annotated[
        float, typer.Option(min=0.0, help="How late slow files answer.", rich_help_panel=PLANTED)
    ] = 1,
) -> None:
    """Play the platform and its object store against a daemon, and check its record. Exits 1 when anything differs."""
    from notify_server.cli.simulate import Options, run
    from notify_server.simulator import Kind, Plan

    shares = {
        Kind.MISSING: missing,
        Kind.SLOW: slow,
        Kind.REFUSES_HEAD: refuse_head,
        Kind.FAILS_FIRST: fail_first,
        Kind.FAILED: failed,
    }
    try:
        plan = Plan(
            seed=secrets.randbelow(1_000_000) if seed is None else seed,
            batches=batches,
            files=files,
            shares=shares,
            redelivered=redelivered,
        )
        options = Options(config or context.obj, url, store, own_daemon, keep, rate, slow_seconds, timeout, settle)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    run(plan, options)


def main() -> None:
    """The entry point of `notify-server` and `python -m notify_server`."""
    app(prog_name="notify-server")
