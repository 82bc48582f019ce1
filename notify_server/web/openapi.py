"""Builds the OpenAPI 3.1 document from the table of endpoints and their types."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

ERROR = {
    "type": "object",
    "title": "Error",
    "description": "Every error has this shape, which is the platform's response convention.",
    "properties": {
        "request_id": {"type": "string", "format": "uuid"},
        "code": {"type": "string", "description": "The HTTP status, or a more precise code."},
        "msg": {"type": "string", "description": "The parameter that is wrong, and what to do."},
        "data": {"type": "null"},
    },
    "required": ["request_id", "code", "msg", "data"],
}


# The names of forwarding endpoints.
NAME = "[A-Za-z0-9_-]{1,64}"

# Groups of endpoints: what they are about, and the first word of their paths.
TAGS = {
    "server": ("The server process, its activity and the storage hosts.", ("status", "series", "stream", "hosts")),
    "record": (
        "Batches, files, failures and rejected notifications.",
        ("totals", "batches", "files", "failures", "rejections", "search", "export", "verdict", "notifications"),
    ),
    "actions": (
        "Recheck, acknowledge, delete, and who did what.",
        ("recheck", "prune", "attention", "acknowledge", "actions"),
    ),
    "forwarding": ("Events, and the endpoints that they are sent to.", ("events", "forward", "deliveries")),
    "expectations": ("Submissions that a notification is expected for.", ("expectations",)),
}


class Created(NamedTuple):
    """An answer with the status 201."""

    answer: msgspec.Struct


class Endpoint(NamedTuple):
    """An operation of the API. `path` has its parameters in braces: `{name}` is a name, any other an integer. `handler`
    takes Api and the request's parts.

    `query` and `body` are the types of the request, `answer` that of the JSON answer; `media` are the media types of
    an answer that is not JSON.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    query: type[msgspec.Struct] | None = None
    body: type[msgspec.Struct] | None = None
    answer: Any = None
    media: tuple[str, ...] = ()
    # Further refusals: the status, and what it means.
    refusals: tuple[tuple[str, str], ...] = ()
    # The body may be NDJSON (application/x-ndjson) of so many lines, each of the type `body`; then the answer is of the
    # type `lines_answer`. The status is 201 when anything was created.
    max_lines: int = 0
    lines_answer: Any = None

    @property
    def id(self) -> str:
        """The operationId: the name of the handler."""
        return self.handler.__name__

    @property
    def route(self) -> str:
        """The path as aiohttp takes it."""
        path = self.path.replace("{name}", f"{{name:{NAME}}}")
        return re.sub(r"{(\w+)}", r"{\1:[0-9]{1,19}}", path)

    @property
    def tag(self) -> str:
        """The group that it belongs to."""
        noun = self.path.split("/")[3]
        return next(name for name, (_, nouns) in TAGS.items() if noun in nouns)

    @property
    def parameters(self) -> list[str]:
        """The names in the path."""
        return re.findall(r"{(\w+)}", self.path)


def document(endpoints: Sequence[Endpoint], version: str, summary: Callable[[Endpoint], str]) -> dict[str, Any]:
    """Return the OpenAPI document."""
    types = [kind for e in endpoints for kind in (e.query, e.body, e.answer, e.lines_answer) if kind is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    _say_times(types, components)
    of_type = {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    queries = set()
    for endpoint in endpoints:
        operation: dict[str, Any] = {
            "operationId": endpoint.id,
            "summary": summary(endpoint),
            "tags": [endpoint.tag],
            "parameters": [
                {
                    "name": name,
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "pattern": f"^{NAME}$"}
                    if name == "name"
                    else {"type": "integer", "minimum": 1, "maximum": 2**63 - 1},
                }
                for name in endpoint.parameters
            ],
            "responses": _responses(endpoint, of_type),
        }
        if endpoint.query is not None:
            name = of_type[id(endpoint.query)]["$ref"].rpartition("/")[2]
            queries.add(name)
            operation["parameters"] += [
                {
                    "name": field,
                    "in": "query",
                    "required": field in components[name].get("required", ()),
                    "schema": _without_null(schema),
                }
                for field, schema in components[name]["properties"].items()
            ]
        if endpoint.body is not None:
            operation["requestBody"] = _request_body(endpoint, of_type[id(endpoint.body)])
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "notify_server",
            "version": version,
            "description": "Delivered batches and files, check results, and actions. Times are UTC.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        # Relative to the address of this document.
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, (text, _) in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": {**{name: schema for name, schema in components.items() if name not in queries}, "Error": ERROR},
            "securitySchemes": {"admin_token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"admin_token": []}],
    }


def _say_times(types: Sequence[Any], components: dict[str, Any]) -> None:
    """Add the format of times to the schemas: msgspec gives it to those that must have an offset alone."""
    seen: set[type] = set()

    def visit(info: Any) -> None:
        if isinstance(info, inspect.StructType):
            if info.cls in seen:
                return
            seen.add(info.cls)
            properties = components.get(info.cls.__name__, {}).get("properties", {})
            for field in info.fields:
                choices = field.type.types if isinstance(field.type, inspect.UnionType) else (field.type,)
                if any(isinstance(choice, inspect.DateTimeType) for choice in choices):
                    schema = properties[field.encode_name]
                    for part in schema.get("anyOf", [schema]):
                        if part.get("type") == "string":
                            part["format"] = "date-time"
                visit(field.type)
        elif isinstance(info, inspect.UnionType):
            for choice in info.types:
                visit(choice)
        elif isinstance(info, inspect.ListType):
            visit(info.item_type)

    for each in inspect.multi_type_info(types):
        visit(each)


def _request_body(endpoint: Endpoint, schema: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if endpoint.max_lines:
        lines = f"{endpoint.max_lines:,} lines with an object each"
        body["description"] = f"An object, or as application/x-ndjson up to {lines}."
    return body


def _responses(endpoint: Endpoint, of_type: dict[int, dict[str, Any]]) -> dict[str, Any]:
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    if endpoint.media:
        content = {media: {"schema": {"type": "string"}} for media in endpoint.media}
    else:
        schema = of_type[id(endpoint.answer)]
        if endpoint.lines_answer is not None:
            schema = {"anyOf": [schema, of_type[id(endpoint.lines_answer)]]}
        content = {"application/json": {"schema": schema}}
    responses: dict[str, Any] = {
        "200": {"description": "Success.", "content": content},
        "400": {"description": "Invalid parameter; msg names it.", "content": refused},
        "401": {"description": "The admin_token is missing or wrong.", "content": refused},
        "403": {"description": "Not allowed from this origin.", "content": refused},
        "405": {"description": "Method not allowed; see Allow.", "content": refused},
        "503": {"description": "The database is temporarily unavailable; retry.", "content": refused},
    }
    if endpoint.max_lines:
        responses["201"] = {"description": "Created.", "content": content}
    if endpoint.body is not None:
        responses["408"] = {"description": "The body did not arrive in time.", "content": refused}
        responses["413"] = {"description": "The body is too large.", "content": refused}
        responses["415"] = {"description": "The body is not JSON.", "content": refused}
    if endpoint.parameters or endpoint.body is not None:
        responses["404"] = {"description": "No row has this id.", "content": refused}
    for status, meaning in endpoint.refusals:
        responses[status] = {"description": meaning, "content": refused}
    return responses


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Drop null from a parameter's schema: null only means that it is absent."""
    choices = [choice for choice in schema.get("anyOf", ()) if choice != {"type": "null"}]
    if not choices:
        return schema
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
    return {**rest, **(choices[0] if len(choices) == 1 else {"anyOf": choices})}
