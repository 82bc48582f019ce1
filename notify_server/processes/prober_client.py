"""The daemon's end of the pipe to a prober."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import msgspec

from notify_server.model import Evidence, Request
from notify_server.processes.child import Child, module
from notify_server.processes.prober_protocol import ProberConfig, Ready
from notify_server.supervise import log_task_failure

START_SECONDS = 20.0
STOP_SECONDS = 2.0

_decode = msgspec.msgpack.Decoder(list[Evidence]).decode
_decode_ready = msgspec.msgpack.Decoder(Ready).decode
_encode = msgspec.msgpack.Encoder().encode


class ProberLink:
    """One prober. `busy` counts the requests it has been sent and not answered; it is the caller's to look at.

    `libcurl` is the version it has, empty until the first process is ready.
    """

    def __init__(self, config: ProberConfig) -> None:
        self._child = Child("prober", module("processes.prober"), _encode(config))
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self.busy = 0
        self.libcurl = ""

    @property
    def alive(self) -> bool:
        """Whether the process is up and has said that it is ready."""
        return self._child.up

    @property
    def pid(self) -> int | None:
        """The process id, None while there is no process."""
        return self._child.pid

    @property
    def restarts(self) -> int:
        """How many processes were started because another had ended."""
        return self._child.restarts

    async def start(
        self,
        on_ready: Callable[[ProberLink], None],
        on_evidence: Callable[[ProberLink, list[Evidence]], None],
        on_death: Callable[[ProberLink], None],
    ) -> None:
        """Start the process and keep one running until `stop`. Returns when the first is ready, or has failed once.

        `on_death` is called when a process that was ready has ended; what it was sent and has not answered is lost.
        """

        def up(payload: bytes) -> None:
            self.libcurl = _decode_ready(payload).libcurl
            self._ready.set()
            on_ready(self)

        def told(payload: bytes) -> None:
            evidence = _decode(payload)
            self.busy -= len(evidence)
            on_evidence(self, evidence)

        def died() -> None:
            self.busy = 0
            if not self._child.finishing:
                on_death(self)

        self._task = asyncio.create_task(self._child.run(up, told, died), name="prober")
        self._task.add_done_callback(log_task_failure)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), START_SECONDS)

    def send(self, requests: Sequence[Request]) -> None:
        """Hand requests to the prober. When it is gone they are lost, as `on_death` tells."""
        self.busy += len(requests)
        self._child.send(_encode(requests))

    async def stop(self) -> None:
        """End the process: it leaves by itself when its input closes, and is killed when it does not."""
        self._child.finish()
        if self._task is not None:
            try:
                await asyncio.wait_for(self._task, STOP_SECONDS)
            except TimeoutError:
                self._child.kill()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._task
