"""Loads `config.toml` and `NOTIFY_SERVER__SECTION__KEY`, and checks all of it before anything is opened.

Only `load_config` reads the environment and the file; a `Config(...)` built in code has its arguments and defaults.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_origin

from pydantic import ValidationError

from notify_server.config.forward import KINDS
from notify_server.config.root import Config
from notify_server.config.sections import HostSettings, Section
from notify_server.config.values import show
from notify_server.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

ENV_PREFIX = "NOTIFY_SERVER__"
FORWARD = "forward"
_ROLES = ("server", "roles")


def load_config(path: Path | None, *, environ: Mapping[str, str] = os.environ, cwd: Path | None = None) -> Config:
    """Return the configuration from a TOML file and the environment.

    Without `path`, `config.toml` in `cwd` (the working directory) is read if it exists. Paths inside the file are
    relative to the working directory of the process. Raises ConfigError with a line for each error.
    """
    tables = _read(path or (cwd or Path()) / "config.toml", optional=path is None)
    problems = [_misplaced(name, value) for name, value in tables.items() if name not in Config.model_fields]
    known, unknown = _sort_variables(environ)
    problems += unknown
    variables = _nest(known)
    values = {}
    for section in Config.model_fields:
        if section == FORWARD:
            # A list: the variable replaces all of it.
            values[section] = variables.get(section, tables.get(section, []))
            continue
        table = tables.get(section, {})
        values[section] = _merge(section, table, variables.get(section, {})) if isinstance(table, dict) else table
    config = None
    try:
        config = Config(**values)
    except ValidationError as error:
        problems += [_problem(each, variables) for each in error.errors(include_url=False)]
    # Raised here because an error's context is printed with it, and pydantic's holds the values.
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _read(path: Path, *, optional: bool) -> dict[str, Any]:
    """Return the file's tables; a byte order mark is skipped, because some editors write one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        if optional and isinstance(error, FileNotFoundError):
            return {}
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from None
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}, line {content.count(10, 0, error.start) + 1}: is not UTF-8 text"]) from None
    except RecursionError:
        raise ConfigError([f"{path}: is nested too deeply"]) from None
    except ValueError as error:
        # tomllib's texts quote keys, never values, so they can be shown.
        what, _, place = re.sub(r"\('(.+?)',?\)", r"\1", str(error)).replace("', '", ".").partition(" (at ")
        line = re.match(r"line ([0-9]+)", place)
        number = line[1] if line else len(content.splitlines())
        raise ConfigError([f"{path}, line {number}: {what}"]) from None


def _sort_variables(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return our variables that name a key, and a line for each that does not."""
    known, problems = {}, []
    for name, value in environ.items():
        if not name.upper().startswith(ENV_PREFIX):
            continue
        section, _, key = name[len(ENV_PREFIX) :].lower().partition("__")
        if section == FORWARD and not key:
            known[name] = value
        elif section not in Config.model_fields:
            problems.append(f"environment {name}: {_unknown('section', section, Config.model_fields)}")
        elif key.partition("__")[2] and (table := _table(section, key.partition("__")[0])) is not None:
            if (inner := key.partition("__")[2]) in table.model_fields:
                known[name] = value
            else:
                problems.append(f"environment {name}: {_unknown('key', inner, table.model_fields)}")
        elif key not in _keys(section):
            problems.append(f"environment {name}: {_unknown('key', key, _keys(section))}")
        else:
            known[name] = value
    return known, problems


def _nest(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the variables' values by section and key; `forward` is a separate list.

    A value of a list or a table is parsed as JSON when it looks like it, else as text separated by commas.
    """
    nested: dict[str, Any] = {}
    for name, value in variables.items():
        section, _, key = name[len(ENV_PREFIX) :].lower().partition("__")
        if not key:
            nested[section] = _decode(value)
        else:
            place, kind = nested.setdefault(section, {}), _section(section)
            outer, _, inner = key.partition("__")
            if inner and (table := _table(section, outer)) is not None:
                place, kind, key = place.setdefault(outer, {}), table, inner
            origin = get_origin(kind.model_fields[key].annotation)
            is_collection = isinstance(origin, type) and issubclass(origin, (tuple, Mapping))
            place[key] = _decode(value) if is_collection else value
    return nested


def _merge(section: str, table: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Put the variables' values over those of the file, also within its tables."""
    merged = {**table, **variables}
    for key in table.keys() & variables.keys():
        if _table(section, key) is not None and isinstance(table[key], dict):
            merged[key] = {**table[key], **variables[key]}
    return merged


def _decode(value: str) -> Any:
    if not value.strip():
        return value  # Not a list: an empty one may mean "any".
    if not value.lstrip().startswith(("[", "{")):
        return [part.strip() for part in value.split(",")]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # The section refuses it.


def _keys(section: str) -> Iterable[str]:
    if section == FORWARD:
        return ()
    return _section(section).model_fields


def _section(name: str) -> type[Section]:
    return cast("type[Section]", Config.model_fields[name].annotation)


def _table(section: str, key: str) -> type[Section] | None:
    """Return the table that a key of a section is, such as `[verify.usable]`; None for any other key."""
    field = None if section == FORWARD else _section(section).model_fields.get(key)
    kind = None if field is None else field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"unknown {what}" + (f', did you mean "{near[0]}"?' if near else "")


def _name(key: str) -> str:
    """Return a key as TOML would write it."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else show(key)


def _misplaced(name: str, value: object) -> str:
    if isinstance(value, dict):
        return f"[{_name(name)}]: {_unknown('section', name, Config.model_fields)}"
    return f"{_name(name)}: stands outside of any section, such as [server]"


def _forward_problem(error: ErrorDetails) -> str:
    """Return one line that names the entry and key, such as `forward[1].secret: …`. Values are not shown: they are
    secrets.
    """
    place, kind = FORWARD, ""
    for part in error["loc"][1:]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not kind and part in KINDS:
            kind = part
        else:
            place += f".{_name(part)}"
    match error["type"]:
        case "value_error":
            what = str(error["ctx"]["error"])
        case "missing":
            what = "is needed"
        case "extra_forbidden":
            what = _unknown("key", str(error["loc"][-1]), KINDS[kind].model_fields)
        case "literal_error":
            what = "must be " + error["ctx"]["expected"].replace("'", '"')
        case "tuple_type" if place == FORWARD:
            what = "must be a list of tables: write [[forward]]"
        case "tuple_type":
            what = 'must be a list, like ["a", "b"]'
        case _:
            what = "must be a table"
    return f"{place}: {what}"


def _problem(error: ErrorDetails, variables: Mapping[str, Mapping[str, object]]) -> str:
    """Return one line: the section and key, or the variable, of the value, and the error."""
    if error["loc"][:1] == (FORWARD,):
        return _forward_problem(error)
    # An error of the whole configuration comes from its only rule.
    section, *rest = error["loc"] or _ROLES
    inside_hosts = (section, *rest[:1]) == ("verify", "hosts") and len(rest) > 1
    inner = _table(str(section), str(rest[0])) if rest else None
    set_there = variables.get(str(section), {})
    if inner is not None and len(rest) > 1:
        outer = rest.pop(0)
        if rest[0] in cast("Mapping[str, object]", set_there.get(str(outer), {})):
            place = "environment " + f"{ENV_PREFIX}{section}__{outer}__{rest.pop(0)}".upper()
        else:
            place = f"[{section}.{outer}]"
    elif rest and rest[0] in set_there:
        place = "environment " + f"{ENV_PREFIX}{section}__{rest.pop(0)}".upper()
    elif inside_hosts:
        place, rest = f"[verify.hosts.{show(rest[1])}]", rest[2:]
    else:
        place = f"[{section}]"
    for part in rest:
        place += f"[{part}]" if isinstance(part, int) else f" {_name(part)}" if part != "[key]" else ""
    match error["type"]:
        case "value_error":
            what = str(error["ctx"]["error"])
        case "extra_forbidden":
            known = HostSettings.model_fields if inside_hosts else inner.model_fields if inner else _keys(str(section))
            what = _unknown("key", str(error["loc"][-1]), known)
        case "literal_error":
            wanted = error["ctx"]["expected"].replace("'", '"')
            what = f"must be {wanted}, not {show(error['input'])}"
        case "tuple_type":
            what = 'must be a list, like ["a", "b"]'
        case _:
            what = "must be a table"
    return f"{place}: {what}"
