"""The circuit of an endpoint: a dead receiver is given a rest, and its deliveries lose no attempt meanwhile."""

from __future__ import annotations

from notify_server.model import CircuitState

OPEN_AFTER = 4
FIRST_REST_MS = 1_000
MAX_REST_MS = 60_000


class Circuit:
    """Opens after OPEN_AFTER failures in a row and rests for 1 s, doubling to 60 s; then one trial decides. Pure: the
    time (Unix ms) is passed in.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._rest = 0
        self._open_until: int | None = None
        self._trial = False

    def state(self, now: int) -> CircuitState:
        """Return the state at `now`."""
        if self._open_until is None:
            return CircuitState.CLOSED
        return CircuitState.OPEN if now < self._open_until else CircuitState.HALF_OPEN

    @property
    def open_until(self) -> int | None:
        """The end of the rest, None while the circuit is closed."""
        return self._open_until

    def slots(self, now: int, wanted: int) -> int:
        """Return how many of `wanted` deliveries may start now. One that starts while half-open is the trial."""
        match self.state(now):
            case CircuitState.CLOSED:
                return wanted
            case CircuitState.HALF_OPEN if not self._trial:
                return min(1, wanted)
        return 0

    def started(self, now: int) -> None:
        """Note that a delivery has started."""
        if self.state(now) is CircuitState.HALF_OPEN:
            self._trial = True

    def try_now(self, now: int) -> None:
        """End the rest, because a person tests or starts the endpoint."""
        if self.state(now) is CircuitState.OPEN:
            self._open_until = now

    def released(self) -> None:
        """Note that a delivery which had started has no result: it was given back."""
        self._trial = False

    def succeeded(self) -> None:
        """Note a success: the circuit closes."""
        self.failures = 0
        self._rest = 0
        self._open_until = None
        self._trial = False

    def failed(self, now: int) -> None:
        """Note a failure. Once the circuit has opened, only a failed trial lengthens the rest: the other deliveries
        started before it opened.
        """
        self.failures += 1
        state = self.state(now)
        if state is CircuitState.HALF_OPEN or (state is CircuitState.CLOSED and self.failures >= OPEN_AFTER):
            self._rest = min(self._rest * 2, MAX_REST_MS) if self._rest else FIRST_REST_MS
            self._open_until = now + self._rest
            self._trial = False
