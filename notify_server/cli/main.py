"""The command line: the program, its commands, and the handling of wrong ones."""

from __future__ import annotations

import io
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from notify_server.cli.commands import configuration, forward, installation, record, simulation, submissions
from notify_server.cli.common import EXIT_USAGE
from notify_server.cli.options import ClickUsageError, ConfigOption

app = typer.Typer(
    name="notify-server",
    help="The callback endpoint for the platform's asynchronous batch file notifications (异步批处理文件通知).",
    no_args_is_help=False,
    add_completion=True,
    pretty_exceptions_enable=False,
)


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
        serve(config)


@app.command()
def serve(config: ConfigOption = None) -> None:
    """Accept notifications, verify their files, keep the record. Stops on SIGTERM or Ctrl-C."""
    from notify_server.cli.serve import run

    run(config)


app.add_typer(simulation.app)
app.add_typer(installation.app)
app.add_typer(record.app)
app.add_typer(submissions.app)
app.add_typer(configuration.app, name="config", help="Check, show or write the configuration.", no_args_is_help=True)
app.add_typer(
    forward.endpoints,
    name="forward",
    help="Look at forwarding endpoints and act on them, through the daemon.",
    no_args_is_help=True,
)
app.add_typer(forward.app)


def main() -> None:
    """Run `notify-server` and `python -m notify_server`."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An address may contain characters that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(prog_name="notify-server", standalone_mode=False)
    except ClickUsageError as error:
        if problem := _usage_problem(error):
            print(problem, file=sys.stderr)
        code = EXIT_USAGE
    except typer.Abort:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)


def _open_closed_streams() -> None:
    """Open /dev/null in place of a closed standard stream. The next file or socket would take its number otherwise, and
    receive the output.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Takes the lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)
    # Python sets these to None for a closed stream.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115


def _usage_problem(error: Any) -> str:
    """Return one line about a wrong command line."""
    near = getattr(error, "possibilities", None)
    if near:
        return f"{error.message}. Did you mean {near[0]}?"
    return " ".join(str(error.format_message()).split())
