"""Reads this machine's own addresses from Linux's /proc: the guard refuses them."""

from __future__ import annotations

import re
from ipaddress import IPv6Address, ip_network
from pathlib import Path

_LOCAL = re.compile(r"\|-- ([0-9.]+)\n\s+/32 host LOCAL")


def own_networks(proc: Path = Path("/proc/net")) -> list[str]:
    """Return the addresses of all interfaces, and their on-link IPv6 prefixes, which hold the machine's neighbours.

    Empty where /proc does not have them, as on other systems. Call it again after a change of the network.
    """
    return sorted({*_ipv4(_read(proc / "fib_trie")), *_ipv6(_read(proc / "if_inet6"))})


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError:
        return ""


def _ipv4(trie: str) -> list[str]:
    return [f"{address}/32" for address in _LOCAL.findall(trie)]


def _ipv6(table: str) -> list[str]:
    """Read lines of an address in hexadecimal, the interface's number, the prefix length, scope, flags and name."""
    rows = [line.split() for line in table.splitlines()]
    return [str(ip_network((int(IPv6Address(bytes.fromhex(row[0]))), int(row[2], 16)), strict=False)) for row in rows]
