"""Decides who may post a notification, from the caller's address, network, token and rate."""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv6Address, ip_address
from urllib.parse import unquote_to_bytes

import structlog
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from notify_server.callbacks.errors import SIGNATURE_MESSAGE, RefusedError
from notify_server.config import AuthConfig, IPNetwork, ServerConfig

log = structlog.get_logger("notify_server.web")

# A flood is logged at most this often.
LOUD_SECONDS = 60.0
# Beyond this many sources the ones silent for longest are forgotten, which only favours them.
MAX_SOURCES = 10_000
# The IPv6 prefix of one subscriber (RFC 6177), who controls all of its addresses.
IPV6_PREFIX = 64

# Represents a caller whose address two forwarding headers give differently. It lies in no network.
UNKNOWN_CALLER = "unknown"

# RFC 7239, section 6, and what Azure and IIS append to X-Forwarded-For: an address with or without a port.
_NODE = re.compile(r"\[(?P<bracketed>[^\]]*)\](:[\w.-]{1,64})?|(?P<ipv4>\d{1,3}(\.\d{1,3}){3}):[\w.-]{1,64}")
# RFC 7239, section 4: one parameter and the separator after it.
_PARAMETER = re.compile(
    r'\s*(?:(?P<name>[\w!#$%&\'*+.^`|~-]+)=(?P<value>"(?:[^"\\]|\\.)*"|[^\s",;]*))?\s*(?P<end>[,;]|$)'
)

Headers = CIMultiDict[str] | CIMultiDictProxy[str]


class Access:
    """Decides from the head of a request whether its sender may post. Times are monotonic seconds."""

    def __init__(self, server: ServerConfig, auth: AuthConfig, clock: Callable[[], float]) -> None:
        self._trusted = server.trusted_proxies
        self._networks = auth.callback_networks
        token = auth.callback_token
        self._token = token.get_secret_value().encode() if token is not None else None
        self._rate_limit = RateLimit(server.rate_limit) if server.rate_limit else None
        self._clock = clock
        self._loud_at = 0.0

    def caller(self, headers: Headers, peer: str) -> str:
        """Return the address of the caller, behind the trusted proxies. Raise RefusedError (429) beyond its rate."""
        address = client_address(peer, headers, self._trusted) if self._trusted else peer
        if self._rate_limit is not None:
            self._check_rate(self._rate_limit, address)
        return address

    def check(self, headers: Headers, url: URL, caller: str) -> None:
        """Raise RefusedError unless the network, the token and the kind of client are allowed."""
        if self._networks and not within(caller, self._networks):
            raise RefusedError(403, "401002", "无权限访问当前接口 not permitted from this address")
        if self._token is not None and not any(
            hmac.compare_digest(presented, self._token) for presented in _tokens(headers, url)
        ):
            raise RefusedError(401, "401001", SIGNATURE_MESSAGE)
        if "Origin" in headers or headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            # A page of another site makes its visitor's browser post; the platform is no browser.
            raise RefusedError(403, "401002", "无权限访问当前接口 not permitted from a web page")

    def _check_rate(self, limit: RateLimit, caller: str) -> None:
        now = self._clock()
        if not (wait := limit.wait(source_of(caller), now)):
            return
        if now >= self._loud_at:
            self._loud_at = now + LOUD_SECONDS
            log.warning("callbacks beyond [server] rate_limit are answered 429", remote=caller)
        retry_after = {"Retry-After": str(math.ceil(wait))}
        raise RefusedError(429, "429", "请求过于频繁 too many requests, send it again later", headers=retry_after)


def _tokens(headers: Headers, url: URL) -> Iterator[bytes]:
    """Return the token in each reading of the request: a `+` in an address may be itself or a blank."""
    scheme, _, credentials = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield credentials.strip().encode("utf-8", "surrogatepass")
        return
    yield url.query.get("token", "").encode("utf-8", "surrogatepass")
    for part in url.raw_query_string.split("&"):
        name, _, value = part.partition("=")
        if name == "token":
            yield unquote_to_bytes(value)
            yield value.encode("utf-8", "surrogatepass")
            return


def within(address: str, networks: Sequence[IPNetwork]) -> bool:
    """Return whether the text of an address, IPv4-mapped or not, lies in one of the networks."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if parsed.version == 6 else None
    return any(parsed in network or (mapped is not None and mapped in network) for network in networks)


def client_address(peer: str, headers: Headers, trusted: Sequence[IPNetwork]) -> str:
    """Return the caller's address: the peer, or the last forwarded address that is not a trusted proxy.

    A proxy appends the address that called it to X-Forwarded-For or to Forwarded (RFC 7239). The list is believed from
    its end, as far as the addresses are trusted proxies; the first other one is the caller, and all before it is what
    that caller claims. A proxy writes one of the two headers and may pass the other on as the caller sent it, so two
    headers that disagree give UNKNOWN_CALLER.
    """
    if not trusted or not within(peer, trusted):
        return peer
    lines = headers.getall("X-Forwarded-For", ())
    by_list = _last_untrusted(peer, [part.strip() for line in lines for part in line.split(",")], trusted)
    if not (forwarded := headers.getall("Forwarded", ())):
        return by_list
    nodes = _forwarded_nodes(",".join(forwarded))
    by_rfc = _last_untrusted(peer, nodes, trusted) if nodes is not None else UNKNOWN_CALLER
    return by_rfc if not lines or by_rfc == by_list else UNKNOWN_CALLER


def _last_untrusted(peer: str, nodes: Sequence[str], trusted: Sequence[IPNetwork]) -> str:
    address = peer
    for node in reversed(nodes):
        if (found := _address_of(node)) is None:
            break
        address = found
        if not within(address, trusted):
            break
    return address


def _address_of(node: str) -> str | None:
    match = _NODE.fullmatch(node)
    text = (match["bracketed"] or match["ipv4"]) if match else node
    try:
        # A zone has a meaning on its own machine only, and may hold anything.
        return str(ip_address((text or "").partition("%")[0]))
    except ValueError:
        return None


def _forwarded_nodes(header: str) -> list[str] | None:
    """Return the `for` of each element of a Forwarded header, "" for an element without one; None if malformed."""
    nodes = []
    node = ""
    at = 0
    while match := _PARAMETER.match(header, at):
        if (match["name"] or "").lower() == "for":
            value = match["value"]
            node = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
        at = match.end()
        if match["end"] != ";":
            nodes.append(node)
            node = ""
        if not match["end"]:
            return nodes
    return None


def source_of(address: str) -> str:
    """Return the key of an address in the rate limit: itself, the IPv4 address it maps, or the /64 of an IPv6 one."""
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
    """Admits at most `rate` requests per second from one source, and as many at once after a second of silence. Times
    are monotonic seconds.
    """

    def __init__(self, rate: int) -> None:
        self._interval = 1.0 / rate
        # When the source would have used up its rate at a constant pace. Ordered by the last admission.
        self._used_until: dict[str, float] = {}

    def wait(self, source: str, now: float) -> float:
        """Admit one and return 0, or return the seconds until one would be admitted."""
        used_until = max(self._used_until.get(source, now), now) + self._interval
        # At most a second ahead; rounding errors of added fractions are no reason to refuse.
        ahead = used_until - now - 1.0
        if ahead > 1e-6:
            return ahead
        self._used_until.pop(source, None)
        self._used_until[source] = used_until
        if len(self._used_until) > MAX_SOURCES:
            del self._used_until[next(iter(self._used_until))]
        return 0.0
