"""The keeper: the process that writes the record on SQLite. It reads calls from standard input and writes answers to
standard output.

It is a separate process because SQLite blocks its caller for as long as the disk takes, and Python's lock would block
callbacks and probes too. It ends when its input ends, after finishing the calls it has received: it outlives a killed
daemon by no more than that.
"""

from __future__ import annotations

import notify_server.lean.asyncio
import notify_server.lean.structlog  # noqa: F401

# isort: split
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from notify_server.errors import NotifyServerError, StoreRefusedError
from notify_server.expansion.expander import Expander
from notify_server.model import BatchVerdict, Delivery, DueFile
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
from notify_server.processes.worker import Input, Output, follow_daemon
from notify_server.store.base import ExpansionListener
from notify_server.store.sqlite.store import SqliteStore
from notify_server.supervise import freeze_gc, start_task
from notify_server.verify.guard import Guard

log = structlog.get_logger("notify_server.store")

_encode = msgspec.msgpack.Encoder().encode
_decode_call = msgspec.msgpack.Decoder(Call).decode
_NOTHING = msgspec.Raw(_encode(None))


class Keeper:
    """Serves one store, until its input ends."""

    def __init__(self, source: int, sink: int) -> None:
        self._source = source
        self._output = Output(sink)
        self._input = Input(source, self._output)
        self._decoders = {name: msgspec.msgpack.Decoder(verb.arguments).decode for name, verb in VERBS.items()}
        self._now = 0
        # Log lines from before the daemon knows that the store is open.
        self._early: list[Logged] = []
        self._opened = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._expanding: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Open the store and serve it."""
        self._config = msgspec.msgpack.decode(self._input.first(), type=KeeperConfig)
        # SQLite blocks this thread for as long as the disk takes.
        self._output.start_beating()
        structlog.configure(processors=[structlog.processors.format_exc_info, self._log])
        try:
            self._store = await SqliteStore.open(Path(self._config.path), owner=self._config.owner)
        except StoreRefusedError as error:
            self._send(Opened(str(error), 0))
            return
        self._verbs = self.verbs(self._store)
        self._send(Opened(None, self._store.backlog))
        self._opened = True
        for line in self._early:
            self._send(line)
        asyncio.get_running_loop().add_reader(self._source, self._read)
        await self._ended.wait()
        if self._expanding is not None:
            self._expanding.cancel()
        await self._store.close()
        # Every call has its answer now. Wait until the answers are sent.
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def verbs(self, store: SqliteStore) -> Mapping[str, Callable[..., Awaitable[object]]]:
        """Return the function that carries out each verb of the protocol."""
        return {
            "accept_all": self._accept_all,
            "reject": store.reject,
            "expand_inbox": self._expand_inbox,
            "due_hosts": store.due_hosts,
            "claim": store.claim,
            "release": self._release,
            "record": store.record,
            "recheck": store.recheck,
            "ping": store.ping,
            "make_due": store.make_due,
            "end_session": store.end_session,
            "prune": store.prune,
            "subscribe": store.outbox.subscribe,
            "claim_deliveries": store.outbox.claim_deliveries,
            "release_deliveries": self._release_deliveries,
            "record_deliveries": store.outbox.record_deliveries,
            "find_at_risk": store.outbox.find_at_risk,
            "find_expiring": store.outbox.find_expiring,
            "ping_endpoint": store.outbox.ping_endpoint,
            "replay_deliveries": store.outbox.replay_deliveries,
            "stop_endpoint": store.outbox.stop_endpoint,
            "endpoint_states": store.outbox.endpoint_states,
            "open_problems": store.outbox.open_problems,
            "register": store.expectations.register,
            "check_limits": store.expectations.check_limits,
            "check_quiet": store.expectations.check_quiet,
            "remove_expectation": store.expectations.remove,
            "add_action": store.journal.add_action,
            "acknowledge": store.journal.acknowledge,
            "keep_samples": store.journal.keep_samples,
        }

    def _read(self) -> None:
        try:
            payloads = self._input.read()
        except EOFError:
            asyncio.get_running_loop().remove_reader(self._source)
            self._ended.set()
            return
        for payload in payloads:
            call = _decode_call(payload)
            self._now = call.now
            task = asyncio.create_task(self._answer(call), name=call.verb)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, call: Call) -> None:
        try:
            answer = await self._verbs[call.verb](*self._decoders[call.verb](call.arguments))
        except Exception as error:
            if not isinstance(error, NotifyServerError):
                log.error(
                    "a call to the keeper failed unexpectedly, please report this", verb=call.verb, exc_info=error
                )
            self._send(Reply(call.id, self._store.backlog, _NOTHING, Failure.of(error)))
        else:
            self._send(Reply(call.id, self._store.backlog, msgspec.Raw(_encode(answer))))

    async def _accept_all(self, deliveries: Sequence[Delivery]) -> list[int | Failure]:
        answers = await self._store.accept_all(deliveries)
        return [answer if isinstance(answer, int) else Failure.of(answer) for answer in answers]

    async def _release_deliveries(self, deliveries: Sequence[int]) -> None:
        self._store.outbox.release_deliveries(deliveries)

    async def _release(self, files: Sequence[DueFile]) -> None:
        self._store.release(files)

    async def _expand_inbox(self) -> None:
        if self._expanding is None:
            config = self._config
            guard = Guard(
                config.allowed_hosts,
                config.allowed_networks,
                config.allowed_ports,
                config.refused_networks,
                config.own_networks,
            )
            listener = ExpansionListener(
                self._on_files, self._on_verdicts, self._on_unknown_fields, self._on_reported_failed
            )
            expander = Expander(self._store, guard, lambda: self._now, listener)
            self._expanding = start_task(expander.run(), "expand the inbox", on_failure=_exit)

    def _on_files(self, hosts: set[str]) -> None:
        self._send(Expanded(self._store.backlog, hosts=hosts))

    def _on_verdicts(self, verdicts: Sequence[BatchVerdict]) -> None:
        self._send(Expanded(self._store.backlog, verdicts=list(verdicts)))

    def _on_unknown_fields(self, count: int) -> None:
        self._send(Expanded(self._store.backlog, unknown_fields=count))

    def _on_reported_failed(self, count: int) -> None:
        self._send(Expanded(self._store.backlog, reported_failed=count))

    def _log(self, logger: object, level: str, event: MutableMapping[str, Any]) -> str:
        fields = {name: value if isinstance(value, int | float) else str(value) for name, value in event.items()}
        line = Logged(level, str(fields.pop("event")), fields)
        if self._opened:
            self._send(line)
        else:
            self._early.append(line)
        raise structlog.DropEvent

    def _send(self, message: msgspec.Struct) -> None:
        self._output.send(_encode(message))


def _exit() -> None:
    # The daemon logs it and starts another keeper.
    os._exit(1)


def main(keeper: type[Keeper] = Keeper) -> None:
    """Run the process. It ends quietly when the daemon does."""
    # SIGCONT: a stopped keeper resumes, finishes its transaction and ends.
    follow_daemon(signal.SIGCONT)
    # No other user may read or lock the record.
    os.umask(0o077)
    freeze_gc()
    with contextlib.suppress(BrokenPipeError, EOFError):
        asyncio.run(keeper(sys.stdin.fileno(), sys.stdout.fileno()).run())


if __name__ == "__main__":
    main()
