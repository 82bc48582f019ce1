"""A million files that wait: memory, the first probe after a start, and which thread spends what on each file."""

from __future__ import annotations

import time

import msgspec

from notify_server.clock import unix_ms
from tests.bench.figures import Column, Outcome, Setting, Sheet
from tests.bench.probes import CONCURRENCY
from tests.bench.record import add_pending, reading, size_mib, until
from tests.bench.servers import ONE_HOST, daemon, nginx
from tests.bench.usage import cpu_seconds, memory_mib, threads, tree


class Drained(msgspec.Struct):
    """CPU microseconds a file of each thread of the daemon, and of its prober."""

    first_probe_seconds: float
    memory_mib: float
    files_a_second: float
    loop_us: float
    writer_us: float
    others_us: float
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

            def look() -> tuple[float, int, dict[int, float], float]:
                (pending,) = connection.execute("SELECT sum(pending) FROM batch").fetchone()
                probers = sum(cpu_seconds(pid) for pid in list(tree(server.pid))[1:])
                return time.monotonic(), pending, threads(server.pid), probers

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
    # The writer has no name that /proc knows; of the other threads it is the one that works.
    writer = max(spent.values(), default=0.0)
    drained = Drained(
        (first - started) / 1000, memory, done / (after[0] - before[0]), loop, writer, sum(spent.values()) - writer,
        (after[3] - before[3]) / done * 1e6, size,
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
        [Column("event loop"), *(Column(name, ".0f") for name in ("writer", "other threads", "prober"))],
        [[f"{loop:.0f}", writer, drained.others_us, drained.prober_us]],
        ceiling(drained),
    )
    return Outcome([backlog, threads_sheet], msgspec.to_builtins(drained))


def ceiling(drained: Drained) -> str:
    """What one main process could do with more cores and probers, by calculation."""
    main, longest = drained.loop_us + drained.writer_us + drained.others_us, max(drained.loop_us, drained.writer_us)
    least, most = 1e6 / main, 1e6 / longest
    probers = drained.prober_us / 1e6
    return (
        "By calculation: with cores of their own for its probers the main process would come to between "
        f"{least:,.0f} files/s (its threads taking turns, as Python's lock makes them in part) and {most:,.0f} (side "
        f"by side), which is what {least * probers:.1f} to {most * probers:.1f} probers do."
    )
