"""Whoever reads a request, the front or aiohttp behind it, what becomes of it is the same."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notify_server.callbacks.aiohttp_parser import MAX_HEAD
from notify_server.callbacks.connection import CallbackConnection
from notify_server.web.routes import CALLBACK
from tests.support.app import AppServer, Clock, Events, start_app
from tests.support.notification import notification
from tests.support.waiting import SECONDS, eventually

if TYPE_CHECKING:
    from tests.support.app import Start
    from tests.web.conftest import Locked

LIMIT = 3000


def content(**changes: Any) -> bytes:
    return json.dumps(notification(**changes)).encode()


def request(body: bytes, *lines: str, line: str = "POST /notify HTTP/1.1") -> bytes:
    head = "".join(f"{each}\r\n" for each in (line, "Host: h", *lines, f"Content-Length: {len(body)}"))
    return f"{head}\r\n".encode("latin-1") + body


class Door:
    """A socket at one of two listeners, and all that has come from there."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._data = b""
        self._ended = False
        self._news = asyncio.Event()

    async def receive(self) -> None:
        """Until there is no more; of a reset, what came before it."""
        with contextlib.suppress(ConnectionError):
            while part := await asyncio.get_running_loop().sock_recv(self._connection, 65536):
                self._data += part
                self._news.set()
        self._ended = True
        self._news.set()

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(self._connection, data)

    async def answers(self, number: int) -> list[tuple[int, str, str]]:
        """The first answers, so many unless the connection has come to its end before."""
        async with asyncio.timeout(SECONDS):
            while len(found := answers_in(self._data)) < number and not self._ended:
                self._news.clear()
                await self._news.wait()
        return found[:number]


class Doors:
    """One app with two listeners: the front's, and one where all is aiohttp's."""

    def __init__(self, daemon: AppServer, front: int, aiohttp: int) -> None:
        self.daemon = daemon
        self.ports = {"front": front, "aiohttp": aiohttp}

    async def answers(self, name: str, warm: bool, chunks: Sequence[bytes]) -> tuple[list[tuple[int, str, str]], int]:
        """Status, code and message of a good request's answer (`warm`), of the one that is sent in chunks, and of a
        good one after it as far as it has one; and how many rows the one in chunks has left.
        """
        with socket.create_connection(("127.0.0.1", self.ports[name])) as connection:
            connection.setblocking(False)
            door = Door(connection)
            receiving = asyncio.create_task(door.receive())
            if warm:
                await door.send(request(content(), JSON, AUTHORISED))
                await door.answers(1)
            before = sum(self.daemon.counts())
            for number, chunk in enumerate(chunks):
                if number:
                    # By this answer the server has read what was sent before.
                    assert (await self.daemon.get("/healthz")).status == 200
                await door.send(chunk)
            await door.answers(warm + 1)
            rows = sum(self.daemon.counts()) - before
            await door.send(LAST)
            found = await door.answers(warm + 2)
            receiving.cancel()
            return found, rows


def answers_in(data: bytes) -> list[tuple[int, str, str]]:
    """Status, code and message of the answers that are complete."""
    found = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        if not end:
            break
        status_line, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        status, length = int(status_line.split()[1]), int(headers.get("content-length", 0))
        if status < 200:
            continue
        body, data = data[:length], data[length:]
        if len(body) < length:
            break
        try:
            content = json.loads(body)
            found.append((status, content["code"], content["msg"]))
        except (ValueError, KeyError):
            # aiohttp's own refusal, or what healthz says.
            found.append((status, "", ""))
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doors(events: Events, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    # The timeout is for bodies that say they are chunked, and are not.
    sections: dict[str, dict[str, Any]] = {
        "server": {"body_limit_bytes": LIMIT, "body_timeout": 0.2},
        "auth": {"callback_token": "a-secret"},
    }
    daemon = await start_app(tmp_path_factory.mktemp("doors"), events, Clock(), sections)
    assert daemon.app is not None
    handlers = daemon.handlers
    assert handlers is not None
    loop = asyncio.get_running_loop()
    fronts = [
        CallbackConnection(daemon.config.server, handlers, callback, int)
        for callback in (daemon.app[CALLBACK].callback, None)
    ]
    listeners = [await loop.create_server(front, "127.0.0.1", 0) for front in fronts]
    ports = [listener.sockets[0].getsockname()[1] for listener in listeners]
    yield Doors(daemon, *ports)
    for listener in listeners:
        listener.close()
    for front in fronts:
        await front.drain(1)
    await daemon.stop()


AUTHORISED = "Authorization: Bearer a-secret"
JSON = "Content-Type: application/json"
LAST = request(b"", "Connection: close", line="GET /healthz HTTP/1.1")

lines = st.sampled_from(
    [
        "POST /notify HTTP/1.1",
        "POST /notify?token=a-secret HTTP/1.1",
        "POST /notify?token=wrong HTTP/1.1",
        "POST /notify HTTP/1.0",
        "POST /notify/ HTTP/1.1",
        "POST /notif%79 HTTP/1.1",
        "POST http://h/notify HTTP/1.1",
        "POST  /notify HTTP/1.1",
        "POST /notify",
        "POST /notify HTTP/2.0",
        "PUT /notify HTTP/1.1",
        "GET /healthz HTTP/1.1",
        "post /notify HTTP/1.1",
    ]
)
fields = st.lists(
    st.sampled_from(
        [
            AUTHORISED,
            "authorization: bearer  a-secret",
            "Authorization: Bearer wrong",
            JSON,
            "Content-Type: text/plain",
            "content-type: application/json; charset=utf-16",
            "Content-Encoding: gzip",
            "Content-Encoding: x",
            "Expect: 200-ok",
            "Host: other",
            "Content-Length: 1",
            "Content-Length: +1",
            "Connection: close",
            "Connection: keep-alive",
            "Transfer-Encoding: identity",
            "Transfer-Encoding: chunked",
            "Upgrade: h2c",
            "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "X-Forwarded-For: 1.2.3.4",
            "No colon",
            " Folded: field",
            "Space : before",
            "Control: \x01",
            "Latin: \xe9",
            "NUL: \x00",
            f"Long: {'x' * 3000}",
            f"Long: {'x' * MAX_HEAD}",
        ]
    ),
    max_size=4,
)
bodies = st.sampled_from(
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        content(batch_id="same"),
        content(batch_id=""),
        json.dumps({"params": "{}", "nonce": 1}).encode(),
        b" " * (LIMIT + 1),
        content() + b" " * 2500,
    ]
)
requests = st.builds(lambda line, more, body: request(body, *more, line=line), lines, fields, bodies)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(warm=st.booleans(), sent=requests, cuts=st.lists(st.integers(0, 4000), max_size=2))
async def test_any_request_however_it_is_cut_has_the_answer_that_aiohttp_gives(
    doors: Doors, warm: bool, sent: bytes, cuts: list[int]
) -> None:
    places = [0, *sorted({cut for cut in cuts if 0 < cut < len(sent)}), len(sent)]
    chunks = [sent[start:end] for start, end in itertools.pairwise(places)]
    by_front, kept_by_front = await doors.answers("front", warm, chunks)
    by_aiohttp, kept_by_aiohttp = await doors.answers("aiohttp", warm, chunks)
    # Whether there is another answer after a refusal is for each to say.
    both = min(len(by_front), len(by_aiohttp))
    assert both > warm
    assert by_front[:both] == by_aiohttp[:both]
    assert kept_by_front == kept_by_aiohttp


async def test_requests_that_come_at_once_are_answered_in_their_order(daemon: AppServer) -> None:
    connection = await daemon.connect()
    requests = [request(content(), JSON), request(b"{", JSON), request(content(), JSON)]
    await connection.send(b"".join(requests))
    (await connection.answer()).accepted()
    (await connection.answer()).refusal(400, "400")
    (await connection.answer()).accepted()
    await connection.send(request(content(), JSON))
    (await connection.answer()).accepted()


async def test_a_connection_serves_callbacks_and_all_else_by_turns(daemon: AppServer) -> None:
    connection = await daemon.connect()
    for _ in range(3):
        await connection.send(request(content(), JSON) + request(b"", line="GET /healthz HTTP/1.1"))
        (await connection.answer()).accepted()
        assert (await connection.answer()).status == 200


async def test_a_caller_that_asks_for_it_has_its_connection_closed_after_the_answer(daemon: AppServer) -> None:
    for body, status in ((content(), 200), (b"{", 400)):
        connection = await daemon.connect()
        await connection.send(request(body, JSON, "Connection: close"))
        answer = await connection.answer()
        assert (answer.status, answer.headers["Connection"]) == (status, "close")
        assert await connection.rest() == b""


async def test_a_refused_request_that_is_all_there_leaves_the_connection_to_the_next(start: Start) -> None:
    daemon = await start(auth={"callback_token": "a-secret"})
    connection = await daemon.connect()
    wrong = request(content(), JSON, "Authorization: Bearer wrong")
    await connection.send(wrong + wrong)
    for _ in range(2):
        answer = await connection.answer()
        answer.refusal(401, "401001")
        assert "Connection" not in answer.headers
    await connection.send(request(content(), JSON, AUTHORISED))
    (await connection.answer()).accepted()
    assert daemon.counts() == (1, 0)


async def test_a_refused_request_counts_once_for_the_rate_limit(start: Start) -> None:
    daemon = await start(server={"rate_limit": 4}, auth={"callback_token": "a-secret"})
    connection = await daemon.connect()
    await connection.send(request(content(), JSON) * 5)
    assert [(await connection.answer()).status for _ in range(5)] == [401] * 4 + [429]


async def test_a_body_in_pieces_is_taken_as_it_was_sent(daemon: AppServer) -> None:
    connection = await daemon.connect()
    body = content() + b" " * 700_000
    data = request(body, JSON)
    for start in range(0, len(data), 100_000):
        await connection.send(data[start : start + 100_000])
        assert (await daemon.get("/healthz")).status == 200
    (await connection.answer()).accepted()
    (stored,) = daemon.rows("SELECT body FROM notification ORDER BY id DESC LIMIT 1")
    assert stored == (body.decode(),)


async def test_who_hangs_up_in_the_middle_of_a_body_leaves_nothing_behind(daemon: AppServer) -> None:
    before, since = daemon.counts(), len(daemon.events.all)
    connection = await daemon.connect()
    await connection.send(request(content(), JSON)[:-5])
    await connection.close()
    await daemon.events.seen("hung up", since)
    assert daemon.counts() == before
    await daemon.serves()


async def test_who_ends_its_side_after_a_request_gets_the_answer(daemon: AppServer) -> None:
    connection = await daemon.connect()
    await connection.send(request(content(), JSON))
    connection.end()
    answer = await connection.answer()
    answer.accepted()
    assert answer.headers["Connection"] == "close"
    assert await connection.rest() == b""


async def test_who_hangs_up_before_its_ack_leaves_a_notification_and_no_noise(start: Start, locked: Locked) -> None:
    daemon = await start()
    since = len(daemon.events.all)
    with locked(daemon):
        for reset in (False, True):
            gone = socket.create_connection(("127.0.0.1", daemon.port))
            gone.sendall(request(content(), JSON))
            # By this answer it has been read.
            assert (await daemon.get("/healthz")).status == 200
            if reset:
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.close()
        assert (await daemon.get("/healthz")).status == 200
    await eventually(lambda: daemon.counts() == (2, 0))
    await daemon.serves()
    assert [event for event in daemon.events.all[since:] if event["level"] not in ("debug", "info")] == []


async def test_who_does_not_read_its_answers_is_not_read_from_and_gets_them_all(daemon: AppServer) -> None:
    stubborn = socket.create_connection(("127.0.0.1", daemon.port))
    # Few answers fit on the way.
    stubborn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader, writer = await asyncio.open_connection(sock=stubborn, limit=1024)
    number = 1000
    data = request(json.dumps({"batch_id": "pipelined", "api_code": "c", "file_list": []}).encode(), JSON)
    before = daemon.count("notification")

    async def send() -> None:
        for _ in range(number):
            writer.write(data)
            await writer.drain()

    sending = asyncio.create_task(send())
    await daemon.serves()
    received = b""
    async with asyncio.timeout(30):
        while received.count(b"HTTP/1.1 200 OK") < number:
            received += await reader.read(65536)
    await sending
    assert received.count(b'"code":"000"') == number
    # One more for what `serves` has sent.
    assert daemon.count("notification") - before == number + 1
    writer.close()
    await writer.wait_closed()


async def test_beyond_max_connections_both_kinds_count(start: Start) -> None:
    daemon = await start(server={"max_connections": 2})
    callbacks, other = await daemon.connect(), await daemon.connect()
    await callbacks.send(request(content(), JSON))
    (await callbacks.answer()).accepted()
    await other.send(request(b"", line="GET /healthz HTTP/1.1"))
    assert (await other.answer()).status == 200
    assert (await (await daemon.connect()).answer()).status == 503


def test_the_front_parses_heads_with_the_bounds_that_aiohttp_has() -> None:
    """Otherwise one of them would take what the other refuses."""

    async def bounds() -> tuple[int, int]:
        async def never(request: web.BaseRequest) -> web.Response:
            raise AssertionError

        handler = web.Server(never)()
        return handler.max_line_size, handler.max_field_size

    assert asyncio.run(bounds()) == (MAX_HEAD, MAX_HEAD)
