"""The process that keeps the record on SQLite: calls in on standard input, answers out on standard output.

It is a process of its own because SQLite keeps whoever calls it waiting for the disk, and Python's lock keeps everybody
else: callbacks are answered, and probes judged, beside it. It ends when its input does, once it has done what it was
told, so it cannot outlive the daemon by more than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from notify_server.errors import NotifyServerError, StoreRefusedError
from notify_server.model import BatchVerdict
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
from notify_server.store.sqlite import writer as sqlite_writer
from notify_server.store.sqlite.store import SqliteStore
from notify_server.supervise import freeze_gc, start_task
from notify_server.verify.guard import Guard

log = structlog.get_logger("notify_server.store")

_encode = msgspec.msgpack.Encoder().encode
_decode_call = msgspec.msgpack.Decoder(Call).decode
_arguments = {name: msgspec.msgpack.Decoder(verb.arguments).decode for name, verb in VERBS.items()}
_NOTHING = msgspec.Raw(_encode(None))


class Keeper:
    """Serves one store, until its input ends."""

    def __init__(self, source: int, sink: int) -> None:
        self._source = source
        self._output = Output(sink)
        self._input = Input(source, self._output)
        self._now = 0
        # Lines for the log from before the daemon knows that the store is open.
        self._early: list[Logged] = []
        self._opened = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._expanding: asyncio.Task[None] | None = None
        self._store: SqliteStore

    async def run(self) -> None:
        """Open the store and serve it."""
        config = msgspec.msgpack.decode(self._input.first(), type=KeeperConfig)
        # SQLite blocks this thread for as long as the disk takes.
        self._output.start_beating()
        sqlite_writer.BUSY_TIMEOUT_MS = config.busy_timeout_ms
        structlog.configure(processors=[structlog.processors.format_exc_info, self._log])
        try:
            self._store = await SqliteStore.open(Path(config.path), owner=config.owner)
        except StoreRefusedError as error:
            self._send(Opened(str(error), 0))
            return
        self._send(Opened(None, self._store.backlog))
        self._opened = True
        for line in self._early:
            self._send(line)
        asyncio.get_running_loop().add_reader(self._source, self._read)
        await self._ended.wait()
        if self._expanding is not None:
            self._expanding.cancel()
        await self._store.close()
        for task in self._tasks:
            # There will be no news of the inbox; all else has its answer, and is about to send it.
            if task.get_name() == "wait_inbox":
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

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
            answer = await self._do(call.verb, _arguments[call.verb](call.arguments))
        except Exception as error:
            if not isinstance(error, NotifyServerError):
                log.error("the keeper made a mistake, please report this", verb=call.verb, exc_info=error)
            self._send(Reply(call.id, self._store.backlog, _NOTHING, Failure.of(error)))
        else:
            self._send(Reply(call.id, self._store.backlog, msgspec.Raw(_encode(answer))))

    async def _do(self, verb: str, arguments: Any) -> object:
        match verb:
            case "accept_all":
                answers = await self._store.accept_all(*arguments)
                return [answer if isinstance(answer, int) else Failure.of(answer) for answer in answers]
            case "release":
                self._store.release(*arguments)
                return None
            case "expand_inbox":
                self._expanding = start_task(
                    self._expand_inbox(Guard(*arguments)), "expand the inbox", on_failure=_exit
                )
                return None
            case _:
                return await getattr(self._store, verb)(*arguments)

    async def _expand_inbox(self, guard: Guard) -> None:
        def on_files(hosts: set[str]) -> None:
            self._send(Expanded(self._store.backlog, hosts=hosts))

        def on_verdicts(verdicts: Sequence[BatchVerdict]) -> None:
            self._send(Expanded(self._store.backlog, verdicts=list(verdicts)))

        def on_unknown_fields(count: int) -> None:
            self._send(Expanded(self._store.backlog, unknown_fields=count))

        told = ExpansionListener(on_files, on_verdicts, on_unknown_fields)
        await self._store.expand_inbox(guard, lambda: self._now, told)

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


def main() -> None:
    """The process: ends quietly when the daemon does."""
    # It finishes its transaction and ends.
    follow_daemon(signal.SIGCONT)
    freeze_gc()
    with contextlib.suppress(BrokenPipeError, EOFError):
        asyncio.run(Keeper(sys.stdin.fileno(), sys.stdout.fileno()).run())


if __name__ == "__main__":
    main()
