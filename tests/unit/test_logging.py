"""Logging never makes the server wait, and tells journald how bad an event is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from notify_server.telemetry.logging import BackgroundStream
from tests.support.waiting import SECONDS

LOG = """
import os, sys
status = os.fstat(2)
os.environ["JOURNAL_STREAM"] = sys.argv[1] if len(sys.argv) > 1 else f"{status.st_dev}:{status.st_ino}"
import structlog
from notify_server.config import LogConfig
from notify_server.telemetry.logging import set_up_logging
set_up_logging(LogConfig(format=os.environ["FORM"], level="debug"), background=True)
log = structlog.get_logger()
log.debug("d"); log.info("i"); log.warning("w"); log.error("e"); log.critical("c")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("x")
import logging
logging.getLogger("library").error("from a library")
"""


def logged(form: str, *arguments: str) -> list[str]:
    end = subprocess.run(
        [sys.executable, "-c", LOG, *arguments],
        env=os.environ | {"FORM": form},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    return end.stderr.splitlines()


@pytest.mark.parametrize("form", ["console", "json"])
def test_every_line_to_journald_begins_with_its_priority(form: str) -> None:
    lines = logged(form)
    assert [line[:3] for line in lines[:5]] == ["<7>", "<6>", "<4>", "<3>", "<2>"]
    assert all(line.startswith("<3>") for line in lines[5:])
    assert "from a library" in lines[-1]


def test_lines_to_anything_else_have_no_priority() -> None:
    assert not any(line.startswith("<") for line in logged("console", "1:2"))


def test_a_stalled_reader_loses_lines_and_delays_no_writer() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="utf-8") as stream, os.fdopen(reading, encoding="utf-8") as reader:
        log = BackgroundStream(stream, max_lines=50)
        line = "x" * 4095 + "\n"
        # More than a pipe and the queue hold: returns although no one reads.
        for _ in range(1000):
            log.write(line)
        assert log.dropped > 0
        kept = 1000 - log.dropped
        assert [reader.readline() for _ in range(1)] == [line]
        seen = 1
        while (text := reader.readline()) == line:
            seen += 1
        assert text == f"{log.dropped} log lines dropped: standard error is not read\n"
        while seen < kept:
            assert reader.readline() == line
            seen += 1
        log.close()


def test_a_stream_whose_reader_is_gone_raises_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError), os.fdopen(writing, "w", encoding="utf-8") as stream:
        log = BackgroundStream(stream)
        log.write("a\n")
        # Returns: the thread has met the error, and ended all the same. Closing the stream then raises it.
        log.close()
