"""What goes through the pipe between the daemon and a prober. Apart from the prober, so that the daemon loads no
libcurl.

A frame is a length (4 bytes, little endian) and so many bytes of MessagePack.
"""

from __future__ import annotations

import struct

import msgspec

FRAME_HEADER = struct.Struct("<I")


class ProberConfig(msgspec.Struct, frozen=True):
    """What a prober is told once: the guard's settings as text, the certificates to trust, and its name to the
    world.
    """

    allowed_hosts: list[str]
    allowed_networks: list[str]
    allowed_ports: list[int]
    user_agent: str
    ca_file: str
    concurrency: int


class Ready(msgspec.Struct, frozen=True, array_like=True):
    """What a prober says once it can be sent requests: the version of its libcurl."""

    libcurl: str


def frame(payload: bytes) -> bytes:
    """The payload as it goes through the pipe."""
    return FRAME_HEADER.pack(len(payload)) + payload
