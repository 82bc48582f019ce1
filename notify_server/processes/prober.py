"""A child process that makes HTTP requests: requests in on standard input, evidence out on standard output.

It knows no database, no schedule and no files. It ends when its standard input does, so it cannot outlive the daemon.
The first frame in is a `ProberConfig`, every later one a list of `Request`; the first frame out is a `Ready`,
every later one a list of `Evidence`.

Names are looked up in threads (prober_places.py). libcurl's own multi loop is driven with select(): measured against
its socket callbacks and epoll it probes 1.5 times as many files a second. select() knows descriptors up to 1,023, which
bounds how many requests one prober may have in flight.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import pycurl

from notify_server.model import Evidence, Reason, Request
from notify_server.processes.prober_handle import Handle
from notify_server.processes.prober_places import Places, Unsent
from notify_server.processes.prober_protocol import ProberConfig, Ready
from notify_server.processes.worker import Input, Output, follow_daemon
from notify_server.verify.guard import Guard

# Evidence is sent in batches: when there is this much of it, or when the first has waited this long. A frame costs the
# daemon a wake-up, whatever its size. A batch is at most half of what is in flight, so that the daemon judges one half
# and sends new requests while the prober works on the other.
MAX_TOGETHER = 64
TOGETHER_SECONDS = 0.002
# Connections kept: twice the requests in flight, and some for each of many hosts. select() handles descriptors up to
# 1,023, and requests in flight need some too.
MIN_KEPT, MAX_KEPT = 400, 800


class Prober:
    """Reads requests, drives libcurl, writes evidence, until its input ends."""

    def __init__(self, source: int, sink: int) -> None:
        self._source = source
        self._output = Output(sink)
        self._input = Input(source, self._output)
        self._multi = pycurl.CurlMulti()
        self._places = Places(self._begin, self._not_looked_up)
        self._idle: list[Handle] = []
        self._under_way: Counter[tuple[str, int]] = Counter()
        self._busy = 0
        self._evidence: list[Evidence] = []
        self._flush_at = 0.0
        self._together = 1
        self._decode = msgspec.msgpack.Decoder(list[Request]).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._config = msgspec.msgpack.decode(self._input.first(), type=ProberConfig)
        self._guard = Guard(
            self._config.allowed_hosts,
            self._config.allowed_networks,
            self._config.allowed_ports,
            self._config.refused_networks,
            self._config.own_networks,
        )
        self._multi.setopt(pycurl.M_MAXCONNECTS, min(max(self._config.concurrency * 2, MIN_KEPT), MAX_KEPT))
        self._output.send(self._encode(Ready(pycurl.version_info()[1])))

    def _send(self, evidence: list[Evidence]) -> None:
        self._output.send(self._encode(evidence))

    def run(self) -> None:
        """Work until standard input ends (EOFError) or standard output is gone (BrokenPipeError)."""
        multi = self._multi
        while True:
            # Without a request in flight only the next frame can wake it up.
            reads, writes, errors = multi.fdset() if self._busy else ([], [], [])
            reads += (self._source, self._places.descriptor)
            ready, _, _ = select.select(reads, writes, errors, self._patience())
            if self._source in ready:
                for payload in self._input.read():
                    for request in self._decode(payload):
                        self._start(request)
                self._together = min(MAX_TOGETHER, max(1, self._busy // 2))
            if self._places.is_active:
                self._places.advance()
            if self._busy:
                multi.perform()
                self._collect()
            # With nothing else to do, waiting longer gains nothing.
            if self._evidence and (not self._busy or time.monotonic() >= self._flush_at):
                self._flush()

    def _patience(self) -> float | None:
        """Return how long to wait for an event, in seconds; None is forever."""
        timeout_ms = self._multi.timeout() if self._busy else -1
        patience = None if timeout_ms < 0 else timeout_ms / 1000
        if (due := self._places.patience()) is not None:
            patience = due if patience is None else min(due, patience)
        if self._evidence:
            flush = max(0.0, self._flush_at - time.monotonic())
            return flush if patience is None else min(flush, patience)
        return patience

    def _start(self, request: Request) -> None:
        if self._config.proxy:
            # The proxy looks the name up.
            self._begin(request, (), 0.0)
        else:
            self._places.find(request)

    def _begin(self, request: Request, addresses: Sequence[str], looked_up_ms: float) -> None:
        handle = self._idle.pop() if self._idle else Handle(self._config, self._guard, self._under_way)
        try:
            handle.start(request, addresses, looked_up_ms)
        except (ValueError, pycurl.error):
            # The guard cannot read this address; libcurl cannot even be given it.
            self._idle.append(handle)
            self._send([Evidence(request.id, None, Reason.INVALID_URL, False, None, None, None, None, None, 0.0)])
            return
        self._multi.add_handle(handle.curl)
        self._busy += 1

    def _not_looked_up(self, request: Request, why: Unsent, elapsed_ms: float) -> None:
        phases = (None,) * 5
        shortage, crowded = why is Unsent.SHORTAGE, why is Unsent.CROWDED
        self._tell(
            Evidence(
                *(request.id, None, Reason.DNS_ERROR, False, *phases, elapsed_ms), shortage=shortage, crowded=crowded
            )
        )

    def _collect(self) -> None:
        more = 1
        while more:
            more, answered, failed = self._multi.info_read()
            for curl in answered:
                self._tell(self._finish(curl, None))
            for curl, error, _ in failed:
                self._tell(self._finish(curl, error))

    def _tell(self, evidence: Evidence) -> None:
        if not self._evidence:
            self._flush_at = time.monotonic() + TOGETHER_SECONDS
        self._evidence.append(evidence)
        if len(self._evidence) >= self._together:
            self._flush()

    def _flush(self) -> None:
        self._send(self._evidence)
        self._evidence = []

    def _finish(self, curl: Any, error: int | None) -> Evidence:
        handle: Handle = curl.handle
        evidence = handle.finish(error)
        self._multi.remove_handle(curl)
        self._idle.append(handle)
        self._busy -= 1
        return evidence


def main() -> None:
    """Run the process. It ends quietly when the daemon does."""
    follow_daemon(signal.SIGKILL)
    # Callbacks and the keeper come first when there are not enough processors for all.
    os.nice(10)
    try:
        Prober(sys.stdin.fileno(), sys.stdout.fileno()).run()
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
