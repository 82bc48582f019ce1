"""What a prober is told first, and says first. Apart from the prober, so that the daemon loads no libcurl."""

from __future__ import annotations

import msgspec


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
    refused_networks: list[str] = []
    own_networks: list[str] = []
    referer: str = ""


class Ready(msgspec.Struct, frozen=True, array_like=True):
    """What a prober says once it can be sent requests: the version of its libcurl."""

    libcurl: str
