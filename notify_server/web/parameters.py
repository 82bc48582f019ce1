"""Converts query parameters and JSON bodies to structs. Errors name the parameter and say what it must be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import msgspec
from multidict import MultiMapping

from notify_server.callbacks.errors import RefusedError
from notify_server.operations import REASON_PATTERN, unknown_reason

T = TypeVar("T", bound=msgspec.Struct)

# The digits of the largest number that a database can hold.
_NUMBER = re.compile(r"-?[0-9]{1,19}")


def from_query(query: MultiMapping[str], kind: type[T]) -> T:
    """Convert the parameters of a URL. Raises RefusedError that names the wrong one."""
    if twice := next((name for name in query if len(query.getall(name)) > 1), None):
        raise _wrong(f"{twice}: may be given only once")
    return convert(dict(query), kind, from_text=True)


def from_json(body: bytes, kind: type[T]) -> T:
    """Convert a body, which must be an object. Raises RefusedError that names the wrong field."""
    try:
        values = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _wrong("body: is needed, {} at least" if not body else f"body: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise _wrong("body: must be an object")
    return convert(values, kind)


def from_lines(body: bytes, kind: type[T], most: int) -> list[T]:
    """Convert NDJSON: a line for each object, empty lines left out. Raises RefusedError that names the wrong line."""
    lines = [(number, line) for number, line in enumerate(body.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise _wrong("body: is needed, one line at least")
    if len(lines) > most:
        raise RefusedError(413, "413", f"body: has {len(lines):,} lines, send at most {most:,} at a time")
    decode = msgspec.json.Decoder(kind).decode
    found = []
    for number, line in lines:
        try:
            # Nearly all lines are right: their fields are looked at one by one only to name the wrong one.
            found.append(decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            try:
                found.append(from_json(line, kind))
            except RefusedError as error:
                raise _wrong(f"line {number}: {error.message}") from error
    return found


def refuse_all(names: Iterable[str]) -> None:
    """Raise RefusedError when there is any parameter."""
    for name in names:
        raise _wrong(f"{name}: is not a parameter here, there are none")


def convert(values: Mapping[str, Any], kind: type[T], *, from_text: bool = False) -> T:
    """Convert values to a struct; with `from_text` numbers and booleans are text. Raises RefusedError that names the
    wrong value.
    """
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in values:
        if name not in fields:
            near = get_close_matches(name, fields, 1)
            known = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            raise _wrong(f"{name}: is not a parameter here, {known}")
    if missing := next((name for name, field in fields.items() if field.required and name not in values), None):
        raise _wrong(f"{missing}: is needed")
    converted = {}
    for name, value in values.items():
        wanted = _given(fields[name].type) if from_text else fields[name].type
        schema = _schema(wanted)
        if from_text and schema.get("type") == "integer" and _NUMBER.fullmatch(value):
            value = int(value)
        elif from_text and schema.get("type") == "boolean" and value in ("true", "false"):
            value = value == "true"
        try:
            converted[name] = msgspec.convert(value, wanted)
        except msgspec.ValidationError as error:
            if isinstance(value, str) and _is_reason(schema):
                raise _wrong(f"{name}: {unknown_reason(value)}") from error
            raise _wrong(f"{name}: must be {_description(schema)}") from error
    return kind(**converted)


def _given(kind: Any) -> Any:
    """Drop None from a type: a parameter that is present is not null."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    return Union[tuple(choice for choice in get_args(kind) if choice is not NoneType)]  # noqa: UP007


def _schema(kind: Any) -> dict[str, Any]:
    (schema,), components = msgspec.json.schema_components([kind], ref_template="{name}")

    def resolved(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return components[part["$ref"]]
        return {key: [resolved(p) for p in v] if key == "anyOf" else resolved(v) for key, v in part.items()}

    found: dict[str, Any] = resolved(schema)
    return found


def _is_reason(schema: Mapping[str, Any]) -> bool:
    return any(choice.get("pattern") == REASON_PATTERN for choice in schema.get("anyOf", [schema]))


def _description(schema: Mapping[str, Any]) -> str:
    """Describe the values that a schema accepts."""
    if "anyOf" in schema:
        return " or ".join(_description(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    match schema["type"]:
        case "integer":
            low, high = schema.get("minimum"), schema.get("maximum")
            if high is None or high >= 2**63 - 1:
                return "a whole number" + (f", {low} or more" if low is not None else "")
            return f"a whole number from {low} to {high}"
        case "string" if schema.get("format") == "date-time":
            return "a time like 2026-11-23T08:00:00Z (+ is written %2B in an address)"
        case "string":
            low, high = schema.get("minLength", 0), schema.get("maxLength")
            return "text" if high is None else f"text of {low} to {high} characters"
        case "array":
            return f"a list, each {_description(schema['items'])}"
        case "boolean":
            return "true or false"
        case "number":
            return "a number"
        case "null":
            return "null"
        case other:
            return f"of the type {other}"


def _wrong(message: str) -> RefusedError:
    return RefusedError(400, "400", message)
