"""Screens and the API on a large record: how long they take, and what it costs the acks that somebody looks on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection

import msgspec

from tests.bench.figures import Column, Outcome, Setting, Sheet, in_turn, quantile
from tests.bench.latency import COLUMNS, cells
from tests.bench.openloop import Load, start
from tests.bench.record import add_settled, batch_name
from tests.bench.servers import daemon

RATE = 500
LOAD_SECONDS = 2.0
SECONDS = 30.0
ALONE, WATCHED = "nobody looks on", "a dashboard is open"


class Page(msgspec.Struct):
    """How long a page took, in milliseconds, and how large it is."""

    p50_ms: float
    p95_ms: float
    max_ms: float
    kib: float


TOKEN = "token-of-this-benchmark"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def _get(connection: HTTPConnection, path: str) -> bytes:
    connection.request("GET", path, headers=HEADERS)
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise RuntimeError(f"GET {path}: {response.status}")
    return body


def _page(port: int, path: str, times: int) -> Page:
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    taken = []
    body = b""
    for _ in range(times):
        began = time.perf_counter()
        body = _get(connection, path)
        taken.append((time.perf_counter() - began) * 1000)
    connection.close()
    taken.sort()
    return Page(quantile(taken, 0.5), quantile(taken, 0.95), taken[-1], len(body) / 1024)


@contextmanager
def _dashboard(port: int) -> Iterator[None]:
    """What an open dashboard does: it listens to events, and loads the overview every LOAD_SECONDS."""
    done = threading.Event()
    failed: list[Exception] = []

    def load() -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        try:
            while not done.is_set():
                _get(connection, "/")
                done.wait(LOAD_SECONDS)
        except Exception as error:
            failed.append(error)
        finally:
            connection.close()

    def listen() -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        try:
            connection.request("GET", "/api/v1/stream", headers=HEADERS)
            response = connection.getresponse()
            # A sample comes every second, so that this ends soon after the rest.
            while not done.is_set():
                if not response.readline():
                    raise RuntimeError("the stream has ended")
        except Exception as error:
            failed.append(error)
        finally:
            connection.close()

    looking = [threading.Thread(target=job, daemon=True) for job in (load, listen)]
    for thread in looking:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in looking:
            thread.join()
    if failed:
        raise failed[0]


def run(setting: Setting) -> Outcome:
    """Pages first, then acks with and without somebody who looks on, in turn, on one record."""
    files, times, seconds = setting.of(1_000_000, 100_000), setting.of(60, 10), setting.of(8, 2)
    store = setting.work / "dashboard.db"
    setting.say(f"making a record of {files:,} files")
    add_settled(store, files)
    paths = {
        "/": "/",
        "/ui/batches/{id}": "/ui/batches/10",
        "/api/v1/search?q={batch_id}": f"/api/v1/search?q={batch_name(files // 200)}",
        "/api/v1/batches": "/api/v1/batches",
    }
    with daemon(store, auth__admin_token=TOKEN) as server:
        setting.say("loading pages")
        pages = {name: _page(server.port, path, times) for name, path in paths.items()}

        def alone(turn: int) -> Load:
            return start(server.port, RATE, seconds, salt=2 * turn).result()

        def watched(turn: int) -> Load:
            with _dashboard(server.port):
                return start(server.port, RATE, seconds, salt=2 * turn + 1).result()

        runs, _ = in_turn(setting, {ALONE: alone, WATCHED: watched})
    sheets = [
        Sheet(
            f"Pages on a record of {files:,} files, {times} times each",
            [
                Column("page"),
                Column("p50 ms", ",.1f"),
                Column("p95 ms", ",.1f"),
                Column("max ms", ",.1f"),
                Column("KiB", ",.0f"),
            ],
            [[name, page.p50_ms, page.p95_ms, page.max_ms, page.kib] for name, page in pages.items()],
        ),
        Sheet(
            f"Acks at {RATE} a second on that record, median of {setting.rounds} x {seconds} s (open loop)",
            [Column("7 files each, 64 connections"), *COLUMNS],
            [[name, *cells(loads)] for name, loads in runs.items()],
            f"An open dashboard listens to /api/v1/stream and loads the overview every {LOAD_SECONDS:.0f} s.",
        ),
    ]
    return Outcome(sheets, {"pages": msgspec.to_builtins(pages), "rate": RATE, "runs": msgspec.to_builtins(runs)})
