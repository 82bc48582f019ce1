"""Tells a host that does not answer from a machine that is cut off: an outage of our own is charged to no file.

A failure to reach a host is held back first. What happens next decides: an answer from any other host shows that this
machine is connected, and the failure counts; failures of other hosts, with no answer in between, show that it is cut
off. With no request to another host in flight nothing more can be learnt, and the failure counts.

While this machine is cut off every attempt is a trial: a few at a time, none is charged, and one answer ends it. There
are two kinds of outage: of the network, and of the name servers alone, which leaves literal addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Generic, TypeVar

import structlog

from notify_server.model import Evidence, Reason, Target
from notify_server.verify.hosts import hostname_of

log = structlog.get_logger("notify_server.verify")

# Declare an outage after 2 consecutive failures of hosts that answered before, or 5 of any hosts. Hosts that never
# answered may simply be dead: they count only if a host that answered before fails too, or if none has answered yet.
KNOWN_TO_CUT_OFF = 2
ANY_TO_CUT_OFF = 5
# The number of hosts whose answers are remembered.
MAX_KNOWN = 1000
# The errors of getaddrinfo that prove an answer of a name server: no such name, or no address of it.
_ANSWERS = (socket.EAI_NONAME, socket.EAI_NODATA)

T = TypeVar("T")


class Connectivity(Generic[T]):
    """One of the two kinds of outage; `T` is an attempt that failed. Has no clock."""

    def __init__(self) -> None:
        # In the order of their last answers.
        self._known: dict[str, None] = {}
        self._failed: set[str] = set()
        self._doubted: list[tuple[str, T]] = []
        self.lost = False

    @property
    def doubted(self) -> set[str]:
        """The hosts with failures that are held back."""
        return {host for host, _ in self._doubted}

    @property
    def unheard(self) -> set[str]:
        """The doubted hosts for which `failed` was not called."""
        return self.doubted - self._failed

    def doubt(self, host: str, attempt: T) -> None:
        """Hold back an attempt that did not reach the host, until `take` returns it."""
        self._doubted.append((host, attempt))

    def failed(self, host: str) -> bool:
        """Count a host that does not answer. Return whether an outage begins with it."""
        before = self.lost
        self._failed.add(host)
        known = sum(host in self._known for host in self._failed)
        # While no known host fails, failing unknown hosts are dead themselves, however many.
        many = len(self._failed) >= ANY_TO_CUT_OFF and (known > 0 or not self._known)
        self.lost = known >= KNOWN_TO_CUT_OFF or many
        return self.lost and not before

    def answered(self, host: str) -> bool:
        """Note that the host has answered. Return whether an outage ends with it."""
        before, self.lost = self.lost, False
        self._failed.clear()
        self._known.pop(host, None)
        self._known[host] = None
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return before

    def take(self) -> list[T]:
        """Remove and return the attempts that are held back."""
        taken = [attempt for _, attempt in self._doubted]
        self._doubted.clear()
        return taken


def is_name(hostname: str) -> bool:
    """Return whether the host is a name that must be looked up, not a literal address."""
    try:
        ip_address(hostname)
    except ValueError:
        return True
    return False


def ask_name_server(hostname: str, loop: AbstractEventLoop, on_result: Callable[[bool], None]) -> None:
    """Look the name up, and report whether a name server answers, even if only that the name does not exist; libcurl
    does not distinguish the two. No caller waits for the thread: libc may take half a minute.
    """

    def look_up() -> None:
        try:
            socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
            answered = True
        except (OSError, UnicodeError) as error:
            answered = not isinstance(error, socket.gaierror) or error.errno in _ANSWERS
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(on_result, answered)

    threading.Thread(target=look_up, name="ask-name-server", daemon=True).start()


class Outages(Generic[T]):
    """Decides, for both kinds of outage, which failed attempts count. `count` charges an attempt to its file and host,
    `give_back` returns a list uncharged; `under_way` returns the targets of requests in flight; `on_connected` is
    called when an outage ends, `on_settled` after a look-up that may have decided something.
    """

    def __init__(
        self,
        *,
        count: Callable[[T], None],
        give_back: Callable[[list[T]], None],
        under_way: Callable[[], Iterable[Target]],
        on_connected: Callable[[], None],
        on_settled: Callable[[], None],
    ) -> None:
        self._count = count
        self._give_back = give_back
        self._under_way = under_way
        self._on_connected = on_connected
        self._on_settled = on_settled
        self._network: Connectivity[T] = Connectivity()
        self._names: Connectivity[T] = Connectivity()
        self._asking = False
        # The number of outages so far, of both kinds.
        self._begun = 0

    @property
    def ongoing(self) -> bool:
        """True while no host, or no name server, answers."""
        return self._network.lost or self._names.lost

    def is_cut_off(self, hostname: str) -> bool:
        """Return whether requests to the host are trials now."""
        return self._network.lost or (self._names.lost and is_name(hostname))

    def before(self, hostname: str) -> int | None:
        """Return the mark of an attempt that begins now, for `doubt`: the outages so far, or None during one."""
        return None if self.is_cut_off(hostname) else self._begun

    def heard(self, target: Target, evidence: Evidence) -> None:
        """Note that the network, or a name server, works if the evidence of a request proves it."""
        if evidence.status is not None or evidence.connect_ms is not None or evidence.refused:
            self._answered(self._network, target.host)
        if evidence.dns_ms is not None and is_name(target.hostname):
            self._answered(self._names, target.host)

    def doubt(self, target: Target, evidence: Evidence, attempt: T, *, before: int | None) -> bool:
        """Return False when the attempt reached a host, so that it counts. Otherwise keep it; give it back at once if
        an outage occurred since `before`, its mark.
        """
        if evidence.status is not None or evidence.reused or evidence.refused:
            return False
        if evidence.failure is Reason.DNS_ERROR:
            kind = self._names
        elif evidence.failure in (Reason.TIMEOUT, Reason.CONNECT_ERROR) and evidence.connect_ms is None:
            kind = self._network
        else:
            return False
        if before == self._begun:
            kind.doubt(target.host, attempt)
            if kind is self._network:
                self._failed(kind, target.host)
            return True
        self._give_back([attempt])
        if kind is self._names:
            self._ask_name_server(target.host)
        return True

    def settle(self) -> None:
        """Count the failures about which nothing more can be learnt."""
        for kind in (self._network, self._names):
            if not (doubted := kind.doubted):
                continue
            if kind is self._names and (unheard := kind.unheard):
                self._ask_name_server(min(unheard))
                continue
            others = self._under_way()
            if not any(
                other.host not in doubted and (kind is self._network or is_name(other.hostname)) for other in others
            ):
                for attempt in kind.take():
                    self._count(attempt)

    def drop(self) -> None:
        """Forget the attempts that are held back."""
        self._network.take()
        self._names.take()

    def _answered(self, kind: Connectivity[T], host: str) -> None:
        if kind.answered(host):
            log.warning("connected again", to=self._name_of(kind))
            self._on_connected()
        for attempt in kind.take():
            self._count(attempt)

    def _failed(self, kind: Connectivity[T], host: str) -> None:
        if kind.failed(host):
            self._begun += 1
            log.warning("no host answers: files wait, no attempts are spent", to=self._name_of(kind))
        if kind.lost and kind.doubted:
            self._give_back(kind.take())

    def _name_of(self, kind: Connectivity[T]) -> str:
        return "network" if kind is self._network else "name servers"

    def _ask_name_server(self, host: str) -> None:
        if self._asking:
            return
        self._asking = True

        def on_result(answers: bool) -> None:
            self._asking = False
            if answers:
                self._answered(self._names, host)
            else:
                self._failed(self._names, host)
            self.settle()
            self._on_settled()

        ask_name_server(hostname_of(host), asyncio.get_running_loop(), on_result)
