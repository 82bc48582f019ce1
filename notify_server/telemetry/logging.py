"""Sets up logging, once per process."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import queue
import re
import sys
import threading
from collections.abc import Mapping
from typing import Any, TextIO, cast

import structlog
from aiohttp.http_exceptions import HttpProcessingError

from notify_server.config import LogConfig

# Lines that wait for a slow reader of standard error; more are dropped, so neither acks nor memory suffer.
MAX_WAITING_LINES = 10_000
EXIT_SECONDS = 1.0
# syslog(3); journald reads them from the beginning of a line.
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


class BackgroundStream:
    """Writes to a stream from a thread of its own, so that the caller never waits for the stream's reader.

    At most `max_lines` wait. Later ones are dropped and counted in `dropped`; a line says how many once
    the reader goes on.
    """

    def __init__(self, stream: TextIO, *, max_lines: int = MAX_WAITING_LINES) -> None:
        self._stream = stream
        self._max_lines = max_lines
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.dropped = 0
        self._reported = 0
        # A daemon thread: one that is blocked in a write must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Queue the text, or count it as dropped."""
        if self._lines.qsize() < self._max_lines:
            self._lines.put(text)
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Do nothing: the thread flushes each line."""

    def close(self) -> None:
        """Write what waits, for at most EXIT_SECONDS."""
        self._lines.put(None)
        self._thread.join(EXIT_SECONDS)

    def _run(self) -> None:
        while (text := self._lines.get()) is not None:
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(text)
                if (dropped := self.dropped) > self._reported:
                    self._stream.write(f"{dropped - self._reported} log lines dropped: standard error is not read\n")
                    self._reported = dropped
                self._stream.flush()


class BestEffortStream:
    """Writes to a stream whose reader may go away, without failing the writer."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def set_up_logging(config: LogConfig, *, background: bool = False) -> None:
    """Log to standard error, one line an event, in colour on a terminal or as JSON; for journald with priorities.

    Values from outside are escaped (JSON strings, or repr on the console), so that no event can forge another line.
    With `background` a thread writes, see BackgroundStream.
    """
    stream = cast("TextIO", BestEffortStream(sys.stderr))
    if background:
        queued = BackgroundStream(stream)
        atexit.register(queued.close)
        stream = cast("TextIO", queued)
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
    if _is_journal(os.environ, 2):
        renderer[-1] = _with_priority(renderer[-1])
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    # Messages of libraries, above all asyncio's "exception was never retrieved", are formatted alike.
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
            foreign_pre_chain=shared,
        )
    )
    handler.addFilter(_is_news)
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def set_level(level: str) -> None:
    """Write nothing below this level from now on."""
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(number))
    logging.getLogger().setLevel(max(number, logging.WARNING))


def _is_journal(environ: Mapping[str, str], descriptor: int) -> bool:
    """Return True when the descriptor is the stream to journald that systemd names in JOURNAL_STREAM, and was not
    redirected since (systemd.exec(5)).
    """
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _with_priority(render: structlog.typing.Processor) -> structlog.typing.Processor:
    """Begin every line with the priority of its event (sd-daemon(3))."""

    def prioritised(logger: Any, method: str, event: structlog.typing.EventDict) -> str:
        priority = _PRIORITIES.get(str(event.get("level", method)), 6)
        return "\n".join(f"<{priority}>{line}" for line in str(render(logger, method, event)).splitlines())

    return prioritised


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
    """Return False for aiohttp's message about a malformed request: its traceback quotes headers that may hold a
    token.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
