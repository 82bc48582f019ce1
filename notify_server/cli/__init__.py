"""The command line."""

from notify_server.cli.main import main

__all__ = ["main"]
