"""Any sequence of verbs, with restarts in between: the tables agree with the reference model."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from notify_server.errors import RejectionGoneError
from notify_server.model import BatchVerdict, Delivery, FileResult, FileState
from notify_server.store.base import Engine, NewFile
from notify_server.store.reading.types import FileFilter
from notify_server.store.sqlite import claims
from tests.store.backends import Backend, KeptBackend, SqliteBackend
from tests.store.builders import NOW, again, blocked, chunk, delivery, failed, finished, found, missing, rejection
from tests.store.builders import request as made
from tests.store.reference import SORTED, TABLES, Claim, Item, Reference, Row

T = TypeVar("T")

HOSTS = ("a.example", "b.example")
NAMES = ("k1", "k2", "k3", "k4")

new_files = st.one_of(
    st.builds(
        lambda name, host, version: finished(name, url=f"https://{host}/{name}?{version}", host=host),
        st.sampled_from(NAMES), st.sampled_from(HOSTS), st.integers(1, 2),
    ),
    st.builds(failed, st.sampled_from(NAMES)),
    st.builds(blocked, st.sampled_from(NAMES)),
)  # fmt: skip
file_lists = st.lists(st.lists(new_files, max_size=3), min_size=1, max_size=3)
outcomes = st.sampled_from(["found", "missing", "blocked", "again", "again soon"])


class StoreMachine(RuleBasedStateMachine):
    """Drives a store and the model alike. `serial` tells attempts apart, and `now` only goes forward."""

    new_backend: ClassVar[Callable[[], Backend]]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.backend = type(self).new_backend()
        self.store: Engine = self.run(self.backend.open())
        self.model = Reference()
        self.now = NOW
        self.serial = 0

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    async def _accept(self, delivery: Delivery) -> int:
        return await self.store.accept(delivery)

    def teardown(self) -> None:
        self.run(self.backend.close())
        self.runner.close()

    # Verbs

    @rule(batch_id=st.sampled_from(["x", "y"]), chunks=file_lists)
    def accept(self, batch_id: str, chunks: list[list[NewFile]]) -> None:
        files = sum(map(len, chunks))
        id = self.run(self._accept(delivery(batch_id, files=files, received_at=self.now)))
        self.model.inbox.append(Item(id, batch_id, chunks, self.now))

    @precondition(lambda self: self.model.inbox)
    @rule(count=st.integers(1, 8), together=st.booleans())
    def expand(self, count: int, together: bool) -> None:
        """Expand so many chunks from the start of the inbox; an interrupted one is repeated next time."""
        chunks = self.next_chunks(count)
        for part in [chunks] if together else [[one] for one in chunks]:
            verdicts = self.run(self.store.expand(self.expansions(part), self.now))
            assert outline(verdicts) == self.model.expand(part, self.now)

    @precondition(lambda self: self.model.inbox)
    @rule()
    def discard(self) -> None:
        (item,) = self.run(self.store.inbox(1))
        verdicts = self.run(self.store.discard(item, "unreadable", self.now))
        assert outline(verdicts) == self.model.discard(self.model.inbox[0], self.now)

    @rule(n=st.integers(1, 3))
    def reject(self, n: int) -> None:
        for _ in range(n):
            self.run(self.store.reject(rejection(received_at=self.now)))
            self.model.reject()

    @precondition(lambda self: self.model.rejected)
    @rule(data=st.data(), batch_id=st.sampled_from(["x", "y"]), chunks=file_lists)
    def replay(self, data: st.DataObject, batch_id: str, chunks: list[list[NewFile]]) -> None:
        """Take a rejection after all that is there, or was."""
        id = data.draw(st.integers(1, self.model.rejected))
        files = sum(map(len, chunks))
        accept = self._accept(delivery(batch_id, files=files, received_at=self.now, replays=id))
        try:
            notification = self.run(accept)
        except RejectionGoneError:
            assert id not in self.model.rejections
        else:
            self.model.rejections.remove(id)
            self.model.inbox.append(Item(notification, batch_id, chunks, self.now))

    @precondition(lambda self: self.model.batches)
    @rule(data=st.data())
    def recheck(self, data: st.DataObject) -> None:
        query = "SELECT batch_id, oss_object_name, file.id FROM file JOIN batch ON batch.id = file.batch"
        ids = {(batch_id, name): id for batch_id, name, id in self.run(self.backend.rows(query))}
        wanted = data.draw(st.lists(st.sampled_from(sorted(ids)), max_size=4)) if ids else []
        restart = self.run(self.store.recheck([*(ids[key] for key in wanted), 10**6], self.now))
        assert restart == self.model.recheck(wanted, self.now)

    @rule(wanted=st.lists(st.tuples(st.sampled_from(HOSTS), st.integers(0, 4)), max_size=3, unique_by=lambda w: w[0]))
    def claim(self, wanted: list[tuple[str, int]]) -> None:
        claimed = self.run(self.store.claim(wanted, self.now))
        rows = self.run(
            self.backend.rows(
                "SELECT file.id, batch_id, oss_object_name, target_url FROM file JOIN batch ON batch.id = file.batch"
            )
        )
        where = {id: (batch_id, name, address) for id, batch_id, name, address in rows}
        claims = []
        for host, n in wanted:
            free = self.model.claimable(host, self.now)
            got = [file for file in claimed if file.host == host]
            keys = [where[file.id][:2] for file in got]
            assert len(set(keys)) == len(keys) == min(n, len(free))
            assert [free[key] for key in keys] == sorted(free.values())[: len(keys)]
            for file, (batch_id, name) in zip(got, keys, strict=True):
                known = self.model.batches[batch_id].files[name]
                assert (file.target_url, file.attempts) == (where[file.id][2], known.attempts)
                claims.append(Claim(file, batch_id, name, known.generation))
        assert len(claims) == len(claimed)
        self.model.claims += claims

    @precondition(lambda self: self.model.claims)
    @rule(ends=st.lists(outcomes, min_size=1, max_size=4), requests=st.sampled_from([0, 1, 1, 1, 2, 20]))
    def record(self, ends: list[str], requests: int) -> None:
        results = self.results(ends, requests)
        verdicts = self.run(self.store.record([result for _, result in results], self.now))
        assert outline(verdicts) == self.model.record(results, self.now)

    @precondition(lambda self: self.model.claims and self.model.inbox)
    @rule(ends=st.lists(outcomes, min_size=1, max_size=4), count=st.integers(1, 4), record_first=st.booleans())
    def expand_and_record_at_once(self, ends: list[str], count: int, record_first: bool) -> None:
        results, chunks = self.results(ends, 1), self.next_chunks(count)
        expand = self.store.expand(self.expansions(chunks), self.now)
        record = self.store.record([result for _, result in results], self.now)

        async def both() -> None:
            await asyncio.gather(*([record, expand] if record_first else [expand, record]))

        self.run(both())
        # Which of the two came first is the store's to choose.
        expanded_first = self.model.copy()
        by_id = {item.id: item for item in expanded_first.inbox}
        expanded_first.expand([(by_id[item.id], n) for item, n in chunks], self.now)
        expanded_first.record(results, self.now)
        self.model.record(results, self.now)
        self.model.expand(chunks, self.now)
        if self.tables() == expanded_first.tables():
            self.model = expanded_first

    @precondition(lambda self: self.model.claims)
    @rule(count=st.integers(1, 3))
    def release(self, count: int) -> None:
        claims = self.model.claims[:count]
        self.store.release([claim.file for claim in claims])
        self.model.release(claims)

    @precondition(lambda self: not self.model.claims)
    @rule(age=st.integers(0, 50), limit=st.sampled_from([1, 2, 5, 100]))
    def prune(self, age: int, limit: int) -> None:
        before = self.now - age
        while self.run(self.store.prune(before, 0, limit)):
            pass
        self.model.prune(before)

    @rule()
    def reopen(self) -> None:
        self.store = self.run(self.backend.reopen())
        self.model.reopen()

    @rule(ms=st.integers(1, 40))
    def time_passes(self, ms: int) -> None:
        self.now += ms

    # What must hold after each of them

    @invariant()
    def tables_are_what_the_model_knows(self) -> None:
        assert self.tables() == self.model.tables()

    @invariant()
    def the_record_tells_of_what_is_in_the_tables(self) -> None:
        records = self.run(self.backend.records())
        totals = self.run(records.totals())
        states = Counter(file.state for batch in self.model.batches.values() for file in batch.files.values())
        assert (totals.batches, totals.files) == (len(self.model.batches), states.total())
        assert [getattr(totals, state) for state in FileState] == [states[state] for state in FileState]
        assert totals.rejections == len(self.model.rejections)
        for state in FileState:
            page = self.run(records.files(FileFilter(state=state), None, 1000))
            assert (len(page.items), page.next) == (states[state], None)

    @invariant()
    def hosts_are_due_when_the_model_says(self) -> None:
        due = self.run(self.store.due_hosts("", 9))
        assert {host.host: host.next_attempt_at for host in due} == self.model.due_hosts()

    @invariant()
    def the_inbox_holds_what_has_not_been_expanded(self) -> None:
        ids = [item.id for item in self.run(self.store.inbox(1000))]
        assert ids == [item.id for item in self.model.inbox][: len(ids)]
        assert bool(ids) == bool(self.model.inbox)

    @invariant()
    def the_backlog_is_what_is_in_the_inbox_and_what_is_pending(self) -> None:
        in_inbox = sum(item.files for item in self.model.inbox)
        # Files of an item that is half expanded are both in the inbox and in their batch, and may count once or twice.
        twice = sum(len(files) for item in self.model.inbox for files in item.chunks[: item.expanded])
        most = in_inbox + self.model.pending
        assert most - twice <= self.store.backlog <= most

    # Helpers

    def next_chunks(self, count: int) -> list[tuple[Item, int]]:
        readable = self.model.inbox[: len(self.run(self.store.inbox(1000)))]
        return [(item, n) for item in readable for n in range(len(item.chunks))][:count]

    def expansions(self, chunks: Sequence[tuple[Item, int]]) -> list[Any]:
        items = {item.id: item for item in self.run(self.store.inbox(1000))}
        return [
            chunk(items[item.id], *item.chunks[n], batch_id=item.batch_id, last=n + 1 == len(item.chunks))
            for item, n in chunks
        ]

    def results(self, ends: Sequence[str], requests: int) -> list[tuple[Claim, FileResult]]:
        return [
            (claim, self.outcome(claim, end, requests)) for claim, end in zip(self.model.claims, ends, strict=False)
        ]

    def outcome(self, claim: Claim, end: str, requests: int) -> FileResult:
        rows = tuple(made(total_ms=float(self.serial + n)) for n in range(requests))
        self.serial += requests
        changes = {"requests": rows, "content_length": self.serial}
        match end:
            case "found":
                return found(claim.file, **changes)
            case "missing":
                return missing(claim.file, **changes)
            case "blocked":
                return missing(claim.file, state=FileState.BLOCKED, reason="private_address", **changes)
            case "again":
                return again(claim.file, self.now + 30, **changes)
            case _:
                return again(claim.file, self.now, **changes)

    def tables(self) -> dict[str, list[Row]]:
        tables = {name: self.run(self.backend.rows(query)) for name, query in TABLES.items()}
        return {name: sorted(rows, key=repr) if name in SORTED else rows for name, rows in tables.items()}


def outline(verdicts: Sequence[BatchVerdict]) -> list[Row]:
    return sorted(((v.batch_id, v.verdict, v.files, v.available) for v in verdicts), key=repr)


def test_after_any_sequence_of_verbs_the_tables_hold_what_the_reference_model_knows(
    new_backend: Callable[[], Backend],
) -> None:
    run(new_backend)


def test_so_they_do_when_due_files_are_read_ahead_in_small_pieces(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(claims, "READ_AHEAD", 1)
    run(lambda: SqliteBackend(tmp_path_factory.mktemp("store")))


def run(new_backend: Callable[[], Backend]) -> None:
    class Machine(StoreMachine):
        pass

    Machine.new_backend = new_backend
    run_state_machine_as_test(
        Machine,
        settings=settings(
            # A keeper is the store of SQLite in a process that has to be started for each of them.
            max_examples=3 if isinstance(new_backend(), KeptBackend) else 10,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
