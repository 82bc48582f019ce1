"""Functions that the commands share. Imports are deferred, so that a command loads only what it uses."""

from __future__ import annotations

import getpass
import os
import re
import sys
from collections.abc import Coroutine, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from notify_server.errors import NotifyServerError

if TYPE_CHECKING:
    import ssl

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from notify_server.config import Config

T = TypeVar("T")

# Set by `notify-server --verbose`.
VERBOSE: ContextVar[bool] = ContextVar("verbose", default=False)

EXIT_FAILED = 1
EXIT_USAGE = 2
# Wide enough for a row to be one line if there is no terminal to fit into.
PIPE_WIDTH = 200


class Column(NamedTuple):
    """A column of a table, and its rank among those that a narrow terminal leaves out: None is always shown."""

    heading: str
    rank: int | None = None
    right: bool = False


class UsageError(NotifyServerError):
    """The options of the command contradict each other or are incomplete; the text says what to do."""


def read_config(path: Path | None) -> Config:
    """Return the configuration, or exit 2 with a line on standard error for every wrong key."""
    from notify_server.config import load_config
    from notify_server.errors import ConfigError

    try:
        return load_config(path)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None


def config_file(path: Path | None) -> Path | None:
    """Return the file that `read_config` reads, None if there is none."""
    if path is not None:
        return path
    here = Path("config.toml")
    return here if here.exists() else None


def output() -> Console:
    """Return the console for tables on standard output."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, soft_wrap=False, highlight=False)


def new_table(**options: Any) -> Table:
    """Return a table without lines, which reads the same on a terminal, in a pipe, and pasted into a message."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", **options)


def print_fitted(columns: Sequence[Column], rows: Sequence[Sequence[Text]], caption: str | None) -> None:
    """Print rows with every cell whole and on one line. Where the terminal is too narrow, leave out columns, those of
    the lowest rank first, but none of rank None.
    """
    from rich.cells import cell_len
    from rich.console import Console

    console = output()
    widths = [
        max(cell_len(text) for text in (column.heading, *(row[index].plain for row in rows)))
        for index, column in enumerate(columns)
    ]
    kept = list(range(len(columns)))
    droppable = sorted((column.rank, index) for index, column in enumerate(columns) if column.rank is not None)
    for _, index in droppable:
        if sum(widths[each] + 2 for each in kept) - 2 <= console.width:
            break
        kept.remove(index)
    table = new_table(caption=caption, caption_justify="left")
    for each in kept:
        table.add_column(columns[each].heading, justify="right" if columns[each].right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[each] for each in kept))
    # A line wider than the terminal is wrapped by it, and copied whole.
    needed = sum(widths[each] + 2 for each in kept)
    Console(width=max(console.width, needed), soft_wrap=True, highlight=False).print(table)


def counted(number: int, noun: str) -> str:
    """Return the number with its noun: 1 file, 2 files."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Escape the characters of an external text that a terminal must not receive."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def trust_only(certificate: Path) -> ssl.SSLContext:
    """Return a context that trusts the server's own certificate alone, whatever its issuer and names.

    Raises NotifyServerError.
    """
    import ssl

    end = "-----END CERTIFICATE-----"
    try:
        # The certificates after the first are its issuers, which must not be trusted.
        first = certificate.read_text("utf-8").partition(end)[0] + end
        context = ssl.create_default_context(cadata=first)
    except (OSError, ValueError) as error:
        raise NotifyServerError(f"[server] ssl_certificate {certificate}: cannot be used ({error})") from error
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


async def until_signal(work: Coroutine[Any, Any, T], stopped_by: list[int]) -> T:
    """Run the coroutine. SIGTERM and SIGINT cancel it, and are appended to `stopped_by`."""
    import asyncio
    import signal

    task = asyncio.ensure_future(work)

    def stop(number: int) -> None:
        stopped_by.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    return await task


def user_name() -> str:
    """Return the user who runs this command, for the log of actions."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
    # A header carries no other characters.
    return re.sub(r"[^!-~]", "?", name)
