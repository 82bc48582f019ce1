"""Imports structlog without rich, which it would load for tracebacks in colour: 4 MiB, and a tenth of a second."""

from notify_server.lean import hidden

with hidden("rich"):
    import structlog  # noqa: F401
