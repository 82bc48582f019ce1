"""The commands about the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from notify_server.cli.options import Commands, ConfigOption, JsonOption

app = Commands()


@app.command("check")
def config_check(config: ConfigOption = None) -> None:
    """Check the configuration. Exits 2 with a line for each wrong key; else shows which file it was read from."""
    from notify_server.cli.config import check

    check(config)


@app.command("show")
def config_show(
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every key with its value and its origin. Secrets are not shown."""
    from notify_server.cli.config import show

    show(config, as_json=as_json)


@app.command("init")
def config_init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.")] = Path("config.toml"),
) -> None:
    """Write a configuration file with every key, its default and a comment. Overwrites nothing."""
    from notify_server.cli.config import init

    init(path)
