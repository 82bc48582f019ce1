"""The first messages from and to a prober. Separate from the prober, so that the daemon loads no libcurl."""

from __future__ import annotations

import msgspec


class ProberConfig(msgspec.Struct, frozen=True):
    """The settings sent to a prober first: the guard's settings as text, the trusted certificates, the user
    agent and the proxy.
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
    proxy: str = ""


class Ready(msgspec.Struct, frozen=True, array_like=True):
    """The prober's first message, once it accepts requests: the version of its libcurl."""

    libcurl: str
