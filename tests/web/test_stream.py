"""The stream of events: what comes, for how long, and for how many."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from notify_server.app import STREAM
from notify_server.telemetry.history import Sample
from notify_server.web import bodies, stream
from notify_server.web.stream import Stream
from tests.support.app import AppServer, Start
from tests.support.daemon import Daemon
from tests.support.notification import notification
from tests.support.waiting import SECONDS, eventually


def listen_request(daemon: AppServer) -> bytes:
    return f"GET /api/v1/stream HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {daemon.token}\r\n\r\n".encode()


async def events(reader: aiohttp.StreamReader) -> AsyncIterator[tuple[str, Any]]:
    """Events by name with their data, as a browser takes them."""
    async with asyncio.timeout(SECONDS):
        while block := await reader.readuntil(b"\n\n"):
            *id, name, data = block.decode().rstrip("\n").split("\n")
            assert all(line.startswith("id: ") for line in id)
            yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def stream_of(daemon: AppServer) -> Stream:
    assert daemon.app is not None
    return daemon.app[STREAM]


def listeners(daemon: AppServer) -> int:
    return len(stream_of(daemon)._listeners)


async def test_a_sample_comes_every_second_and_every_verdict_when_it_is_reached(daemon: AppServer) -> None:
    async with daemon._session.get("/api/v1/stream", headers=daemon.admin) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Accel-Buffering"] == "no"
        body = notification(batch_id='line\n\nevent: "forged"', api_code="code")
        (await daemon.post(body)).accepted()
        seen: dict[str, list[Any]] = {"sample": [], "verdict": []}
        async for name, data in events(response.content):
            seen[name].append(data)
            if len(seen["sample"]) >= 3 and seen["verdict"]:
                break
    (verdict,) = seen["verdict"]
    assert verdict["batch_id"] == body["batch_id"]
    assert (verdict["verdict"], verdict["files"], verdict["available"]) == ("incomplete", 1, 0)
    samples = [msgspec.convert(data, Sample) for data in seen["sample"]]
    assert [0.5 < (b.at - a.at).total_seconds() < 3 for a, b in itertools.pairwise(samples)] == [True, True]
    await eventually(lambda: not listeners(daemon))


async def test_a_listener_that_goes_is_no_error(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        url = daemon.callback.replace("/notify", "/api/v1/stream")
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SECONDS), headers=daemon.admin) as session:
            for _ in range(3):
                gone = await session.get(url)
                assert (await gone.content.readuntil(b"\n\n")).startswith(b"event: sample")
                gone.close()
            async with session.get(url) as response:
                # By then those that have gone have been sent to, too.
                for _ in range(3):
                    await response.content.readuntil(b"\n\n")
        assert await daemon.terminate() == 0
        assert [line for line in daemon.lines if line["level"] != "info"] == []


async def test_no_more_listen_than_may_and_a_place_is_free_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_LISTENERS", 2)
    daemon = await start()
    first, second = await daemon.connect(), await daemon.connect()
    for connection in (first, second):
        await connection.send(listen_request(daemon))
    await eventually(lambda: listeners(daemon) == 2)
    answer = await daemon.get("/api/v1/stream")
    assert "too many" in answer.refusal(503, "503")
    assert answer.headers["Retry-After"] == "5"
    await first.close()
    await eventually(lambda: listeners(daemon) == 1)
    async with daemon._session.get("/api/v1/stream", headers=daemon.admin) as response:
        assert response.status == 200


async def test_a_listener_that_reads_nothing_is_cut_off_and_no_other_waits(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "STALLED_SECONDS", 0.3)
    daemon = await start()
    slow = await daemon.connect()
    await slow.send(listen_request(daemon))
    await slow._reader.readuntil(b"\r\n\r\n")
    await eventually(lambda: listeners(daemon) == 1)
    async with daemon._session.get("/api/v1/stream", headers=daemon.admin) as response:
        # More than sockets hold, in fewer events than a listener may be behind.
        for _ in range(100):
            stream_of(daemon).publish("large", "x" * 200_000)
        names = [name async for name, _ in _first(events(response.content), 100)]
        assert names.count("large") >= 98
        await daemon.events.seen("client stalled, disconnected", path="/api/v1/stream")
        await eventually(lambda: listeners(daemon) == 1)


async def _first(source: AsyncIterator[Any], number: int) -> AsyncIterator[Any]:
    async for item in source:
        yield item
        if not (number := number - 1):
            return


async def test_a_listener_that_is_too_far_behind_is_ended() -> None:
    it = Stream()
    with it.listen() as messages:
        for number in range(stream.MAX_BEHIND + 1):
            it.publish("event", number)
        assert not it._listeners
        received = [message.data async for message in messages]
    assert len(received) == stream.MAX_BEHIND
    assert received[-1] == b"event: event\ndata: %d\n\n" % (stream.MAX_BEHIND - 1)


async def test_once_closed_all_listeners_end_and_no_new_one_is_accepted() -> None:
    it = Stream()
    with it.listen() as one, it.listen() as other:
        it.publish("last", None)
        it.close()
        assert it.full
        assert [[message.data async for message in messages] for messages in (one, other)] == [
            [b"event: last\ndata: null\n\n"]
        ] * 2


async def test_a_daemon_with_listeners_stops_at_once(tmp_path: Path) -> None:
    async with Daemon(tmp_path, {"server": {"shutdown_grace": "20s"}}) as daemon:
        url = daemon.callback.replace("/notify", "/api/v1/stream")
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_read=30), headers=daemon.admin
        ) as session:
            responses = [await session.get(url) for _ in range(5)]
            for response in responses:
                assert (await response.content.readuntil(b"\n\n")).startswith(b"event: sample")
            # Long before the grace is over.
            assert await daemon.terminate(signal.SIGTERM, seconds=15) == 0
            for response in responses:
                await response.read()
                response.close()
        assert daemon.count("stopped") == 1
