"""Events, verdicts and forwarding over the API of a running daemon."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.forward.conftest import Receiver, until
from tests.support.app import AppServer, Start
from tests.support.notification import API_CODE

pytestmark = pytest.mark.asyncio(loop_scope="module")

LOOPBACK = ["127.0.0.0/8"]


@pytest_asyncio.fixture(loop_scope="module")
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", receiver.handle)
    async with TestServer(app) as server:
        receiver.url = str(server.make_url("/"))
        yield receiver


def endpoint(receiver: Receiver, **keys: Any) -> dict[str, Any]:
    return {"name": "a", "url": f"{receiver.url}hook?token=hush-hush", "allowed_networks": LOOPBACK, **keys}


async def incomplete(daemon: AppServer, batch_id: str) -> None:
    entry = {"oss_object_name": "k", "target_url": None, "status": "FAILED"}
    (await daemon.post({"batch_id": batch_id, "api_code": API_CODE, "file_list": [entry]})).accepted()
    await daemon.settled(batch_id)


async def get(daemon: AppServer, path: str, status: int = 200) -> Any:
    reply = await daemon.get(path)
    assert reply.status == status, reply.body
    return json.loads(reply.body)


async def post(daemon: AppServer, path: str, body: Any = None, status: int = 200) -> Any:
    headers = {"Content-Type": "application/json"} if body is not None else {}
    reply = await daemon.ask("POST", path, data=None if body is None else json.dumps(body), headers=headers)
    assert reply.status == status, reply.body
    return json.loads(reply.body)


async def test_events_are_pulled_by_cursor(start: Start) -> None:
    daemon = await start()
    assert await get(daemon, "/api/v1/events") == {"items": [], "next": 0}
    await incomplete(daemon, "e1")
    await incomplete(daemon, "e2")
    page = await get(daemon, "/api/v1/events?limit=1")
    (first,) = page["items"]
    assert set(first) == {"id", "key", "type", "timestamp", "revision", "data"}
    assert (first["type"], first["data"]["batch_id"], first["revision"]) == ("batch.incomplete", "e1", 1)
    assert page["next"] == first["id"]
    page = await get(daemon, f"/api/v1/events?after={page['next']}")
    assert [item["data"]["batch_id"] for item in page["items"]] == ["e2"]
    assert await get(daemon, f"/api/v1/events?after={page['next']}") == {"items": [], "next": page["next"]}
    assert (await get(daemon, "/api/v1/events?types=batch.complete,endpoint.*"))["items"] == []
    assert len((await get(daemon, f"/api/v1/events?api_code={API_CODE}"))["items"]) == 2
    assert (await get(daemon, "/api/v1/events?api_code=other"))["items"] == []


async def test_long_poll_returns_with_the_event(start: Start) -> None:
    daemon = await start()
    poll = asyncio.create_task(get(daemon, "/api/v1/events?wait=30s"))
    await incomplete(daemon, "p1")
    assert [item["data"]["batch_id"] for item in (await poll)["items"]] == ["p1"]


async def test_wrong_queries_are_refused_by_name(start: Start) -> None:
    daemon = await start()
    for path, name in (
        ("/api/v1/events?types=nothing", "types"),
        ("/api/v1/events?wait=soon", "wait"),
        ("/api/v1/events?after=-1", "after"),
        ("/api/v1/verdict", "batch_id"),
    ):
        assert (await get(daemon, path, 400))["msg"].startswith(f"{name}: ")


async def test_verdict_answers_by_the_partners_name(start: Start) -> None:
    daemon = await start()
    await get(daemon, "/api/v1/verdict?batch_id=never", 404)
    poll = asyncio.create_task(get(daemon, f"/api/v1/verdict?batch_id=v1&api_code={API_CODE}&wait=1s", 404))
    await poll
    await incomplete(daemon, "v1")
    answer = await get(daemon, f"/api/v1/verdict?batch_id=v1&api_code={API_CODE}&wait=30s")
    assert (answer["verdict"], answer["provisional"], answer["revision"], answer["files"]) == (
        "incomplete",
        False,
        1,
        1,
    )
    assert answer["missing"][0]["oss_object_name"] == "k"
    assert (answer["reference"], answer["expected_files"]) == (None, None)


async def test_verdict_of_two_batches_needs_the_api_code(start: Start) -> None:
    daemon = await start()
    await incomplete(daemon, "twin")
    entry = {"oss_object_name": "k", "target_url": None, "status": "FAILED"}
    (await daemon.post({"batch_id": "twin", "api_code": "zz", "file_list": [entry]})).accepted()
    await daemon.events.seen("verdict", batch_id="twin", api_code="zz")
    assert "api_code" in (await get(daemon, "/api/v1/verdict?batch_id=twin", 400))["msg"]


async def test_endpoints_and_deliveries_are_shown_without_secrets(start: Start, receiver: Receiver) -> None:
    daemon = await start(forward=[endpoint(receiver)])
    await incomplete(daemon, "f1")
    await receiver.reached(1)

    async def delivered() -> bool:
        return bool((await get(daemon, "/api/v1/forward/a/deliveries?state=delivered"))["items"])

    await until(delivered)
    (row,) = (await get(daemon, "/api/v1/forward/a/deliveries?state=delivered"))["items"]
    assert (row["type"], row["batch_id"], row["state"], row["last_status"]) == (
        "batch.incomplete", "f1", "delivered", 200,
    )  # fmt: skip
    detail = await get(daemon, f"/api/v1/deliveries/{row['id']}")
    assert detail["request"]["type"] == "batch.incomplete"
    assert [attempt["status"] for attempt in detail["attempts"]] == [200]
    listed = await daemon.get("/api/v1/forward")
    assert b"hush" not in listed.body
    (shown,) = json.loads(listed.body)["items"]
    assert (shown["name"], shown["state"], shown["circuit"], shown["pending"]) == ("a", "ok", "closed", 0)
    await get(daemon, "/api/v1/forward/none/deliveries", 404)


async def test_endpoint_is_tested_stopped_started_and_replayed(start: Start, receiver: Receiver) -> None:
    daemon = await start(forward=[endpoint(receiver)])
    tested = await post(daemon, "/api/v1/forward/a/test")
    assert (tested["delivered"], tested["status"]) == (True, 200)
    assert await post(daemon, "/api/v1/forward/a/stop") == {"name": "a", "state": "stopped"}
    assert "start it first" in (await post(daemon, "/api/v1/forward/a/test", status=409))["msg"]
    await incomplete(daemon, "s1")
    (shown,) = (await get(daemon, "/api/v1/forward"))["items"]
    assert (shown["state"], shown["pending"], shown["stopped_reason"]) == ("stopped", 1, "stopped by hand")
    await post(daemon, "/api/v1/forward/a/start")
    await receiver.reached(2)

    async def idle() -> bool:
        return bool((await get(daemon, "/api/v1/forward"))["items"][0]["pending"] == 0)

    await until(idle)
    # The test is no event to send again.
    since = {"since": "2020-01-01T00:00:00Z"}
    assert await post(daemon, "/api/v1/forward/a/replay", since | {"dry_run": True}) == {"deliveries": 1}
    assert await post(daemon, "/api/v1/forward/a/replay", since) == {"deliveries": 1}
    await receiver.reached(3)
    await post(daemon, "/api/v1/forward/none/stop", status=404)


async def test_failed_delivery_shows_the_answer(start: Start, receiver: Receiver) -> None:
    receiver.answer(500, b"not today")
    daemon = await start(forward=[endpoint(receiver)])
    tested = await post(daemon, "/api/v1/forward/a/test")
    assert (tested["delivered"], tested["error"], tested["response"]) == (False, "answered HTTP 500", "not today")


async def test_metrics_of_forwarding_are_exposed(start: Start, receiver: Receiver) -> None:
    daemon = await start(forward=[endpoint(receiver)])
    await post(daemon, "/api/v1/forward/a/test")
    text = (await daemon.get("/metrics")).body.decode()
    assert 'notify_server_forward_attempts_total{endpoint="a",outcome="delivered"} 1.0' in text
    for name in ("pending", "oldest_pending_seconds", "delivery_seconds_count"):
        assert f'notify_server_forward_{name}{{endpoint="a"}}' in text


async def test_stream_has_ids_and_resumes_behind_the_last_one(start: Start) -> None:
    daemon = await start()
    await incomplete(daemon, "r1")
    await incomplete(daemon, "r2")
    first, second = (await get(daemon, "/api/v1/events"))["items"]
    url, headers = f"http://127.0.0.1:{daemon.port}/api/v1/stream", {"Last-Event-ID": str(first["id"]), **daemon.admin}
    received = b""
    async with asyncio.timeout(30), aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        while not (b"event: verdict" in received and received.endswith(b"\n\n")):
            received += await answer.content.readany()
    lines = received.decode().split("\n")
    place = next(number for number, line in enumerate(lines) if line == "event: verdict")
    assert lines[place - 1] == f"id: {second['id']}"
    data = json.loads(lines[place + 1].removeprefix("data: "))
    assert list(data)[:2] == ["batch_id", "verdict"]
    assert data["batch_id"] == "r2"
    assert data["completed_at"].endswith("Z")
