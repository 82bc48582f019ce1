"""How many callbacks one source may send (GCRA, the generic cell rate algorithm). Pure: the time is passed in."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

# Sources remembered. Beyond it the ones that have kept silent for longest are forgotten, which only favours them.
MAX_SOURCES = 10_000
# What one subscriber gets of IPv6 (RFC 6177): who has one address of it has all of them.
IPV6_PREFIX = 64


def source_of(address: str) -> str:
    """Whom an address counts for: itself, the IPv4 address it maps, or the /64 of an IPv6 one."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return f"{IPv6Address(int(parsed) >> 128 - IPV6_PREFIX << 128 - IPV6_PREFIX)}/{IPV6_PREFIX}"
    return str(parsed)


class RateLimit:
    """At most `rate` a second from one source, and as many at once after a second of silence. Times are monotonic
    seconds.
    """

    def __init__(self, rate: int) -> None:
        self._interval = 1.0 / rate
        # When the source would have used up its rate if it had kept to it. In the order of the last admission.
        self._used_until: dict[str, float] = {}

    def wait(self, source: str, now: float) -> float:
        """Admit one and return 0, or return the seconds until one would be admitted."""
        used_until = max(self._used_until.get(source, now), now) + self._interval
        # A second ahead at most; what is left of it after adding up fractions is no reason to refuse.
        ahead = used_until - now - 1.0
        if ahead > 1e-6:
            return ahead
        self._used_until.pop(source, None)
        self._used_until[source] = used_until
        if len(self._used_until) > MAX_SOURCES:
            del self._used_until[next(iter(self._used_until))]
        return 0.0
