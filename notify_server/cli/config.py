"""`notify-server config`: check, show and write the configuration."""

from __future__ import annotations

import ipaddress
import json
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

from pydantic import BaseModel, PlainValidator, SecretStr
from pydantic.fields import FieldInfo

from notify_server.cli.common import EXIT_FAILED, config_file, printable, read_config
from notify_server.config import ENV_PREFIX, Config, StatusRange
from notify_server.config.accept import Accept
from notify_server.config.forward import warnings
from notify_server.config.loading import FORWARD
from notify_server.config.values import duration, with_secrets_hidden
from notify_server.contract.signature import PlatformKey

SET = "…(set)"
_UNITS = (("d", 86_400.0), ("h", 3600.0), ("m", 60.0), ("s", 1.0))


class Setting(NamedTuple):
    """A key in effect. `value` is a JSON and TOML value, None when the key is not set."""

    section: str
    key: str
    value: Any
    source: str


def check(path: Path | None) -> None:
    """Exit 2 with a line for every wrong key, else print the sources of the configuration."""
    config = read_config(path)
    file = config_file(path)
    print(f"file: {printable(str(file)) if file else 'none, config.toml is not there'}")
    variables = ", ".join(sorted(_variables(os.environ).values()))
    print(f"environment: {variables or 'none'}")
    if config.server.takes_callbacks:
        print(f"register with the platform: {callback_address(config, '<callback_token>')}")
    for warning in warnings(config.forward, config.server.public_url):
        print(f"warning: {warning}")
    print("Configuration OK.")


def callback_address(config: Config, token: str) -> str:
    """Return the address to register with the platform. `token` stands for the callback_token, if one is set."""
    server = config.server
    base = server.public_url.rstrip("/") if server.public_url is not None else server.local_url
    return f"{base}{server.callback_path}{f'?token={token}' if config.auth.callback_token else ''}"


def show(path: Path | None, *, as_json: bool) -> None:
    """Print the configuration in effect: as TOML that can be loaded again, except for the secrets; or as JSON."""
    config = read_config(path)
    file = config_file(path)
    found = list(settings(config, file, os.environ))
    if as_json:
        tables: dict[str, dict[str, Any]] = {}
        for setting in found:
            tables.setdefault(setting.section, {})[setting.key] = {"value": setting.value, "source": setting.source}
        endpoints = forwarded(config, file, os.environ)
        tables[FORWARD] = {"value": endpoints.value, "source": endpoints.source}
        shown = {"file": None if file is None else str(file), "settings": tables}
        print(json.dumps(shown, ensure_ascii=False, indent=2))
        return
    section = ""
    for setting in found:
        if setting.section != section:
            print(f"\n[{setting.section}]" if section else f"[{setting.section}]")
            section = setting.section
        if _has_tables(setting.value):
            # The tables go last: keys after a table's header belong to that table.
            continue
        if setting.value is None:
            print(f"# {setting.key} is not set")
        else:
            print(f"{setting.key} = {toml(setting.value)}  # {printable(setting.source)}")
    for setting in found:
        for pattern, keys in setting.value.items() if _has_tables(setting.value) else ():
            print(f"\n[{setting.section}.{setting.key}.{toml(pattern)}]  # {printable(setting.source)}")
            for key, value in keys.items():
                print(f"{key} = {toml(value)}")
    endpoints = forwarded(config, file, os.environ)
    for endpoint in endpoints.value:
        print(f"\n[[{FORWARD}]]  # {printable(endpoints.source)}")
        for key, value in endpoint.items():
            print(f"{key} = {toml(value)}")


def init(path: Path) -> None:
    """Write the example to `path`, which must not exist. Exits 1 with one line when it cannot be written."""
    write_new(path, (files("notify_server") / "config.example.toml").read_text(encoding="utf-8"))
    print(f"{path}: every key at its default; change what you need, then run `notify-server config check`")


def refuse_existing(path: Path) -> NoReturn:
    """Exit 1 with one line: nothing is written over a file."""
    print(f"notify_server: {path}: exists already and is left unchanged: name another", file=sys.stderr)
    raise SystemExit(EXIT_FAILED) from None


def write_new(path: Path, text: str) -> None:
    """Write a file that only its owner can read: it holds tokens. Exits 1 with one line when it is there already or
    cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        refuse_existing(path)
    except OSError as error:
        print(f"notify_server: {path}: cannot be written ({error.strerror})", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None


def settings(config: Config, file: Path | None, environ: Mapping[str, str]) -> Iterator[Setting]:
    """Return every key with its value and origin: `default`, the file's name, or `environment <name>`."""
    tables = {} if file is None else tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    variables = _variables(environ)
    for section, model in config:
        if section != FORWARD:
            yield from _settings(section, model, file, tables.get(section, {}), variables)


def _settings(
    section: str,
    model: BaseModel,
    file: Path | None,
    table: Mapping[str, Any],
    variables: Mapping[tuple[str, str], str],
) -> Iterator[Setting]:
    """Yield the keys of a section, then those of its tables."""
    inner: list[tuple[str, BaseModel]] = []
    for key, field in type(model).model_fields.items():
        value = getattr(model, key)
        if isinstance(value, BaseModel):
            inner.append((key, value))
            continue
        outer, _, rest = f"{section}.{key}".replace(".", "__").partition("__")
        variable = variables.get((outer, rest))
        source = f"environment {variable}" if variable else str(file) if key in table else "default"
        yield Setting(section, key, _plain(value, field), source)
    for key, value in inner:
        yield from _settings(f"{section}.{key}", value, file, table.get(key, {}), variables)


def forwarded(config: Config, file: Path | None, environ: Mapping[str, str]) -> Setting:
    """Return the `[[forward]]` tables, with the keys that are set in each, without their secrets."""
    variable = _variables(environ).get((FORWARD, ""))
    tables = {} if file is None else tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    source = f"environment {variable}" if variable else str(file) if FORWARD in tables else "default"
    endpoints = [
        {"name": each.name}
        | {
            key: each.target if key == "url" else _plain(getattr(each, key), type(each).model_fields[key])
            for key in type(each).model_fields
            if key in each.model_fields_set
        }
        for each in config.forward
    ]
    return Setting(FORWARD, "", endpoints, source)


def _variables(environ: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Return the names of our environment variables by section and key; `load_config` has checked that each has
    both.
    """
    found = {}
    for name in environ:
        if name.upper().startswith(ENV_PREFIX):
            section, _, key = name[len(ENV_PREFIX) :].lower().partition("__")
            found[section, key] = name
    return found


def _plain(value: Any, field: FieldInfo) -> Any:
    match value:
        case None | str() | int():
            return with_secrets_hidden(value) if field.repr is False and isinstance(value, str) else value
        case float():
            return _duration(value) if _is_duration(field) else value
        case SecretStr():
            return SET
        case Accept():
            return str(value)
        case PlatformKey():
            return f"…(fingerprint {value.fingerprint})"
        case StatusRange(low, high):
            return str(low) if low == high else f"{low}-{high}"
        case tuple():
            return [_plain(part, field) for part in value]
        case BaseModel():
            return {
                key: _plain(getattr(value, key), type(value).model_fields[key])
                for key in sorted(value.model_fields_set)
            }
        case Mapping():
            return {str(key): _plain(part, field) for key, part in value.items()}
        case Path() | ipaddress.IPv4Network() | ipaddress.IPv6Network():
            return str(value)
    raise TypeError(f"there is no form for a {type(value).__name__}")


def _is_duration(field: FieldInfo) -> bool:
    inner = [part for argument in get_args(field.annotation) for part in getattr(argument, "__metadata__", ())]
    return any(isinstance(part, PlainValidator) and part.func is duration for part in [*field.metadata, *inner])


def _duration(seconds: float) -> str:
    """Return a duration as text, in the largest unit that divides it."""
    for unit, size in _UNITS:
        if seconds and seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds * 1000:.15g}ms" if 0 < seconds < 1 else f"{seconds:.15g}s"


def _has_tables(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values())


def toml(value: Any) -> str:
    """Return a text, number, truth value, list or inline table as TOML."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(key)} = {toml(inner)}' for key, inner in value.items())}}}"
    # JSON's strings and numbers are valid TOML, except for DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
