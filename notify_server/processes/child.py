"""Supervises a child process of the daemon: starts it, talks to it in frames over its standard input and output, and
replaces it when it has ended or hangs.

A child that answers no ping for some time hangs: it is killed, and its unanswered frames are lost, as after a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence

import structlog

from notify_server.processes.frames import FRAME_HEADER, Frames, frame
from notify_server.supervise import let_end, start_task, stop_tasks

log = structlog.get_logger("notify_server")

READ_BYTES = 1 << 20
# A payload from this size on is written without copying it behind its header.
LARGE_FRAME = 1 << 16
MIN_RESTART_SECONDS = 0.05
MAX_RESTART_SECONDS = 5.0
# Silence is counted in ticks of the daemon's loop: time in which the daemon itself stands still does not count.
TICK_SECONDS = 0.2
# Callers that wait for an answer get an error after SILENT_TICKS; the process is killed after HUNG_TICKS.
SILENT_TICKS = 3
HUNG_TICKS = 20
# How long a process may take to load and to send its first sign of life.
START_TICKS = 150
# How long to wait for a killed process: one that waits for a dead disk cannot end.
KILL_SECONDS = 1.0
# Prefixes of settings in the environment: the daemon's own, and those of its tracing, which may hold credentials.
SECRET_PREFIXES = ("NOTIFY_SERVER__", "OTEL_")


def module(name: str) -> list[str]:
    """Return the command that runs a module of this package. `-P` keeps the working directory off its import path."""
    return [sys.executable, "-P", "-m", f"notify_server.{name}"]


class Child:
    """Keeps one process running. It is sent `first` when it starts, and is up once it has answered that.

    `on_up` receives its first frame, `on_frame` every later one. `on_death` is called when a process that was up has
    ended. `on_silent` is called when it has not answered for SILENT_TICKS: it may answer later, or be killed.
    `is_overdue` is called in each tick, with the count of ticks; it returns True if an answer is so late that the
    process must be killed. `name` is for the log; `restarts` counts replacements.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        first: bytes,
        *,
        on_up: Callable[[bytes], object],
        on_frame: Callable[[bytes], object],
        on_death: Callable[[], object],
        on_silent: Callable[[], object] = lambda: None,
        is_overdue: Callable[[int], bool] = lambda ticks: False,
    ) -> None:
        self._name = name
        self._command = command
        self._first = first
        self._on_up = on_up
        self._on_frame = on_frame
        self._on_death = on_death
        self._on_silent = on_silent
        self._is_overdue = is_overdue
        self._process: Process | None = None
        self._up = False
        self._alive = False
        self._silent_ticks = 0
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.restarts = 0
        self.ticks = 0

    @property
    def up(self) -> bool:
        """True while the process runs and has answered its first frame."""
        return self._up

    @property
    def answers(self) -> bool:
        """True while the process is up and not silent, and is not being stopped."""
        return self._up and self._silent_ticks < SILENT_TICKS and not self.stopping

    @property
    def stopping(self) -> bool:
        """True once `stop` has begun."""
        return self._stopping.is_set()

    @property
    def pid(self) -> int | None:
        """The process id, None while there is none."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process and keep one running until `stop`."""
        self._task = start_task(self._run(), f"supervise {self._name}")

    def send(self, payload: bytes) -> None:
        """Send a frame. It is lost when the process is gone, which `on_death` reports."""
        pipe = self._process.stdin if self._process is not None else None
        # uvloop raises on a pipe whose other end is closed, which it may notice before `on_death` is called.
        if pipe is not None and not pipe.is_closing():
            if len(payload) < LARGE_FRAME:
                pipe.write(frame(payload))
            else:
                pipe.write(FRAME_HEADER.pack(len(payload)))
                pipe.write(payload)

    async def stop(self, grace: float) -> bool:
        """Close the input of the process and wait for its end; kill it after `grace` seconds. Return False when it had
        to be killed.
        """
        self._stopping.set()
        if self._task is None:
            return True
        let_end(self._task)
        self._close_input()
        in_time = await self._ended_within(grace)
        if not in_time:
            self._kill()
            if not await self._ended_within(KILL_SECONDS):
                log.error(f"{self._name} cannot be killed, giving up on it", pid=self.pid)
        await stop_tasks(self._task)
        return in_time

    async def _ended_within(self, seconds: float) -> bool:
        assert self._task is not None
        await asyncio.wait([self._task], timeout=seconds)
        return self._task.done()

    async def _run(self) -> None:
        delay = MIN_RESTART_SECONDS
        while not self.stopping:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command, stdin=PIPE, stdout=PIPE, env=_environment()
                )
            except OSError as error:
                log.error(f"{self._name} cannot be started, trying again", error=str(error))
                await self._pause(delay)
                delay = min(delay * 2, MAX_RESTART_SECONDS)
                continue
            was_up = await self._attend(process)
            if was_up:
                delay = MIN_RESTART_SECONDS
                self._on_death()
            if self.stopping:
                return
            log.error(f"{self._name} ended, starting another", pid=process.pid, status=process.returncode)
            await self._pause(delay)
            self.restarts += 1
            delay = min(delay * 2, MAX_RESTART_SECONDS)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _attend(self, process: Process) -> bool:
        """Talk to the process until it has ended; return True if it was up."""
        self._process = process
        self._alive = False
        self._silent_ticks = 0
        watching = start_task(self._watch(process), f"watch {self._name}")
        let_end(watching)
        was_up = False
        try:
            self.send(self._first)
            if self.stopping:
                self._close_input()
            was_up = await self._receive(process)
            # One that is being stopped may take its time after it has closed its output.
            if not self.stopping:
                self._kill()
            await process.wait()
        finally:
            watching.cancel()
            self._up = False
            if process.returncode is None:
                self._kill()
            self._process = None
        return was_up

    async def _receive(self, process: Process) -> bool:
        """Hand over frames until the output of the process ends; return True if it was up."""
        frames = Frames()
        try:
            while data := await _read(process):
                self._alive = True
                self._silent_ticks = 0
                for payload in frames.feed(data):
                    if not payload:
                        continue
                    if self._up:
                        self._on_frame(payload)
                        # Let callbacks run between two frames, however many have arrived.
                        await asyncio.sleep(0)
                    else:
                        self._up = True
                        log.debug(f"{self._name} ready", pid=process.pid)
                        self._on_up(payload)
        except Exception as error:
            # A frame that cannot be decoded now never will be: start another process.
            log.error(f"{self._name} sent an invalid message, please report this", pid=process.pid, exc_info=error)
        return self._up

    async def _watch(self, process: Process) -> None:
        """Ping the process in each tick, and kill it when it hangs."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.ticks += 1
            self._silent_ticks += 1
            if self._up:
                self.send(b"")
                if self._silent_ticks == SILENT_TICKS:
                    self._on_silent()
            limit = HUNG_TICKS if self._alive else START_TICKS
            if self._silent_ticks > limit:
                log.error(
                    f"{self._name} hangs, killing it", pid=process.pid, silent_seconds=self._silent_ticks * TICK_SECONDS
                )
            elif self._is_overdue(self.ticks):
                log.error(f"{self._name} answers pings but not its work, killing it", pid=process.pid)
            else:
                continue
            self._kill()
            return

    def _close_input(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def ticks(seconds: float) -> int:
    """Return the number of ticks that a process is given for something that should take at most `seconds`."""
    return round(seconds / TICK_SECONDS) + 1


async def _read(process: Process) -> bytes:
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):
        return await process.stdout.read(READ_BYTES)
    return b""


def _environment() -> dict[str, str]:
    # A child needs none of the daemon's settings, and must not be able to leak them.
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(SECRET_PREFIXES)}
