"""Imports asyncio without TLS, for processes that talk to the daemon only: 1 MiB."""

from notify_server.lean import hidden

with hidden("ssl"):
    import asyncio  # noqa: F401
