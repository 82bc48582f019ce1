"""Settings of the whole suite: markers, and seeds that are the same in every run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

HERE = Path(__file__).parent
# Drawn examples and the torture's choices follow from this, so that a failure is the same failure again.
# `make torture` draws a seed of its own each time.
SEED = 20_260_215

settings.register_profile("fixed", derandomize=True, print_blob=True)
settings.register_profile("explore", database=DirectoryBasedExampleDatabase(".hypothesis/examples"))
settings.load_profile("fixed")


def pytest_report_header() -> str:
    return f"seed {SEED}; drawn examples are the same in every run (--hypothesis-profile=explore draws others)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the folder that it is in, and those that need PostgreSQL with `postgres`."""
    for item in items:
        folder = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""
        if folder and not folder.endswith(".py"):
            item.add_marker(folder)
        parameters = (
            item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        )
        if "postgres" in item.path.name or "postgres" in parameters:
            item.add_marker("postgres")


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of whatever a test draws by itself."""
    return SEED
