"""The time from a notification to its verdict: on the stream of events, and at a system that it is forwarded to."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import aiohttp
import msgspec
from aiohttp import web

from tests.bench.figures import Column, Outcome, Row, Setting, Sheet, in_turn, median_by, quantile
from tests.bench.record import batch_name, body_of
from tests.bench.servers import ONE_HOST, Origin, Server, daemon, nginx, slow_origin
from tests.support.waiting import free_port

RATES = (1, 20, 200)
FILES = 7
DELAY = 0.02
PATIENCE_SECONDS = 30.0
ADMIN = "admin-token-of-the-benchmark"
AUTHORIZATION = {"Authorization": f"Bearer {ADMIN}"}
WAYS = ("stream", "forwarded")


class Verdicts(msgspec.Struct):
    """Milliseconds from when each notification was due until its verdict had arrived, sorted, by the way it came."""

    sent: int
    stream: list[float]
    forwarded: list[float]


class _Arrivals:
    """Notes when each batch was due and when its verdict came, by both ways."""

    def __init__(self) -> None:
        self.due: dict[str, float] = {}
        self.came: dict[str, dict[str, float]] = {way: {} for way in WAYS}

    def note(self, way: str, batch_id: str) -> None:
        self.came[way].setdefault(batch_id, time.monotonic())

    @property
    def complete(self) -> bool:
        return all(len(came) >= len(self.due) for came in self.came.values())

    def milliseconds(self, way: str) -> list[float]:
        """Return the sorted times of one way."""
        came: Mapping[str, float] = self.came[way]
        return sorted(1000 * (came[batch_id] - due) for batch_id, due in self.due.items() if batch_id in came)


async def _listen(session: aiohttp.ClientSession, port: int, arrivals: _Arrivals, connected: asyncio.Event) -> None:
    async with session.get(f"http://127.0.0.1:{port}/api/v1/stream", headers=AUTHORIZATION) as response:
        response.raise_for_status()
        is_verdict = False
        async for line in response.content:
            connected.set()
            if line.startswith(b"event:"):
                is_verdict = line.strip() == b"event: verdict"
            elif line.startswith(b"data:") and is_verdict:
                arrivals.note("stream", msgspec.json.decode(line[5:])["batch_id"])


@contextmanager
def _receiving(arrivals: _Arrivals) -> Iterator[web.Application]:
    async def take(request: web.Request) -> web.Response:
        arrivals.note("forwarded", (await request.json())["data"]["batch_id"])
        return web.Response(status=204)

    app = web.Application()
    app.router.add_post("/", take)
    yield app


async def _measure(server: Server, hook: int, addresses: list[str], rate: int, seconds: float) -> Verdicts:
    arrivals = _Arrivals()
    number = max(10, round(rate * seconds))
    with _receiving(arrivals) as app:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", hook).start()
        timeout = aiohttp.ClientTimeout(total=None, sock_read=None)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=64)) as session:
            connected = asyncio.Event()
            listening = asyncio.create_task(_listen(session, server.port, arrivals, connected))
            await connected.wait()

            async def post(which: int) -> None:
                body = body_of(which, addresses[which * FILES : (which + 1) * FILES])
                url = f"http://127.0.0.1:{server.port}/notify"
                async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                    response.raise_for_status()

            posts = []
            began = time.monotonic()
            for which in range(number):
                due = began + which / rate
                await asyncio.sleep(due - time.monotonic())
                arrivals.due[batch_name(which)] = due
                posts.append(asyncio.create_task(post(which)))
            await asyncio.gather(*posts)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not arrivals.complete and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        await runner.cleanup()
    return Verdicts(number, arrivals.milliseconds("stream"), arrivals.milliseconds("forwarded"))


def run(setting: Setting) -> Outcome:
    """Each rate on a fresh server, with an origin that answers at once and with one that is 20 ms away."""
    seconds = setting.of(10.0, 1.0)
    origins: dict[str, AbstractContextManager[Origin]] = {
        "0 ms": nginx(setting.work),
        "20 ms": slow_origin(DELAY),
    }
    rows: list[Row] = []
    raw: dict[str, object] = {}
    for distance, starting in origins.items():
        with starting as origin:

            def measure(turn: int, rate: int, origin: Origin = origin, distance: str = distance) -> Verdicts:
                hook = free_port()
                endpoint = {
                    "name": "bench",
                    "url": f"http://127.0.0.1:{hook}/",
                    "secrets": ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
                    "events": ["batch.complete", "batch.incomplete"],
                    "allowed_networks": ["127.0.0.0/8"],
                }
                store = setting.work / f"{distance.replace(' ', '')}-{rate}-{turn}.db"
                with daemon(store, auth__admin_token=ADMIN, forward=json.dumps([endpoint])) as server:
                    addresses = origin.addresses(FILES * max(10, round(rate * seconds)), ONE_HOST)
                    return asyncio.run(_measure(server, hook, addresses, rate, seconds))

            runs, _ = in_turn(
                setting,
                {
                    f"{rate} a second, origin at {distance}": lambda turn, rate=rate: measure(turn, rate)  # type: ignore[misc]
                    for rate in RATES
                },
            )
        for name, verdicts in runs.items():
            cells: list[float] = []
            for way in WAYS:
                for share in (0.5, 0.99):
                    cells.append(median_by(verdicts, lambda v, way=way, share=share: quantile(getattr(v, way), share)))  # type: ignore[misc]
            lost = sum(2 * each.sent - len(each.stream) - len(each.forwarded) for each in verdicts)
            rows.append([name, *cells, float(lost)])
        raw[distance] = msgspec.to_builtins(runs)
    columns = [
        Column(f"{FILES} files each"),
        *(Column(f"{way} {p} ms", ",.1f") for way in WAYS for p in ("p50", "p99")),
    ]
    sheet = Sheet(
        f"From the notification to its verdict, median of {setting.rounds} runs of {seconds:.0f} s (open loop)",
        [*columns, Column("never came", ",.0f")],
        rows,
        "From when each notification was due until its verdict had arrived at a listener of /api/v1/stream, and at an "
        "endpoint that it is forwarded to.",
    )
    return Outcome([sheet], raw)
