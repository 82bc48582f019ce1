"""A million files that wait: memory, the first probe after a start, and which process spends what on each file."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from notify_server.clock import unix_ms
from tests.bench.figures import Column, Outcome, Setting, Sheet
from tests.bench.probes import CONCURRENCY
from tests.bench.record import add_pending, reading, size_mib, until
from tests.bench.servers import ONE_HOST, daemon, nginx
from tests.bench.usage import cpu_seconds, memory_mib, threads, tree


class Drained(msgspec.Struct):
    """CPU microseconds a file of the daemon's event loop and its other threads, of its keeper, and of its prober."""

    first_probe_seconds: float
    memory_mib: float
    files_a_second: float
    loop_us: float
    others_us: float
    keeper_us: float
    prober_us: float
    size_mib: float


def run(setting: Setting) -> Outcome:
    """One start on a large backlog, and some seconds of it."""
    files, seconds = setting.of(1_000_000, 200_000), setting.of(15, 3)
    store = setting.work / "backlog.db"
    with nginx(setting.work) as origin:
        setting.say(f"making a backlog of {files:,} files")
        add_pending(store, origin.addresses(files, ONE_HOST), unix_ms())
        size = size_mib(store)
        started = unix_ms()
        limits = {"verify__concurrency": str(CONCURRENCY), "verify__per_host_concurrency": str(CONCURRENCY)}
        with daemon(store, **limits) as server, reading(store) as connection:
            until(store, "SELECT count(*) FROM (SELECT 1 FROM attempt LIMIT 1)", pause=0.02)

            keeper = keeper_of(server.pid)
            probers = [pid for pid in tree(server.pid) if pid not in (server.pid, keeper)]

            def look() -> tuple[float, int, dict[int, float], float, float]:
                (pending,) = connection.execute("SELECT sum(pending) FROM batch").fetchone()
                probing = sum(cpu_seconds(pid) for pid in probers)
                return time.monotonic(), pending, threads(server.pid), cpu_seconds(keeper), probing

            time.sleep(setting.of(2, 1))
            before = look()
            time.sleep(seconds)
            memory = memory_mib(server.pid)
            after = look()
            (first,) = connection.execute("SELECT started_at FROM attempt ORDER BY id LIMIT 1").fetchone()
    done = before[1] - after[1]
    if not after[1]:
        raise RuntimeError("the backlog was drained before it was measured")
    spent = {thread: (cpu - before[2].get(thread, 0.0)) / done * 1e6 for thread, cpu in after[2].items()}
    loop = spent.pop(server.pid)
    drained = Drained(
        (first - started) / 1000, memory, done / (after[0] - before[0]), loop, sum(spent.values()),
        (after[3] - before[3]) / done * 1e6, (after[4] - before[4]) / done * 1e6, size,
    )  # fmt: skip
    backlog = Sheet(
        f"A backlog of {files:,} files",
        [
            Column("start to first probe s", ".2f"),
            Column("memory MiB while it is drained", ",.0f"),
            Column("files/s", ",.0f"),
            Column("file on disk MiB", ",.0f"),
        ],
        [[f"{drained.first_probe_seconds:.2f}", memory, drained.files_a_second, size]],
    )
    threads_sheet = Sheet(
        f"CPU µs a file, over {seconds} s of the drain",
        [Column("event loop"), *(Column(name, ".0f") for name in ("other threads", "keeper", "prober"))],
        [[f"{loop:.0f}", drained.others_us, drained.keeper_us, drained.prober_us]],
        ceiling(drained),
    )
    return Outcome([backlog, threads_sheet], msgspec.to_builtins(drained))


def keeper_of(daemon: int) -> int:
    """The process that keeps the daemon's record."""
    (keeper,) = [pid for pid in tree(daemon) if b"processes.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return keeper


def ceiling(drained: Drained) -> str:
    """What one daemon could do with more cores and probers, by calculation."""
    loop, keeper = 1e6 / (drained.loop_us + drained.others_us), 1e6 / drained.keeper_us
    name = "event loop" if loop < keeper else "keeper"
    most = min(loop, keeper)
    return (
        f"By calculation: with a core for each process the {name} is the limit, at {most:,.0f} files/s, which is what "
        f"{most * drained.prober_us / 1e6:.1f} probers do."
    )
