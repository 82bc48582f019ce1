"""The command that plays the platform."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from notify_server.cli.options import ClickUsageError, Commands, ConfigOption

app = Commands()


def _planted(text: str, **limits: Any) -> Any:
    return typer.Option(rich_help_panel="Planted batches and files", help=text, **limits)


def _share(text: str) -> Any:
    return _planted(text, min=0.0, max=1.0, metavar="SHARE")


Url = Annotated[str | None, typer.Option(metavar="URL", help="The callback address. Default: from the configuration.")]
Database = Annotated[
    Path | None, typer.Option(metavar="PATH", help="The server's database. Default: from the configuration.")
]
OwnDaemon = Annotated[bool, typer.Option("--own-daemon", help="Start a server for this run, in a temporary directory.")]
Keep = Annotated[
    Path | None, typer.Option(metavar="DIR", help="With --own-daemon: the directory, instead of a temporary one.")
]
Rate = Annotated[float, typer.Option(min=0.0, metavar="N", help="Posts a second; 0 is as fast as they are acked.")]
Timeout = Annotated[
    float, typer.Option(min=0.0, metavar="SECONDS", help="Seconds to wait for the verdicts after the last ack.")
]
Settle = Annotated[
    float,
    typer.Option(
        min=0.0, metavar="SECONDS", help="Seconds to wait once only missing files are left, which are being retried."
    ),
]
Answers = Annotated[
    str,
    _planted(
        "One more batch, of recorded responses of storage vendors and servers: all, or the names of some.",
        metavar="NAMES",
    ),
]


@app.command()
def demo(
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="The directory, instead of a temporary one.")
    ] = None,
) -> None:
    """Run a demo server with live batches, and show the address of its dashboard. Ctrl-C stops it."""
    from notify_server.cli.demo import run

    run(keep)


@app.command()
def simulate(
    config: ConfigOption = None,
    url: Url = None,
    store: Database = None,
    own_daemon: OwnDaemon = False,
    keep: Keep = None,
    rate: Rate = 0.0,
    timeout: Timeout = 120,
    settle: Settle = 10,
    batches: Annotated[int, _planted("Number of batches.", min=1, metavar="N")] = 20,
    files: Annotated[int, _planted("Files in a batch.", min=1, metavar="N")] = 50,
    seed: Annotated[int | None, _planted("Repeats an earlier run. Default: random, and shown.", metavar="N")] = None,
    missing: Annotated[float, _share("Share of files that are not there.")] = 0.05,
    slow: Annotated[float, _share("Share of files that answer late.")] = 0.05,
    refuse_head: Annotated[float, _share("Share of files that refuse HEAD.")] = 0.1,
    fail_first: Annotated[float, _share("Share of files that answer 500 or 503 at first.")] = 0.05,
    failed: Annotated[float, _share("Share of files reported as FAILED.")] = 0.05,
    redelivered: Annotated[float, _share("Share of batches that are delivered twice.")] = 0.2,
    slow_seconds: Annotated[
        float, _planted("How late slow files and receivers answer.", min=0.0, metavar="SECONDS")
    ] = 1,
    answers: Answers = "",
    receivers: Annotated[
        str, _planted("Receivers of events, with --own-daemon.", metavar="NAMES")
    ] = "steady,down,slow,fails-first,false-ok,gone",
) -> None:
    """Play the platform and its object store against a server, and check its record. Exits 1 when anything differs."""
    from notify_server.cli.simulate import Options, run
    from notify_server.simulator.answers import answers_named
    from notify_server.simulator.plan import Kind, Plan
    from notify_server.simulator.receiver import receivers_named

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
            answers=answers_named(answers),
        )
        behaviours = receivers_named(receivers)
        options = Options(config, url, store, own_daemon, keep, rate, slow_seconds, timeout, settle, behaviours)
    except ValueError as error:
        raise ClickUsageError(str(error)) from None
    run(plan, options)
