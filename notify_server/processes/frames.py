"""How the daemon and its child processes talk: frames through pipes. It loads nothing, as a prober must not.

A frame is a length (4 bytes, little endian) and so many bytes of MessagePack.
"""

from __future__ import annotations

import struct

FRAME_HEADER = struct.Struct("<I")


def frame(payload: bytes) -> bytes:
    """The payload as it goes through a pipe."""
    return FRAME_HEADER.pack(len(payload)) + payload


class Frames:
    """Puts frames together again from what a pipe gives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that are complete with these bytes."""
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
