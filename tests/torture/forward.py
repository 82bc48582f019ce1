"""Kills the daemon with SIGKILL while it forwards events, and looks for verdicts that never arrive, or arrive stale.

Batches are posted with a file reported as FAILED, which makes them incomplete, and half of them again with the file
uploaded, which makes them complete: two revisions of an event, to two endpoints. One endpoint answers 500 to the first
attempt of some events. A third of the kills each comes while the daemon starts, after some acks, and after some
deliveries, whose results are not recorded then. What had no answer is posted again in the next life.

Of each batch and endpoint

- the last event must be of the batch's last verdict: else it is lost;
- no event may be accepted after one with a higher revision: it would be stale;
- an event may be accepted twice only if a kill came before the record of its delivery: it is doubled.

With PostgreSQL the same is asked of two nodes, one of which is killed.

Besides, 1,000 batches of which every file is missing become at risk within a second: each is an event once, soon after
its time, and a robot has its digest soon after that.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import aiohttp
import asyncpg
from aiohttp import web
from standardwebhooks import Webhook

from notify_server.simulator.loopback_server import LoopbackServer
from tests.support.daemon import Daemon
from tests.support.notification import batch_body, failed, finished
from tests.support.origin import Answer, Origin
from tests.support.postgres import new_schema
from tests.support.waiting import Bell, eventually
from tests.torture.figures import Figure, Setting
from tests.torture.nodes import postgres

ROUNDS = 200
NODE_BATCHES = 4000
SENDERS = 4
MAX_ROUND = 60
MOMENTS = ("starting", "acking", "delivering")
ENDPOINTS = ("steady", "flaky")
FLAKY_SHARE = 0.02
SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()
SETTLE_SECONDS = 300.0
AT_RISK_BATCHES = 1000
AT_RISK_SECONDS = 10
LEASE_SECONDS = 5.0
SETTLED = (
    "SELECT NOT EXISTS (SELECT 1 FROM notification WHERE expanded_at IS NULL)"
    " AND NOT EXISTS (SELECT 1 FROM batch WHERE verdict = 'pending')"
    " AND NOT EXISTS (SELECT 1 FROM forward WHERE state = 'pending')"
)
UNRECORDED = (
    "SELECT event.key, forward.endpoint FROM forward JOIN event ON event.id = forward.event WHERE state = 'pending'"
)


class Receiver(LoopbackServer):
    """Two endpoints on loopback. Remembers every event that it accepts, in order; `flaky` are the shares that fail."""

    def __init__(self, dice: random.Random, *, flaky: float) -> None:
        super().__init__(self._answer)
        self.accepted: dict[str, list[tuple[str, str, int, str]]] = {name: [] for name in ENDPOINTS}
        self.total = 0
        self.unsigned = 0
        self.bell = Bell()
        self._dice = dice
        self._flaky = flaky
        self._failed: set[str] = set()

    def tables(self) -> list[dict[str, Any]]:
        """Return the `[[forward]]` tables that lead here."""
        return [
            {
                "name": name,
                "url": f"{self.address}{name}",
                "secrets": [SECRET],
                "events": ["batch.complete", "batch.incomplete"],
                "allowed_networks": ["127.0.0.0/8"],
            }
            for name in ENDPOINTS
        ]

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        name, body, key = request.path[1:], await request.read(), request.headers["webhook-id"]
        try:
            Webhook(SECRET).verify(body, {field.lower(): value for field, value in request.headers.items()})
        except Exception:
            self.unsigned += 1
            return web.Response(status=401)
        if name == "flaky" and key not in self._failed and self._dice.random() < self._flaky:
            self._failed.add(key)
            return web.Response(status=500)
        data = json.loads(body)["data"]
        self.accepted[name].append((key, data["batch_id"], data["revision"], data["verdict"]))
        self.total += 1
        self.bell.ring()
        return web.Response()

    def keys(self) -> set[tuple[str, str]]:
        """Return key and endpoint of all that was accepted."""
        return {(key, name) for name, events in self.accepted.items() for key, *_ in events}


class Platform:
    """Posts batches, half of them a second time with the file uploaded, and what had no answer again."""

    def __init__(self, origin: Origin, dice: random.Random, most: int) -> None:
        self.expected: dict[str, str] = {}
        self.acked = 0
        self.left = most
        self.bell = Bell()
        self.unanswered: list[tuple[str, bool]] = []
        self._again: list[str] = []
        self._origin = origin
        self._dice = dice
        self._number = 0

    def _next(self) -> tuple[str, bool]:
        if self.unanswered:
            return self.unanswered.pop()
        if self._again and self._dice.random() < 0.5:
            return self._again.pop(0), True
        self._number += 1
        return f"batch-{self._number}", False

    async def send(self, daemon: Daemon) -> bool:
        """Post the next batch; return False when it was not acked."""
        batch, uploaded = self._next()
        file = finished(self._origin.url(f"/{batch}"), "k") if uploaded else failed("k")
        try:
            reply = await daemon.post(batch_body(batch, [file]))
        except (aiohttp.ClientError, OSError):
            self.unanswered.append((batch, uploaded))
            return False
        if reply.status != 200:
            self.unanswered.append((batch, uploaded))
            return False
        self.expected[batch] = "complete" if uploaded else "incomplete"
        self.acked += 1
        if not uploaded and self._dice.random() < 0.5:
            self._again.append(batch)
        self.bell.ring()
        return True

    async def send_until_it_fails(self, daemon: Daemon) -> None:
        """Post batch after batch, until one is not acked or there are none left."""
        while self.left > 0:
            self.left -= 1
            if not await self.send(daemon):
                return


async def kills(setting: Setting) -> list[Figure]:
    """Kill one daemon on SQLite, again and again."""
    dice = random.Random(setting.seed)
    rounds = setting.times(ROUNDS)
    hits: Counter[str] = Counter()
    unrecorded: set[tuple[str, str]] = set()
    async with Origin() as origin, Receiver(dice, flaky=FLAKY_SHARE if rounds >= 20 else 0.0) as receiver:
        platform = Platform(origin, dice, 0)
        daemon = Daemon(setting.work / "sqlite", {"forward": receiver.tables()})
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_exit(daemon.__aexit__)
            moments = [MOMENTS[(number + 2) % len(MOMENTS)] for number in range(rounds)]
            for moment in moments:
                await _round(daemon, platform, receiver, dice, moment)
                if not daemon.database.exists():
                    continue
                waiting = {(row["key"], row["endpoint"]) for row in _waiting(daemon)}
                # A request that the daemon has sent may be accepted after it is dead.
                unrecorded |= waiting
                between = waiting & receiver.keys()
                hits["kills with events waiting"] += bool(waiting)
                hits["kills with deliveries not recorded"] += bool(between)
            await daemon.start()
            while platform.unanswered:
                assert await platform.send(daemon)
            await daemon.eventually(SETTLED, seconds=SETTLE_SECONDS)
            figures = judge(f"{rounds} kills", platform, receiver, unrecorded)
    proof = ("kills with events waiting", "kills with deliveries not recorded")
    seen = ", ".join(f"{hits[name]} {name}" for name in proof)
    return [
        *figures,
        Figure("kills that hit the outbox", "some each", seen, all(hits[name] for name in proof), dict(hits)),
    ]


def _waiting(daemon: Daemon) -> Sequence[Any]:
    if not daemon.value("SELECT count(*) FROM sqlite_master WHERE name = 'forward'"):
        return []
    return daemon.sql(UNRECORDED)


async def _round(daemon: Daemon, platform: Platform, receiver: Receiver, dice: random.Random, moment: str) -> None:
    daemon.text = ""
    if moment == "starting":
        began = asyncio.create_task(daemon.start())
        while not (daemon.running or began.done()):
            await asyncio.sleep(0)
        await asyncio.sleep(dice.uniform(0.3, 1.0))
        await daemon.kill()
        with contextlib.suppress(AssertionError):  # It ended without being ready.
            await began
        return
    await daemon.start()
    platform.left = MAX_ROUND
    senders = [asyncio.create_task(platform.send_until_it_fails(daemon)) for _ in range(SENDERS)]
    if moment == "acking":
        enough = platform.acked + dice.randint(1, MAX_ROUND // 2)
        await platform.bell.until(lambda: platform.acked >= enough)
    else:
        some = receiver.total + dice.randint(1, MAX_ROUND // 2)
        await receiver.bell.until(lambda: receiver.total >= some)
    await daemon.kill()
    await asyncio.gather(*senders)


async def nodes(setting: Setting) -> list[Figure]:
    """Kill one of two nodes on PostgreSQL half-way."""
    dice = random.Random(setting.seed)
    batches = max(60, setting.times(NODE_BATCHES))
    async with contextlib.AsyncExitStack() as stack:
        origin = await stack.enter_async_context(Origin())
        receiver = await stack.enter_async_context(Receiver(dice, flaky=0.0))
        url = await new_schema(stack.enter_context(postgres()))
        look = await asyncpg.connect(url)
        stack.push_async_callback(look.close)
        config: dict[str, Any] = {
            "store": {"url": url, "lease": f"{LEASE_SECONDS}s"}, "forward": receiver.tables(),
        }  # fmt: skip
        both = [await stack.enter_async_context(Daemon(setting.work / name, config)) for name in "ab"]
        platform = Platform(origin, dice, batches)
        senders = [asyncio.create_task(platform.send_until_it_fails(node)) for node in both for _ in range(SENDERS)]
        await receiver.bell.until(lambda: receiver.total >= batches // 2, 120)
        doomed = dice.choice(both)
        (survivor,) = [node for node in both if node is not doomed]
        await doomed.kill()
        # Those of the other node too, which is about to record them.
        unrecorded = {(key, endpoint) for key, endpoint in await look.fetch(UNRECORDED)}
        await asyncio.gather(*senders)
        while platform.left > 0 or platform.unanswered:
            platform.left -= 1
            assert await platform.send(survivor)

        await eventually(lambda: look.fetchval(SETTLED), SETTLE_SECONDS)
        return judge("1 of 2 nodes killed", platform, receiver, unrecorded)


def judge(what: str, platform: Platform, receiver: Receiver, unrecorded: set[tuple[str, str]]) -> list[Figure]:
    """Compare the events that were accepted with the verdicts of what was acked."""
    lost = stale = doubled = beyond = events = 0
    for name, accepted in receiver.accepted.items():
        last: dict[str, tuple[int, str]] = {}
        times: defaultdict[str, int] = defaultdict(int)
        for key, batch, revision, verdict in accepted:
            events += 1
            times[key] += 1
            doubled += times[key] > 1
            beyond += times[key] > 1 and (key, name) not in unrecorded
            if revision < last.get(batch, (0, ""))[0]:
                stale += 1
            else:
                last[batch] = (revision, verdict)
        lost += sum(last.get(batch, (0, ""))[1] != verdict for batch, verdict in platform.expected.items())
    verdicts = len(platform.expected) * len(ENDPOINTS)
    return [
        Figure(
            f"verdicts lost on their way to an endpoint, {what}",
            "0",
            f"{lost} of {verdicts:,}",
            not lost and verdicts > 0,
            {"lost": lost, "verdicts": verdicts, "events": events},
        ),
        Figure("events accepted after a newer one of their batch", "0", f"{stale} of {events:,}", not stale),
        Figure(
            "events doubled, though their delivery was recorded",
            "0",
            f"{beyond}; {doubled} doubled by a kill before the record",
            not beyond and not receiver.unsigned,
            {"doubled": doubled, "beyond": beyond},
        ),
    ]


class Alarms(LoopbackServer):
    """An endpoint and a robot that note when they get what."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.events: list[tuple[str, float]] = []
        self.first_occurred_at = float("inf")
        self.digest_at: float | None = None
        self.bell = Bell()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        body = json.loads(await request.read())
        if request.path == "/robot":
            self.digest_at = self.digest_at or time.time()
        else:
            data = body["data"]
            due = datetime.fromisoformat(data["first_received_at"]).timestamp() + AT_RISK_SECONDS
            self.events.append((data["batch_id"], time.time() - due))
            occurred_at = datetime.fromisoformat(body["timestamp"]).timestamp()
            self.first_occurred_at = min(self.first_occurred_at, occurred_at)
        self.bell.ring()
        return web.json_response({"errcode": 0})


async def at_risk(setting: Setting) -> list[Figure]:
    """Post batches whose files are all missing, and wait until each is reported at risk."""
    number = setting.times(AT_RISK_BATCHES)
    async with Origin() as origin, Alarms() as alarms:
        origin.default = Answer(404)
        common = {"events": ["batch.at_risk"], "allowed_networks": ["127.0.0.0/8"]}
        endpoints = [
            {"name": "listings", "url": f"{alarms.address}listings", **common},
            {"name": "on-call", "bot": "wecom", "url": f"{alarms.address}robot", "group_wait": "2s", **common},
        ]
        config: dict[str, Any] = {
            "alert": {"at_risk_after": f"{AT_RISK_SECONDS}s"},
            "forward": endpoints,
            "verify": {"retry_schedule": ["1h"]},
        }
        async with Daemon(setting.work / "at-risk", config) as daemon:
            for start in range(0, number, 50):
                bodies = [
                    batch_body(f"b{n}", [finished(origin.url(f"/{n}"), "k")])
                    for n in range(start, min(start + 50, number))
                ]
                replies = await asyncio.gather(*(daemon.post(body) for body in bodies))
                assert {reply.status for reply in replies} == {200}
            with contextlib.suppress(TimeoutError):
                await alarms.bell.until(lambda: len(alarms.events) >= number and alarms.digest_at is not None, 120)
    slowest = max((late for _, late in alarms.events), default=float("inf"))
    digest = (alarms.digest_at or float("inf")) - alarms.first_occurred_at - 2.0
    times = Counter(batch for batch, _ in alarms.events)
    once = len(times) == number and set(times.values()) == {1}
    return [
        Figure("batches reported at risk, once each", f"{number:,}", f"{len(times):,}", once),
        Figure("slowest of them after its time", "at most 5 s", f"{slowest:.1f} s", slowest <= 5, {"seconds": slowest}),
        Figure(
            "a robot's digest after group_wait", "at most 10 s", f"{digest:.1f} s", digest <= 10, {"seconds": digest}
        ),
    ]


async def run(setting: Setting) -> list[Figure]:
    """200 kills on SQLite at scale 1, one of two nodes on PostgreSQL, and batches at risk."""
    return [*await kills(setting), *await nodes(setting), *await at_risk(setting)]
