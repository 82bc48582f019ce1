"""Posts every address that is meant to make the daemon reach into a private network, with traps on all of them.

It runs in a network of its own, where private addresses are as real as public ones: each has a listener on port 80 and
on port 443. That the traps would catch something is shown twice: by a connection of this part's own to each of them,
and by a second daemon without a guard, which is posted the same addresses and walks in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from typing import Any

import trustme

from notify_server.model import Reason
from tests.e2e.test_verification import INVALID
from tests.e2e.test_verification import PRIVATE as POSTED
from tests.support.daemon import Config, Daemon, clean_environment
from tests.support.netns import Network
from tests.support.notification import batch_body, finished
from tests.support.origin import Answer, Origin
from tests.torture.figures import Figure, Setting
from tests.torture.fuzz import acceptable
from tests.unit import test_guard

PUBLIC = "93.184.216.34"
# Public, so that it is not the guard that keeps the daemon from it.
PROXY = "93.184.216.77"
PROXY_PORT = 80
FORBIDDEN_PORTS = (22, 25, 6379, 8080)
MAX_REDIRECTS = 5
PATIENCE = 120.0
REBINDINGS = 20
# Of the traps that a vector leads to, how many the daemon without a guard must have walked into.
OPEN_SHARE = 0.9

AVAILABLE = ("available", None)


@dataclass(frozen=True)
class Vector:
    """An address to post, and what becomes of its file. `hops` redirects are followed before it is refused."""

    row: str
    url: str
    end: tuple[str, str | None]
    hops: int = 0

    @property
    def body(self) -> bytes:
        """The notification that has it."""
        return batch_body("x", [finished(self.url, "key")])


def blocked(reason: Reason) -> tuple[str, str]:
    """The end of a file that the guard refuses."""
    return "blocked", str(reason)


PRIVATE = blocked(Reason.PRIVATE_ADDRESS)
UNREADABLE = blocked(Reason.INVALID_URL)


def cases(test: Any) -> list[Any]:
    """What a test of the guard is parametrised with, one value or a tuple of them for each case."""
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    return [getattr(case, "values", case) for case in mark.args[1]]


def in_url(address: str) -> str:
    """The address as a URL's host."""
    return test_guard.in_url(address)


def direct() -> Iterator[Vector]:
    """Addresses that say themselves where they lead."""
    for row, addresses in test_guard.PRIVATE.items():
        for address in addresses:
            yield Vector(row, f"http://{in_url(address)}/latest/meta-data/", PRIVATE)
            yield Vector(row, f"https://{in_url(address)}/", PRIVATE)
    for host, _ in cases(test_guard.test_a_literal_in_any_spelling_is_read_as_the_address_it_is_and_refused):
        for authority in (host, f"{host}:80", f"{host}:00080"):
            yield Vector("rows 8-14", f"HTTP://{authority}/x", PRIVATE)
    for host in cases(test_guard.test_row_12_localhost_and_all_under_it_are_refused_unless_the_loopback_is_opened):
        yield Vector("row 12", f"http://{host}/", PRIVATE)
    for spelling in POSTED:
        yield Vector("rows 1-18", spelling.format(port=80), PRIVATE)
    for host in cases(test_guard.test_a_numeric_last_label_that_makes_no_ipv4_address_is_invalid):
        yield Vector("row 11", f"http://{host}/x", UNREADABLE)
    for url in cases(test_guard.test_row_20_userinfo_is_refused_and_nothing_of_it_is_returned):
        yield Vector("row 20", url, UNREADABLE)
    yield Vector("row 20", "http://good@127.0.0.1/", UNREADABLE)
    for authority in cases(
        test_guard.test_row_21_whatever_readers_strip_or_split_at_differently_makes_an_authority_invalid
    ):
        yield Vector("row 21", f"http://{authority}/x", UNREADABLE)
    for url in cases(test_guard.test_anything_but_an_absolute_http_address_is_invalid):
        yield Vector("row 21", url, UNREADABLE)
    for spelling in INVALID:
        yield Vector("row 21", spelling.format(trap="127.0.0.2:80"), UNREADABLE)
    for port in cases(test_guard.test_a_port_that_is_no_port_is_invalid):
        yield Vector("row 30", f"http://{PUBLIC}:{port}/x", UNREADABLE)
    for host in ("[fe80::1%eth0]", "[fe80::1%25eth0]"):
        yield Vector("row 18", f"http://{host}/", UNREADABLE)
    for port in FORBIDDEN_PORTS:
        for address in (PUBLIC, "127.0.0.1", "10.1.2.3"):
            yield Vector("row 30", f"http://{address}:{port}/", blocked(Reason.PORT_NOT_ALLOWED))


def neighbours() -> list[str]:
    """Public addresses, those next to a private network among them."""
    pairs = [*test_guard.IPV4_NEIGHBOURS.values(), *test_guard.IPV6_NEIGHBOURS.values()]
    found = {address for pair in pairs for address in pair if address is not None}
    found |= set(cases(test_guard.test_a_public_address_is_examined_and_dialled))
    # Mapped and translated ones are dialled as what they are, or not at all; here it is about networks' edges.
    # Nor one that vectors embed in IPv6 addresses, since those are let through with it.
    return sorted(a for a in found if not a.startswith(("::ffff:", "64:ff9b:")) and a != "8.8.8.8")


def redirecting(origin: Origin) -> Iterator[Vector]:
    """Addresses on a public host that lead to private ones, at every hop."""
    here = "http://" + PUBLIC
    numbers = iter(range(1_000_000))

    def chain(row: str, location: str, end: tuple[str, str | None], hops: int) -> Vector:
        number = next(numbers)
        for hop in range(1, hops):
            origin.on(f"/{number}/{hop}", Answer(302, {"Location": f"/{number}/{hop + 1}"}, close=True))
        origin.on(
            f"/{number}/{hops}", Answer((301, 302, 303, 307, 308)[number % 5], {"Location": location}, close=True)
        )
        return Vector(row, f"{here}/{number}/1", end, hops)

    for address in (each for addresses in test_guard.PRIVATE.values() for each in addresses):
        yield chain("row 26", f"http://{in_url(address)}/", PRIVATE, 1)
    for hops in range(1, MAX_REDIRECTS + 1):
        for location in (
            "http://127.0.0.1/",
            "//169.254.169.254/latest",
            "http://10.1.2.3/",
            "https://[::1]/",
            "//0x7f.1",
        ):
            yield chain("row 26", location, PRIVATE, hops)
        yield chain("row 26", f"http://{PUBLIC}:6379/", blocked(Reason.PORT_NOT_ALLOWED), hops)
        yield chain("row 26", "http://private.test/", PRIVATE, hops)
    for location, reason in cases(
        test_guard.test_row_26_a_redirect_is_examined_like_any_address_and_keeps_its_own_reason
    ):
        if reason is not Reason.HOST_NOT_ALLOWED:
            yield chain("row 26", location, blocked(reason), 1)
    for location in cases(test_guard.test_row_27_a_redirect_that_leads_to_no_http_address_is_a_bad_redirect):
        # The others cannot be said in a header.
        if location.isascii() and location.isprintable():
            for hops in (1, MAX_REDIRECTS):
                yield chain("row 27", location, blocked(Reason.BAD_REDIRECT), hops)
    origin.on("/loop", Answer(302, {"Location": "/loop"}, close=True))
    yield Vector("row 29", f"{here}/loop", ("unavailable", str(Reason.TOO_MANY_REDIRECTS)), 2 * (MAX_REDIRECTS + 1))


def named(network: Network, known: set[str]) -> Iterator[Vector]:
    """Names, and what the name server says of them. They are added to `known`."""

    def on(name: str, *answers: str) -> None:
        network.names.on(name, answers)
        known.add(name)

    for number, address in enumerate(each for addresses in test_guard.PRIVATE.values() for each in addresses):
        on(f"p{number}.test", address)
        yield Vector("row 23", f"http://p{number}.test/", PRIVATE)
    on("private.test", "10.1.2.3")
    on("loopback.test", "127.0.0.1")
    on("both.test", "127.0.0.1", "::1", "10.1.2.3", "fd00:ec2::254")
    on("metadata.google.internal", "169.254.169.254")
    on("alias.test", "metadata.google.internal")
    for name in ("private.test", "loopback.test", "both.test", "metadata.google.internal", "alias.test"):
        yield Vector("row 23", f"http://{name}/", PRIVATE)
        yield Vector("row 23", f"https://{name.upper()}./", PRIVATE)
    for number, private in enumerate(("10.1.2.3", "127.0.0.1", "::1", "fd00:ec2::254", "::ffff:127.0.0.1")):
        # Whichever comes first, only the public one may be dialled.
        for order in ((PUBLIC, private), (private, PUBLIC)):
            name = f"mixed{number}-{order.index(PUBLIC)}.test"
            on(name, *order)
            yield Vector("row 24", f"http://{name}/mixed", AVAILABLE)
    for host, hostname in cases(test_guard.test_row_22_a_name_in_any_script_has_one_canonical_form_which_is_punycode):
        on(hostname, "192.168.0.1")
        yield Vector("row 22", f"https://{host}:443/x", PRIVATE)


# --- The traps ---


def dialled(address: str) -> str:
    """The address that a connection to this one arrives at: a mapped IPv4 address is that, none at all is loopback."""
    parsed = ip_address(address)
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    if parsed.is_unspecified:
        return "127.0.0.1" if parsed.version == 4 else "::1"
    return str(parsed)


def trapped() -> list[str]:
    """The private addresses that the vectors lead to."""
    found = {dialled(each) for addresses in test_guard.PRIVATE.values() for each in addresses}
    spelled = cases(test_guard.test_a_literal_in_any_spelling_is_read_as_the_address_it_is_and_refused)
    found |= {dialled(address) for _, address in spelled}
    return sorted(found | {"127.0.0.1", "127.0.0.2", "::1", "10.1.2.3", "169.254.169.254", "192.168.0.1"})


@dataclass
class Traps:
    """Listeners that must not be reached. `nowhere` has addresses that no machine can have, such as multicast."""

    origins: dict[tuple[str, int], Origin] = field(default_factory=dict)
    nowhere: list[str] = field(default_factory=list)

    async def set_up(self, network: Network, stack: contextlib.AsyncExitStack) -> None:
        """Listen on all of them, and connect to each once."""
        places = [(address, port) for address in (PUBLIC, "127.0.0.1", "10.1.2.3") for port in FORBIDDEN_PORTS]
        places.append((PROXY, PROXY_PORT))
        for address in trapped():
            if ip_address(address).is_multicast:
                self.nowhere.append(address)
                continue
            if not address.startswith("127.") and address != "::1":
                network.add(address)
            places += [(address, 80), (address, 443)]
        for address, port in places:
            try:
                origin = await stack.enter_async_context(Origin(address, port))
                await self._knock(origin)
            except OSError:
                self.nowhere.append(address)
            else:
                self.origins[address, port] = origin

    async def _knock(self, origin: Origin) -> None:
        _, writer = await asyncio.open_connection(origin.host, origin.port)
        await origin.bell.until(lambda: origin.connections == 1)
        writer.close()
        await writer.wait_closed()

    def reached(self) -> Counter[tuple[str, int]]:
        """How often each was connected to, the connection of `set_up` aside."""
        return Counter(
            {place: origin.connections - 1 for place, origin in self.origins.items() if origin.connections > 1}
        )


# --- The daemon ---


def settings(work: Any, **verify: Any) -> Config:
    """The daemon's configuration: the guard as it is by default, and everything else in haste."""
    return {
        "verify": {
            "timeout": "4s",
            "connect_timeout": "2s",
            "retry_schedule": [],
            "concurrency": 400,
            "max_redirects": MAX_REDIRECTS,
            "ca_file": str(work / "ca.pem"),
            "allowed_networks": [],
            "allowed_ports": [80, 443],
            **verify,
        }
    }


@dataclass
class Seen:
    """What became of the vectors."""

    as_expected: int = 0
    wrong: list[str] = field(default_factory=list)
    by_row: Counter[str] = field(default_factory=Counter)
    by_end: Counter[str] = field(default_factory=Counter)


async def post_all(daemon: Daemon, vectors: Iterable[Vector], seen: Seen, tag: str) -> None:
    """Post each in a batch of its own, wait for their verdicts, and compare."""
    posted: list[tuple[str, Vector]] = []
    for number, vector in enumerate(vectors):
        batch = f"{tag}-{number}"
        reply = await daemon.post(batch_body(batch, [finished(vector.url, "key")]))
        seen.by_row[vector.row] += 1
        if acceptable(vector.body) is False:
            # What the contract does not hold to be an address at all is refused at the door.
            _compare(seen, vector, reply.status == 400, f"{reply.status}", "refused")
        elif reply.status != 200:
            _compare(seen, vector, False, f"{reply.status} {reply.body!r}", "")
        else:
            posted.append((batch, vector))
    await daemon.eventually("SELECT count(*) = 0 FROM notification WHERE expanded_at IS NULL", seconds=PATIENCE)
    await daemon.eventually("SELECT count(*) = 0 FROM batch WHERE verdict = 'pending'", seconds=PATIENCE)
    for batch, vector in posted:
        (row,) = daemon.files(batch).values()
        end = row["state"], row["reason"]
        attempts = daemon.attempts(row)
        hops = sum(attempt["http_status"] in (301, 302, 303, 307, 308) for attempt in attempts)
        right = end == vector.end and hops == vector.hops and (not hops or bool(row["final_url"]))
        _compare(seen, vector, right, f"{end}, {hops} hops, {row['final_url']}", f"{end[0]} {end[1] or ''}".strip())


def _compare(seen: Seen, vector: Vector, right: bool, found: str, end: str) -> None:
    seen.as_expected += right
    seen.by_end[end] += 1
    if not right:
        seen.wrong.append(f"{vector}: {found}")


async def _rebind(setting: Setting, network: Network, origin: Origin) -> Counter[str]:
    """Names that are public when they are looked up first, and private from then on: how their files ended.

    A prober remembers an address for a while; so there are files before it forgets, and after it has been replaced.
    """
    ends: Counter[str] = Counter()
    names = [f"rebind{number}.test" for number in range(REBINDINGS)]
    for number, name in enumerate(names):
        network.names.on(name, [PUBLIC], [("127.0.0.1", "10.1.2.3", "169.254.169.254")[number % 3]])
    # A connection that is kept would spare the second look-up.
    origin.on("/rebind", Answer(close=True))
    async with Daemon(
        setting.work / "rebinding", settings(setting.work, allowed_networks=[PUBLIC]), prefix=network.prefix
    ) as daemon:
        for turn in ("at first", "remembered", "turned private"):
            if turn == "turned private":
                await daemon.restart()
            files = await daemon.settle(turn, [f"http://{name}/rebind" for name in names])
            for row in files.values():
                dialled = row["state"] == "available" and row["remote_addr"] == PUBLIC
                ends[f"{turn}, dialled"] += dialled
                ends[f"{turn}, blocked"] += (row["state"], row["reason"]) == PRIVATE
    ends["looked_up_again"] = sum(network.names.asked[name] >= 4 for name in names)
    return ends


async def _without_guard(setting: Setting, network: Network, vectors: Iterable[Vector], traps: Traps) -> int:
    """Post what was refused to a daemon that refuses nothing; the number of traps that it walks into."""
    before = traps.reached()
    everything = settings(setting.work, allowed_networks=["0.0.0.0/0", "::/0"], allowed_ports=[])
    async with Daemon(setting.work / "open", everything, prefix=network.prefix) as daemon:
        refused = [vector.url for vector in vectors if vector.end in (PRIVATE, blocked(Reason.PORT_NOT_ALLOWED))]
        entries = [finished(url, str(number)) for number, url in enumerate(refused)]
        await daemon.deliver("open", entries)
        await daemon.verdict("open", seconds=PATIENCE)
    return len(traps.reached() - before)


async def run(setting: Setting) -> list[Figure]:
    """Post all vectors once; the scale changes nothing. Raises PermissionError without root."""
    if os.geteuid():
        # A network would skip the test, and this may be none.
        raise PermissionError("a network of its own takes root")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(setting.work / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(PUBLIC).configure_cert(tls)
    proxy = f"http://{PROXY}:{PROXY_PORT}"
    proxies = clean_environment(
        http_proxy=proxy,
        HTTPS_PROXY=proxy,
        https_proxy=proxy,
        ALL_PROXY=proxy,
        all_proxy=proxy,
        no_proxy="",
        NO_PROXY="",
    )
    public = [PUBLIC, *(address for address in neighbours() if address != PUBLIC)]
    seen, traps, known = Seen(), Traps(), set[str]()
    async with Network(*public, PROXY) as network, contextlib.AsyncExitStack() as stack:
        origins = [await stack.enter_async_context(Origin(address, 80)) for address in public]
        secure = await stack.enter_async_context(Origin(PUBLIC, 443, tls=tls))
        await traps.set_up(network, stack)
        vectors = [
            *direct(),
            *(Vector("rows 5, 6", f"http://{in_url(address)}/public", AVAILABLE) for address in public),
            *named(network, known),
            *redirecting(origins[0]),
        ]
        secure.on("/down", Answer(302, {"Location": f"http://{PUBLIC}/plain"}))
        vectors.append(Vector("row 28", f"https://{PUBLIC}/down", AVAILABLE, hops=1))
        # A machine's own addresses are private, and those of this network are; these stand for other machines'.
        guarded = settings(setting.work, allowed_networks=public)
        async with Daemon(setting.work / "guarded", guarded, prefix=network.prefix, environ=proxies) as daemon:
            own = int(daemon.callback.rpartition(":")[2].partition("/")[0])
            for host in ("127.0.0.1", "localhost", PUBLIC):
                vectors.append(Vector("row 30", f"http://{host}:{own}/notify", blocked(Reason.PORT_NOT_ALLOWED)))
            await post_all(daemon, vectors, seen, "v")
            # What a HEAD for its own callback would have left in its log.
            visits = daemon.count("refused", status=405)
            secrets = "user:secret" in daemon.text or "good@" in daemon.text
            assert await daemon.terminate() == 0
        asked = set(network.names.asked)
        rebound = await _rebind(setting, network, origins[0])
        walked_into = traps.reached()
        unreached = sum(not origin.hits for origin in origins)
        open_to = await _without_guard(setting, network, vectors, traps)
    for line in [*seen.wrong, *map(str, walked_into), *(asked - known)]:
        print(ascii(line), file=sys.stderr)
    count = len(vectors)
    return [
        Figure(
            "vectors that ended as they must",
            f"all of {count}",
            f"{seen.as_expected}",
            seen.as_expected == count and not unreached and not secrets,
            {"vectors": count, "public_not_reached": unreached, **dict(seen.by_row), **dict(seen.by_end)},
        ),
        Figure(
            "connections to traps",
            f"0; more than {OPEN_SHARE:.0%} of the traps without the guard",
            f"{sum(walked_into.values()) + visits}; without the guard to {open_to} of {len(traps.origins) - 1}",
            not walked_into and not visits and open_to > OPEN_SHARE * (len(traps.origins) - 1),
            {
                "connections": sum(walked_into.values()),
                "own_port": visits,
                "traps": len(traps.origins),
                "reached_without_guard": open_to,
                "addresses_no_machine_has": len(set(traps.nowhere)),
            },
        ),
        Figure(
            "names that turn private after their first look-up",
            f"all {REBINDINGS} blocked from then on",
            f"{rebound['turned private, blocked']}",
            rebound["at first, dialled"] == rebound["looked_up_again"] == REBINDINGS
            and rebound["remembered, dialled"] + rebound["remembered, blocked"] == REBINDINGS
            and rebound["turned private, blocked"] == REBINDINGS,
            dict(rebound),
        ),
        Figure(
            "look-ups of names that are no names",
            "0",
            f"{len(asked - known)}, beside {len(asked & known)} of others",
            asked == known,
            {"unknown": len(asked - known), "known": len(asked & known), "posted": len(known)},
        ),
    ]
