"""Daemons that take callbacks only, or probe only, on one database."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.daemon import Daemon
from tests.support.notification import batch_body, failed, finished
from tests.support.origin import SILENCE, Origin
from tests.support.postgres import fetch, new_schema
from tests.support.waiting import eventually

CALLBACKS, PROBES = ["callbacks"], ["probes"]


@pytest.fixture
async def url() -> str:
    return await new_schema()


@asynccontextmanager
async def node(folder: Path, url: str, roles: Sequence[str], **verify: Any) -> AsyncIterator[Daemon]:
    """A daemon with these roles alone."""
    config: dict[str, dict[str, Any]] = {
        "server": {"roles": list(roles)},
        "auth": {"admin_token": "token-of-these-nodes"},
        "store": {"url": url, "lease": "5s"},
        "verify": verify,
    }
    async with Daemon(folder, config) as daemon:
        yield daemon


async def get(daemon: Daemon, path: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(daemon.url + path, headers=daemon.admin) as response,
    ):
        return response.status, await response.text()


async def test_what_one_takes_another_probes_and_neither_does_the_others_work(tmp_path: Path, url: str) -> None:
    async with (
        Origin() as origin,
        node(tmp_path / "takes", url, CALLBACKS) as taking,
        node(tmp_path / "probes", url, PROBES) as probing,
    ):
        assert taking.prober_pids() == []
        assert len(probing.prober_pids()) == 1
        await probing.line("sharing the work", callbacks=1, probes=1)
        await taking.deliver("b", [finished(origin.url(f"/{n}"), f"{n}") for n in range(100)])
        assert (await probing.verdict("b"))["available"] == 100
        assert await fetch(url, "SELECT DISTINCT name FROM node JOIN lease ON lease.node = node.id") == []
        assert taking.count("verdict") == 0
        assert await taking.terminate() == await probing.terminate() == 0
    for daemon in (taking, probing):
        assert [line for line in daemon.lines if line["level"] == "error"] == []


async def test_a_notification_that_is_sent_to_a_node_that_only_probes_is_to_be_sent_again_and_is_not_kept(
    tmp_path: Path, url: str
) -> None:
    async with node(tmp_path / "probes", url, PROBES) as probing, node(tmp_path / "takes", url, CALLBACKS) as taking:
        body = batch_body("b", [failed("1")])
        await probing.line("takes no callbacks, only probes: [server] roles")
        reply = await probing.post(body)
        assert (reply.status, reply.code, int(reply.headers["Retry-After"]) > 0) == (503, "503", True)
        assert json.loads(reply.body)["msg"].startswith("this server takes no callbacks ([server] roles)")
        assert await fetch(url, "SELECT count(*) FROM notification UNION ALL SELECT count(*) FROM rejection") == [
            (0,),
            (0,),
        ]
        assert (await taking.post(body)).status == 200
        await probing.verdict("b")


async def test_a_balancer_that_asks_whether_they_are_ready_sends_callbacks_to_those_that_take_them(
    tmp_path: Path, url: str
) -> None:
    async with node(tmp_path / "takes", url, CALLBACKS) as taking, node(tmp_path / "probes", url, PROBES) as probing:
        assert await get(taking, "/readyz") == (200, '{"ready":true,"store":"ok","server":"ok"}')
        status, text = await get(probing, "/readyz")
        assert status == 503
        assert json.loads(text) == {
            "ready": False,
            "store": "ok",
            "server": "ok",
            "probers": "ok",
            "callbacks": "not taken here, see [server] roles",
        }
        assert (await get(probing, "/healthz"))[0] == 200


async def test_everyone_tells_who_is_there(tmp_path: Path, url: str) -> None:
    async with (
        node(tmp_path / "takes", url, CALLBACKS) as taking,
        node(tmp_path / "probes", url, PROBES) as probing,
        node(tmp_path / "both", url, CALLBACKS + PROBES) as both,
    ):
        wanted = {taking: CALLBACKS, probing: PROBES, both: CALLBACKS + PROBES}
        await asyncio.gather(*(daemon.line("sharing the work", nodes=3) for daemon in wanted))
        for daemon, roles in wanted.items():
            status = json.loads((await get(daemon, "/api/v1/status"))[1])
            assert (status["roles"], status["nodes"]) == (roles, {"callbacks": 2, "probes": 2})
            metrics = (await get(daemon, "/metrics"))[1]
            assert 'notify_server_nodes{role="callbacks"} 2.0' in metrics
            assert 'notify_server_nodes{role="probes"} 2.0' in metrics
            running = f'notify_server_probers{{state="up"}} {float("probes" in roles)}'
            assert running in metrics
            assert (await get(daemon, "/"))[0] == 200


async def test_without_a_node_that_probes_what_needs_no_probe_has_its_verdict_and_the_rest_waits_for_one(
    tmp_path: Path, url: str
) -> None:
    async with Origin() as origin, node(tmp_path / "takes", url, CALLBACKS) as taking:
        await taking.line("no node probes files, all of them wait: start one that has probes in [server] roles")
        await taking.deliver("failed", [failed("1"), failed("2")])
        assert (await taking.verdict("failed"))["verdict"] == "incomplete"
        await taking.deliver("finished", [finished(origin.url("/1"), "1")])

        async def expanded() -> bool:
            return await fetch(url, "SELECT state FROM file WHERE host <> ''") == [("pending",)]

        await eventually(expanded)
        async with node(tmp_path / "probes", url, PROBES) as probing:
            assert (await probing.verdict("finished"))["verdict"] == "complete"
            # From now on the inbox is its work too.
            await taking.line("sharing the work", probes=1)
            await taking.deliver("later", [failed("1")])
            await probing.verdict("later")
            await probing.kill()
            # And without a probing node the inbox is still expanded.
            await taking.deliver("last", [failed("1")])
            await taking.verdict("last")
        assert origin.count["/1"] == 1


async def test_hosts_are_shared_among_those_that_probe(tmp_path: Path, url: str) -> None:
    limit = 4
    async with (
        Origin() as origin,
        node(tmp_path / "takes", url, CALLBACKS) as taking,
        node(tmp_path / "more", url, CALLBACKS),
        node(tmp_path / "probes", url, PROBES, per_host_concurrency=limit) as probing,
    ):
        await probing.line("sharing the work", callbacks=2, probes=1)
        origin.default = SILENCE
        await taking.deliver("b", [finished(origin.url(f"/{n}"), f"{n}") for n in range(20)])
        # All of what the host can bear is its own: those that take callbacks have no share of it.
        await origin.reached(limit)
        assert origin.busy == limit


async def test_the_inbox_of_a_node_that_is_stopped_for_longer_than_its_lease_is_taken_over(
    tmp_path: Path, url: str
) -> None:
    """Row 84: stopped, it keeps the connection that the right to expand goes with."""
    async with Origin() as origin, node(tmp_path / "a", url, CALLBACKS + PROBES) as one:
        await one.deliver("first", [finished(origin.url("/1"), "1")])
        await one.verdict("first")
        async with node(tmp_path / "b", url, CALLBACKS + PROBES) as two:
            one.send(signal.SIGSTOP)
            await two.deliver("second", [finished(origin.url("/2"), "2")])
            assert (await two.verdict("second"))["verdict"] == "complete"
            one.send(signal.SIGCONT)
            await one.line("registered", number=2)
            await one.deliver("third", [finished(origin.url("/3"), "3")])

            async def settled() -> bool:
                return await fetch(url, "SELECT count(*) FROM batch WHERE verdict = 'complete'") == [(3,)]

            await eventually(settled)
            assert [origin.count[f"/{n}"] for n in (1, 2, 3)] == [1, 1, 1]
            assert await one.terminate() == await two.terminate() == 0
