"""Starts tracing if the environment asks for it. OpenTelemetry is loaded only then."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import structlog

from notify_server.config import version
from notify_server.telemetry.metrics import tracing_wanted

if TYPE_CHECKING:
    from notify_server.telemetry.tracing import Tracing

log = structlog.get_logger("notify_server")


def open_tracing() -> Tracing | None:
    """Return the tracing that the environment configures, None without one. An invalid setting stops nothing."""
    if not tracing_wanted(os.environ):
        return None
    try:
        from notify_server.telemetry.tracing import Tracing

        tracing = Tracing.to_collector(version())
    except ImportError as error:
        log.warning(
            "no traces: OTEL_… is set, but the extra is missing: `pip install 'notify-server[otel]'`", error=str(error)
        )
        return None
    except Exception as error:
        log.warning("no traces: OTEL_… has a value that cannot be used", error=str(error))
        return None
    log.info("traces are exported over OTLP/HTTP")
    return tracing
