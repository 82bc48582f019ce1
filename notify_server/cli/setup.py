"""`notify-server init`: asks for the settings of a new installation, tests each answer, and writes config.toml."""

from __future__ import annotations

import asyncio
import base64
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import typer
from yarl import URL

from notify_server.cli.common import printable
from notify_server.cli.config import callback_address, refuse_existing, toml, write_new
from notify_server.cli.doctor.findings import Level, Subject
from notify_server.cli.doctor.forwarding import endpoint_checks
from notify_server.cli.doctor.run import look
from notify_server.config import Config, load_config
from notify_server.config.forward import BOTS, WEBHOOK_PREFIX, robot_of
from notify_server.errors import ConfigError, NotifyServerError

LOOPBACK = ("127.0.0.1/32", "::1/128")
TOKEN_BYTES = 24
WEBHOOK_BYTES = 32

Tables = dict[str, Any]
# Takes the tables so far and an answer, and returns the tables with it.
Fill = Callable[[Tables, str], Tables]


def run(path: Path) -> None:
    """Ask six questions and write `path`, which must not exist. Exits 1 when it cannot be written."""
    if path.exists():
        refuse_existing(path)
    print(f"Answer six questions to write {path}. Press Enter to accept the default in brackets.\n")
    tables: Tables = {}
    tables = _ask("1. The address that the platform will post to", "none yet", tables, _with_address, _resolves)
    tables = _ask(
        "2. The token that callbacks must have", "make one", tables, partial(_with_token, key="callback_token")
    )
    tables = _ask("3. Private networks that files lie in, like 10.0.0.0/8", "none", tables, _with_networks)
    tables = _ask("4. The webhook or group robot (DingTalk, WeCom, Feishu) to notify", "none", tables, _with_endpoint)
    tables = _with_endpoint_secret(tables)
    tables = _ask(
        "5. The token for the dashboard and the API", "make one", tables, partial(_with_token, key="admin_token")
    )
    tables = _ask(
        "6. A PostgreSQL database, like postgresql://user@host/database", "SQLite", tables, _with_store, _connects
    )
    write_new(path, document(tables))
    _show(path, tables)


def _ask(
    question: str,
    default: str,
    tables: Tables,
    fill: Fill,
    look_at: Callable[[Config], Iterator[str]] = lambda _: iter(()),
) -> Tables:
    """Ask until the answer is one that the configuration takes. What `look_at` yields is shown as a warning."""
    while True:
        answer = typer.prompt(f"{question} [{default}]", default="", show_default=False).strip()
        try:
            filled = fill(tables, answer)
            config = checked(filled)
            for warning in look_at(config) if answer else ():
                print(f"   note: {printable(warning)}")
        except NotifyServerError as error:
            problems = error.problems if isinstance(error, ConfigError) else [str(error)]
            print("\n".join(f"   {printable(problem)}" for problem in problems))
            continue
        return filled


def checked(tables: Tables) -> Config:
    """Return the configuration that the tables are. Raises ConfigError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        write_new(path, document(tables))
        return load_config(path, environ={})


def document(tables: Tables) -> str:
    """Return the tables as TOML."""
    parts = ["# Written by `notify-server init`. `notify-server config init` writes a file with every key explained."]
    for name, table in tables.items():
        for entry in table if isinstance(table, list) else [table]:
            head = f"[[{name}]]" if isinstance(table, list) else f"[{name}]"
            parts.append("\n".join([head, *(f"{key} = {toml(value)}" for key, value in entry.items())]))
    return "\n\n".join(parts) + "\n"


def _with(tables: Tables, section: str, **values: object) -> Tables:
    return {**tables, section: {**tables.get(section, {}), **values}}


def _with_address(tables: Tables, answer: str) -> Tables:
    if not answer:
        return tables
    try:
        url = URL(answer)
        port = url.port
    except ValueError:
        url, port = URL(), None
    if url.scheme not in ("http", "https") or not url.raw_host or not port:
        raise ConfigError(['must be an address like "https://notify.example.com/notify"'])
    base = str(url.origin())
    tables = _with(tables, "server", public_url=base)
    if url.raw_path not in ("", "/"):
        tables = _with(tables, "server", callback_path=url.raw_path)
    if _is_behind_a_proxy(url):
        return _with(tables, "server", trusted_proxies=list(LOOPBACK))
    return _with(tables, "server", host="0.0.0.0", port=port)  # noqa: S104


def _is_behind_a_proxy(url: URL) -> bool:
    """Return whether a proxy on this machine serves the address: it has the certificate, or a privileged port."""
    return url.scheme == "https" or url.explicit_port is None


def _resolves(config: Config) -> Iterator[str]:
    url = URL(config.server.public_url or "")
    try:
        socket.getaddrinfo(url.raw_host, url.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        yield f"{url.host} does not resolve yet: it must before the platform can post"
    if _is_behind_a_proxy(url):
        yield f"have your proxy pass {url.origin()} on to http://127.0.0.1:{config.server.port}; deploy/ has examples"


def _with_token(tables: Tables, answer: str, *, key: str) -> Tables:
    return _with(tables, "auth", **{key: answer or secrets.token_hex(TOKEN_BYTES)})


def _with_networks(tables: Tables, answer: str) -> Tables:
    networks = answer.replace(",", " ").split()
    return _with(tables, "verify", allowed_networks=networks) if networks else tables


def _with_endpoint(tables: Tables, answer: str) -> Tables:
    if not answer:
        return tables
    robot = robot_of(answer)
    endpoint: Tables = {"name": robot or "receiver", **({"bot": robot} if robot else {}), "url": answer}
    if robot is None:
        made = base64.b64encode(secrets.token_bytes(WEBHOOK_BYTES)).decode()
        endpoint["secrets"] = [WEBHOOK_PREFIX + made]
    return {**tables, "forward": [endpoint]}


def _with_endpoint_secret(tables: Tables) -> Tables:
    """Ask for the robot's signing secret, where it has one, and look at the endpoint."""
    if "forward" not in tables:
        return tables
    (endpoint,) = tables["forward"]
    if endpoint.get("bot") in BOTS and endpoint["bot"] != "wecom":
        tables = _ask(
            f"   The signing secret (加签) of the {endpoint['bot']} robot",
            "none",
            tables,
            lambda so_far, answer: {**so_far, "forward": [{**endpoint, **({"secret": answer} if answer else {})}]},
        )
    for finding in look(endpoint_checks(Subject(checked(tables), None, None))):
        if finding.level is not Level.OK:
            print(f"   note: {printable('; '.join(filter(None, (finding.text, finding.remedy))))}")
    return tables


def _with_store(tables: Tables, answer: str) -> Tables:
    return _with(tables, "store", url=answer) if answer else tables


def _connects(config: Config) -> Iterator[str]:
    """Connect once. Raises NotifyServerError, so that another answer can be given."""
    if config.store.is_postgres:
        # The driver is only loaded where it is needed.
        from notify_server.store.postgres.session import reach

        asyncio.run(reach(config.store.url))
    yield from ()


def _show(path: Path, tables: Tables) -> None:
    print(f"\n{path} is written, readable by you alone. Register this address with the platform:\n")
    print(f"    {callback_address(checked(tables), tables['auth']['callback_token'])}\n")
    test = f" Then `notify-server forward test {tables['forward'][0]['name']}`." if "forward" in tables else ""
    print(f"Next: `notify-server doctor`, then `notify-server`.{test}")
