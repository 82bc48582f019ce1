"""Runs attempts: one request after the other until the policy comes to a conclusion, then a result for the record.

An attempt in flight is in memory only: after a crash, or when a prober dies, its file is still pending.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import msgspec
import structlog

from notify_server.config import HostSettings, VerifyConfig
from notify_server.model import (
    AttemptRow,
    DueFile,
    Evidence,
    FileResult,
    FileState,
    Reason,
    Request,
    Target,
)
from notify_server.processes.prober_client import ProberLink
from notify_server.verify import policy
from notify_server.verify.capacity import Capacity
from notify_server.verify.connectivity import Outages
from notify_server.verify.guard import Guard
from notify_server.verify.hosts import Address, Host, port_of
from notify_server.verify.recorder import Recorder
from notify_server.verify.results import attempt_row, file_result, flags_of
from notify_server.verify.usable import media_types

log = structlog.get_logger("notify_server.verify")

# A file that was in flight when this many probers died may be the cause: an attempt is charged to it.
MAX_DEATHS = 5
# How long a host is paused when this machine was short of something, and when its address was at its limit.
SHORTAGE_SECONDS = 1.0
CROWDED_SECONDS = 0.25


class Flight:
    """An attempt in flight on one file."""

    __slots__ = (
        "address", "ask", "deadline", "doubted", "file", "host", "is_stranger", "link", "on_trial", "outages_before",
        "requests", "sent_at", "settings", "waits_since",
    )  # fmt: skip

    def __init__(
        self, file: DueFile, host: Host, ask: policy.NextRequest, now: float, outages_before: int | None
    ) -> None:
        self.file = file
        # The file's host decides what an answer means; the host of the request in flight holds the slot.
        self.settings = host.settings
        self.host = host
        self.ask = ask
        self.deadline = now + host.settings.timeout
        # The scarce slots that it holds, and the address at whose limit it counts.
        self.on_trial = False
        self.is_stranger = False
        self.address: Address | None = None
        self.waits_since = now
        # Outages of this machine before its request. If another occurs by its end, a failure to reach a host is free.
        self.outages_before = outages_before
        self.link: ProberLink | None = None
        self.sent_at = 0
        self.requests: list[AttemptRow] = []
        # An answer on a reused connection that was discarded.
        self.doubted: Evidence | None = None


def _headers(flight: Flight, settings: HostSettings) -> tuple[str, ...]:
    """Return the header lines of the host that is asked, none where a redirect has led from https to http."""
    is_downgraded = flight.file.target_url.lower().startswith("https:") and flight.ask.target.url.startswith("http:")
    return () if is_downgraded else settings.header_lines


# The signed address has expired: no request was made, or the request was refused for this reason.
EXPIRED = policy.Conclusion(FileState.PENDING, Reason.EXPIRED, final=True)

Doubted = tuple[Flight, policy.Conclusion, Evidence]


class Slots(Protocol):
    """The methods of the scheduler that are called when an attempt ends."""

    def free(self, flight: Flight) -> None:
        """Free the slot of a flight that has ended."""

    def give_back(self, flights: Sequence[Flight]) -> None:
        """Free the slots, and return the files to the store: still due, no attempt spent."""

    def move(self, flight: Flight) -> None:
        """Exchange the slot for one at the host of the flight's next request, as soon as one is free."""

    def rest(self, host: Host, until: float) -> None:
        """Send nothing to the host before then."""

    def unpark(self) -> None:
        """Give turns to the hosts that waited for the end of an outage."""

    def pump(self) -> None:
        """Start the files that may start now."""


class Attempts:
    """Owns the flights."""

    def __init__(
        self,
        guard: Guard,
        config: VerifyConfig,
        recorder: Recorder,
        slots: Slots,
        *,
        now: Callable[[], int],
        chance: Callable[[], float],
    ) -> None:
        self._guard = guard
        self._config = config
        self._recorder = recorder
        self._slots = slots
        self._now = now
        self._chance = chance
        self._sniffs = config.usable.sniff != "off" and config.usable.not_media != "off"
        self._flights: dict[int, Flight] = {}
        self._last_id = 0
        self._deaths: dict[int, int] = {}
        self._addresses: WeakValueDictionary[tuple[str, str], Address] = WeakValueDictionary()
        self.capacity = Capacity(config.concurrency)
        self.outages: Outages[Doubted] = Outages(
            count=lambda doubted: self._end(*doubted, self._now()),
            give_back=lambda doubted: slots.give_back([flight for flight, _, _ in doubted]),
            under_way=self._targets,
            on_connected=slots.unpark,
            on_settled=slots.pump,
        )

    def __len__(self) -> int:
        return len(self._flights)

    def _targets(self) -> list[Target]:
        return [flight.ask.target for flight in self._flights.values()]

    def begin(self, file: DueFile, host: Host, now: float, outages_before: int | None) -> Flight:
        """Return a new attempt on a file. The caller has counted it at its host."""
        target = self._guard.examine(file.target_url)
        if target.refusal is None and self._has_ended(file, self._now()):
            target = msgspec.structs.replace(target, refusal=Reason.EXPIRED)
        return Flight(file, host, policy.first(target, host.settings), now, outages_before)

    def refuse(self, flight: Flight, reason: Reason, at: int) -> None:
        """End an attempt before its first request: the address has expired, or the guard refuses it because the
        settings have changed since the file was stored.
        """
        if reason is Reason.EXPIRED:
            self._end(flight, EXPIRED, None, at)
        else:
            self._end(flight, policy.Conclusion(FileState.BLOCKED, reason), None, at)

    def _end_of(self, file: DueFile) -> int | None:
        """Return when the file's address ends, as far as that makes a difference."""
        return file.expires_at if self._config.usable.expired == "fail" else None

    def _has_ended(self, file: DueFile, at: int) -> bool:
        return (end := self._end_of(file)) is not None and at >= end

    def request(self, flight: Flight, link: ProberLink, now: float, at: int) -> Request:
        """Return the flight's next request, for this prober."""
        self._last_id += 1
        self._flights[self._last_id] = flight
        flight.link = link
        flight.sent_at = at
        ask, settings = flight.ask, flight.host.settings
        return Request(
            self._last_id,
            ask.method,
            ask.target.url,
            round((flight.deadline - now) * 1000),
            round(settings.connect_timeout * 1000),
            # A host that mixes up its answers gets a new connection for every request.
            ask.fresh or not flight.host.reuse,
            flight.host.reuse,
            ask.ranged,
            settings.per_host_concurrency,
            ask.method == "GET"
            and self._sniffs
            and bool(media_types(flight.file.oss_object_name, self._config.usable)),
            _headers(flight, settings) if settings.header_lines else (),
        )

    def on_evidence(self, link: ProberLink, evidence: list[Evidence]) -> None:
        """Judge evidence, and send the next requests of the attempts."""
        again: list[Request] = []
        # Evidence that arrives together is judged at one time.
        now, at = time.monotonic(), self._now()
        for item in evidence:
            flight = self._flights.pop(item.id, None)
            if flight is None:
                continue
            if item.shortage or item.crowded:
                self._not_sent(flight, item, now)
                continue
            outcome = self._judge(flight, item, now, at)
            self._note(flight, item, outcome)
            if isinstance(outcome, policy.Conclusion):
                if not (self._slow_down(flight, outcome, item, at) or self._is_doubted(flight, outcome, item)):
                    self._end(flight, outcome, item, at)
                continue
            flight.ask = outcome
            if outcome.target.host != flight.host.name:
                # Each hop is a request to its own host.
                self._slots.move(flight)
                continue
            again.append(self.request(flight, link, now, at))
        if again:
            link.send(again)
        self.outages.settle()
        self._slots.pump()
        self._recorder.flush()

    def _judge(self, flight: Flight, item: Evidence, now: float, at: int) -> policy.NextRequest | policy.Conclusion:
        file, settings = flight.file, flight.settings
        last = policy.is_last(file.attempts, self._config.retry_schedule, at, self._end_of(file))
        outcome = policy.judge(
            *(flight.ask, item, settings, self._guard.follow),
            last=last,
            key=file.oss_object_name,
            usable=self._config.usable,
        )
        if outcome is policy.PLAIN or outcome is policy.AVAILABLE:
            return outcome
        if item.status in policy.EXPIRED_STATUS and self._has_ended(file, at):
            return EXPIRED
        if isinstance(outcome, policy.NextRequest) and now >= flight.deadline:
            if outcome.method == flight.ask.method:
                return policy.Conclusion(FileState.PENDING, Reason.TIMEOUT)
            # HEAD has used up the time, and the deciding GET has a time of its own.
            flight.deadline = now + settings.timeout
        return outcome

    def _note(self, flight: Flight, item: Evidence, outcome: policy.NextRequest | policy.Conclusion) -> None:
        """Keep the request as an attempt row, and update the host's state from it."""
        host, ask = flight.host, flight.ask
        if item.status is not None:
            host.answered(time.monotonic())
        if item.remote_addr is not None and item.remote_addr != host.dialled:
            self._learn_address(host, item.remote_addr)
        self.outages.heard(ask.target, item)
        if isinstance(outcome, policy.NextRequest) and outcome.fresh and not ask.fresh:
            flight.doubted = item
            return
        doubted, flight.doubted = flight.doubted, None
        if doubted is not None and policy.was_anothers(doubted, item):
            if host.reuse:
                log.warning("host mixes up answers on one connection: each is used for one request", host=host.name)
            host.reuse = False
        flight.requests.append(attempt_row(ask, item, outcome, flight.settings, flight.sent_at))

    def _end(self, flight: Flight, conclusion: policy.Conclusion, item: Evidence | None, now: int) -> None:
        """Record the attempt, count a failure at the host, and free the slot."""
        file, config = flight.file, self._config
        attempts = file.attempts + (conclusion is not EXPIRED or item is not None)
        asked = policy.retry_after_ms(item.retry_after, now) if item is not None and item.retry_after else None
        outcome = policy.conclude(conclusion, attempts, config.retry_schedule, config.jitter, self._chance(), asked)
        outcome = policy.squeeze(outcome, now, self._end_of(file))
        shown = flags_of(file, flight.ask, item, conclusion, flight.settings, config.usable, now)
        self._recorder.add(
            file_result(
                *(file, attempts, conclusion, outcome, now),
                ask=flight.ask,
                item=item,
                requests=flight.requests,
                flags=shown,
            )
        )
        self._deaths.pop(file.id, None)
        if item is not None and item.status is None and conclusion.reason in policy.CONNECTION_FAILURES:
            self._host_failed(flight.host, item.total_ms / 1000)
        self._slots.free(flight)

    def _host_failed(self, host: Host, seconds: float) -> None:
        was_open = host.on_trial
        if not host.failed(time.monotonic(), seconds):
            return
        if not was_open:
            log.warning("host does not answer, its files wait", host=host.name)
        self._slots.rest(host, host.open_until)

    def _slow_down(self, flight: Flight, conclusion: policy.Conclusion, item: Evidence, at: int) -> bool:
        """Return whether the attempt is free, because the host has asked for fewer requests."""
        now, host = time.monotonic(), flight.host
        if not conclusion.busy:
            if item.status is not None:
                host.served(now)
                if item.first_byte_ms is not None:
                    host.took(now, item.first_byte_ms / 1000)
            return False
        asked_ms = policy.retry_after_ms(item.retry_after, at)
        was_paced = host.rate is not None
        if not host.too_busy(now, None if asked_ms is None else asked_ms / 1000):
            return False
        if not was_paced:
            log.warning("host asks for fewer requests, it is paced", host=host.name, rate=round(host.rate or 0.0, 1))
        self._slots.rest(host, host.rest_until)
        if host.name == flight.file.host:
            self._slots.give_back([flight])
        else:
            # If claimed again at once, it would only be redirected here again.
            self.postpone(flight, host.rest_until - now)
            self._slots.free(flight)
        return True

    def postpone(self, flight: Flight, seconds: float) -> None:
        """Record that the file is due in so many seconds, with the jitter of retries. No attempt is spent."""
        file, at = flight.file, self._now()
        wait_ms = round(1000 * max(0.0, seconds) * (1 + self._config.jitter * self._chance()))
        none = (None,) * 9
        self._recorder.add(FileResult(file, FileState.PENDING, None, file.attempts, at + wait_ms, *none))

    def _not_sent(self, flight: Flight, item: Evidence, now: float) -> None:
        """Give back a file for which nothing was sent: this machine is short of something, or the address is at its
        limit.
        """
        host = flight.host
        if item.crowded and item.remote_addr is not None:
            address = self._learn_address(host, item.remote_addr)
            address.not_before = max(address.not_before, now + CROWDED_SECONDS)
            self._slots.give_back([flight])
            return
        if item.crowded:
            # Too many names of its zone, or of zones that keep silent, are looked up already.
            host.pause(now + CROWDED_SECONDS + self._chance())
            self._slots.rest(host, host.rest_until)
            self._slots.give_back([flight])
            return
        if self.capacity.lower(now, len(self._flights)):
            log.warning("this machine is short of ports or descriptors: fewer files are probed at a time")
        host.pause(now + SHORTAGE_SECONDS)
        self._slots.rest(host, host.rest_until)
        self._slots.give_back([flight])

    def _learn_address(self, host: Host, remote_addr: str) -> Address:
        key = (remote_addr, port_of(host.name))
        address = self._addresses.get(key)
        if address is None:
            address = self._addresses[key] = Address()
        host.dialled, host.address = remote_addr, address
        return address

    def _is_doubted(self, flight: Flight, conclusion: policy.Conclusion, item: Evidence) -> bool:
        """Return whether the attempt is held back, because this machine may be cut off."""
        if conclusion.state is not FileState.PENDING:
            return False
        doubted = (flight, conclusion, item)
        return self.outages.doubt(flight.ask.target, item, doubted, before=flight.outages_before)

    def on_death(self, link: ProberLink) -> list[Flight]:
        """Drop the flights of a prober that has died, and return those whose files are to be given back. No attempt is
        spent, unless a file was in flight so often when a prober died that it seems to be the cause.
        """
        lost = [id for id, flight in self._flights.items() if flight.link is link]
        given_back: list[Flight] = []
        for id in lost:
            flight = self._flights.pop(id)
            deaths = self._deaths[flight.file.id] = self._deaths.get(flight.file.id, 0) + 1
            if deaths >= MAX_DEATHS:
                self._end(flight, policy.Conclusion(FileState.PENDING, Reason.PROTOCOL_ERROR), None, self._now())
            else:
                given_back.append(flight)
        return given_back
