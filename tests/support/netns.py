"""A network of a test's own: its addresses, its routes and its name server are what the test says. Linux, as root.

    async with Network("93.184.216.34", "10.1.2.3") as network, Origin("93.184.216.34", 80) as origin:
        network.names.on("files.test", ["93.184.216.34"], ["10.1.2.3"])
        async with Daemon(tmp_path, {...}, prefix=network.prefix) as daemon:
            ...

While it is open, the test's own thread is in the network: the sockets that it opens and the processes that it starts
belong there, so Origin and Daemon are used as ever. What was opened before stays where it was. Daemon's `prefix` gives
it the name server; without it the daemon would ask the machine's, which nothing here leads to.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Self

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from tests.support.waiting import Bell

# libc's resolver gives up on a silent server after a second.
RESOLV_CONF = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n"
NSSWITCH_CONF = "hosts: files dns\n"
# Binds these files over the existing ones of /etc, only for the command that follows.
BIND = 'for file in "$0"/*; do [ ! -e "/etc/${file##*/}" ] || mount --bind "$file" "/etc/${file##*/}"; done; exec "$@"'
# Frames leave by one end, and the other end accepts none of them: packets sent there are never answered.
SETUP = """
link set lo up
link add void type veth peer name end
link set void arp off up
link set end arp off up
address add 192.0.2.1/32 dev void
address add 2001:db8::1/128 dev void nodad
"""
CLONE_NEWNET = 0x40000000

SERVFAIL = dns.rcode.SERVFAIL
NXDOMAIN = dns.rcode.NXDOMAIN
# The query is never answered.
SILENT = None

# Addresses; or a name, of which this is another name (CNAME).
NameAnswer = Sequence[str] | dns.rcode.Rcode | None
# The fate of a packet to an address that is not here: it is lost, or the sender gets an error at once, EHOSTUNREACH or
# ENETUNREACH.
ROUTES = {"silent": "unicast {} dev void", "unreachable": "unreachable {}", "no route": "throw {}"}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Names:
    """The name server, on 127.0.0.1, over UDP; every record has a TTL of 0. Other names do not exist."""

    def __init__(self) -> None:
        # How many queries there were for each name: a look-up makes two, for IPv4 and for IPv6 addresses.
        self.asked: Counter[str] = Counter()
        self.bell = Bell()
        self._answers: dict[str, tuple[NameAnswer, ...]] = {}
        self._all: tuple[NameAnswer, ...] = ()
        self._turns: Counter[tuple[str, dns.rdatatype.RdataType]] = Counter()
        self._transport: asyncio.BaseTransport | None = None

    def on(self, name: str, *answers: NameAnswer) -> None:
        """Answer look-ups of this name with these, one after the other, the last one for ever."""
        self._answers[name] = answers
        for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
            self._turns[name, kind] = 0

    def on_all(self, *answer: NameAnswer) -> None:
        """Answer every look-up with this; with nothing given, as `on` says again."""
        self._all = answer

    async def asked_for(self, name: str, number: int = 1) -> None:
        """Return once so many queries for this name have come."""
        await self.bell.until(lambda: self.asked[name] >= number)

    async def start(self) -> None:
        """Serve."""
        names = self

        class Server(asyncio.DatagramProtocol):
            transport: asyncio.DatagramTransport

            def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
                self.transport = transport

            def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
                if (answer := names.answer(data)) is not None:
                    self.transport.sendto(answer, address)

        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(Server, ("127.0.0.1", 53))

    def stop(self) -> None:
        """Serve no more."""
        assert self._transport is not None
        self._transport.close()

    def answer(self, data: bytes) -> bytes | None:
        """The answer to a query, None when there shall be none."""
        query = dns.message.from_wire(data)
        (question,) = query.question
        name = question.name.to_text(omit_final_dot=True).lower()
        self.asked[name] += 1
        self.bell.ring()
        response = dns.message.make_response(query, recursion_available=True)
        rcode = self._fill(response, name, question.rdtype)
        if rcode is SILENT:
            return None
        response.set_rcode(rcode)
        return response.to_wire()

    def _fill(self, response: dns.message.Message, name: str, kind: dns.rdatatype.RdataType) -> dns.rcode.Rcode | None:
        """Add the records of this name, and of what it is another name of."""
        answers = self._all or self._answers.get(name, (NXDOMAIN,))
        answer = answers[min(self._turns[name, kind], len(answers) - 1)]
        self._turns[name, kind] += 1
        if answer is None or isinstance(answer, dns.rcode.Rcode):
            return answer
        for value in answer:
            try:
                of = dns.rdatatype.AAAA if ip_address(value).version == 6 else dns.rdatatype.A
            except ValueError:
                response.answer.append(dns.rrset.from_text(name + ".", 0, "IN", dns.rdatatype.CNAME, value + "."))
                return self._fill(response, value, kind)
            if of == kind:
                response.answer.append(dns.rrset.from_text(name + ".", 0, "IN", of, value))
        return dns.rcode.NOERROR


class Network:
    """Use it with `async with`. It has these addresses, on which a test may listen, 127.0.0.1 and ::1; packets to all
    others get lost until `elsewhere` says otherwise. Skips the test where it may not be made.
    """

    def __init__(self, *addresses: str) -> None:
        self.names = Names()
        self.prefix: Sequence[str] = ()
        self._addresses = addresses
        self._outside = -1
        self._etc = Path()

    async def __aenter__(self) -> Self:
        self._outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.unshare(CLONE_NEWNET))
        except PermissionError:
            os.close(self._outside)
            pytest.skip("a network of its own takes root")
        self._etc = Path(tempfile.mkdtemp())
        try:
            (self._etc / "resolv.conf").write_text(RESOLV_CONF)
            (self._etc / "nsswitch.conf").write_text(NSSWITCH_CONF)
            self.prefix = ("unshare", "--mount", "sh", "-ec", BIND, str(self._etc))
            self._ip(SETUP)
            self.elsewhere("silent")
            self.add(*self._addresses)
            await self.names.start()
        except BaseException:
            self._leave()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.names.stop()
        self._leave()

    def _leave(self) -> None:
        _check(_libc.setns(self._outside, CLONE_NEWNET))
        os.close(self._outside)
        shutil.rmtree(self._etc)

    def _ip(self, commands: str) -> None:
        subprocess.run(["ip", "-batch", "-"], input=commands, text=True, check=True)

    def add(self, *addresses: str) -> None:
        """Packets to these addresses arrive here."""
        self._ip("".join(f"address add {address} dev lo{' nodad' * (':' in address)}\n" for address in addresses))

    def remove(self, *addresses: str) -> None:
        """They do not any more: these addresses are elsewhere. What listens on them keeps listening."""
        self._ip(
            "".join(f"address delete {address}/{ip_address(address).max_prefixlen} dev lo\n" for address in addresses)
        )

    def elsewhere(self, fate: str) -> None:
        """What becomes of packets to addresses that are not here: one of ROUTES."""
        self._ip("".join(f"route replace {ROUTES[fate].format(every)}\n" for every in ("0.0.0.0/0", "::/0")))
