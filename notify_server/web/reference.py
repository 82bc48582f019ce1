"""Prepares the OpenAPI document for the reference page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode

# Values of the examples, by the name of the parameter.
_SAMPLES = {"reason": "http_404", "q": "b452c50b"}
_BODIES = {"recheck": {"batch": 1, "dry_run": True}}


class Type(NamedTuple):
    """The type of a value: a word or a type of the document, possibly a list of it, possibly null."""

    word: str
    is_reference: bool = False
    many: bool = False
    nullable: bool = False
    values: tuple[str, ...] = ()


class Field(NamedTuple):
    """A parameter, or a member of an object."""

    name: str
    type: Type
    required: bool
    default: str | None
    description: str


class Operation(NamedTuple):
    """An operation. `example` is its path with sample parameters, `data` the sample body."""

    id: str
    method: str
    path: str
    parameters: list[Field]
    body: Type | None
    answer: Type | None
    media: str
    example: str
    data: str | None


class Described(NamedTuple):
    """A type of the document."""

    name: str
    description: str
    fields: list[Field]
    values: tuple[str, ...]


class Reference(NamedTuple):
    """The content of the page."""

    read: list[Operation]
    act: list[Operation]
    types: list[Described]


def reference(document: Mapping[str, Any]) -> Reference:
    """Read a document made by `openapi.document`."""
    operations = [
        _operation(method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    types = [_described(name, schema) for name, schema in sorted(document["components"]["schemas"].items())]
    return Reference(
        [operation for operation in operations if operation.method == "GET"],
        [operation for operation in operations if operation.method != "GET"],
        types,
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Operation:
    parameters = [_field(each["name"], each["schema"], required=each["required"]) for each in operation["parameters"]]
    ((media, answer), *others) = operation["responses"]["200"]["content"].items()
    example = path
    for each in operation["parameters"]:
        example = example.replace(f"{{{each['name']}}}", "1")
    query = {field.name: _SAMPLES[field.name] for field in parameters if field.required and field.name in _SAMPLES}
    body = operation.get("requestBody")
    id = operation["operationId"]
    return Operation(
        id,
        method,
        path,
        parameters,
        _type(body["content"]["application/json"]["schema"]) if body is not None else None,
        _type(answer["schema"]) if media == "application/json" else None,
        ", ".join([media, *(name for name, _ in others)]),
        f"{example}?{urlencode(query)}" if query else example,
        json.dumps(_BODIES.get(id, {})) if body is not None else None,
    )


def _described(name: str, schema: Mapping[str, Any]) -> Described:
    required = schema.get("required", ())
    fields = [_field(key, value, required=key in required) for key, value in schema.get("properties", {}).items()]
    return Described(name, schema.get("description", ""), fields, _values(schema))


def _field(name: str, schema: Mapping[str, Any], *, required: bool) -> Field:
    default = schema.get("default")
    return Field(
        name,
        _type(schema),
        required,
        json.dumps(default, ensure_ascii=False) if default not in (None, [], {}) else None,
        schema.get("description", ""),
    )


def _values(schema: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in schema.get("enum", ()))


def _type(schema: Mapping[str, Any]) -> Type:
    choices = schema.get("anyOf")
    if choices is not None:
        (first, *_) = [choice for choice in choices if choice != {"type": "null"}]
        return _type(first)._replace(nullable={"type": "null"} in choices)
    if "$ref" in schema:
        return Type(schema["$ref"].rpartition("/")[2], is_reference=True)
    if schema.get("type") == "array":
        return _type(schema["items"])._replace(many=True)
    word = schema.get("type") or ("string" if "enum" in schema else "any")
    return Type(str(schema.get("format", word)), values=_values(schema))
