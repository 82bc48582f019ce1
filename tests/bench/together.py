"""The latency of acks at a fixed rate, on an idle server and while a backlog is probed at full speed."""

from __future__ import annotations

import time

import msgspec

from notify_server.clock import unix_ms
from tests.bench.figures import Column, Outcome, Row, Setting, Sheet, in_turn
from tests.bench.latency import COLUMNS, cells
from tests.bench.openloop import Load, start
from tests.bench.probes import CONCURRENCY
from tests.bench.record import add_pending, reading
from tests.bench.servers import ONE_HOST, daemon, nginx

RATE = 500
# The drain must outlast the acks: more files than can be probed meanwhile.
FILES_A_SECOND = 40_000
IDLE, DRAINING = "nothing else to do", "a backlog is drained"


class Shared(msgspec.Struct):
    """The acks, and how many files a second were probed and recorded meanwhile."""

    load: Load
    files_a_second: float = 0.0


def run(setting: Setting) -> Outcome:
    """Both in turn, on a fresh store each time."""
    seconds = setting.of(8, 2)
    limits = {"verify__concurrency": str(CONCURRENCY), "verify__per_host_concurrency": str(CONCURRENCY)}
    pending = "SELECT coalesce(sum(pending), 0) FROM batch WHERE batch_id NOT LIKE 'open-loop.%'"

    with nginx(setting.work) as origin:
        addresses = origin.addresses(FILES_A_SECOND * (seconds + 2), ONE_HOST)

        def idle(turn: int) -> Shared:
            with daemon(setting.work / f"idle-{turn}.db", **limits) as server:
                start(server.port, 100, 0.5, salt=time.time_ns()).result()
                return Shared(start(server.port, RATE, seconds, salt=turn).result())

        def draining(turn: int) -> Shared:
            store = setting.work / f"draining-{turn}.db"
            add_pending(store, addresses, unix_ms())
            with daemon(store, **limits) as server, reading(store) as connection:
                start(server.port, 100, 0.5, salt=time.time_ns()).result()
                (before,) = connection.execute(pending).fetchone()
                load = start(server.port, RATE, seconds, salt=turn).result()
                (after,) = connection.execute(pending).fetchone()
            if not after:
                raise RuntimeError("the backlog was drained before the acks had ended")
            return Shared(load, (before - after) / seconds)

        runs, _ = in_turn(setting, {IDLE: idle, DRAINING: draining})
    rows: list[Row] = [
        [name, *cells([run.load for run in shared]), sum(run.files_a_second for run in shared) / len(shared)]
        for name, shared in runs.items()
    ]
    sheet = Sheet(
        f"Acks at {RATE} a second, median of {setting.rounds} x {seconds} s (open loop)",
        [Column("7 files each, 64 connections"), *COLUMNS, Column("files/s meanwhile", ",.0f")],
        rows,
    )
    return Outcome([sheet], {"rate": RATE, "runs": msgspec.to_builtins(runs)})
