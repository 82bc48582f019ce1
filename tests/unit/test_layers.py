"""Imports point down only, and what a process does not need it does not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import notify_server

HOUSE = "notify_server"
ROOT = Path(notify_server.__file__).parent
# From the bottom. What stands in one set is one part; parts on one level know nothing of each other. A package stands
# for all that is in it, unless a module of it has a place of its own.
LAYERS: tuple[tuple[frozenset[str], ...], ...] = tuple(
    tuple(frozenset(part.split()) for part in level)
    for level in (
        ["model", "errors", "clock", "frames", "tasks"],
        ["contract", "verify.guard"],
        ["config"],
        ["verify.policy", "verify.frames", "child"],
        ["store", "verify.hosts", "verify.shares", "verify.reach", "verify.prober", "observe", "tracing"],
        ["timeline", "actions"],
        ["web", "verify.link verify.pool", "forward"],
        ["app"],
        ["simulator"],
        ["cli"],
        ["__main__"],
    )
)
# Packages whose modules have places of their own; their own `__init__` imports nothing of the house.
BARE = frozenset({"", "verify"})
# What these may import of the house, and nothing else.
ONLY = {"verify.prober": frozenset({"model", "frames", "verify.guard", "verify.frames"})}
# Processes of their own, which nobody imports.
NEVER_IMPORTED = frozenset({"verify.prober", "store.keeper"})


def place_of(module: str) -> tuple[int, frozenset[str]] | None:
    """The level of a module (its name without `notify_server.`), and the part it belongs to."""
    for name in (module, module.partition(".")[0]):
        for level, parts in enumerate(LAYERS):
            for part in parts:
                if name in part:
                    return level, part
    return None


def modules() -> dict[str, Path]:
    """Every module of the house, without `notify_server.`; the package itself is the empty name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported_names(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """The full names of all that a module's source imports, wherever in it that is done."""
    here = f"{HOUSE}.{module}".rstrip(".").split(".")
    package = here if is_package else here[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def house_imports(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """The modules of the house that a source imports, as in `MODULES`; a name in a module stands for the module."""
    found = set()
    for name in imported_names(source, module, is_package=is_package):
        if name != HOUSE and not name.startswith(f"{HOUSE}."):
            continue
        inner = name.removeprefix(HOUSE).removeprefix(".")
        while inner not in MODULES:
            inner = inner.rpartition(".")[0]
        found.add(inner)
    return found


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with a module's imports, one line each."""
    imports = sorted(house_imports(source, module, is_package=is_package) - {module})
    if module in BARE:
        return [f"{module or HOUSE} imports {name}" for name in imports]
    if module in ONLY:
        return [f"{module} imports {name}" for name in imports if name not in ONLY[module]]
    place = place_of(module)
    assert place is not None, f"{module} has no place in LAYERS: give it one"
    wrong = []
    for name in imports:
        other = place_of(name) if name not in BARE else (-1, frozenset[str]())
        assert other is not None, f"{name} has no place in LAYERS: give it one"
        if name in NEVER_IMPORTED or not (other[0] < place[0] or other[1] == place[1]):
            wrong.append(f"{module} imports {name}")
    return wrong


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module or HOUSE)
def test_a_module_imports_only_what_is_below_it(module: str) -> None:
    path = MODULES[module]
    assert violations(module, path.read_text("utf-8"), is_package=path.name == "__init__.py") == []


def test_the_house_has_the_modules_that_the_layers_are_about() -> None:
    # Without this, a renamed package would make the tests above true of nothing.
    wanted = {"model", "errors", "config", "observe", "app", "cli", "__main__", "contract", "store", "web"}
    wanted |= {f"verify.{name}" for name in ("guard", "policy", "frames", "hosts", "prober", "link", "pool")}
    assert wanted <= MODULES.keys()


# -- the test itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("model", "from notify_server.config import Config", ["model imports config"]),
        ("model", "import notify_server.errors", ["model imports errors"]),
        ("contract.wire", "from ..config import Config", ["contract.wire imports config"]),
        ("contract.wire", "from .. import config as c, model", ["contract.wire imports config"]),
        ("config", "from notify_server.verify import policy", ["config imports verify.policy"]),
        ("verify.policy", "def f():\n    import notify_server.store.base", ["verify.policy imports store.base"]),
        ("verify.guard", "from .policy import judge", ["verify.guard imports verify.policy"]),
        ("verify.hosts", "from notify_server.store.base import Store", ["verify.hosts imports store.base"]),
        ("store.sqlite", "from notify_server.verify.hosts import Host", ["store.sqlite imports verify.hosts"]),
        (
            "store.sqlite",
            "if TYPE_CHECKING:\n    from notify_server.web import errors",
            ["store.sqlite imports web.errors"],
        ),
        ("web.callback", "import notify_server.verify.pool as p", ["web.callback imports verify.pool"]),
        ("verify.pool", "from notify_server.web.errors import RefusedError", ["verify.pool imports web.errors"]),
        ("verify.link", "from notify_server.verify.prober import Handle", ["verify.link imports verify.prober"]),
        ("app", "import importlib\nimportlib.import_module('notify_server.cli.main')", ["app imports cli.main"]),
        ("app", "from notify_server.verify.prober import main", ["app imports verify.prober"]),
        ("cli.main", "from notify_server.__main__ import main", ["cli.main imports __main__"]),
        ("verify.prober", "from notify_server.verify.policy import judge", ["verify.prober imports verify.policy"]),
        ("verify.prober", "import notify_server.config, os", ["verify.prober imports config"]),
    ],
)
def test_an_import_that_points_up_or_aside_is_found(module: str, source: str, wrong: list[str]) -> None:
    assert violations(module, source) == wrong


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model", "import msgspec\nfrom enum import StrEnum"),
        ("config", "from notify_server.contract.signature import PlatformKey"),
        ("store.sqlite", "from .base import Store\nfrom notify_server import model"),
        ("verify.pool", "from notify_server.verify.link import ProberLink\nfrom . import policy"),
        ("verify.prober", "from notify_server.model import Request\nfrom .frames import frame"),
        ("web.callback", "from notify_server.web.errors import error_response\nimport notify_server_of_others.app"),
        ("simulator", "from notify_server import config, model"),
        ("cli.serve", "from notify_server.app import serve"),
        ("__main__", "from notify_server.cli import main"),
    ],
)
def test_an_import_that_points_down_is_allowed(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_a_package_that_only_holds_modules_imports_none_of_them() -> None:
    assert violations("verify", "from notify_server.verify.pool import Pool", is_package=True) == [
        "verify imports verify.pool"
    ]
    assert violations("", "from .model import Reason", is_package=True) == ["notify_server imports model"]


def test_a_module_without_a_place_is_not_let_through() -> None:
    with pytest.raises(AssertionError, match="no place"):
        violations("novelty", "import os")


# -- what is loaded ----------------------------------------------------------------------------------------------------


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_daemon_loads_neither_libcurl_nor_the_command_lines_parts() -> None:
    loaded = python("import sys, notify_server.app; print(*sys.modules)").split()
    assert "notify_server.app" in loaded
    assert not {name for name in loaded if name.split(".")[0] in ("pycurl", "typer", "click")}
    assert not {name for name in loaded if name.startswith(("notify_server.cli", "notify_server.verify.prober"))}


def test_the_daemon_does_not_need_rich() -> None:
    # structlog loads it where it is installed, which cannot be helped; nothing of the house may.
    assert python(
        "import sys; sys.modules.update(dict.fromkeys(['rich', 'typer', 'pycurl']))\n"
        "import notify_server.app; print('imported')"
    ) == ("imported\n")


def test_a_prober_loads_nothing_of_the_daemons() -> None:
    loaded = python("import sys, notify_server.verify.prober; print(*sys.modules)").split()
    assert "pycurl" in loaded
    unwanted = {"pydantic", "pydantic_settings", "aiohttp", "structlog", "sqlite3", "asyncio", "cryptography", "uvloop"}
    unwanted |= {"typer", "rich", "prometheus_client"}
    assert not unwanted & {name.split(".")[0] for name in loaded}
    house = {name for name in loaded if name.split(".")[0] == HOUSE}
    allowed = {"verify", "verify.prober", "verify.guard", "verify.frames", "model", "frames"}
    assert house == {HOUSE, *(f"{HOUSE}.{name}" for name in allowed)}
