"""Imports libraries without optional parts that a server never uses. Whatever starts a process of the server imports
these modules first.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hidden(name: str) -> Iterator[None]:
    """Let `import name` fail for a while, as if the module was not installed."""
    loaded = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if loaded is None:
            del sys.modules[name]
        else:
            sys.modules[name] = loaded
