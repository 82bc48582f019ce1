"""HEADs a second: the daemon, which claims, guards and records, beside clients that do nothing but ask."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import msgspec

from notify_server.clock import unix_ms
from tests.bench.acks import OURS
from tests.bench.figures import Column, Outcome, Row, Setting, Sheet, in_turn, median_by, row_name
from tests.bench.record import add_pending, reading, size_mib, until_settled
from tests.bench.servers import MANY_HOSTS, ONE_HOST, Origin, daemon, module, mortal, nginx, slow_origin, tool
from tests.bench.usage import PeakMemory, cpu_seconds

CONCURRENCY = 128
LIMIT = "libcurl alone"
TWO_PROBERS = "with 2 probers"
# How long after a daemon's store was made its files are due: it has started by then, and the start costs no file.
LEAD_SECONDS = 4.0
RUN_SECONDS = 300.0
DELAY = 0.02


class Probing(msgspec.Struct):
    """One run: files found, and what it took to ask for them. Memory is the highest, of all processes together."""

    found: int
    seconds: float
    cpu_seconds: float
    memory_mib: float = 0.0
    bytes_a_file: float = 0.0

    @property
    def rate(self) -> float:
        """Files a second."""
        return self.found / self.seconds


@dataclass(frozen=True)
class Task:
    """The addresses to request, also as a file with one to a line, and the server that answers."""

    origin: Origin
    addresses: Sequence[str]
    listed: Path
    work: Path


def _command(command: Sequence[str], environment: dict[str, str] | None = None) -> tuple[bytes, Probing]:
    """Run a command to its end. Its output, and what it took as a whole; `found` is for the caller to say."""
    began = time.perf_counter()
    process = subprocess.Popen(
        mortal(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(environment or {})}
    )
    before = os.times()
    with PeakMemory(process.pid) as peak:
        try:
            output, errors = process.communicate(timeout=RUN_SECONDS)
        except BaseException:
            process.kill()
            process.wait()
            raise
    seconds = time.perf_counter() - began
    after = os.times()
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {errors.decode(errors='replace')[-500:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return output, Probing(0, seconds, cpu, peak.mib)


def _module(name: str, task: Task) -> Probing:
    """A client of ours, which leaves its own start out of what it tells."""
    ca_file = [str(task.origin.ca_file)] if task.origin.ca_file else []
    output, whole = _command(module(f"peers.{name}", task.listed, CONCURRENCY, *ca_file))
    run = msgspec.json.decode(output, type=Probing)
    run.memory_mib = whole.memory_mib
    return run


def lychee(task: Task) -> Probing:
    """lychee without its limits: no pause between requests, as many at a time for a host as at all, no retries."""
    command = [
        tool("lychee"), "--max-concurrency", str(CONCURRENCY), "--host-concurrency", str(CONCURRENCY),
        "--host-request-interval", "0ms", "--max-retries", "0", "--method", "head", "--accept", "200",
        "--no-progress", "--format", "json", str(task.listed),
    ]  # fmt: skip
    environment = {"SSL_CERT_FILE": str(task.origin.ca_file)} if task.origin.ca_file else {}
    output, run = _command(command, environment)
    run.found = msgspec.json.decode(output)["successful"]
    return run


def curl(task: Task) -> Probing:
    """curl in parallel."""
    config = task.work / "curl.conf"
    config.write_text("".join(f'url = "{address}"\noutput = "/dev/null"\n' for address in task.addresses))
    command = [
        tool("curl"), "--parallel", "--parallel-max", str(CONCURRENCY), "--parallel-immediate", "--head", "--silent",
        "--show-error", "--http1.1", "--noproxy", "*", "--write-out", "%{http_code}\n", "--config", str(config),
    ]  # fmt: skip
    if task.origin.ca_file:
        command += ["--cacert", str(task.origin.ca_file)]
    output, run = _command(command)
    run.found = output.split().count(b"200")
    return run


def ours(task: Task, *, processes: int = 1, settings: Mapping[str, str] = MappingProxyType({})) -> Probing:
    """The daemon, from its first request to its last verdict, on a store that has them all waiting. `settings` are more
    keys of its configuration.
    """
    store = task.work / f"probes-{time.time_ns()}.db"
    lead = LEAD_SECONDS
    due_at = unix_ms() + round(lead * 1000)
    add_pending(store, task.addresses, due_at)
    limits = {"verify__concurrency": str(CONCURRENCY), "verify__per_host_concurrency": str(CONCURRENCY)}
    limits["verify__processes"] = str(processes)
    if task.origin.ca_file:
        limits["verify__ca_file"] = str(task.origin.ca_file)
    with daemon(store, **limits, **settings) as server:
        # Whatever starting took is not the files'.
        while (left := due_at - unix_ms()) > 100:
            time.sleep((left - 50) / 1000)
        started_late = unix_ms() > due_at
        before = cpu_seconds(server.pid)
        with PeakMemory(server.pid) as peak:
            until_settled(store)
        cpu = cpu_seconds(server.pid) - before
        with reading(store) as connection:
            (found,) = connection.execute("SELECT count(*) FROM file WHERE state = 'available'").fetchone()
            (first,) = connection.execute("SELECT min(started_at) FROM attempt").fetchone()
            (last,) = connection.execute("SELECT max(completed_at) FROM batch").fetchone()
    if started_late:
        raise RuntimeError(f"the daemon took more than {lead} s to start")
    run = Probing(found, (last - first) / 1000, cpu, peak.mib, size_mib(store) * 2**20 / found)
    for part in store.parent.glob(f"{store.name}*"):
        part.unlink()
    return run


PEERS: dict[str, Callable[[Task], Probing]] = {
    LIMIT: lambda task: _module("libcurl_alone", task),
    OURS: ours,
    TWO_PROBERS: lambda task: ours(task, processes=2),
    "aiohttp client": lambda task: _module("aiohttp_client", task),
    "curl --parallel": curl,
    "lychee": lychee,
}


@dataclass(frozen=True)
class Case:
    """Where the files are: how far away, over what, and at how many hosts."""

    name: str
    origin: Callable[[Path], AbstractContextManager[Origin]]
    hosts: Sequence[str]
    files: int


def cases(setting: Setting) -> list[Case]:
    """At no distance, with and without TLS, and 20 ms away; at one host and at a hundred."""
    near, far = setting.of(30_000, 3_000), setting.of(20_000, 3_000)
    found = []
    for label, hosts in (("1 host", ONE_HOST), ("100 hosts", MANY_HOSTS)):
        found += [
            Case(f"http, {label}", lambda work: nginx(work), hosts, near),
            Case(f"https, {label}", lambda work: nginx(work, tls=True), hosts, near),
            Case(f"http, {label}, 20 ms", lambda work: slow_origin(DELAY), hosts, far),
        ]
    return sorted(found, key=lambda case: (case.name.endswith("ms"), case.name.startswith("https")))


def _measure(peer: Callable[[Task], Probing], task: Task, turn: int) -> Probing:
    done = peer(task)
    if done.found != (wanted := len(task.addresses)):
        raise RuntimeError(f"{wanted - done.found} of {wanted} files were not found")
    return done


def run(setting: Setting) -> Outcome:
    """All peers in all cases."""
    measured: dict[str, dict[str, list[Probing]]] = {}
    raw: dict[str, object] = {}
    for case in cases(setting):
        setting.say(f"{case.name}, {case.files:,} files")
        work = setting.work / case.name.replace(", ", "-").replace(" ", "-")
        work.mkdir()
        with case.origin(work) as origin:
            listed = work / "addresses.txt"
            addresses = origin.addresses(case.files, case.hosts)
            listed.write_text("\n".join(addresses) + "\n")
            task = Task(origin, addresses, listed, work)

            peers = {name: partial(_measure, peer, task) for name, peer in PEERS.items()}
            measured[case.name], missing = in_turn(setting, peers)
        raw[case.name] = {
            "runs": msgspec.to_builtins(measured[case.name]), "missing": missing, "files": case.files,
        }  # fmt: skip

    def sheet(title: str, form: str, of: Callable[[Probing], float], note: str = "") -> Sheet:
        rows: list[Row] = []
        for name in PEERS:
            rows.append([row_name(name, missing), *(median_by(runs[name], of) for runs in measured.values())])
        columns = [Column(f"{CONCURRENCY} at a time"), *(Column(name.replace(", ", "\n"), form) for name in measured)]
        return Sheet(title, columns, rows, note)

    return Outcome(
        [
            sheet(
                f"HEADs: files a second, median of {setting.rounds}",
                ",.0f",
                lambda run: run.rate,
                "notify_server also claims, guards and records each file in its store. The origin is nginx with one "
                f"worker; {DELAY * 1000:.0f} ms away it is one of our own, because nginx cannot wait.",
            ),
            sheet("HEADs: CPU seconds for 1,000 files", ".3f", lambda run: run.cpu_seconds / run.found * 1000),
            sheet("HEADs: peak memory, MiB", ",.0f", lambda run: run.memory_mib),
        ],
        raw,
    )
