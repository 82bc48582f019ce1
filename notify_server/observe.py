"""Logs and metrics: set up once by the composition root, never from the import of a module."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from notify_server.config import LogConfig

ACK_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


def set_up_logging(config: LogConfig) -> None:
    """Log to standard error, one line an event, in colour on a terminal or as JSON.

    Values from outside are escaped (JSON strings, or repr on the console), so that no event can forge another line.
    """
    level = logging.getLevelNamesMapping()[config.level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if config.format == "json":
        renderer: list[structlog.typing.Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ]
    else:
        renderer = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            )
        ]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # What libraries log, asyncio's "exception was never retrieved" above all, goes the same way.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processor=renderer[-1], foreign_pre_chain=shared)
    )  # fmt: skip
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def _to_json(event: Any, **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()


class Metrics:
    """What Prometheus is told, in a registry of its own: an application has one, and a test as many as it likes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        callbacks = Counter(
            "notify_server_callbacks",
            "Callbacks answered, by the code of the answer.",
            ["code"],
            registry=self.registry,
        )
        self.callbacks = callbacks.labels
        self.accepted = callbacks.labels("000")
        self.ack_seconds = Histogram(
            "notify_server_ack_seconds",
            "From the callback's headers to its durable acknowledgement.",
            buckets=ACK_BUCKETS,
            registry=self.registry,
        )
        self.unknown_fields = Counter(
            "notify_server_unknown_fields",
            "Fields in notifications that the contract does not know.",
            registry=self.registry,
        )
        self.verdicts = Counter("notify_server_verdicts", "Verdicts reached.", ["verdict"], registry=self.registry)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def render(self) -> tuple[bytes, str]:
        """The exposition, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
