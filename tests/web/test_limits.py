"""What one caller can take from the others has an end: time, connections, memory; and so has going down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest_asyncio

from tests.support.waiting import SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.support.app import AppServer, Start
    from tests.support.http import Connection
    from tests.web.conftest import Locked

HEAD = b"POST /notify HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"


def posting(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def content(daemon: AppServer) -> bytes:
    return json.dumps(daemon.notification()).encode()


async def drip(connection: Connection, data: bytes, *, every: float = 0.02) -> None:
    """Send a byte at a time, until cancelled; return only when every byte was sent."""
    # Sending fails once the server has closed the connection.
    with contextlib.suppress(ConnectionError, RuntimeError):
        for byte in data:
            await connection.send(bytes([byte]))
            await asyncio.sleep(every)
        return
    await asyncio.Event().wait()


# Slow callers


async def test_a_body_that_drips_is_cut_off(start_server: Start) -> None:
    daemon = await start_server(server={"header_timeout": 0.5, "body_timeout": 0.3})
    for head, body in (
        (b"Content-Length: 5000\r\n\r\n", b" " * 4000),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 700),
    ):
        connection = await daemon.connect()
        await connection.send(HEAD + head)
        dripping = asyncio.create_task(drip(connection, body))
        (await connection.answer()).refusal(408, "408")
        # Nor does the caller keep the connection.
        assert await connection.rest() == b""
        assert not dripping.done()
        dripping.cancel()
    await daemon.serves()
    assert daemon.counts() == (1, 0)


async def test_a_body_that_stops_is_cut_off(start_server: Start) -> None:
    daemon = await start_server(server={"body_timeout": 0.2})
    connection = await daemon.connect()
    await connection.send(HEAD + b"Content-Length: 100\r\n\r\n{")
    answer = await connection.answer()
    answer.refusal(408, "408")
    assert answer.headers["Connection"] == "close"


async def test_a_slow_body_within_its_time_is_accepted(start_server: Start) -> None:
    daemon = await start_server(server={"header_timeout": 0.2, "body_timeout": 5})
    connection = await daemon.connect()
    body = content(daemon)
    await connection.send(posting(body)[:-10])
    # By its end the time for headers has passed.
    assert await (await daemon.connect()).rest() == b""
    await connection.send(body[-10:])
    (await connection.answer()).accepted()


async def test_a_refused_caller_cannot_keep_the_connection_with_its_body(start_server: Start) -> None:
    daemon = await start_server(
        server={"header_timeout": 0.5, "body_timeout": 60, "body_limit_bytes": 2000}, auth={"callback_token": "x" * 8}
    )
    connection = await daemon.connect()
    await connection.send(HEAD + b"Content-Length: 1999\r\n\r\n")
    dripping = asyncio.create_task(drip(connection, b" " * 1900))
    (await connection.answer()).refusal(401, "401001")
    assert await connection.rest() == b""
    assert not dripping.done()
    dripping.cancel()


async def test_silence_and_dripping_headers_are_closed_while_honest_callers_are_served(start_server: Start) -> None:
    daemon = await start_server(server={"header_timeout": 0.4})
    await daemon.serves()
    silent = [await daemon.connect() for _ in range(20)]
    dripping = [await daemon.connect() for _ in range(20)]
    # Has had its turn, and drips at its second request.
    returning = await daemon.connect()
    await returning.send(posting(content(daemon)))
    (await returning.answer()).accepted()
    drips = [asyncio.create_task(drip(each, HEAD + b"X: " + b"x" * 500)) for each in (*dripping, returning)]
    for _ in range(10):
        await daemon.serves()
    for connection in (*silent, *dripping, returning):
        assert await connection.rest() == b""
    for task in drips:
        assert not task.done()
        task.cancel()
    await daemon.serves()


async def test_a_connection_in_use_is_kept_beyond_the_time_for_headers(start_server: Start) -> None:
    daemon = await start_server(server={"header_timeout": 1.0})
    connection, silent = await daemon.connect(), await daemon.connect()
    closed = asyncio.create_task(silent.rest())
    while not closed.done():
        await connection.send(posting(content(daemon)))
        (await connection.answer()).accepted()
        await asyncio.sleep(0.01)
    await connection.send(posting(content(daemon)))
    (await connection.answer()).accepted()


# Many callers


async def test_beyond_max_connections_callers_are_sent_away_and_those_there_go_on(start_server: Start) -> None:
    daemon = await start_server(server={"max_connections": 3})
    here = [await daemon.connect() for _ in range(3)]
    for _ in range(2):
        for connection in here:
            await connection.send(posting(content(daemon)))
            (await connection.answer()).accepted()
        for _ in range(3):
            late = await daemon.connect()
            # Sent before anything is asked, or after: either way it can be read.
            answer = await late.answer()
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
            assert await late.rest() == b""
    await here.pop().close()
    # The server learns of it in its own time.
    async with asyncio.timeout(5):
        status = 503
        while status == 503:
            another = await daemon.connect()
            await another.send(posting(content(daemon)))
            status = (await another.answer()).status
    assert status == 200


async def test_a_caller_beyond_max_connections_that_has_sent_its_request_can_read_why(start_server: Start) -> None:
    daemon = await start_server(server={"max_connections": 1})
    here = await daemon.connect()
    await here.send(posting(content(daemon)))
    (await here.answer()).accepted()
    async with aiohttp.ClientSession() as session:
        for _ in range(20):
            url = f"http://127.0.0.1:{daemon.port}/notify"
            async with session.post(url, json=daemon.notification()) as response:
                assert response.status == 503
                assert response.headers["Retry-After"]


async def test_silent_connections_of_one_address_leave_room_for_another_address(start_server: Start) -> None:
    daemon = await start_server(server={"max_connections": 20})
    silent = [await daemon.connect() for _ in range(30)]
    body = content(daemon)
    for _ in range(25):
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port, local_addr=("127.0.0.2", 0))
        writer.write(posting(body))
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.close()
    # Those in excess were refused with an answer, those that gave way were closed.
    ends = [await connection.rest() for connection in (*silent[20:], silent[0])]
    assert [end.partition(b"\r\n")[0] for end in ends] == [b"HTTP/1.1 503 Service Unavailable"] * 10 + [b""]


async def test_many_requests_at_once_are_all_acked(start_server: Start) -> None:
    daemon = await start_server()
    answers = await asyncio.gather(*(daemon.post(daemon.notification()) for _ in range(300)))
    assert len({answer.accepted() for answer in answers}) == 300
    assert daemon.counts() == (300, 0)


# Going down


async def test_on_stop_what_waits_for_its_commit_is_acked(start_server: Start, locked: Locked) -> None:
    daemon = await start_server(server={"shutdown_grace": 8})
    connection, idle = await daemon.connect(), await daemon.connect()
    await idle.send(posting(content(daemon)))
    (await idle.answer()).accepted()
    since = len(daemon.events.all)
    with locked(daemon):
        await connection.send(posting(content(daemon)))
        # Its turn is before this one's.
        assert (await daemon.get("/healthz")).status == 200
        stopping = asyncio.create_task(daemon.stop(hang_up=False))
        await daemon.events.seen("stopping", since)
        assert await idle.rest() == b""
        await refused_connection(daemon)
    (await connection.answer()).accepted()
    assert await connection.rest() == b""
    await stopping
    assert daemon.events.find("stopped", since)


async def test_on_stop_a_request_whose_body_is_arriving_is_answered(start_server: Start) -> None:
    daemon = await start_server(server={"shutdown_grace": 100})
    body = content(daemon)
    connection = await daemon.connect()
    await connection.send(posting(body)[:-10])
    assert (await daemon.get("/healthz")).status == 200
    since = len(daemon.events.all)
    stopping = asyncio.create_task(daemon.stop(hang_up=False))
    await daemon.events.seen("stopping", since)
    await refused_connection(daemon)
    await connection.send(body[-10:])
    (await connection.answer()).accepted()
    assert await connection.rest() == b""
    await asyncio.wait_for(stopping, SECONDS)


async def refused_connection(daemon: AppServer) -> None:
    """Wait until the daemon takes no new connection."""
    async with asyncio.timeout(2):
        while True:
            try:
                await (await daemon.connect()).close()
            except OSError:
                return
            await asyncio.sleep(0.005)


async def test_with_nothing_to_wait_for_it_stops_at_once(start_server: Start) -> None:
    daemon = await start_server(server={"shutdown_grace": 100})
    await daemon.serves()
    await asyncio.wait_for(daemon.stop(hang_up=False), SECONDS)


async def test_it_stops_within_the_grace_whatever_keeps_it(start_server: Start, origin: int) -> None:
    verify = {"allowed_networks": ["127.0.0.1"], "allowed_ports": []}
    daemon = await start_server(server={"shutdown_grace": 1.2, "body_timeout": 60}, verify=verify)
    # A probe without an answer, a body that does not end, and one that is not read.
    body = daemon.notification(daemon.entry(target_url=f"http://127.0.0.1:{origin}/"))
    (await daemon.post(body)).accepted()
    half = await daemon.connect()
    await half.send(posting(content(daemon))[:-10])
    unwanted = await daemon.connect()
    await unwanted.send(HEAD + b"Content-Length: 100000000\r\n\r\n{")
    (await unwanted.answer()).refusal(413, "413")
    metrics = ""
    while "notify_server_in_flight_files 1.0" not in metrics:
        metrics = (await daemon.get("/metrics")).body.decode()
    await daemon.stop(hang_up=False)
    # Nothing was learnt, so nothing was spent.
    assert daemon.rows("SELECT state, attempts FROM file") == [("pending", 0)]


@pytest_asyncio.fixture(loop_scope="module")
async def origin() -> AsyncIterator[int]:
    """The port of a server that takes connections and never says a word."""
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    gone.set()
    server.close()
    await server.wait_closed()


# The process


class Process:
    """`python -m notify_server`, as anybody would run it."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, lines: list[str]) -> None:
        self.process = process
        self.port = port
        self.lines = lines

    @property
    def peak_bytes(self) -> int:
        """The most memory it has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))

    @property
    def cpu_seconds(self) -> float:
        """What it has computed so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def post(self, data: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        url = f"http://127.0.0.1:{self.port}/notify"
        async with aiohttp.ClientSession() as session, session.post(url, data=data, headers=headers) as response:
            return response.status, await response.json()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def process(tmp_path_factory: Any) -> AsyncIterator[Process]:
    directory = tmp_path_factory.mktemp("process")
    settings = {"SERVER__PORT": "0", "LOG__FORMAT": "json", "VERIFY__ALLOWED_HOSTS": "files.invalid"}
    environment = {**os.environ, **{f"NOTIFY_SERVER__{name}": value for name, value in settings.items()}}
    # The package is this tree's, wherever the process runs.
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "notify_server", cwd=directory, env=environment, stderr=asyncio.subprocess.PIPE
    )  # fmt: skip
    assert started.stderr is not None
    lines: list[str] = []
    port = 0
    async with asyncio.timeout(20):
        while not port:
            line = (await started.stderr.readline()).decode()
            assert line, lines
            lines.append(line)
            event = json.loads(line)
            if event["event"] == "ready for notifications":
                port = int(event["url"].rpartition(":")[2].partition("/")[0])
    running = Process(started, port, lines)

    async def read() -> None:
        assert started.stderr is not None
        while line := (await started.stderr.readline()).decode():
            lines.append(line)

    reading = asyncio.create_task(read())
    yield running
    if started.returncode is None:
        started.send_signal(signal.SIGTERM)
    await started.wait()
    await reading


async def bomb(make: Callable[[], bytes], megabytes: int) -> AsyncIterator[bytes]:
    """A compressed megabyte of blanks, again and again: 1000 times smaller than what it stands for."""
    yield make()
    press = zlib.compressobj(9, zlib.DEFLATED, -15)
    press.compress(b"")
    megabyte = press.compress(b" " * 2**20) + press.flush(zlib.Z_FULL_FLUSH)
    for _ in range(megabytes):
        yield megabyte


async def test_a_bomb_is_refused_and_never_inflated(process: Process) -> None:
    body = json.dumps({"batch_id": "b", "api_code": "c", "file_list": []}).encode()
    assert (await process.post(body, **{"Content-Type": "application/json"}))[0] == 200
    before, worked = process.peak_bytes, process.cpu_seconds
    for encoding, head in (("gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\xff"), ("deflate", b"\x78\xda")):
        for field in ("Content-Encoding", "content-encoding"):
            headers = {"Content-Type": "application/json", field: encoding}
            status, answer = await process.post(bomb(lambda head=head: head, 500), **headers)  # type: ignore[misc]
            assert (status, answer["code"]) == (415, "415")
    assert process.peak_bytes - before < 20 * 2**20
    # 2 GB are not inflated in this.
    assert process.cpu_seconds - worked < 1
    assert (await process.post(body, **{"Content-Type": "application/json"}))[0] == 200


async def test_a_body_over_the_limit_is_never_held(process: Process) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b" " * 2**20

    before = process.peak_bytes
    try:
        status, answer = await process.post(endless(), **{"Content-Type": "application/json"})
        assert (status, answer["code"]) == (413, "413")
    except aiohttp.ClientConnectionError:
        # Cut off in the middle of a sentence, which is as good.
        pass
    # Up to the limit of 8 MiB it is, in parts and for a moment as a whole.
    assert process.peak_bytes - before < 40 * 2**20
    body = json.dumps({"batch_id": "b", "api_code": "c", "file_list": []}).encode()
    assert (await process.post(body, **{"Content-Type": "application/json"}))[0] == 200


async def test_sigterm_in_the_middle_of_a_request_answers_it_and_exits_0(process: Process) -> None:
    body = json.dumps({"batch_id": "last", "api_code": "c", "file_list": []}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
    writer.write(posting(body)[:-10])
    # Told by an answer on another connection that the server has seen it by now.
    await process.post(body, **{"Content-Type": "application/json"})
    process.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(10):
        while not any('"stopping"' in line for line in process.lines):
            await asyncio.sleep(0.01)
        writer.write(body[-10:])
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert await process.process.wait() == 0
    writer.close()
    for line in process.lines:
        json.loads(line)
