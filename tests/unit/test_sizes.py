"""Modules, classes and functions of the package stay short enough to be read in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import notify_server

PACKAGE = Path(notify_server.__file__).parent
MAX_MODULE = 400
MAX_CLASS = 300
MAX_FUNCTION = 60


def too_long(name: str, text: str) -> Iterator[str]:
    """The parts of a module that exceed their limit, with their lengths; decorators count."""
    if (lines := len(text.splitlines())) > MAX_MODULE:
        yield f"{name}: {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = (node.end_lineno or first) - first + 1
            if lines > (MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION):
                yield f"{name}, {node.name}: {lines} lines"


def test_no_module_class_or_function_is_too_long() -> None:
    modules = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    assert len(modules) > 100
    assert [each for name, path in sorted(modules.items()) for each in too_long(name, path.read_text())] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1\n" * 400, []),
        ("x = 1\n" * 401, ["a.py: 401 lines"]),
        ("def f():\n" + " x = 1\n" * 59, []),
        ("@property\ndef f():\n" + " x = 1\n" * 59, ["a.py, f: 61 lines"]),
        ("async def f():\n" + " x = 1\n" * 60, ["a.py, f: 61 lines"]),
        ("class A:\n" + " x = 1\n" * 299, []),
        ("class A:\n" + " x = 1\n" * 300, ["a.py, A: 301 lines"]),
    ],
)
def test_lengths_over_the_limits_are_found(text: str, found: list[str]) -> None:
    assert list(too_long("a.py", text)) == found
