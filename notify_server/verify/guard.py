"""Decides which addresses may be contacted: the guard against requests into the server's own network (SSRF).

Nothing here looks names up. `Guard.examine` reads an address before it is used; `Guard.check_address` judges the socket
address that is about to be dialled, and is the only decision about names: an earlier look-up may be out of date.
`Guard.follow` is `examine` for a redirect.

`contract.host` decides whether a host is valid. Where the standard repairs an address (backslashes, tabs, line ends),
the guard refuses it: two readers may read a repaired address differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NoReturn

from yarl import URL

from notify_server.contract.host import canonical_host, canonical_pattern, is_address, matches
from notify_server.model import Reason, Target

# The IANA special-purpose registries (RFC 6890, RFC 8190) where they say "not globally reachable", and all that is not
# unicast. 192.0.0.0/24 and 2001::/23 are refused whole although a few addresses in them are reachable: those are
# anycast services and overlays (PCP, TURN, AS112, ORCHID), where no file is ever stored.
SPECIAL_PURPOSE: tuple[tuple[str, str], ...] = (
    ("0.0.0.0/8", "RFC 791 3.2, this network; Linux dials itself"),
    ("10.0.0.0/8", "RFC 1918, private use"),
    ("100.64.0.0/10", "RFC 6598, shared address space (carrier-grade NAT)"),
    ("127.0.0.0/8", "RFC 1122 3.2.1.3, loopback"),
    ("169.254.0.0/16", "RFC 3927, link-local; clouds' metadata services"),
    ("172.16.0.0/12", "RFC 1918, private use"),
    ("192.0.0.0/24", "RFC 6890 2.1, IETF protocol assignments"),
    ("192.0.2.0/24", "RFC 5737, documentation"),
    ("192.88.99.0/24", "RFC 7526, deprecated 6to4 relay anycast"),
    ("192.168.0.0/16", "RFC 1918, private use"),
    ("198.18.0.0/15", "RFC 2544, benchmarking"),
    ("198.51.100.0/24", "RFC 5737, documentation"),
    ("203.0.113.0/24", "RFC 5737, documentation"),
    ("224.0.0.0/4", "RFC 5771, multicast"),
    ("240.0.0.0/4", "RFC 1112 4, reserved; RFC 8190, limited broadcast"),
    ("::/128", "RFC 4291 2.5.2, unspecified; Linux dials itself"),
    ("::1/128", "RFC 4291 2.5.3, loopback"),
    ("::/96", "RFC 4291 2.5.5.1, deprecated IPv4-compatible"),
    ("64:ff9b:1::/48", "RFC 8215, local-use IPv4/IPv6 translation"),
    ("100::/64", "RFC 6666, discard-only"),
    ("100:0:0:1::/64", "RFC 9780, dummy prefix"),
    ("2001::/23", "RFC 2928, IETF protocol assignments; 2001::/32 is Teredo, RFC 4380"),
    ("2001:db8::/32", "RFC 3849, documentation"),
    ("2002::/16", "RFC 3056, 6to4"),
    ("3fff::/20", "RFC 9637, documentation"),
    ("5f00::/16", "RFC 9602, SRv6 segment identifiers"),
    ("fc00::/7", "RFC 4193, unique local; fd00:ec2::254 is a metadata service"),
    ("fe80::/10", "RFC 4291 2.5.6, link-local"),
    ("fec0::/10", "RFC 3879, deprecated site-local"),
    ("ff00::/8", "RFC 4291 2.7, multicast"),
    # The one entry from no registry: a public address elsewhere, but the host's agent inside Azure.
    ("168.63.129.16/32", "Azure's WireServer"),
)
_REFUSED = tuple(ip_network(prefix) for prefix, _ in SPECIAL_PURPOSE)
_GLOBAL_UNICAST = IPv6Network("2000::/3")  # RFC 4291 2.4: all that IANA allocates from
_MAPPED = IPv6Network("::ffff:0:0/96")  # RFC 4291 2.5.5.2
_COMPATIBLE = IPv6Network("::/96")  # RFC 4291 2.5.5.1
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052 2.1
_6TO4 = IPv6Network("2002::/16")  # RFC 3056 2
_LOOPBACK = (IPv4Address("127.0.0.1"), IPv6Address("::1"))

_DEFAULT_PORTS = {"http": 80, "https": 443}
_CACHED = 4096  # authorities, and socket addresses, that a guard remembers: about a megabyte when full
_URL_LIMIT = 8192  # RFC 9110 4.1 asks for 8,000; without a limit a Location header could be 300 kB
_ORIGIN_LIMIT = 1024  # a host of 253 characters written in percent-encoding fits

# RFC 3986 2: unreserved, reserved (without "#", which ends the query) and percent-encoded may be written raw.
_RAW = r"!$&-;=?-Z\[\]_a-z~"
_PLAIN = re.compile(rf"([Hh][Tt][Tt][Pp][Ss]?://[A-Za-z0-9.:\[\]_-]+)(/(?:[{_RAW}]++|%[0-9A-Fa-f]{{2}})*+)").fullmatch
_SPLIT = re.compile(r"([Hh][Tt][Tt][Pp][Ss]?://[^/?#]*)([^#]*)(?:#.*)?", re.DOTALL).fullmatch
_ORIGIN = re.compile(r"(https?)://(\[[^\[\]@]+\]|[^\[\]@:\\]+)(?::([0-9]*))?", re.ASCII | re.IGNORECASE).fullmatch
_ENCODE = re.compile(rf"[^{_RAW}%]+|%(?![0-9A-Fa-f]{{2}})").sub
# Characters that copying leaves around an address, trimmed as by the WHATWG URL Standard (4.4), and a BOM. The standard
# trims other control characters too; no editor leaves them, and they make an address invalid.
_AROUND = " \t\r\n\ufeff"
_UNREADABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]").search
# Wider than RFC 3986 3.1, like yarl: no relative reference may have a colon in its first segment (4.2) anyway.
_SCHEME = re.compile(r"[A-Za-z0-9+.-]+:").match
# The text before the userinfo, and the userinfo: up to the last "@" of the authority, or, if the apparent port is none,
# of the whole text, because then a "/", "?" or "#" in a password has ended the authority too early. Possessive, so that
# the cost of a long hostile text is linear.
_USERINFO = re.compile(
    r"((?:[^/\\?#@]*(?::[/\\]++|[/\\]{2,}+)|\s*https?:)?+)"
    r"(?:[^/?#\[\]@:]*+:(?![0-9]*(?:[/?#]|\Z)).*@|[^/?#]*@)",
    re.IGNORECASE | re.DOTALL,
).match

_INVALID = Target("", "", "", Reason.INVALID_URL)
_BAD_REDIRECT = Target("", "", "", Reason.BAD_REDIRECT)


class Guard:
    """Decides which addresses may be contacted. Immutable, hashable, picklable; compares by its settings.

    `allowed_hosts`: `example.com`, or `*.example.com` for its subdomains at any depth (not itself); empty means any.
    `allowed_networks`: networks or addresses to be contacted although they are private; strict, like `10.0.0.0/8`.
    `allowed_ports`: empty means any.
    `refused_networks`: never to be contacted, whatever is allowed.
    `own_networks`: this machine's, private like those of the registries, so `allowed_networks` opens them.

    Raises ValueError, one line naming the entry, when one of them cannot be read.

    A name's answers are judged by `check_address` alone: an allowed host with a private address is still refused.
    """

    __slots__ = (
        "_judge_dial", "_judge_origin", "allowed_hosts", "allowed_networks", "allowed_ports", "own_networks",
        "refused_networks",
    )  # fmt: skip
    allowed_hosts: tuple[str, ...]
    allowed_networks: tuple[IPv4Network | IPv6Network, ...]
    allowed_ports: frozenset[int]
    refused_networks: tuple[IPv4Network | IPv6Network, ...]
    own_networks: tuple[IPv4Network | IPv6Network, ...]
    _judge_origin: Callable[[str], Target]
    _judge_dial: Callable[[str, int], Reason | None]

    def __init__(
        self,
        allowed_hosts: Iterable[str] = (),
        allowed_networks: Iterable[str | IPv4Network | IPv6Network] = (),
        allowed_ports: Iterable[int] = (),
        refused_networks: Iterable[str | IPv4Network | IPv6Network] = (),
        own_networks: Iterable[str | IPv4Network | IPv6Network] = (),
    ) -> None:
        set_once = super().__setattr__
        set_once("allowed_hosts", tuple(map(_pattern, allowed_hosts)))
        set_once("allowed_networks", tuple(_network(entry) for entry in allowed_networks))
        set_once("allowed_ports", frozenset(_port(entry) for entry in allowed_ports))
        set_once("refused_networks", tuple(_network(entry) for entry in refused_networks))
        set_once("own_networks", tuple(_network(entry) for entry in own_networks))
        # A cache per guard, so that a call need not hash the settings.
        set_once("_judge_origin", lru_cache(_CACHED)(self._examine_origin))
        set_once("_judge_dial", lru_cache(_CACHED)(self._check_dial))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a guard cannot be changed: {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a guard cannot be changed: {name}")

    def _settings(self) -> tuple[object, ...]:
        return (
            self.allowed_hosts,
            self.allowed_networks,
            self.allowed_ports,
            self.refused_networks,
            self.own_networks,
        )

    def __eq__(self, other: object) -> bool:
        return self._settings() == other._settings() if isinstance(other, Guard) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._settings())

    def __repr__(self) -> str:
        networks = [str(network) for network in self.allowed_networks]
        return f"Guard({list(self.allowed_hosts)}, {networks}, {sorted(self.allowed_ports)})"

    def __reduce__(self) -> tuple[type[Guard], tuple[object, ...]]:
        return Guard, self._settings()

    def examine(self, url: str) -> Target:
        """Read an address as it was given and judge it, without looking anything up. Never raises.

        The first that applies is the refusal: INVALID_URL (nothing of the address is returned, so that a password in
        it goes nowhere), PORT_NOT_ALLOWED, HOST_NOT_ALLOWED, PRIVATE_ADDRESS (a literal, in any spelling, that
        `check_address` refuses, or a name under `localhost`, RFC 6761 6.3).

        Blanks, tabs, line ends and a BOM around the address are trimmed.

        INVALID_URL: a scheme other than http and https, userinfo, no host, a backslash, space or control character in
        the authority, a control character or lone surrogate anywhere, a port that is not 1 to 65535, an IPv6 zone, a
        name that is not one for the DNS (labels of 1 to 63, 253 characters in all, letters, digits, hyphens and
        underscores once IDNA is done), a numeric last label in what is no IPv4 address, more than 8,192 characters.

        Path and query keep every byte, dot segments and existing %XX included, because addresses may be signed; only
        what RFC 3986 2 does not allow raw (spaces, non-ASCII as UTF-8, `"<>\\^{|}` and the backquote, a stray %)
        becomes %XX.
        """
        if len(url) > _URL_LIMIT:
            return _INVALID
        if plain := _PLAIN(url):
            origin, rest = plain.groups()
        elif not _UNREADABLE(url := url.strip(_AROUND)) and (parts := _SPLIT(url)):
            origin, rest = parts.groups()
            rest = _ENCODE(_percent_encode, rest)
            if not rest.startswith("/"):
                rest = f"/{rest}"
        else:
            return _INVALID
        if len(origin) > _ORIGIN_LIMIT:
            return _INVALID
        target = self._judge_origin(origin)
        if target.refusal is Reason.INVALID_URL:
            return target
        address = target.url + rest
        # Encoding lengthens the address; the result must be accepted as input again.
        return _INVALID if len(address) > _URL_LIMIT else Target(address, target.hostname, target.host, target.refusal)

    def follow(self, url: str, location: str) -> Target:
        """Resolve a Location header against the address that answered with it, and examine the result. Never raises.

        RFC 9110 10.2.2, RFC 3986 5.2 (strict: `http:g` is absolute, and so without a host). `url` is a `Target.url`;
        `location` is the field's value decoded as UTF-8. BAD_REDIRECT when it leads to no http or https address at
        all: another scheme, an unreadable text, one of more than 8,192 characters. `examine` decides the rest.
        """
        location = location.strip(_AROUND)
        base = self.examine(url).url
        if not base or len(location) > _URL_LIMIT or _UNREADABLE(location):
            return _BAD_REDIRECT
        if scheme := _SCHEME(location):
            return self.examine(location) if scheme[0].lower() in ("http:", "https:") else _BAD_REDIRECT
        if location.startswith("//"):
            return self.examine(base.partition("//")[0] + location)
        if location[:1] not in ("", "?", "#"):
            # RFC 3986 5.2.3 merges with everything up to the last slash. yarl would decode the path's %XX in that step.
            base = base.partition("?")[0].rpartition("/")[0] + "/"
        try:
            joined = str(URL(base, encoded=True).join(URL(location, encoded=True)))
        except ValueError:
            return _BAD_REDIRECT
        return self.examine(joined)

    def check_address(self, address: str, port: int) -> Reason | None:
        """Judge the socket address that is about to be dialled: IPv4 or IPv6 text, a %zone allowed. None: go ahead.

        PORT_NOT_ALLOWED takes precedence over PRIVATE_ADDRESS. A text that is no IP address gives PRIVATE_ADDRESS.

        An address that carries an IPv4 address is judged by it: IPv4-mapped, because that is what is dialled, and
        NAT64's well-known prefix (RFC 6052), because in a network with IPv6 only every IPv4 site is reached through it
        and a translator may sit in front of a private network (its section 5.1 forbids that; not all obey). Refused
        even with a public address inside: IPv4-compatible and 6to4 (deprecated), Teredo, NAT64's local-use prefix.
        IPv6 outside 2000::/3 is refused, whether a registry names it or not. `allowed_networks` permits an address
        if it contains the dialled address, or the IPv4 address that is embedded in it.
        """
        return self._judge_dial(address, port)

    def _check_dial(self, address: str, port: int) -> Reason | None:
        if self.allowed_ports and port not in self.allowed_ports:
            return Reason.PORT_NOT_ALLOWED
        try:
            parsed = ip_address(address)
        except ValueError:
            return Reason.PRIVATE_ADDRESS
        if _is_within(parsed, self.refused_networks):
            return Reason.PRIVATE_ADDRESS
        is_public = _is_public(parsed) and not _is_within(parsed, self.own_networks)
        return None if is_public or self._has_hole(parsed) else Reason.PRIVATE_ADDRESS

    def _has_hole(self, address: IPv4Address | IPv6Address) -> bool:
        return _is_within(address, self.allowed_networks)

    def _examine_origin(self, origin: str) -> Target:
        """Examine `scheme://authority`; `url` of the returned target is the canonical origin."""
        parts = _ORIGIN(origin)
        if parts is None:
            return _INVALID
        scheme = parts[1].lower()
        try:
            port = _port(int(parts[3])) if parts[3] else _DEFAULT_PORTS[scheme]
            hostname = canonical_host(parts[2])
        except ValueError:
            return _INVALID
        canonical = URL.build(scheme=scheme, host=hostname, port=port)
        host = hostname if canonical.is_default_port() else f"{canonical.host_subcomponent}:{port}"
        return Target(str(canonical), hostname, host, self._refusal(hostname, port))

    def _refusal(self, hostname: str, port: int) -> Reason | None:
        if self.allowed_ports and port not in self.allowed_ports:
            return Reason.PORT_NOT_ALLOWED
        if self.allowed_hosts and not any(matches(hostname, pattern) for pattern in self.allowed_hosts):
            return Reason.HOST_NOT_ALLOWED
        if is_address(hostname):
            return self._check_dial(hostname, port)
        if f".{hostname}".endswith(".localhost") and not any(self._has_hole(address) for address in _LOOPBACK):
            return Reason.PRIVATE_ADDRESS
        return None


def printable_url(url: str) -> str:
    """Return an untrusted address in a form that can be logged and shown: at most 300 printable characters.

    Userinfo is removed even where the address cannot otherwise be read; characters that are not printable (control
    characters, text direction marks, lone surrogates) are percent-encoded.
    """
    if found := _USERINFO(url):
        url = found[1] + url[found.end() :]
    shown = (ch if ch.isprintable() else _percent(ch.encode("utf-8", "surrogatepass")) for ch in url[:300])
    return "".join(shown)[:300]


def _percent(raw: bytes) -> str:
    return "".join(f"%{byte:02X}" for byte in raw)


def _percent_encode(found: re.Match[str]) -> str:
    return _percent(found[0].encode())


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address):
        if address in _MAPPED or address in _NAT64:
            return _is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
        if address not in _GLOBAL_UNICAST:
            return False
    return not any(address in network for network in _REFUSED)


def _is_within(address: IPv4Address | IPv6Address, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    """Return whether one of the networks holds the address, or the IPv4 address that it carries."""
    forms = [form for form in (address, _embedded(address)) if form is not None]
    return any(form in network for network in networks for form in forms)


def _embedded(address: IPv4Address | IPv6Address) -> IPv4Address | None:
    """Return the IPv4 address that an IPv6 address carries, None if it is of no kind that carries one."""
    if isinstance(address, IPv4Address):
        return None
    value = int(address)
    # RFC 4291 2.5.5.1 excepts :: and ::1: an exception for 0.0.0.0/8 is none for the loopback.
    if address in _MAPPED or address in _NAT64 or (address in _COMPATIBLE and value > 1):
        return IPv4Address(value & 0xFFFF_FFFF)
    return IPv4Address(value >> 80 & 0xFFFF_FFFF) if address in _6TO4 else None


def _pattern(entry: str) -> str:
    try:
        return canonical_pattern(entry)
    except ValueError as error:
        raise ValueError(f"{entry!r} {error}") from None


def _network(entry: str | IPv4Network | IPv6Network) -> IPv4Network | IPv6Network:
    if "%" in str(entry):
        raise ValueError(f"{entry!r} is not a network: a zone means nothing outside one machine")
    try:
        return ip_network(entry)
    except ValueError as error:
        raise ValueError(f"{entry!r} is not a network: write 10.0.0.0/8, or a single address ({error})") from None


def _port(entry: int) -> int:
    if isinstance(entry, bool) or not isinstance(entry, int) or not 1 <= entry <= 65535:
        raise ValueError(f"{entry!r} is not a port: write a number from 1 to 65535")
    return entry
