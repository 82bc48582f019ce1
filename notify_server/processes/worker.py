"""The child's end of the pipes, the same for every child process of the daemon."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

from notify_server.processes.frames import FRAME_HEADER, Frames, frame

READ_BYTES = 1 << 20
BEAT_SECONDS = 0.2
PR_SET_PDEATHSIG = 1


class Output:
    """Writes whole frames to a pipe, from any thread."""

    def __init__(self, sink: int) -> None:
        self._sink = sink
        self._lock = threading.Lock()

    def send(self, payload: bytes) -> None:
        """Write a frame. Raises BrokenPipeError when the daemon is gone."""
        view = memoryview(frame(payload))
        with self._lock:
            while view:
                view = view[os.write(self._sink, view) :]

    def start_beating(self) -> None:
        """Send a sign of life every BEAT_SECONDS from a thread, for a process whose work blocks its main thread."""
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def _beat(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            while True:
                self.send(b"")
                time.sleep(BEAT_SECONDS)


class Input:
    """Reads frames from a pipe and answers pings."""

    def __init__(self, source: int, output: Output) -> None:
        self._source = source
        self._output = output
        self._frames = Frames()

    def first(self) -> bytes:
        """Wait for the first frame and return it; the pipe does not block from then on. Raises EOFError when the pipe
        ends before.
        """
        os.set_blocking(self._source, True)
        # Not a byte more: nothing would wake the caller for further frames.
        (length,) = FRAME_HEADER.unpack(self._exactly(FRAME_HEADER.size))
        payload = self._exactly(length)
        os.set_blocking(self._source, False)
        return payload

    def read(self) -> list[bytes]:
        """Return the frames that have arrived. Raises EOFError at the end of the pipe."""
        try:
            data = os.read(self._source, READ_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError
        payloads = self._frames.feed(data)
        if b"" in payloads:
            self._output.send(b"")
            payloads = [payload for payload in payloads if payload]
        return payloads

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = os.read(self._source, size - len(data))
            if not more:
                raise EOFError
            data += more
        return data


def follow_daemon(when_it_dies: signal.Signals) -> None:
    """Let the daemon alone decide when this process stops, and send this process a signal when the daemon is killed.

    Signals of a terminal or a service manager to the whole group are ignored: the daemon closes the inputs of its
    children in its own order. A stopped child does not notice that its input has ended, hence the signal.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(when_it_dies)


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, however that ends. Does nothing outside Linux.

    It stays in force when the process executes another program.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
