"""Looks names up for the prober, fairly between zones.

libcurl looks up a few names at a time, in the order in which they come, while the time of the others runs: one zone
whose name server keeps silent would make the files of all other names end as dns_error. So names are looked up here, in
threads: a zone has a few of them at most, and the zones that have not answered lately share half of them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

THREADS = 48
THREADS_A_ZONE = 8
# A zone that has not answered for this long, or never, is a stranger.
LATELY = 300.0
STRANGER_THREADS = THREADS // 2
MAX_KNOWN = 10_000
# getaddrinfo keeps its buffers on the stack, which is 8 MB by default.
STACK_BYTES = 512 * 1024
# Second-level names under which a country's registry registers others.
_REGISTRIES = frozenset({"ac", "co", "com", "edu", "go", "gov", "mil", "ne", "net", "or", "org"})
# The errors of getaddrinfo that prove an answer: no such name, or no address of it.
_ANSWERS = (socket.EAI_NONAME, socket.EAI_NODATA)
# Those that this machine causes: no descriptor or no memory left.
_SHORTAGES = (socket.EAI_MEMORY, socket.EAI_SYSTEM)


def zone_of(name: str) -> str:
    """Return the domain that somebody has registered, and that has name servers of its own, as far as a name shows."""
    labels = name.split(".")
    is_below_registry = len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in _REGISTRIES
    return ".".join(labels[-3:] if is_below_registry else labels[-2:])


class Turns:
    """Decides which name is looked up next. Has no threads and no clock; times are seconds."""

    def __init__(self, threads: int = THREADS, a_zone: int = THREADS_A_ZONE, strangers: int = STRANGER_THREADS) -> None:
        self._threads = threads
        self._a_zone = a_zone
        self._for_strangers = strangers
        # The names that wait, by zone; the zones in the order of their turns.
        self._waiting: dict[str, deque[str]] = {}
        self._busy: Counter[str] = Counter()
        # The zones whose look-ups under way count as those of strangers, each with their number.
        self._strangers: Counter[str] = Counter()
        self._answered_at: dict[str, float] = {}
        self._under_way: dict[str, bool] = {}
        self._newest_next = False

    def add(self, name: str) -> None:
        """Let a name wait for its turn."""
        self._waiting.setdefault(zone_of(name), deque()).append(name)

    def next(self, now: float) -> str | None:
        """Return the name to look up now, None when none may be."""
        if len(self._under_way) >= self._threads:
            return None
        # Of strangers by turns the oldest and the newest: many silent zones delay a new one by a look-up or two.
        order = reversed(self._waiting) if self._newest_next else iter(self._waiting)
        for zone in list(order):
            is_stranger = now - self._answered_at.get(zone, -LATELY) >= LATELY
            if self._busy[zone] >= self._a_zone or (is_stranger and self._strangers.total() >= self._for_strangers):
                continue
            names = self._waiting.pop(zone)
            name = names.popleft()
            if names:
                self._waiting[zone] = names
            self._busy[zone] += 1
            self._strangers[zone] += is_stranger
            self._under_way[name] = is_stranger
            self._newest_next = is_stranger and not self._newest_next
            return name
        return None

    def end(self, name: str, now: float, *, answered: bool) -> None:
        """Note that a look-up has ended, and whether a name server has answered."""
        zone = zone_of(name)
        self._busy[zone] -= 1
        self._strangers[zone] -= self._under_way.pop(name)
        for counter in (self._busy, self._strangers):
            if not counter[zone]:
                del counter[zone]
        self._answered_at.pop(zone, None)
        if answered:
            self._answered_at[zone] = now
            if len(self._answered_at) > MAX_KNOWN:
                del self._answered_at[next(iter(self._answered_at))]

    def drop(self, name: str) -> bool:
        """Remove a name that waits; return False when its look-up has begun or it is not known."""
        zone = zone_of(name)
        if name not in (names := self._waiting.get(zone, ())):
            return False
        assert isinstance(names, deque)
        names.remove(name)
        if not names:
            del self._waiting[zone]
        return True


class Found(NamedTuple):
    """The end of a look-up: the addresses of the name, none when it failed. `shortage` is this machine's own."""

    name: str
    addresses: tuple[str, ...]
    answered: bool
    shortage: bool = False


def look_up(name: str) -> Found:
    """Look a name up; this may take half a minute."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return Found(name, (), error.errno in _ANSWERS, error.errno in _SHORTAGES)
    except (OSError, UnicodeError):
        return Found(name, (), answered=True)
    return Found(name, tuple(dict.fromkeys(str(address[0]) for *_, address in found)), answered=True)


class LookUps:
    """Runs look-ups in threads, started when they are needed. `descriptor` is readable when some have ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._turns = Turns()
        self._to_do: deque[str] = deque()
        self._work = threading.Semaphore(0)
        self._ended: deque[Found] = deque()
        self._threads = 0
        self._under_way = 0
        self.descriptor, self._bell = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._bell, False)

    def add(self, name: str) -> None:
        """Look a name up when its turn comes."""
        self._turns.add(name)

    def drop(self, name: str) -> bool:
        """Remove a name whose turn has not come; return False when it has."""
        return self._turns.drop(name)

    def begin(self) -> list[str]:
        """Begin the look-ups whose turn has come, and return their names."""
        begun: list[str] = []
        while (name := self._turns.next(self._clock())) is not None:
            begun.append(name)
            self._under_way += 1
            if self._under_way > self._threads and not self._start_thread() and not self._threads:
                self._ended.append(Found(name, (), answered=False, shortage=True))
                self._ring()
                continue
            self._to_do.append(name)
            self._work.release()
        return begun

    def ended(self) -> list[Found]:
        """Return the look-ups that have ended since the last call."""
        try:
            os.read(self.descriptor, 4096)
        except BlockingIOError:
            return []
        found = [self._ended.popleft() for _ in range(len(self._ended))]
        now = self._clock()
        for each in found:
            self._under_way -= 1
            self._turns.end(each.name, now, answered=each.answered)
        return found

    def _start_thread(self) -> bool:
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=self._run, name="look-up", daemon=True).start()
        except RuntimeError:  # No thread left on this machine.
            return False
        finally:
            threading.stack_size(before)
        self._threads += 1
        return True

    def _run(self) -> None:
        while True:
            self._work.acquire()
            self._ended.append(look_up(self._to_do.popleft()))
            self._ring()

    def _ring(self) -> None:
        # A full pipe rings already.
        with contextlib.suppress(BlockingIOError):
            os.write(self._bell, b"\0")
