"""Whether it is a host that does not answer, or we who reach nobody: our own fault is charged to no file.

A failure to reach a host is doubted first. What is heard next decides: an answer from anybody shows that we are
connected, and the failure counts; other hosts' failures, with no answer in between, that we are not. Where no other
host is being asked there is nothing to hear, and the failure counts.

While we are cut off every attempt is a trial: a few at a time, nothing is spent on them, and one answer ends it. There
are two ways to be cut off: from the network, and from the name servers alone, which leaves literal addresses.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable
from ipaddress import ip_address
from typing import Generic, TypeVar

# Hosts that fail one after the other, with no answer in between: it takes few that had answered before. Strangers may
# all be dead, and count only beside one that is not, or when nobody has answered yet.
KNOWN_TO_CUT_OFF = 2
ANY_TO_CUT_OFF = 5
# Hosts that are remembered to have answered.
MAX_KNOWN = 1000
# What getaddrinfo says when a name server has answered: there is no such name, or no address of it.
_ANSWERS = (socket.EAI_NONAME, socket.EAI_NODATA)

T = TypeVar("T")


class Connectivity(Generic[T]):
    """One of the two ways to be cut off; `T` is an attempt that failed. Knows no time."""

    def __init__(self) -> None:
        # Those that answered last are at the end.
        self._known: dict[str, None] = {}
        self._failed: set[str] = set()
        self._doubted: list[tuple[str, T]] = []
        self.lost = False

    @property
    def doubted(self) -> set[str]:
        """The hosts whose failures are doubted."""
        return {host for host, _ in self._doubted}

    @property
    def unheard(self) -> set[str]:
        """Those of them that `failed` has not been told of."""
        return self.doubted - self._failed

    def doubt(self, host: str, attempt: T) -> None:
        """An attempt did not reach the host. It comes back from `take`."""
        self._doubted.append((host, attempt))

    def failed(self, host: str) -> bool:
        """The host does not answer, nor has any other since. Returns whether we are cut off now, and were not."""
        before = self.lost
        self._failed.add(host)
        known = sum(host in self._known for host in self._failed)
        # While those that are known do not fail, strangers that do are dead themselves, however many.
        many = len(self._failed) >= ANY_TO_CUT_OFF and (known > 0 or not self._known)
        self.lost = known >= KNOWN_TO_CUT_OFF or many
        return self.lost and not before

    def answered(self, host: str) -> bool:
        """The host has answered: we are connected. Returns whether we were cut off."""
        before, self.lost = self.lost, False
        self._failed.clear()
        self._known.pop(host, None)
        self._known[host] = None
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return before

    def take(self) -> list[T]:
        """The doubted attempts, once it is known what becomes of them."""
        taken = [attempt for _, attempt in self._doubted]
        self._doubted.clear()
        return taken


def is_name(hostname: str) -> bool:
    """Whether a host is to be looked up, and no literal address."""
    try:
        ip_address(hostname)
    except ValueError:
        return True
    return False


def ask_name_server(hostname: str, loop: AbstractEventLoop, tell: Callable[[bool], None]) -> None:
    """Look the name up, and tell whether a name server answers: that the name does not exist is an answer, too.

    libcurl does not tell one from the other. The thread is nobody's to wait for: libc may take half a minute.
    """

    def look_up() -> None:
        try:
            socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
            answered = True
        except (OSError, UnicodeError) as error:
            answered = not isinstance(error, socket.gaierror) or error.errno in _ANSWERS
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(tell, answered)

    threading.Thread(target=look_up, name="ask-name-server", daemon=True).start()
