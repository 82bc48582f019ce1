"""The options that several commands take."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from notify_server.model import FileState

Command = TypeVar("Command", bound=Callable[..., Any])

# typer vendors click; a wrong command line raises an exception of this class.
ClickUsageError: Any = typer.BadParameter.__base__


class PlainCommand(TyperCommand):
    """A command with help in everyday notation: BATCH and "at least 1", not {BATCH} <str> and "x>=1"."""

    def get_help(self, ctx: Any) -> str:
        text = re.sub(r"[{]([A-Z.]+)[}]", r"\1", super().get_help(ctx))
        text = re.sub(r"^(  [A-Z.]+) <[^>]*>", r"\1", text, flags=re.MULTILINE)
        text = re.sub(r"([0-9.]+)<=x<=([0-9.]+)", lambda found: f"{_plain(found[1])} to {_plain(found[2])}", text)
        return re.sub(r"x>=([0-9.]+)", lambda found: f"at least {_plain(found[1])}", text)


def _plain(number: str) -> str:
    return f"{float(number):g}"


class Commands(typer.Typer):
    """A group of commands with plain help: rich would read [brackets] as markup, and give flags a type."""

    def __init__(self) -> None:
        super().__init__(rich_markup_mode=None)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Command], Command]:
        return super().command(name, cls=PlainCommand, **options)


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


BATCH = "its batch_id, the unique beginning of one, or its row id"


def _known_types(value: str) -> str:
    """Refuse a type that no event has, with the nearest one."""
    # Loaded only when used, because it takes time to load.
    from notify_server.events.payload import EventType, matching_types

    for name in (part.strip() for part in value.split(",")):
        if not matching_types([name]):
            near = get_close_matches(name, EventType, 1)
            remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(EventType)}, and batch.*"
            raise typer.BadParameter(f"{name} is not a type of event, {remedy}")
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
        "--url", metavar="URL", help="A server's address, like http://10.0.0.7:8080. Default: the database itself."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of text; lists as one object a line.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and change nothing.")]
LimitOption = Annotated[int, typer.Option(min=1, metavar="N", help="Show at most N.")]
StateOption = Annotated[
    FileState | None,
    typer.Option("--state", metavar="STATE", help=f"Only files in this state: {', '.join(FileState)}."),
]
BatchOption = Annotated[str | None, typer.Option("--batch", metavar="BATCH", help=f"Only this batch: {BATCH}.")]
BatchArgument = Annotated[str, typer.Argument(metavar="BATCH", help=f"{BATCH}.".capitalize(), show_default=False)]
ReasonOption = Annotated[
    str | None,
    typer.Option(metavar="REASON", callback=_known_reason, help="Only files that fail for this reason."),
]
HostOption = Annotated[str | None, typer.Option("--host", metavar="NAME", help="Only files of this host.")]
ApiCodeOption = Annotated[str | None, typer.Option(metavar="CODE", help="Only this api_code.")]
TypesOption = Annotated[
    str, typer.Option(metavar="TYPES", callback=_known_types, help='Types, such as "batch.*,endpoint.failing".')
]
