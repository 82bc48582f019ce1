"""What the size of the record costs: acks, probes and a start, with few and with many files in the file."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import msgspec

from notify_server.clock import unix_ms
from tests.bench.acks import SMALL, wrk
from tests.bench.figures import Column, Outcome, Setting, Sheet, in_turn, median_by
from tests.bench.probes import CONCURRENCY
from tests.bench.record import add_pending, add_settled, forget_pending, reading, size_mib, until, until_settled
from tests.bench.servers import ONE_HOST, Origin, daemon, nginx


class Grown(msgspec.Struct):
    """One run on a store of a certain size."""

    first_probe_seconds: float
    probes_a_second: float
    acks_a_second: float
    ack_p99_ms: float
    ack_cpu_us: float


def _measure(store: Path, origin: Origin, files: int, seconds: int, turn: int) -> Grown:
    with reading(store) as connection:
        (known,) = connection.execute("SELECT coalesce(max(id), 0) FROM attempt").fetchone()
        (batches,) = connection.execute("SELECT coalesce(max(id), 0) FROM batch").fetchone()
    add_pending(store, origin.addresses(files, ONE_HOST), unix_ms())
    started = unix_ms()
    limits = {"verify__concurrency": str(CONCURRENCY), "verify__per_host_concurrency": str(CONCURRENCY)}
    with daemon(store, **limits) as server:
        until(store, f"SELECT max(id) > {known} FROM attempt", pause=0.02)
        until_settled(store)
        with reading(store) as connection:
            query = f"SELECT min(started_at) FROM attempt WHERE id > {known}"
            (first,) = connection.execute(query).fetchone()
            (last,) = connection.execute(f"SELECT max(completed_at) FROM batch WHERE id > {batches}").fetchone()
        acks = wrk(server, 64, seconds, SMALL)
    # Their hosts do not exist: left as they are, they would be requested in the next run.
    forget_pending(store)
    return Grown((first - started) / 1000, files / ((last - first) / 1000), acks.rate, acks.p99_ms, acks.cpu_us)


def run(setting: Setting) -> Outcome:
    """All sizes in turn."""
    sizes = setting.of([10_000, 1_000_000, 5_000_000], [10_000, 200_000])
    files, seconds = setting.of(30_000, 3_000), setting.of(4, 1)
    stores = {f"{size:,}": setting.work / f"grown-{size}.db" for size in sizes}
    made: dict[str, float] = {}
    bytes_a_file: dict[str, float] = {}
    for size, (name, store) in zip(sizes, stores.items(), strict=True):
        setting.say(f"making a record of {name} files")
        began = time.monotonic()
        add_settled(store, size)
        made[name] = time.monotonic() - began
        bytes_a_file[name] = size_mib(store) * 2**20 / size
    with nginx(setting.work) as origin:
        runs, _ = in_turn(
            setting, {name: partial(_measure, store, origin, files, seconds) for name, store in stores.items()}
        )
    sheet = Sheet(
        f"What the size of the record costs, median of {setting.rounds}",
        [
            Column("files in the record"),
            Column("acks/s", ",.0f"),
            Column("ack p99 ms", ".1f"),
            Column("CPU µs/ack", ",.0f"),
            Column("files/s", ",.0f"),
            Column("start to first probe s", ".2f"),
            Column("bytes a file", ",.0f"),
        ],
        [
            [
                name,
                median_by(grown, lambda run: run.acks_a_second),
                median_by(grown, lambda run: run.ack_p99_ms),
                median_by(grown, lambda run: run.ack_cpu_us),
                median_by(grown, lambda run: run.probes_a_second),
                median_by(grown, lambda run: run.first_probe_seconds),
                bytes_a_file[name],
            ]
            for name, grown in runs.items()
        ],
        f"Acks: wrk, 64 connections, 7 files each, {seconds} s. Files: {files:,} at nginx on loopback. A file's bytes "
        "include its share of the notification and its attempt.",
    )
    raw = {"runs": msgspec.to_builtins(runs), "bytes_a_file": bytes_a_file, "made_in_seconds": made}
    return Outcome([sheet], raw)
