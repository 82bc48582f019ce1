"""The framing between the daemon and its child processes. Imports nothing else, so that a prober stays small.

A frame is a length (4 bytes, little endian) and that many bytes of MessagePack. An empty frame is a ping when the
daemon sends it, and a sign of life when a child does.
"""

from __future__ import annotations

import struct

FRAME_HEADER = struct.Struct("<I")


def frame(payload: bytes) -> bytes:
    """Return the payload as it goes through a pipe."""
    return FRAME_HEADER.pack(len(payload)) + payload


class Frames:
    """Reassembles frames from the chunks that a pipe delivers."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads that these bytes complete."""
        buffer = self._buffer
        buffer += data
        payloads: list[bytes] = []
        start = 0
        while len(buffer) - start >= FRAME_HEADER.size:
            (length,) = FRAME_HEADER.unpack_from(buffer, start)
            end = start + FRAME_HEADER.size + length
            if len(buffer) < end:
                break
            payloads.append(bytes(buffer[start + FRAME_HEADER.size : end]))
            start = end
        del buffer[:start]
        return payloads
