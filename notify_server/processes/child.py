"""A child process of the daemon: started, kept running, and talked to in frames over its standard input and output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence

import structlog

from notify_server.processes.frames import Frames, frame

log = structlog.get_logger("notify_server")

READ_BYTES = 1 << 20
RESTART_SHORTEST = 0.05
RESTART_LONGEST = 5.0
# How settings begin in the environment: the daemon's own, and those of its tracing, which may hold credentials.
DAEMONS_OWN = ("NOTIFY_SERVER__", "OTEL_")


def module(name: str) -> list[str]:
    """The command that runs a module of this package."""
    return [sys.executable, "-m", f"notify_server.{name}"]


class Child:
    """One process at a time. It is sent `first` when it starts, and is up once it has answered that.

    `name` is what the log calls it; `restarts` counts the processes that were started because another had ended;
    `finishing` is true once it has been told to end.
    """

    def __init__(self, name: str, command: Sequence[str], first: bytes) -> None:
        self._name = name
        self._command = command
        self._first = first
        self._process: Process | None = None
        self._up = False
        self.finishing = False
        self.restarts = 0

    @property
    def up(self) -> bool:
        """Whether the process runs and has answered its first frame."""
        return self._up

    @property
    def pid(self) -> int | None:
        """The process id, None while there is no process."""
        return self._process.pid if self._process is not None else None

    def send(self, payload: bytes) -> None:
        """Hand it a frame. When the process is gone that is lost, as `on_death` tells."""
        pipe = self._process.stdin if self._process is not None else None
        # uvloop raises on a pipe whose other end it knows to be gone, which may be before `on_death` is called.
        if pipe is not None and not pipe.is_closing():
            pipe.write(frame(payload))

    async def run(
        self,
        on_up: Callable[[bytes], object],
        on_frame: Callable[[bytes], object],
        on_death: Callable[[], object],
    ) -> None:
        """Keep a process running until it ends after `finish`.

        `on_up` is told its first frame, `on_frame` every later one; `on_death` is called when a process that was up has
        ended: what it was sent and has not answered is lost.
        """
        delay = RESTART_SHORTEST
        while not self.finishing:
            process = self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=PIPE, stdout=PIPE, env=_environment()
            )
            try:
                self.send(self._first)
                frames = Frames()
                while data := await _receive(process):
                    for payload in frames.feed(data):
                        if self._up:
                            on_frame(payload)
                            # Callbacks have their turn between two frames, however many are here.
                            await asyncio.sleep(0)
                        else:
                            self._up = True
                            delay = RESTART_SHORTEST
                            log.debug(f"{self._name} ready", pid=process.pid)
                            on_up(payload)
            finally:
                was_up, self._up = self._up, False
                # One that was told to finish is finishing, and is given the time.
                if not self.finishing:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                status = await process.wait()
            if was_up:
                on_death()
            if self.finishing:
                return
            log.error(f"{self._name} ended, starting another", pid=process.pid, status=status)
            await asyncio.sleep(delay)
            self.restarts += 1
            delay = min(delay * 2, RESTART_LONGEST)

    def finish(self) -> None:
        """Close its input: it ends by itself once it has done what it was sent."""
        self.finishing = True
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        """End it at once."""
        self.finishing = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


async def _receive(process: Process) -> bytes:
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):
        return await process.stdout.read(READ_BYTES)
    return b""


def _environment() -> dict[str, str]:
    # A child needs none of the daemon's settings, and must not be able to leak them.
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(DAEMONS_OWN)}
