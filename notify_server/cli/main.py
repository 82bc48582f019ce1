"""The commands and their options."""

from __future__ import annotations

import io
import os
import secrets
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from notify_server.cli.common import EXIT_USAGE
from notify_server.model import FileState, Verdict

app = typer.Typer(
    name="notify-server",
    help="The callback endpoint for the platform's asynchronous batch file notifications (异步批处理文件通知).",
    no_args_is_help=False,
    add_completion=True,
    pretty_exceptions_enable=False,
)

# typer brings click along under a name of its own; what a user gets wrong is an exception of this family.
_UsageError: Any = typer.BadParameter.__base__

ExportFormat = Literal["csv", "ndjson"]
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
    from notify_server.simulator.plan import Kind, Plan

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


@app.command()
def verify(
    context: typer.Context,
    urls: Annotated[list[str] | None, typer.Argument(metavar="URL...", help="Addresses.", show_default=False)] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            metavar="PATH",
            help="A list of addresses: text (one a line), CSV, JSON lines, or a notification; - is standard input.",
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each address.")] = False,
) -> None:
    """Ask for addresses once, as the daemon would, without one. Exits 1 when any is not available."""
    if not urls and file is None:
        raise _UsageError("Name addresses, or a list of them with --file.")
    from notify_server.cli.verify import run

    run(urls or (), file, config or context.obj, as_json=as_json)


config_app = typer.Typer(help="Check, show or write the configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")


@config_app.command("check")
def config_check(context: typer.Context, config: ConfigOption = None) -> None:
    """Say what is wrong with the configuration, a line for each key, and exit 2; or where it comes from."""
    from notify_server.cli.config import check

    check(config or context.obj)


@config_app.command("show")
def config_show(
    context: typer.Context,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of TOML.")] = False,
) -> None:
    """Show every key with its value and where that comes from. Secrets are not shown."""
    from notify_server.cli.config import show

    show(config or context.obj, as_json=as_json)


@config_app.command("init")
def config_init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.")] = Path("config.toml"),
) -> None:
    """Write a configuration with every key at its default, and why. Overwrites nothing."""
    from notify_server.cli.config import init

    init(path)


@app.command()
def doctor(
    context: typer.Context,
    config: ConfigOption = None,
    host: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A host whose name must resolve. Default: those in allowed_hosts."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a list.")] = False,
) -> None:
    """Say what is wrong with this installation, and how to mend it. Changes nothing. Exits 1 on a problem."""
    from notify_server.cli.doctor.run import run

    run(config or context.obj, host, as_json=as_json)


@app.command()
def migrate(context: typer.Context, config: ConfigOption = None) -> None:
    """Bring the record's schema up to date, which `serve` does by itself. On SQLite no daemon may be running."""
    from notify_server.cli.migrate import run

    run(config or context.obj)


@app.command()
def copy(
    context: typer.Context,
    config: ConfigOption = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="The record to copy. Default: [store] url.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--to", metavar="URL", help="Where to, which must be empty. Default: [store] url.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew what was begun before, instead of going on with it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Copy a record from SQLite to PostgreSQL or back, and verify the copy. Goes on with what was stopped before. No
    server may be running on either. Exits 1 when the copy differs.
    """
    from notify_server.cli.copy import run

    run(config or context.obj, source, target, restart=restart, as_json=as_json)


# --- The record: read from where it is, or over a daemon's API (--url). One that runs on a file is asked to act. ---

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url", metavar="URL", help="A daemon's address, like http://10.0.0.7:8080. Default: the record itself."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of text; lists as one object a line.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before doing it.")]
LimitOption = Annotated[int, typer.Option(min=1, help="The most to show.")]
StateOption = Annotated[FileState | None, typer.Option("--state", help="Only files in this state.")]
ReasonOption = Annotated[str | None, typer.Option(metavar="REASON", help="Only files that fail for this reason.")]
HostOption = Annotated[str | None, typer.Option("--host", metavar="NAME", help="Only files of this host.")]
ApiCodeOption = Annotated[str | None, typer.Option(metavar="CODE", help="Only this api_code.")]


@app.command()
def status(
    context: typer.Context,
    config: ConfigOption = None,
    url: UrlOption = None,
    once: Annotated[bool, typer.Option("--once", help="Show it once, also on a terminal.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what is going on, every second on a terminal until Ctrl-C (exit status 130), and the record in numbers."""
    from notify_server.cli import status as status_command
    from notify_server.cli.session import run

    run(config or context.obj, url, lambda _, source: status_command.status(source, once=once, as_json=as_json))


@app.command()
def batches(
    context: typer.Context,
    config: ConfigOption = None,
    url: UrlOption = None,
    verdict: Annotated[Verdict | None, typer.Option(help="Only batches with this verdict.")] = None,
    api_code: ApiCodeOption = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help='Only those received since: RFC 3339, a date, or "2h" ago.')
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Only those received before.")] = None,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
) -> None:
    """List batches, the latest first."""
    from notify_server.cli import listing
    from notify_server.cli.session import run

    run(
        config or context.obj,
        url,
        lambda _, source: listing.batches(source, verdict, api_code, since, until, limit, as_json=as_json),
    )


@app.command()
def show(
    context: typer.Context,
    batch_id: Annotated[str, typer.Argument(metavar="BATCH", help="The batch_id.", show_default=False)],
    config: ConfigOption = None,
    url: UrlOption = None,
    api_code: ApiCodeOption = None,
    state: StateOption = None,
    every: Annotated[bool, typer.Option("--all", help="Available files, too.")] = False,
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """Show a batch, and which of its files are missing and why. Exits 1 when its verdict is incomplete."""
    from notify_server.cli import listing
    from notify_server.cli.session import run

    run(
        config or context.obj,
        url,
        lambda _, source: listing.show(source, batch_id, api_code, state, limit, every=every, as_json=as_json),
    )


@app.command()
def rejections(
    context: typer.Context,
    config: ConfigOption = None,
    url: UrlOption = None,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
) -> None:
    """List the bodies that were refused and kept, the latest first."""
    from notify_server.cli import listing
    from notify_server.cli.session import run

    run(config or context.obj, url, lambda _, source: listing.rejections(source, limit, as_json=as_json))


@app.command()
def export(
    context: typer.Context,
    config: ConfigOption = None,
    url: UrlOption = None,
    form: Annotated[ExportFormat, typer.Option("--format", help="CSV is safe to open in a spreadsheet.")] = "csv",
    batch_id: Annotated[str | None, typer.Option("--batch", metavar="BATCH", help="Only this batch.")] = None,
    api_code: ApiCodeOption = None,
    state: StateOption = None,
    reason: ReasonOption = None,
    host: HostOption = None,
    target: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="The file to write. Default: standard output.")
    ] = None,
) -> None:
    """Write files with all that is known of them, as they are read."""
    from notify_server.cli import listing
    from notify_server.cli.session import run

    run(
        config or context.obj,
        url,
        lambda _, source: listing.export(source, batch_id, api_code, state, reason, host, form, target),
    )


@app.command()
def recheck(
    context: typer.Context,
    config: ConfigOption = None,
    url: UrlOption = None,
    file: Annotated[int | None, typer.Option(min=1, metavar="ID", help="This file, by its id.")] = None,
    batch_id: Annotated[str | None, typer.Option("--batch", metavar="BATCH", help="Files of this batch.")] = None,
    api_code: ApiCodeOption = None,
    reason: ReasonOption = None,
    host: HostOption = None,
    states: Annotated[
        list[FileState] | None,
        typer.Option("--state", help="Only files in these states. Default: all that are not available."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many.")] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask for files anew, at once: one, those of a batch, or those that fail for a reason. Says how many, and asks."""
    from notify_server.cli import acting
    from notify_server.cli.session import run

    chosen = acting.RecheckSelection(file, batch_id, api_code, reason, host, states, dry_run)
    run(
        config or context.obj,
        url,
        lambda config, source: acting.recheck(config, source, chosen, yes=yes, as_json=as_json),
    )


@app.command()
def replay(
    context: typer.Context,
    ids: Annotated[list[int], typer.Argument(metavar="ID...", min=1, help="Rejections, by id.", show_default=False)],
    config: ConfigOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take refused bodies after all, now that the limits or this program allow it."""
    from notify_server.cli import acting
    from notify_server.cli.session import run

    run(config or context.obj, url, lambda config, source: acting.replay(config, source, ids, as_json=as_json))


@app.command()
def prune(
    context: typer.Context,
    config: ConfigOption = None,
    url: UrlOption = None,
    completed: Annotated[
        str | None, typer.Option(metavar="TIME", help='Batches completed before: RFC 3339, a date, or "90d" ago.')
    ] = None,
    refused: Annotated[
        str | None, typer.Option("--rejections", metavar="TIME", help="Rejections received before.")
    ] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Delete what is old: by default what [retention] says, which a daemon does by itself. Says what, and asks."""
    from notify_server.cli import acting
    from notify_server.cli.session import run

    run(
        config or context.obj,
        url,
        lambda config, source: acting.prune(config, source, completed, refused, yes=yes, as_json=as_json),
    )


def main() -> None:
    """The entry point of `notify-server` and `python -m notify_server`."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An address may hold what a terminal's encoding does not.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(prog_name="notify-server", standalone_mode=False)
    except _UsageError as error:
        if problem := _usage_problem(error):
            print(problem, file=sys.stderr)
        code = EXIT_USAGE
    except typer.Abort:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)


def _open_closed_streams() -> None:
    """Open /dev/null in place of a standard stream that is closed, or the next file or socket would take its number and
    get what is meant for it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)
    # Python has none for those that were closed.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115


def _usage_problem(error: Any) -> str:
    """What was wrong with the command's line, in one line."""
    near = getattr(error, "possibilities", None)
    if near:
        return f"{error.message}. Did you mean {near[0]}?"
    return " ".join(str(error.format_message()).split())


forward_app = typer.Typer(
    help="Look at forwarding endpoints and act on them, through the daemon.", no_args_is_help=True
)
app.add_typer(forward_app, name="forward")
EndpointArgument = Annotated[str, typer.Argument(metavar="NAME", help="The endpoint's name.", show_default=False)]


@forward_app.command("list")
def forward_list(
    context: typer.Context, config: ConfigOption = None, url: UrlOption = None, as_json: JsonOption = False
) -> None:
    """List the endpoints with their health. Exits 1 when one is failing or stopped."""
    from notify_server.cli import forward
    from notify_server.cli.session import run

    run(config or context.obj, url, lambda config, source: forward.list_endpoints(source, as_json=as_json))


@forward_app.command("test")
def forward_test(
    context: typer.Context,
    name: EndpointArgument,
    config: ConfigOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send test.ping to an endpoint and show the answer. Exits 1 when it was not delivered."""
    from notify_server.cli import forward
    from notify_server.cli.session import run

    run(config or context.obj, url, lambda config, source: forward.test(source, name, as_json=as_json))


@forward_app.command("replay")
def forward_replay(
    context: typer.Context,
    name: EndpointArgument,
    since: Annotated[str, typer.Option(metavar="TIME", help='Events since: RFC 3339, a date, or "2h" ago.')],
    config: ConfigOption = None,
    url: UrlOption = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Events before. Default: now.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many.")] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send events to an endpoint again. Says how many, and asks."""
    from notify_server.cli import forward
    from notify_server.cli.session import run

    run(
        config or context.obj,
        url,
        lambda config, source: forward.replay(source, name, since, until, dry_run=dry_run, yes=yes, as_json=as_json),
    )


@forward_app.command("stop")
def forward_stop(
    context: typer.Context,
    name: EndpointArgument,
    config: ConfigOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop an endpoint. Its events stay pending."""
    from notify_server.cli import forward
    from notify_server.cli.session import run

    run(config or context.obj, url, lambda config, source: forward.change(source, name, "stop", as_json=as_json))


@forward_app.command("start")
def forward_start(
    context: typer.Context,
    name: EndpointArgument,
    config: ConfigOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start an endpoint. Its pending events are sent."""
    from notify_server.cli import forward
    from notify_server.cli.session import run

    run(config or context.obj, url, lambda config, source: forward.change(source, name, "start", as_json=as_json))


@app.command()
def events(
    context: typer.Context,
    config: ConfigOption = None,
    url: UrlOption = None,
    after: Annotated[int | None, typer.Option(min=0, metavar="ID", help="Events behind this one.")] = None,
    types: Annotated[str, typer.Option(metavar="TYPES", help='Types, such as "batch.*,endpoint.failing".')] = "*",
    api_code: ApiCodeOption = None,
    limit: LimitOption = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they happen, until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print events, oldest first."""
    from notify_server.cli import forward
    from notify_server.cli.session import run

    run(
        config or context.obj,
        url,
        lambda config, source: forward.events(source, after, types, api_code, limit, follow=follow, as_json=as_json),
    )
