"""Finds the addresses of a request's host before libcurl gets the request, so that libcurl looks no name up itself.

A request whose look-up has not begun soon is returned unsent, and charged to no file; only the time of the look-up
itself counts in the time-outs of a request.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

from notify_server.model import Request
from notify_server.processes.prober_names import Found, LookUps

# libcurl forgets an address 60 s after it was given.
KEPT_SECONDS = 50.0
MAX_KEPT = 10_000
# How long a request may wait for its look-up to begin.
PATIENCE_SECONDS = 0.5


class Unsent(Enum):
    """Why a request was not given to libcurl."""

    FAILED = "the name has no address, or no name server has answered in time"
    CROWDED = "its look-up did not begin in time"
    SHORTAGE = "this machine has no descriptor, memory or thread left"


class Begin(Protocol):
    """Takes a request whose host has addresses; `addresses` are entries of CURLOPT_RESOLVE that libcurl lacks."""

    def __call__(self, request: Request, addresses: Sequence[str], looked_up_ms: float) -> None: ...


class Place:
    """The host and port of an address. `until` is when libcurl may forget its addresses."""

    __slots__ = ("name", "port", "until")

    def __init__(self, origin: str) -> None:
        scheme, _, authority = origin.partition("://")
        self.name, _, port = authority.partition(":")
        self.port = port or ("443" if scheme == "https" else "80")
        is_literal = authority.startswith("[") or self.name.replace(".", "").isdigit()
        # libcurl knows the addresses of localhost itself, and refuses what is no address.
        is_local = f".{self.name.rstrip('.')}".endswith((".localhost", "."))
        self.until = math.inf if is_literal or is_local or "@" in authority else 0.0

    def entry(self, addresses: Sequence[str]) -> str:
        """Return the entry of CURLOPT_RESOLVE that gives libcurl these addresses for a minute."""
        # libcurl reads no zone; the guard refuses link-local addresses anyway.
        plain = (address.partition("%")[0] for address in addresses)
        return f"+{self.name}:{self.port}:{','.join(f'[{each}]' if ':' in each else each for each in plain)}"


class Waiting:
    """A request that waits for a look-up; `due` is when it is returned unsent. `is_late` if the look-up began before it
    came: its failure may be that of an outage that is over, and is not charged to the request.
    """

    __slots__ = ("due", "is_late", "place", "request", "since")

    def __init__(self, request: Request, place: Place, now: float) -> None:
        self.request = request
        self.place = place
        self.is_late = False
        self.wait(now)

    def wait(self, now: float) -> None:
        """Wait for a look-up to begin."""
        self.since = now
        self.due = now + PATIENCE_SECONDS

    def begin(self, now: float) -> None:
        """Note that the look-up is under way: its time counts from now on."""
        self.is_late = False
        self.since = now
        self.due = now + min(self.request.connect_timeout_ms, self.request.timeout_ms) / 1000


class Places:
    """Owns the look-ups and the requests that wait for one. `begin` gets a request once its host has addresses, and
    `unsent` one that gets none, with the reason and the milliseconds that its look-up took.
    """

    def __init__(
        self,
        begin: Begin,
        unsent: Callable[[Request, Unsent, float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._begin = begin
        self._unsent = unsent
        self._clock = clock
        self._look_ups = LookUps(clock)
        self._places: dict[str, Place] = {}
        # Addresses by name, with the time until which they hold.
        self._found: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._waiting: dict[str, list[Waiting]] = {}
        self._under_way: set[str] = set()
        self._first_due = math.inf

    @property
    def descriptor(self) -> int:
        """Readable when look-ups have ended."""
        return self._look_ups.descriptor

    @property
    def is_active(self) -> bool:
        """True while a look-up waits or is under way."""
        return bool(self._waiting or self._under_way)

    def patience(self) -> float | None:
        """Return the seconds until `advance` has to be called, None for no such time."""
        return None if self._first_due == math.inf else max(0.0, self._first_due - self._clock())

    def find(self, request: Request) -> None:
        """Begin the request as soon as its host has addresses: at once for most."""
        url = request.url
        path_at = url.find("/", 8)
        origin = url[:path_at] if path_at > 0 else url
        place = self._places.get(origin)
        if place is None:
            if len(self._places) >= MAX_KEPT:
                self._places.clear()
            place = self._places[origin] = Place(origin)
        if place.until == math.inf or place.until > (now := self._clock()):
            self._begin(request, (), 0.0)
            return
        until, addresses = self._found.get(place.name, (0.0, ()))
        if until > now:
            place.until = until
            self._begin(request, (place.entry(addresses),), 0.0)
            return
        waiting = Waiting(request, place, now)
        if place.name in self._under_way:
            waiting.is_late = True
        elif place.name not in self._waiting:
            self._look_ups.add(place.name)
        self._waiting.setdefault(place.name, []).append(waiting)
        self._first_due = min(self._first_due, waiting.due)

    def advance(self) -> None:
        """Begin the requests whose look-ups have ended, and the look-ups whose turn has come."""
        for found in self._look_ups.ended():
            self._end(found)
        begun = self._look_ups.begin()
        now = self._clock()
        for name in begun:
            self._under_way.add(name)
            for waiting in self._waiting.get(name, ()):
                waiting.begin(now)
                self._first_due = min(self._first_due, waiting.due)
        if now >= self._first_due:
            self._give_up(now)

    def _end(self, found: Found) -> None:
        now = self._clock()
        self._under_way.discard(found.name)
        if found.addresses:
            self._found.pop(found.name, None)
            self._found[found.name] = (now + KEPT_SECONDS, found.addresses)
            if len(self._found) > MAX_KEPT:
                del self._found[next(iter(self._found))]
        group = self._waiting.pop(found.name, [])
        if not found.addresses and (late := [waiting for waiting in group if waiting.is_late]):
            for waiting in late:
                waiting.wait(now)
                self._first_due = min(self._first_due, waiting.due)
            group = [waiting for waiting in group if not waiting.is_late]
            self._waiting[found.name] = late
            self._look_ups.add(found.name)
        for waiting in group:
            elapsed_ms = (now - waiting.since) * 1000
            if found.addresses:
                place = waiting.place
                is_new, place.until = place.until <= now, now + KEPT_SECONDS
                self._begin(waiting.request, (place.entry(found.addresses),) if is_new else (), elapsed_ms)
            else:
                self._unsent(waiting.request, Unsent.SHORTAGE if found.shortage else Unsent.FAILED, elapsed_ms)

    def _give_up(self, now: float) -> None:
        self._first_due = math.inf
        for name, group in list(self._waiting.items()):
            has_begun = name in self._under_way
            kept = [waiting for waiting in group if waiting.due > now]
            for waiting in group:
                if waiting.due <= now:
                    why = Unsent.FAILED if has_begun and not waiting.is_late else Unsent.CROWDED
                    self._unsent(waiting.request, why, (now - waiting.since) * 1000)
            if kept:
                self._waiting[name] = kept
                self._first_due = min(self._first_due, *(waiting.due for waiting in kept))
            else:
                del self._waiting[name]
                if not has_begun:
                    self._look_ups.drop(name)
