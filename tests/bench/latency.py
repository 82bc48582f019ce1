"""The latency of acks at fixed rates, from when each was due."""

from __future__ import annotations

import time
from functools import partial

import msgspec

from tests.bench.acks import FASTAPI, LIMIT, OURS, PEERS
from tests.bench.figures import Column, Outcome, Setting, Sheet, in_turn, median_by, row_name
from tests.bench.openloop import Load, start

RATES = (500, 2000)
NAMES = (LIMIT, OURS, FASTAPI, "webhook, no command")

COLUMNS = (
    Column("p50 ms", ",.1f"),
    Column("p99 ms", ",.1f"),
    Column("p99.9 ms", ",.1f"),
    Column("max ms", ",.1f"),
    Column("acks/s", ",.0f"),
    Column("errors", ",.0f"),
)


def cells(loads: list[Load]) -> list[float]:
    """The figures of COLUMNS for several runs of one kind."""
    return [
        median_by(loads, lambda load: load.p50_ms),
        median_by(loads, lambda load: load.p99_ms),
        median_by(loads, lambda load: load.p999_ms),
        max((load.max_ms for load in loads), default=float("nan")),
        median_by(loads, lambda load: load.answered_a_second),
        sum(load.errors + load.unanswered for load in loads),
    ]


def run(setting: Setting) -> Outcome:
    """All peers at all rates, each rate on a fresh server."""
    seconds = setting.of(6, 2)

    def measure(name: str, rate: int, turn: int) -> Load:
        with PEERS[name](setting.work) as server:
            # Work that is done once only, at the first request.
            start(server.port, 100, 0.5, salt=time.time_ns()).result()
            return start(server.port, rate, seconds, salt=time.time_ns()).result()

    sheets = []
    raw: dict[str, object] = {}
    for rate in RATES:
        runs, missing = in_turn(setting, {name: partial(measure, name, rate) for name in NAMES})
        raw[str(rate)] = {"runs": msgspec.to_builtins(runs), "missing": missing}
        late = max((load.late_p99_ms for loads in runs.values() for load in loads), default=0.0)
        busy = max((load.busy for loads in runs.values() for load in loads), default=0.0)
        sheets.append(
            Sheet(
                f"Latency at {rate:,} notifications a second, median of {setting.rounds} x {seconds} s (open loop)",
                [Column("7 files each, 64 connections"), *COLUMNS],
                [[row_name(name, missing), *cells(runs[name])] for name in NAMES],
                "From when each was due to its answer; what finds no connection free waits, and that counts. The "
                f"client itself was late by {late:.1f} ms at most (p99), and took {busy:.0%} of a core.",
            )
        )
    return Outcome(sheets, raw)
