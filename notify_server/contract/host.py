"""Decides whether a host is valid, and gives its one canonical spelling, for addresses and the configuration alike.

The reading is that of the WHATWG URL Standard's host parser (section 3.5), the most permissive one in use, so that
nothing a browser, libcurl or `inet_aton` would take for an IP address passes as a name.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address

from yarl import URL

_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})").sub
# RFC 1035 2.3.4, RFC 1123 2.1, and the underscore, which stores' names do have.
_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*").fullmatch
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*").fullmatch
_NUMBER = re.compile(r"0x(?P<hex>[0-9a-f]*)|0(?P<oct>[0-7]*)|(?P<dec>[1-9][0-9]*)").fullmatch


def canonical_host(host: str) -> str:
    """Return the host as the WHATWG host parser serialises it, without brackets and trailing dot: lower case, punycode,
    addresses in their usual form. Raises ValueError when it is not a host.
    """
    if host.startswith("["):
        if "%" in host or not host.endswith("]"):
            raise ValueError("neither a zone nor half a bracket can be dialled")
        return IPv6Address(host[1:-1]).compressed
    if "%" in host:
        host = _ESCAPE(lambda found: bytes.fromhex(found[1].decode()), host.encode()).decode()
    if len(host) > 254:  # before IDNA, whose cost grows faster than its input
        raise ValueError("the host is too long")
    name = (URL.build(scheme="http", host=host).raw_host or "").removesuffix(".")
    if not _NAME(name):
        raise ValueError("the host is not a name")
    return str(_ipv4(name)) if _NUMERIC(name.rpartition(".")[2]) else name


def is_address(hostname: str) -> bool:
    """Return True when a canonical host is an IP address: no name ends in a numeric label, and none has a colon."""
    return ":" in hostname or _NUMERIC(hostname.rpartition(".")[2]) is not None


def canonical_pattern(entry: str) -> str:
    """Return the canonical spelling of a host, or of `*.` and a name, which stands for its subdomains at any depth but
    not for itself. IPv6 addresses may lack their brackets. Raises ValueError, one line that shows a right one.
    """
    bare = entry.strip()
    wildcard, name = ("*.", bare[2:]) if bare.startswith("*.") else ("", bare)
    try:
        canonical = canonical_host(f"[{name}]" if ":" in name and not name.startswith("[") else name)
    except ValueError:
        canonical = ""
    if not canonical or (wildcard and is_address(canonical)):
        raise ValueError('is not a host: write "example.com", or "*.example.com" for its subdomains')
    return wildcard + canonical


def matches(hostname: str, pattern: str) -> bool:
    """Return True when a canonical pattern matches a canonical host."""
    return hostname.endswith(pattern[1:]) if pattern.startswith("*.") else hostname == pattern


def _ipv4(name: str) -> IPv4Address:
    """Parse as the WHATWG IPv4 parser: one to four decimal, octal or hexadecimal numbers, the last filling the rest."""
    numbers: list[int] = []
    for part in name.split("."):
        found = _NUMBER(part)
        if found is None:
            raise ValueError("a numeric host must be an IPv4 address")
        hexadecimal, octal, decimal = found.group("hex", "oct", "dec")
        if decimal is not None:
            numbers.append(int(decimal))
        else:
            numbers.append(int(octal or "0", 8) if hexadecimal is None else int(hexadecimal or "0", 16))
    *leading, last = numbers
    if len(leading) > 3 or any(number > 255 for number in leading) or last >= 256 ** (4 - len(leading)):
        raise ValueError("a numeric host must be an IPv4 address")
    return IPv4Address(last + sum(number << 8 * (3 - place) for place, number in enumerate(leading)))
