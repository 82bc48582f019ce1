"""Reloads the configuration and the certificate at SIGHUP, as far as they can change while the server runs.

Most keys are read once, when the parts are built; those that differ in the new file are named in the log, and wait for
a restart. A file with errors changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from notify_server.config import Config, RetentionConfig
from notify_server.errors import ConfigError, ListenError
from notify_server.listening import Certificate
from notify_server.telemetry.logging import set_level

log = structlog.get_logger("notify_server")

# The keys that take effect at once.
LIVE_KEYS = frozenset({"[log] level", "[retention] completed", "[retention] rejections"})


class Live:
    """The settings in effect that a reload changes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.retention: RetentionConfig = config.retention


def changed_keys(old: Config, new: Config) -> list[str]:
    """Return the keys that differ, as messages name them."""
    changed = []
    for section in type(new).model_fields:
        before, after = getattr(old, section), getattr(new, section)
        if section == "forward":
            changed += ["[[forward]]"] if before != after else []
            continue
        changed += [
            f"[{section}] {key}" for key in type(after).model_fields if getattr(before, key) != getattr(after, key)
        ]
    return changed


def reload(live: Live, certificate: Certificate, load: Callable[[], Config]) -> None:
    """Apply what `load` returns as far as it can change while the server runs, and log the rest by name."""
    try:
        new = load()
        certificate.reload(live.config.server)
    except ConfigError as error:
        log.error("configuration not reloaded, nothing is changed", problems=list(error.problems))
        return
    except ListenError as error:
        log.error("configuration not reloaded, nothing is changed", problems=[str(error)])
        return
    changed = changed_keys(live.config, new)
    applied = [key for key in changed if key in LIVE_KEYS]
    needs_restart = [key for key in changed if key not in LIVE_KEYS]
    live.retention = new.retention
    set_level(new.log.level)
    # A key that waits for a restart is named again at the next reload.
    live.config = live.config.model_copy(update={"retention": new.retention, "log": new.log})
    log.info("configuration reloaded", changed=applied, certificate=certificate.context is not None)
    if needs_restart:
        log.warning("restart the server to change these", keys=needs_restart)
