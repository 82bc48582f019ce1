"""The daemon's end of the pipe to a prober."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

import certifi
import msgspec

from notify_server.config import VerifyConfig
from notify_server.model import Evidence, Request
from notify_server.processes.child import Child, module, ticks
from notify_server.processes.prober_protocol import ProberConfig, Ready
from notify_server.verify.own_networks import own_networks

START_SECONDS = 20.0
STOP_SECONDS = 2.0
# A prober ends each request by the request's own time-out. It hangs if an answer is later than that by this much.
OVERDUE_SECONDS = 5.0

_decode = msgspec.msgpack.Decoder(list[Evidence]).decode
_decode_ready = msgspec.msgpack.Decoder(Ready).decode
_encode = msgspec.msgpack.Encoder().encode


class ProberLink:
    """One prober. `libcurl` is the version it has, empty until the first process is ready."""

    def __init__(self, config: ProberConfig) -> None:
        self._child = Child(
            "prober",
            module("processes.prober"),
            _encode(config),
            on_up=self._on_up,
            on_frame=self._on_frame,
            on_death=self._on_child_death,
            is_overdue=self._is_overdue,
        )
        self._ready = asyncio.Event()
        # The unanswered requests, each with the tick of its deadline.
        self._deadlines: dict[int, int] = {}
        self.libcurl = ""

    @property
    def busy(self) -> int:
        """The number of requests that the prober was sent and has not answered."""
        return len(self._deadlines)

    @property
    def alive(self) -> bool:
        """True while the process is up and answers."""
        return self._child.answers

    @property
    def pid(self) -> int | None:
        """The process id, None while there is none."""
        return self._child.pid

    @property
    def restarts(self) -> int:
        """The number of processes started to replace another."""
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
        self._on_ready, self._on_evidence, self._on_death = on_ready, on_evidence, on_death
        self._child.start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), START_SECONDS)

    def send(self, requests: Sequence[Request]) -> None:
        """Send requests to the prober. When it is gone they are lost, which `on_death` reports."""
        now = self._child.ticks
        for request in requests:
            self._deadlines[request.id] = now + ticks(request.timeout_ms / 1000 + OVERDUE_SECONDS)
        self._child.send(_encode(requests))

    async def stop(self, grace: float = STOP_SECONDS) -> None:
        """End the process: it ends by itself when its input closes, and is killed after `grace` seconds."""
        await self._child.stop(grace)

    def _on_up(self, payload: bytes) -> None:
        self.libcurl = _decode_ready(payload).libcurl
        self._ready.set()
        self._on_ready(self)

    def _on_frame(self, payload: bytes) -> None:
        evidence = _decode(payload)
        for item in evidence:
            self._deadlines.pop(item.id, None)
        self._on_evidence(self, evidence)

    def _on_child_death(self) -> None:
        self._deadlines.clear()
        if not self._child.stopping:
            self._on_death(self)

    def _is_overdue(self, now: int) -> bool:
        return any(deadline < now for deadline in self._deadlines.values())


def prober_config(verify: VerifyConfig) -> ProberConfig:
    """Return the settings of one prober of `verify.processes`."""
    return ProberConfig(
        list(verify.allowed_hosts),
        [str(network) for network in verify.allowed_networks],
        list(verify.allowed_ports),
        verify.user_agent,
        str(verify.ca_file or system_certificates()),
        -(-verify.concurrency // verify.processes),
        [str(network) for network in verify.refused_networks],
        own_networks(),
        verify.referer or "",
        verify.proxy or "",
    )


def system_certificates() -> str:
    """Return the file of certificate authorities to trust unless `[verify] ca_file` names another."""
    # The bundled libcurl was built on another machine, where they may be elsewhere.
    system = ssl.get_default_verify_paths().cafile
    candidates = [system, "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"]
    return next((path for path in candidates if path and Path(path).is_file()), certifi.where())
