"""Sets up logging, once, by the command that runs."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from typing import Any, TextIO, cast

import structlog
from aiohttp.http_exceptions import HttpProcessingError

from notify_server.config import LogConfig


class BestEffortStream:
    """A stream whose reader may go away: that must not stop what wanted to say something."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def set_up_logging(config: LogConfig) -> None:
    """Log to standard error, one line an event, in colour on a terminal or as JSON.

    Values from outside are escaped (JSON strings, or repr on the console), so that no event can forge another line.
    """
    stream = cast("TextIO", BestEffortStream(sys.stderr))
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
            _inert,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    # What libraries log, asyncio's "exception was never retrieved" above all, goes the same way.
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
            foreign_pre_chain=shared,
        )
    )
    handler.addFilter(_is_news)
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


# Valid JSON, but obeyed by terminals, taken for line ends, or not encodable.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _to_json(event: Any, **_: object) -> str:
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(event, ensure_ascii=False, default=str))


def _inert(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape the text that is not printable."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[name] = value.encode("unicode_escape").decode()
    return event


def _is_news(record: logging.LogRecord) -> bool:
    """Not that a request was malformed: aiohttp tells with a traceback, and quotes headers that may hold a token."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
