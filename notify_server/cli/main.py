"""The command line: the program, its commands, and the handling of wrong ones."""

from __future__ import annotations

import io
import os
import re
import sys
from difflib import get_close_matches
from importlib.metadata import version
from typing import Annotated, Any

import typer

from notify_server.cli.commands import configuration, forward, installation, record, simulation, submissions
from notify_server.cli.common import EXIT_USAGE, VERBOSE
from notify_server.cli.options import ClickUsageError, ConfigOption

# The words of typer for a number that is none, or out of bounds.
PLAIN_NUMBERS = {
    "Input should be a valid integer, unable to parse string as an integer": "must be a whole number",
    "Input should be a valid number, unable to parse string as a number": "must be a number",
    "Input should be greater than or equal to": "must be at least",
    "Input should be less than or equal to": "must be at most",
}

app = typer.Typer(
    name="notify-server",
    help="The callback endpoint for the platform's asynchronous batch file notifications (异步批处理文件通知).",
    no_args_is_help=False,
    add_completion=True,
    pretty_exceptions_enable=False,
    # Rich would read [brackets] in a help text as markup.
    rich_markup_mode=None,
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
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show which record a command uses.")] = False,
) -> None:
    """Without a command, serve."""
    VERBOSE.set(verbose)
    context.obj = config
    if context.invoked_subcommand is None:
        serve(config)


@app.command()
def serve(config: ConfigOption = None) -> None:
    """Run the server: take callbacks, check files, serve the dashboard. Stops on SIGTERM or Ctrl-C."""
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
    help="List, test, replay, stop and start the endpoints of [[forward]], through the server.",
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
    text = " ".join(str(error.format_message()).split()).replace("Value error, ", "")
    for wording, plain in PLAIN_NUMBERS.items():
        text = text.replace(wording, plain)
    if (choice := re.search(r"'([^']*)' is not one of (.*)\.$", text)) is None:
        return text
    meant = get_close_matches(choice[1], re.findall(r"'([^']*)'", choice[2]), 1)
    return f"{text} Did you mean {meant[0]}?" if meant else text
