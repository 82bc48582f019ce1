"""`notify-server doctor`: finds problems of this installation and says how to fix them."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from rich.text import Text

from notify_server.cli.common import EXIT_FAILED, config_file, output, printable
from notify_server.cli.doctor import endpoint, forwarding, probing, programs, record
from notify_server.cli.doctor.findings import Check, Finding, Level, Subject
from notify_server.cli.doctor.public import public_checks
from notify_server.config import load_config
from notify_server.errors import ConfigError

# The time limit of a check; all of them run at the same time.
CHECK_SECONDS = 5.0
# That of those which go through the public address, receivers and stores.
PUBLIC_SECONDS = 60.0
UNKNOWN = "run it again; if that does not help, check it by hand"
COLOURS = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


def run(config_path: Path | None, host: str | None, public: str | None, picture: str | None, *, as_json: bool) -> None:
    """Run all checks and print the findings. Exits 1 when there is a problem. Stores nothing."""
    findings = examine(config_path, host)
    if public is not None:
        with contextlib.suppress(ConfigError):
            config = load_config(config_path)
            findings += look(public_checks(config, config_path, public, picture), PUBLIC_SECONDS)
    if as_json:
        shown = [finding._asdict() for finding in findings]
        print(
            json.dumps({"problems": _count(findings, Level.PROBLEM), "findings": shown}, ensure_ascii=False, indent=2)
        )
    else:
        _show(findings)
    raise SystemExit(EXIT_FAILED if _count(findings, Level.PROBLEM) else 0)


def examine(config_path: Path | None, host: str | None) -> list[Finding]:
    """Return the findings; with a wrong configuration only those that need none."""
    checks = _first_checks()
    try:
        config = load_config(config_path)
    except ConfigError as error:
        remedy = "correct the key; `notify-server config init` writes an example"
        found = [Finding("configuration", Level.PROBLEM, problem, remedy) for problem in error.problems]
    else:
        file = config_file(config_path)
        source = str(file) if file else "no config.toml here: defaults"
        found = [Finding("configuration", Level.OK, f"{source}, and the environment")]
        checks |= _configured_checks(Subject(config, file, host))
    return found + look(checks)


def _first_checks() -> dict[str, Check]:
    """Return the checks that need no configuration, by name."""
    return {
        "python": programs.check_python,
        "libcurl": programs.check_libcurl,
        "sqlite": programs.check_sqlite,
        "clock": programs.check_clock,
    }


def _configured_checks(subject: Subject) -> dict[str, Check]:
    """Return the checks that need the configuration, by name."""
    checks = {
        "listen": endpoint.check_listen,
        "certificate": endpoint.check_certificate,
        "secrets": endpoint.check_secrets,
        "exposure": endpoint.check_exposure,
        "dns": probing.check_dns,
        "trust": probing.check_trust,
        "descriptors": probing.check_descriptors,
    }
    if subject.config.store.is_postgres:
        # Loaded only when used, because its driver takes time to load.
        from notify_server.cli.doctor import postgres

        checks["database"] = postgres.check_database
    else:
        checks |= {
            "directory": record.check_directory,
            "disk": record.check_disk,
            "daemon": record.check_daemon,
            "database": record.check_database,
        }
    return {name: partial(check, subject) for name, check in checks.items()} | forwarding.endpoint_checks(subject)


def _count(findings: Iterable[Finding], level: Level) -> int:
    return sum(finding.level is level for finding in findings)


def look(checks: Mapping[str, Check], seconds: float = CHECK_SECONDS) -> list[Finding]:
    """Run the checks at the same time; return their findings in the given order."""
    found: dict[str, list[Finding]] = {}

    def one(name: str, check: Check) -> None:
        try:
            found[name] = list(check())
        except Exception as error:
            # A failing check must not prevent the findings of the others.
            found[name] = [
                Finding(name, Level.WARNING, f"cannot be checked ({type(error).__name__}: {error})", UNKNOWN)
            ]

    # Daemon threads: one may hang in a look-up or on a dead network drive.
    threads = [threading.Thread(target=one, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = f"not finished within {seconds:g} seconds"
    return [finding for name in checks for finding in found.get(name, [Finding(name, Level.WARNING, late, UNKNOWN)])]


def _show(findings: list[Finding]) -> None:
    console = output()
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        line = Text.assemble((f"{finding.level:<8} ", COLOURS[finding.level]), f"{finding.check:<{width}}  ")
        console.print(line + Text(printable(finding.text)), soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{'':9}{'':{width}}  -> {printable(finding.remedy)}"), soft_wrap=True)
    problems, warnings = _count(findings, Level.PROBLEM), _count(findings, Level.WARNING)
    console.print(
        Text(
            f"{problems} problem{'' if problems == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}.",
            "bold red" if problems else "bold green",
        )
    )
    sys.stdout.flush()
