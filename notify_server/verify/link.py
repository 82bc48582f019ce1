"""The daemon's end of the pipe to a prober: starts the process, carries frames, and starts another when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence

import msgspec
import structlog

from notify_server.model import Evidence, Request
from notify_server.observe import report_end
from notify_server.verify.frames import FRAME_HEADER, ProberConfig, Ready, frame

log = structlog.get_logger("notify_server.verify")

RESTART_SHORTEST = 0.05
RESTART_LONGEST = 5.0
START_SECONDS = 20.0
STOP_SECONDS = 2.0
# How settings begin in the environment: the daemon's own, and those of its tracing, which may hold credentials.
DAEMONS_OWN = ("NOTIFY_SERVER__", "OTEL_")

_decode = msgspec.msgpack.Decoder(list[Evidence]).decode
_decode_ready = msgspec.msgpack.Decoder(Ready).decode
_encode = msgspec.msgpack.Encoder().encode


class ProberLink:
    """One prober. `busy` counts the requests it has been sent and not answered; it is the caller's to look at.

    `restarts` counts the processes that were started because another had ended; `libcurl` is the version they have,
    empty until the first is ready.
    """

    def __init__(self, config: ProberConfig) -> None:
        self._config = config
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._stopping = False
        self.busy = 0
        self.restarts = 0
        self.libcurl = ""

    @property
    def alive(self) -> bool:
        """Whether the process is up and has said that it is ready."""
        return self._ready.is_set()

    @property
    def pid(self) -> int | None:
        """The process id, None while there is no process."""
        return self._process.pid if self._process is not None else None

    async def start(
        self,
        on_ready: Callable[[ProberLink], None],
        on_evidence: Callable[[ProberLink, list[Evidence]], None],
        on_death: Callable[[ProberLink], None],
    ) -> None:
        """Start the process and keep one running until `stop`. Returns when the first is ready, or has failed once.

        `on_death` is called when a process that was ready has ended; what it was sent and has not answered is lost.
        """
        self._task = asyncio.create_task(self._keep_running(on_ready, on_evidence, on_death), name="prober")
        self._task.add_done_callback(report_end)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), START_SECONDS)

    def send(self, requests: Sequence[Request]) -> None:
        """Hand requests to the prober. When it is gone they are lost, as `on_death` tells."""
        self.busy += len(requests)
        pipe = self._process.stdin if self._process is not None else None
        # uvloop raises on a pipe whose other end it knows to be gone, which may be before `on_death` is called.
        if pipe is not None and not pipe.is_closing():
            pipe.write(frame(_encode(requests)))

    async def stop(self) -> None:
        """End the process: it leaves by itself when its input closes, and is killed when it does not."""
        self._stopping = True
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        if self._task is not None:
            try:
                await asyncio.wait_for(self._task, STOP_SECONDS)
            except TimeoutError:
                if self._process is not None:
                    with contextlib.suppress(ProcessLookupError):
                        self._process.kill()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._task

    async def _keep_running(
        self,
        on_ready: Callable[[ProberLink], None],
        on_evidence: Callable[[ProberLink, list[Evidence]], None],
        on_death: Callable[[ProberLink], None],
    ) -> None:
        delay = RESTART_SHORTEST
        while not self._stopping:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "notify_server.verify.prober", stdin=PIPE, stdout=PIPE, env=_environment()
            )  # fmt: skip
            try:
                assert process.stdin is not None
                process.stdin.write(frame(_encode(self._config)))
                while (payload := await self._receive(process)) is not None:
                    if not self._ready.is_set():
                        self.libcurl = _decode_ready(payload).libcurl
                        self._ready.set()
                        delay = RESTART_SHORTEST
                        log.debug("prober ready", pid=process.pid)
                        on_ready(self)
                    else:
                        evidence = _decode(payload)
                        self.busy -= len(evidence)
                        on_evidence(self, evidence)
            finally:
                was_ready = self._ready.is_set()
                self._ready.clear()
                self.busy = 0
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                status = await process.wait()
            if self._stopping:
                return
            log.error("prober ended, starting another", pid=process.pid, status=status)
            if was_ready:
                on_death(self)
            await asyncio.sleep(delay)
            self.restarts += 1
            delay = min(delay * 2, RESTART_LONGEST)

    async def _receive(self, process: Process) -> bytes | None:
        assert process.stdout is not None
        try:
            (length,) = FRAME_HEADER.unpack(await process.stdout.readexactly(FRAME_HEADER.size))
            return await process.stdout.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None


def _environment() -> dict[str, str]:
    # A prober needs none of the daemon's settings, and must not be able to leak them.
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(DAEMONS_OWN)}
