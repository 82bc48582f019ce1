"""The commands that check addresses and the installation, and that move the record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from notify_server.cli.options import ClickUsageError, Commands, ConfigOption, JsonOption

app = Commands()


@app.command()
def verify(
    urls: Annotated[list[str] | None, typer.Argument(metavar="URL", help="URLs to check.", show_default=False)] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            metavar="PATH",
            help="A list of URLs: text (one a line), CSV, JSON lines, or a notification; - is standard input.",
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check URLs once, by the server's rules, without a server. Exits 1 when any is not available."""
    if not urls and file is None:
        raise ClickUsageError("Name URLs, or a list of them with --file.")
    from notify_server.cli.verify import run

    run(urls or (), file, config, as_json=as_json)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.")] = Path("config.toml"),
) -> None:
    """Ask six questions, test each answer, and write a configuration. Overwrites nothing."""
    from notify_server.cli.setup import run

    run(path)


@app.command()
def doctor(
    config: ConfigOption = None,
    host: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A host whose name must resolve. Default: those in allowed_hosts."),
    ] = None,
    public: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="URL",
            help="Also try the address that the platform posts to, as registered: TLS, proxy, path, token. Sends "
            "test.ping to every [[forward]].",
        ),
    ] = None,
    picture: Annotated[
        str | None, typer.Option(metavar="URL", help="With --from: also check this file, by the server's rules.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check this installation and say how to fix what is wrong. Stores nothing. Exits 1 on a problem."""
    from notify_server.cli.doctor.run import run

    if picture is not None and public is None:
        raise ClickUsageError("--picture: add --from URL, the address that the platform posts to.")
    run(config, host, public, picture, as_json=as_json)


@app.command()
def migrate(config: ConfigOption = None) -> None:
    """Update the schema of the database, which `serve` does by itself. On SQLite no server may be running."""
    from notify_server.cli.migrate import run

    run(config)


@app.command()
def copy(
    config: ConfigOption = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="The database to copy. Default: the configured one.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--to", metavar="URL", help="The target, which must be empty. Default: the configured one."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over instead of continuing an unfinished copy.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a database from SQLite to PostgreSQL or back, and verify the copy. Continues an unfinished copy. No server
    may be running on either. Exits 1 when the copy differs.
    """
    from notify_server.cli.copy import run

    run(config, source, target, restart=restart, as_json=as_json)
