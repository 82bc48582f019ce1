"""The store on SQLite as the daemon has it: every verb is carried out by the keeper process (processes/keeper.py)."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import msgspec
import structlog

from notify_server.errors import StoreRefusedError, StoreUnavailableError
from notify_server.model import BatchVerdict, Delivery, DueFile, FileResult, HostDue, Rejection, Restart
from notify_server.processes.child import Child, module, ticks
from notify_server.processes.keeper_protocol import (
    VERBS,
    Call,
    Expanded,
    Failure,
    KeeperConfig,
    Logged,
    Opened,
    Reply,
)
from notify_server.store.base import CLOSE_SECONDS, MAX_ID, ExpansionListener, Nodes, rejection_gone, valid_ids
from notify_server.store.batching import MAX_BYTES, Batcher, ByteGate, Group
from notify_server.store.sqlite.expectations_client import SqliteExpectationsClient
from notify_server.store.sqlite.journal_client import SqliteJournalClient
from notify_server.store.sqlite.outbox_client import SqliteOutboxClient, ignore_result
from notify_server.store.sqlite.scheduler import RECENT_SECONDS

log = structlog.get_logger("notify_server.store")

START_SECONDS = 60.0
# Callers who wait at the other end of a connection are refused after this, and after a moment when the keeper is
# silent. Every other call waits for the keeper's answer or its end; an answer this late means that it hangs.
ANSWER_TICKS = ticks(5.0)
OVERDUE_TICKS = ticks(30.0)
IMPATIENT = frozenset({"accept_all", "reject", "recheck", "ping"})

_encode = msgspec.msgpack.Encoder().encode
_decode_opened = msgspec.msgpack.Decoder(Opened).decode
_decode = msgspec.msgpack.Decoder(Reply | Expanded | Logged).decode


class SqliteClient:
    """Open it with `open`; close it when done. See base.Store for the meaning of each verb.

    When the keeper is gone another is started; until it is up, and for calls that were not answered, verbs raise
    StoreUnavailableError. Claims are released, as after a crash; later results for them are discarded.
    """

    def __init__(
        self,
        config: KeeperConfig,
        command: Sequence[str],
        now: Callable[[], int],
        on_commit: Callable[[float], object],
    ) -> None:
        self._child = Child(
            "keeper",
            command,
            _encode(config),
            on_up=self._on_up,
            on_frame=self._on_frame,
            on_death=self._on_death,
            on_silent=self._on_silent,
            is_overdue=self._is_overdue,
        )
        self.outbox = SqliteOutboxClient(self._call)
        self.expectations = SqliteExpectationsClient(self._call)
        self.journal = SqliteJournalClient(self._call)
        self._path = config.path
        self._now = now
        self._on_commit = on_commit
        self._backlog = 0
        self._ids = itertools.count(1)
        # Each with its verb and the tick at which it was sent.
        self._calls: dict[int, tuple[str, int, asyncio.Future[Any]]] = {}
        self._decoders = {name: msgspec.msgpack.Decoder(verb.answer).decode for name, verb in VERBS.items()}
        self._listener: ExpansionListener | None = None
        self._opened: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._closing = False
        self._accepting: Batcher[Delivery, int] = Batcher(lambda delivery: len(delivery.body))
        self._accepted_at = -math.inf
        # Bodies on their way to the keeper, which are in memory several times.
        self._gate = ByteGate(2 * MAX_BYTES)

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        now: Callable[[], int],
        guard: tuple[Sequence[str], Sequence[str], Sequence[int]] = ((), (), ()),
        refusals: tuple[Sequence[str], Sequence[str]] = ((), ()),
        on_commit: Callable[[float], object] = lambda seconds: None,
        command: Sequence[str] = (),
    ) -> Self:
        """Open or create the database at `path`, its directory included. `now` gives Unix ms. `guard` has the hosts,
        networks and ports that may be probed, as text; `refusals` has the configured networks and those of this machine
        that may not. `on_commit` receives the seconds that each transaction of
        callbacks took; `command` runs the keeper.

        Raises StoreRefusedError when another daemon has it, or the file cannot be used; the text says what to do.
        """
        store = cls(_config(path, *guard, *refusals), command or module("processes.keeper"), now, on_commit)
        store._child.start()
        try:
            async with asyncio.timeout(START_SECONDS):
                refused = await asyncio.shield(store._opened)
        except TimeoutError:
            refused = f"{path}: the process that writes it does not start: the log says why"
        except BaseException:
            await store._child.stop(CLOSE_SECONDS)
            raise
        if refused is not None:
            await store._child.stop(CLOSE_SECONDS)
            raise StoreRefusedError(refused)
        return store

    @property
    def backlog(self) -> int:
        return self._backlog

    @property
    def prefers_small_batches(self) -> bool:
        return asyncio.get_running_loop().time() - self._accepted_at < RECENT_SECONDS

    @property
    def nodes(self) -> Nodes:
        return Nodes(0, (0,), (0,))

    @property
    def pid(self) -> int | None:
        """The keeper's process id, None while there is none."""
        return self._child.pid

    async def close(self, grace: float = CLOSE_SECONDS) -> None:
        self._closing = True
        self._send_deliveries()
        self._accepting.close()
        if not await self._child.stop(grace):
            log.error("the record could not be closed in time: nothing is lost, the next start takes longer")

    # The keeper

    def _on_up(self, payload: bytes) -> None:
        opened = _decode_opened(payload)
        self._backlog = opened.backlog
        if opened.refused is not None:
            if self._opened.done():
                log.error("the record cannot be opened again, retrying", error=opened.refused)
        else:
            self.outbox.on_up()
            if self._listener is not None:
                self._send("expand_inbox", ()).add_done_callback(ignore_result)
        if not self._opened.done():
            self._opened.set_result(opened.refused)

    def _on_frame(self, payload: bytes) -> None:
        match _decode(payload):
            case Reply(id, backlog, answer, failure):
                self._backlog = backlog
                verb, _, future = self._calls.pop(id)
                if future.done():
                    return
                if failure is not None:
                    future.set_exception(failure.error())
                else:
                    future.set_result(self._decoders[verb](answer))
            case Expanded(backlog, hosts, verdicts, unknown_fields, reported_failed):
                self._backlog = backlog
                if self._listener is not None:
                    if hosts:
                        self._listener.on_files(hosts)
                    if verdicts:
                        self._listener.on_verdicts(verdicts)
                    if unknown_fields:
                        self._listener.on_unknown_fields(unknown_fields)
                    if reported_failed:
                        self._listener.on_reported_failed(reported_failed)
            case Logged(level, event, fields):
                log.log(logging.getLevelNamesMapping()[level.upper()], event, **fields)

    def _on_death(self) -> None:
        calls, self._calls = self._calls, {}
        for _, _, future in calls.values():
            if not future.done():
                future.set_exception(self._unavailable())

    def _on_silent(self) -> None:
        for verb, _, future in self._calls.values():
            if verb in IMPATIENT and not future.done():
                future.set_exception(self._unavailable())

    def _is_overdue(self, now: int) -> bool:
        for verb, sent_at, future in self._calls.values():
            if now - sent_at > OVERDUE_TICKS:
                return True
            if now - sent_at > ANSWER_TICKS and verb in IMPATIENT and not future.done():
                future.set_exception(StoreUnavailableError(f"{self._path}: cannot be written in time"))
        return False

    def _unavailable(self) -> StoreUnavailableError:
        if self._closing:
            return StoreUnavailableError("the store is closing")
        if self._child.up:
            return StoreUnavailableError(f"{self._path}: the process that writes it does not answer")
        return StoreUnavailableError(f"{self._path}: the process that writes it has ended, another is being started")

    def _call(self, verb: str, *arguments: object) -> asyncio.Future[Any]:
        if self._child.answers:
            return self._send(verb, arguments)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_exception(self._unavailable())
        return future

    def _send(self, verb: str, arguments: tuple[object, ...]) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        id = next(self._ids)
        self._calls[id] = verb, self._child.ticks, future
        self._child.send(_encode(Call(id, self._now(), verb, msgspec.Raw(_encode(arguments)))))
        return future

    # The verbs

    def accept(self, delivery: Delivery) -> asyncio.Future[int]:
        if delivery.replays is not None and delivery.replays > MAX_ID:
            future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            future.set_exception(rejection_gone(delivery.replays))
            return future
        if not self._accepting:
            # Deliveries of one turn of the loop share a frame. The keeper, which meanwhile commits those before them,
            # puts all that it finds into its next transaction.
            loop = asyncio.get_running_loop()
            loop.call_soon(self._send_deliveries)
            self._accepted_at = loop.time()
        return self._accepting.add(delivery)

    def _send_deliveries(self) -> None:
        while self._accepting:
            group = self._accepting.take()
            size = sum(len(delivery.body) for delivery, _ in group)
            self._gate.enter(size, partial(self._accept, group, size))

    def _accept(self, group: Group[Delivery, int], size: int) -> None:
        began = time.perf_counter()

        def committed(call: asyncio.Future[list[int | Failure]]) -> None:
            self._gate.leave(size)
            if (error := call.exception()) is not None:
                assert isinstance(error, Exception)
                self._accepting.fail(group, error)
                return
            self._on_commit(time.perf_counter() - began)
            answers = [each.error() if isinstance(each, Failure) else each for each in call.result()]
            self._accepting.answer(group, answers)

        self._call("accept_all", [delivery for delivery, _ in group]).add_done_callback(committed)

    async def reject(self, rejection: Rejection) -> None:
        size = len(rejection.body)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def start() -> None:
            if turn.cancelled():
                self._gate.leave(size)
            else:
                turn.set_result(None)

        self._gate.enter(size, start)
        try:
            await turn
            await self._call("reject", rejection)
        finally:
            if not turn.cancelled():
                self._gate.leave(size)

    def expand_inbox(self, listener: ExpansionListener) -> None:
        """Have the keeper expand the inbox, by the time of the latest call, until it is closed."""
        self._listener = listener
        # A keeper that is not up is sent this when it is.
        if self._child.up:
            self._send("expand_inbox", ()).add_done_callback(ignore_result)

    async def due_hosts(self, after: str, limit: int) -> list[HostDue]:
        hosts: list[HostDue] = await self._call("due_hosts", after, limit)
        return hosts

    async def claim(self, wanted: Sequence[tuple[str, int]], now: int) -> list[DueFile]:
        files: list[DueFile] = await self._call("claim", wanted, now)
        return files

    def release(self, files: Sequence[DueFile]) -> None:
        # A keeper that is gone has no claims; one that is silent for a moment must still learn of it.
        if self._child.up:
            self._send("release", (files,)).add_done_callback(ignore_result)

    async def record(self, results: Sequence[FileResult], now: int) -> list[BatchVerdict]:
        verdicts: list[BatchVerdict] = await self._call("record", results, now)
        return verdicts

    async def recheck(self, files: Sequence[int], now: int) -> Restart:
        restart: Restart = await self._call("recheck", valid_ids(files), now)
        return restart

    # Housekeeping

    async def ping(self, now: int) -> None:
        await self._call("ping", now)

    async def make_due(self, beyond: int, now: int, limit: int) -> Restart:
        restart: Restart = await self._call("make_due", beyond, now, limit)
        return restart

    async def end_session(self, session: str, ends_at: int) -> None:
        await self._call("end_session", session, ends_at)

    async def prune(self, completed_before: int, rejected_before: int, limit: int) -> int:
        deleted: int = await self._call("prune", completed_before, rejected_before, limit)
        return deleted


def _config(
    path: Path,
    hosts: Sequence[str],
    networks: Sequence[str],
    ports: Sequence[int],
    refused: Sequence[str],
    own: Sequence[str],
) -> KeeperConfig:
    allowed = list(hosts), list(networks), list(ports)
    return KeeperConfig(str(path.absolute()), os.getpid(), *allowed, list(refused), list(own))
