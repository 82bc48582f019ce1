"""The options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from notify_server.model import FileState

# typer vendors click; a wrong command line raises an exception of this class.
ClickUsageError: Any = typer.BadParameter.__base__


def _or_of_the_program(context: typer.Context, value: Path | None) -> Path | None:
    """Fall back to the option before the command: `notify-server --config PATH status`."""
    return value or context.obj


def _known_reason(value: str | None) -> str | None:
    """Refuse a reason that no file can have, with the nearest one."""
    if value is None:
        return None
    # Loaded only when used, because it takes time to load.
    from notify_server.operations import unknown_reason

    if (wrong := unknown_reason(value)) is not None:
        raise typer.BadParameter(wrong)
    return value


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="PATH",
        callback=_or_of_the_program,
        help="Configuration file. Default: config.toml here, else built-in defaults.",
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url", metavar="URL", help="A daemon's address, like http://10.0.0.7:8080. Default: the record itself."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of text; lists as one object a line.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say how many.")]
LimitOption = Annotated[int, typer.Option(min=1, help="The most to show.")]
StateOption = Annotated[FileState | None, typer.Option("--state", help="Only files in this state.")]
ReasonOption = Annotated[
    str | None,
    typer.Option(metavar="REASON", callback=_known_reason, help="Only files that fail for this reason."),
]
HostOption = Annotated[str | None, typer.Option("--host", metavar="NAME", help="Only files of this host.")]
ApiCodeOption = Annotated[str | None, typer.Option(metavar="CODE", help="Only this api_code.")]
