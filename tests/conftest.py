"""Settings of the whole suite: markers, and seeds that are the same in every run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.support import warm

HERE = Path(__file__).parent
# The folders whose files take longest come first: one that was begun last would be waited for alone.
ORDER = ("torture", "faults", "store", "e2e", "cli", "forward", "bench", "web", "unit")
# Drawn examples and the torture's choices follow from this, so that a failure is the same failure again.
# `make torture` draws a seed of its own each time.
SEED = 20_260_215

settings.register_profile("fixed", derandomize=True, print_blob=True)
settings.register_profile("explore", database=DirectoryBasedExampleDatabase(".hypothesis/examples"))
settings.load_profile("fixed")


def pytest_configure() -> None:
    warm.install()


def pytest_report_header() -> str:
    return f"seed {SEED}; drawn examples are the same in every run (--hypothesis-profile=explore draws others)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by `ORDER`, mark each with its folder, and those that need PostgreSQL with `postgres`."""
    items.sort(key=lambda item: ORDER.index(_folder(item)) if _folder(item) in ORDER else len(ORDER))
    for item in items:
        if folder := _folder(item):
            item.add_marker(folder)
        parameters = (
            item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        )
        if "postgres" in item.path.name or "postgres" in parameters:
            item.add_marker("postgres")


def _folder(item: pytest.Item) -> str:
    """Return the name of the folder of tests/ that a test is in; "" if it is in none."""
    parts = item.path.relative_to(HERE).parts if item.path.is_relative_to(HERE) else ()
    return parts[0] if len(parts) > 1 else ""


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of whatever a test draws by itself."""
    return SEED
