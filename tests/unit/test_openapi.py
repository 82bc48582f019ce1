"""The OpenAPI document keeps the rules of redocly's recommended set, by which generators make good clients."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from notify_server.web.api.endpoints import describe
from notify_server.web.openapi import TAGS

DOCUMENT = describe("1.0")
METHODS = ("get", "post", "delete", "put", "patch")


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        assert set(item) <= set(METHODS)
        for method, operation in item.items():
            yield f"{method} {path}", operation


def schemas(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from schemas(each)


def test_document_names_its_server_licence_and_security() -> None:
    assert DOCUMENT["servers"] == [{"url": "/"}]
    assert DOCUMENT["info"]["license"]["identifier"] == "MIT"
    (used,) = DOCUMENT["security"]
    assert set(used) == set(DOCUMENT["components"]["securitySchemes"])


def test_every_operation_has_a_declared_tag_a_summary_and_an_id_of_its_own() -> None:
    declared = {tag["name"] for tag in DOCUMENT["tags"]}
    assert declared == set(TAGS) and all(tag["description"] for tag in DOCUMENT["tags"])
    found = dict(operations())
    assert {tag for operation in found.values() for tag in operation["tags"]} == declared
    assert all(operation["summary"] and len(operation["tags"]) == 1 for operation in found.values())
    ids = [operation["operationId"] for operation in found.values()]
    assert len(set(ids)) == len(ids) > 20


def test_every_operation_describes_a_success_and_a_refusal() -> None:
    for name, operation in operations():
        codes = operation["responses"]
        assert any(code.startswith("2") for code in codes) and any(code.startswith("4") for code in codes), name


def test_every_path_parameter_is_declared_once() -> None:
    for name, operation in operations():
        declared = [each["name"] for each in operation["parameters"] if each["in"] == "path"]
        assert sorted(declared) == sorted(set(re.findall(r"{(\w+)}", name))), name
        every = [(each["in"], each["name"]) for each in operation["parameters"]]
        assert len(set(every)) == len(every), name


def test_every_reference_leads_to_a_component_and_every_component_is_used() -> None:
    references = {part["$ref"] for part in schemas(DOCUMENT) if "$ref" in part}
    components = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    assert references == components


def test_times_have_the_format_of_times() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        for field, kind in schema.get("properties", {}).items():
            if field.endswith("_at"):
                assert "date-time" in str(kind), f"{name}.{field}"
