"""Any sequence of registrations, arrivals, outages and clock steps: each limit and each verdict raises the events of
the model, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from notify_server.expect.expectation import NewExpectation
from notify_server.store.base import Engine
from tests.store.backends import Backend, KeptBackend
from tests.store.builders import API_CODE, NOW, claim, finished, found, take_in

T = TypeVar("T")

SECOND = 1_000
HOUR = 3_600 * SECOND
FAR = NOW * 2
BATCHES = ("x", "y", "z")
WITHIN = (4 * SECOND, 10 * SECOND)


@dataclass
class Batch:
    received_at: int
    files: int
    pending: int
    verdict: str = "pending"
    told: list[str] = field(default_factory=list)
    last_event: str | None = None
    at_risk: bool = False


@dataclass
class Submission:
    batch_id: str | None
    files: int | None
    notify_due: int
    verdict_due: int
    open: str | None = "notify"
    state: str = "waiting"
    batch: str | None = None
    by: str | None = None


class Model:
    """The rules once more, by walking over everything. `clock` is the time during which a server was ready."""

    def __init__(self) -> None:
        self.batches: dict[str, Batch] = {}
        self.submissions: dict[str, Submission] = {}
        self.clock = 0
        self.ready_at = NOW

    def at(self, now: int) -> int:
        passed = now - self.ready_at
        return self.clock + (passed if -60 * SECOND <= passed <= 3 * SECOND else 0)

    def start_clock(self, now: int) -> None:
        """Time without open limits passes like any other."""
        if not any(each.open for each in self.submissions.values()):
            self.clock += now - self.ready_at
            self.ready_at = now

    def ready(self, now: int) -> None:
        if not any(each.open for each in self.submissions.values()):
            return
        self.clock, self.ready_at = (
            max(self.clock, self.at(now)),
            self.ready_at if -60 * SECOND <= now - self.ready_at < 0 else now,
        )
        for each in self.submissions.values():
            if each.open == "notify" and each.notify_due <= self.clock_for(now):
                each.state, each.open = "late", None
            elif each.open == "verdict" and each.verdict_due <= self.clock_for(now):
                each.open = None
                batch = self.batches[str(each.batch)]
                if batch.verdict == "pending" and not batch.at_risk:
                    batch.at_risk, batch.last_event = True, "at_risk"
                    batch.told.append("batch.at_risk")

    def clock_for(self, now: int) -> int:
        # A clock that is set back a little shows less for a while, and takes nothing back.
        return self.at(now)

    def register(self, reference: str, wanted: NewExpectation, now: int) -> None:
        if reference in self.submissions:
            return
        self.start_clock(now)
        at = self.at(now)
        new = Submission(wanted.batch_id, wanted.files, at + wanted.notify_within_ms, at + wanted.verdict_within_ms)
        self.submissions[reference] = new
        if wanted.batch_id is not None:
            if wanted.batch_id in self.batches:
                self.match(new, wanted.batch_id, "batch_id")
        else:
            ordered = [each.batch for each in self.submissions.values() if each.by == "order" and each.batch]
            since = max([now - HOUR, *(self.batches[batch].received_at for batch in ordered[-1:])])
            taken = {each.batch for each in self.submissions.values()}
            free = [
                (batch.received_at, place, name)
                for place, (name, batch) in enumerate(self.batches.items())
                if name not in taken and batch.received_at >= since
            ]
            if free:
                self.match(new, min(free)[2], "order")
        self.judge()

    def match(self, submission: Submission, batch: str, by: str) -> None:
        submission.batch, submission.by, submission.open = batch, by, "verdict"

    def arrive(self, name: str, files: int, now: int) -> None:
        first = name not in self.batches
        batch = self.batches.setdefault(name, Batch(now, 0, 0))
        batch.received_at = min(batch.received_at, now)
        added = max(0, files - batch.files)
        batch.files += added
        batch.pending += added
        if added:
            batch.verdict = "pending"
        named = [each for each in self.submissions.values() if each.batch_id == name and each.batch is None]
        waiting = [each for each in self.submissions.values() if each.batch_id is None and each.batch is None]
        if named or (first and waiting):
            self.start_clock(now)
        for each in named:
            self.match(each, name, "batch_id")
        if first and not named and waiting:
            self.match(waiting[0], name, "order")
        if not batch.pending:
            self.conclude(batch)

    def settle(self) -> None:
        for batch in self.batches.values():
            batch.pending = 0
            self.conclude(batch)

    def conclude(self, batch: Batch) -> None:
        if batch.verdict != "pending":
            return
        batch.verdict = "complete"
        shorts = self.judge(tell=False)
        if batch.last_event != "complete":
            batch.told.append("batch.complete")
            batch.last_event = "complete"
        for name in shorts:
            self.batches[name].told.append("batch.short")

    def judge(self, tell: bool = True) -> list[str]:
        shorts = []
        for each in self.submissions.values():
            if each.batch is None or each.state == "met" or self.batches[each.batch].verdict == "pending":
                continue
            batch = self.batches[each.batch]
            before, each.open = each.state, None
            short = each.by == "batch_id" and each.files is not None and batch.files < each.files
            each.state = "short" if short else "met"
            if short and before != "short":
                shorts.append(each.batch)
            if before == "short" and not short:
                batch.last_event = None
        if tell:
            for name in shorts:
                self.batches[name].told.append("batch.short")
        return shorts


class ExpectationMachine(RuleBasedStateMachine):
    """Drives a store and the model alike."""

    new_backend: ClassVar[Callable[[], Backend]]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.backend = type(self).new_backend()
        self.store: Engine = self.run(self.backend.open())
        self.model = Model()
        self.now = NOW

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def teardown(self) -> None:
        self.run(self.backend.close())
        self.runner.close()

    @rule(
        batch_id=st.sampled_from([None, None, *BATCHES]),
        files=st.sampled_from([None, 1, 2, 3]),
        notify=st.sampled_from(WITHIN),
        verdict=st.sampled_from(WITHIN),
    )
    def register(self, batch_id: str | None, files: int | None, notify: int, verdict: int) -> None:
        reference = f"r{len(self.model.submissions)}"
        wanted = NewExpectation(reference, API_CODE, batch_id, files, None, notify, verdict)
        for created in (True, False):
            (registered,) = self.run(self.store.expectations.register([wanted], self.now))
            assert (registered.created, registered.conflict) == (created, None)
            self.model.register(reference, wanted, self.now)

    @rule(batch_id=st.sampled_from(BATCHES), files=st.integers(1, 3))
    def arrive(self, batch_id: str, files: int) -> None:
        listed = (finished(f"k{n}") for n in range(files))
        self.run(take_in(self.store, *listed, batch_id=batch_id, now=self.now, received_at=self.now))
        self.model.arrive(batch_id, files, self.now)

    @rule()
    def settle(self) -> None:
        async def record() -> None:
            await self.store.record([found(file) for file in await claim(self.store, now=FAR)], self.now)

        self.run(record())
        self.model.settle()

    @rule(seconds=st.integers(1, 6))
    def be_ready(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += SECOND
            self.run(self.store.expectations.check_limits([HOUR], self.now))
            self.model.ready(self.now)

    @rule(seconds=st.sampled_from([4, 8, 3600]))
    def be_away(self, seconds: int) -> None:
        self.now += seconds * SECOND

    @precondition(lambda self: self.model.submissions)
    @rule(step=st.sampled_from([-7200, -5, 5, 7200]), reopen=st.booleans())
    def set_the_clock(self, step: int, reopen: bool) -> None:
        """A server that starts again goes by a wall clock that was set meanwhile."""
        if reopen:
            self.store = self.run(self.backend.reopen())
        self.now += step * SECOND

    @invariant()
    def submissions_are_in_the_state_of_the_model(self) -> None:
        rows = self.run(
            self.backend.rows(
                "SELECT reference, expectation.state, batch.batch_id, matched_by FROM expectation"
                " LEFT JOIN batch ON batch.id = expectation.batch ORDER BY expectation.id"
            )
        )
        assert rows == [(name, each.state, each.batch, each.by) for name, each in self.model.submissions.items()]

    @invariant()
    def events_are_those_of_the_model(self) -> None:
        rows = self.run(
            self.backend.rows(
                "SELECT batch.batch_id, type FROM event JOIN batch ON batch.id = event.batch ORDER BY event.revision"
            )
        )
        for name, batch in self.model.batches.items():
            assert [kind for batch_id, kind in rows if batch_id == name] == batch.told
        late = self.run(self.backend.rows("SELECT count(*) FROM event WHERE type = 'batch.late'"))
        assert late == [(self.run(self.late()),)]

    async def late(self) -> int:
        """Those that were late, also if their batch has come since."""
        rows = await self.backend.rows("SELECT reference, state FROM expectation")
        self.were_late = getattr(self, "were_late", set()) | {name for name, state in rows if state == "late"}
        return len(self.were_late)


def test_after_any_sequence_the_events_are_those_of_the_model(
    new_backend: Callable[[], Backend],
) -> None:
    class Machine(ExpectationMachine):
        pass

    Machine.new_backend = new_backend
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=4 if isinstance(new_backend(), KeptBackend) else 20,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
