"""What end-to-end and fault tests stand on: the real daemon as a process, and origins that answer as they are told.

Nothing here sleeps. A test waits for a line of the daemon's log, for a request that reached an origin, for a process to
end; only what no line tells is asked of the database again and again (`Daemon.eventually`).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import sqlite3
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import aiohttp

API_CODE = "rent.dcentralize.room.add"
READY = "ready for notifications"
SECONDS = 30.0

Line = Mapping[str, Any]
Config = Mapping[str, Mapping[str, Any]]


class Bell:
    """Wakes those who wait for something to come true. Ring it whenever anything has happened."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def ring(self) -> None:
        """Something has happened."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def until(self, true: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Return once `true()`. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not true():
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(future)
                await future


# --- The origin ---


@dataclass(frozen=True)
class Answer:
    """What an origin does with a request.

    What is bad and comes on a connection that has been used before is asked again on a fresh one:
    where requests are counted, `close`.

    `raw` is sent as it is, instead of a response made of `status`, `headers` and (to a GET) `body`; then each of
    `later`, so many seconds after what came before it; then the connection is left open, closed or `reset`. `delay` and
    `gate` hold all of that back.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay: float = 0.0
    gate: asyncio.Event | None = None
    raw: bytes | None = None
    later: Sequence[tuple[float, bytes]] = ()
    close: bool = False
    reset: bool = False

    def payload(self, method: str) -> bytes:
        """The bytes of the answer to a request with this method."""
        if self.raw is not None:
            return self.raw
        headers = {"Content-Length": str(len(self.body)), **self.headers}
        if self.close:
            headers["Connection"] = "close"
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        text = f"HTTP/1.1 {self.status} Whatever\r\n{head}\r\n".encode()
        return text if method == "HEAD" else text + self.body


class Hit(NamedTuple):
    """A request that reached an origin; `at` is monotonic seconds, `connection` counts from 1."""

    method: str
    path: str
    headers: Mapping[str, str]
    at: float
    connection: int


class _Never(asyncio.Event):
    """Nobody sets it. One that is waited for belongs to that loop; this one is waited for on every test's own."""

    async def wait(self) -> Literal[True]:
        await asyncio.get_running_loop().create_future()
        raise AssertionError("never")


SILENCE = Answer(gate=_Never())


class Origin:
    """A server on a loopback address, told path by path what to answer. Use it with `async with`.

    As a trap it needs no instructions: `connections` must stay 0.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, tls: ssl.SSLContext | None = None) -> None:
        self.host = host
        self.port = port
        self.default: Answer | Callable[[Hit], Answer] = Answer()
        self.hits: list[Hit] = []
        self.count: Counter[str] = Counter()
        self.connections = 0
        self.bytes_sent = 0
        self.busy = 0
        self.busiest = 0
        self.bell = Bell()
        self.live: set[_Connection] = set()
        self._tls = tls
        self._answers: dict[str, list[Answer]] = {}
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), self.host, self.port, ssl=self._tls, backlog=2048
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self.live):
            connection.abort()
        await self.bell.until(lambda: not self.live)
        await self._server.wait_closed()

    def url(self, path: str, host: str | None = None) -> str:
        """The address of `path` here, by another name when `host` is given."""
        name = host or self.host
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{f'[{name}]' if ':' in name else name}:{self.port}{path}"

    def on(self, path: str, *answers: Answer) -> None:
        """Answer requests for `path` with these, one after the other, the last one for ever."""
        self._answers[path] = list(answers)

    def of(self, path: str) -> list[Hit]:
        """The requests for `path` so far."""
        return [hit for hit in self.hits if hit.path == path]

    async def reached(self, number: int = 1, path: str | None = None, seconds: float = SECONDS) -> None:
        """Return once so many requests have come, for `path` or at all."""
        await self.bell.until(lambda: (self.count[path] if path else len(self.hits)) >= number, seconds)

    def take(self, hit: Hit) -> Answer:
        """Count a request and choose its answer."""
        self.hits.append(hit)
        self.count[hit.path] += 1
        scripted = self._answers.get(hit.path)
        if scripted is None:
            return self.default if isinstance(self.default, Answer) else self.default(hit)
        return scripted.pop(0) if len(scripted) > 1 else scripted[0]


class _Connection(asyncio.Protocol):
    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._origin.connections += 1
        self._number = self._origin.connections
        self._origin.live.add(self)
        self._origin.bell.ring()

    def connection_lost(self, error: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()
        self._origin.live.discard(self)
        self._origin.bell.ring()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, self._buffer = self._buffer.partition(b"\r\n\r\n")
        if not found:
            self._buffer = head
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        origin = self._origin
        origin.busy += 1
        origin.busiest = max(origin.busiest, origin.busy)
        answer = origin.take(Hit(method, path, headers, time.monotonic(), self._number))
        if answer.delay or answer.gate is not None:
            self._task = asyncio.get_running_loop().create_task(self._answer_later(method, answer))
        else:
            origin.busy -= 1
            self._answer(method, answer)
        origin.bell.ring()

    async def _answer_later(self, method: str, answer: Answer) -> None:
        try:
            if answer.gate is not None:
                await answer.gate.wait()
            if answer.delay:
                await asyncio.sleep(answer.delay)
        finally:
            self._origin.busy -= 1
        self._answer(method, answer)

    def _answer(self, method: str, answer: Answer) -> None:
        self._write(answer.payload(method))
        if answer.later:
            self._task = asyncio.get_running_loop().create_task(self._trickle(answer))
        else:
            self._finish(answer)

    async def _trickle(self, answer: Answer) -> None:
        for pause, data in answer.later:
            await asyncio.sleep(pause)
            self._write(data)
        self._finish(answer)

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        if data and not self._transport.is_closing():
            self._transport.write(data)
            self._origin.bytes_sent += len(data)

    def _finish(self, answer: Answer) -> None:
        assert self._transport is not None
        if answer.reset:
            raw = self._transport.get_extra_info("socket")
            # Linger for no time at all: what is closed is reset.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            self._transport.abort()
        elif answer.close:
            self._transport.close()


# --- The notification ---


def finished(url: str, name: str | None = None) -> dict[str, Any]:
    """An entry of `file_list` that says FINISHED; the object's key is the address unless it is given."""
    return {"oss_object_name": name or url, "target_url": url, "status": "FINISHED"}


def failed(name: str, url: str | None = None) -> dict[str, Any]:
    """An entry of `file_list` that says FAILED."""
    return {"oss_object_name": name, "target_url": url, "status": "FAILED"}


def notification(batch_id: str, entries: Iterable[dict[str, Any] | str]) -> bytes:
    """The body of a callback; an address alone is a FINISHED file of that name."""
    files = [finished(entry) if isinstance(entry, str) else entry for entry in entries]
    return json.dumps({"batch_id": batch_id, "api_code": API_CODE, "file_list": files}).encode()


# --- The daemon ---


def to_toml(config: Config) -> str:
    """Tables of scalars and lists, and one level of tables in them, as TOML."""
    parts: list[str] = []
    for section, keys in config.items():
        parts.append(f"[{section}]")
        nested = {key: value for key, value in keys.items() if isinstance(value, Mapping)}
        parts += [f"{key} = {json.dumps(value)}" for key, value in keys.items() if key not in nested]
        for key, table in nested.items():
            for name, values in table.items():
                parts.append(f"[{section}.{key}.{json.dumps(name)}]")
                parts += [f"{inner} = {json.dumps(value)}" for inner, value in values.items()]
    return "\n".join(parts) + "\n"


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without any setting of the daemon, and with `variables`."""
    plain = {name: value for name, value in os.environ.items() if not name.upper().startswith("NOTIFY_SERVER__")}
    return plain | variables


async def process_gone(pid: int, seconds: float = SECONDS) -> None:
    """Return once the process has ended, whoever its parent is."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(seconds):
            await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


class Finished(NamedTuple):
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str
    pid: int


async def run_command(
    *arguments: str, cwd: Path, environ: Mapping[str, str] | None = None, seconds: float = SECONDS
) -> Finished:
    """Run `python -m notify_server` with these arguments until it ends by itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "notify_server",
        *arguments,
        cwd=cwd,
        env=clean_environment() if environ is None else environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(seconds):
            stdout, stderr = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
        raise
    assert process.returncode is not None
    return Finished(process.returncode, stdout.decode(), stderr.decode(), process.pid)


class Reply(NamedTuple):
    """The answer to a callback."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The platform's code in the answer, "000" for success."""
        return str(json.loads(self.body)["code"])


class Daemon:
    """`python -m notify_server --config …` in a folder of its own, on a port of its own. Use it with `async with`.

    `config` is laid over settings that let it probe loopback. `prefix` is a command that runs the daemon, such as
    strace. `lines` has the log of the current process, `text` that of all of them.
    """

    def __init__(
        self,
        folder: Path,
        config: Config | None = None,
        *,
        prefix: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        arguments: Sequence[str] | None = None,
    ) -> None:
        self.folder = folder
        self.lines: list[Line] = []
        self.text = ""
        self._prefix = prefix
        self._environ = clean_environment() if environ is None else environ
        self._arguments = ("--config", str(folder / "config.toml")) if arguments is None else tuple(arguments)
        base: dict[str, dict[str, Any]] = {
            "server": {"host": "127.0.0.1", "port": 0},
            "store": {"url": f"sqlite:///{folder / 'notify.db'}"},
            "verify": {"allowed_networks": ["127.0.0.0/8"], "allowed_ports": [], "jitter": 0},
            "log": {"format": "json"},
        }
        for section, keys in (config or {}).items():
            base[section] = base.get(section, {}) | dict(keys)
        self.database = folder / str(base["store"]["url"]).removeprefix("sqlite:///")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(to_toml(base), encoding="utf-8")
        self._bell = Bell()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None
        self._ended = False
        self.callback = ""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.running:
            await self.kill()
        if self._session is not None:
            await self._session.close()
        if error is not None:
            sys.stderr.write(self.text[-4000:])

    # Its life

    async def start(self) -> None:
        """Start it, and return when it is ready."""
        self.lines = []
        self._ended = False
        self._process = await asyncio.create_subprocess_exec(
            *self._prefix,
            sys.executable,
            "-m",
            "notify_server",
            *self._arguments,
            cwd=self.folder,
            env=self._environ,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=1 << 20,
        )
        self._reader = asyncio.create_task(self._read())
        try:
            ready = await self.line(READY)
        except BaseException:
            await self.kill()
            raise
        self.callback = ready["url"]

    async def stop_reading(self) -> None:
        """Close the end of the pipe that its log comes from. No line can be waited for any more."""
        assert self._process is not None and self._reader is not None
        # The one way there is to a pipe of asyncio's process.
        pipe = self._process._transport.get_pipe_transport(2)  # type: ignore[attr-defined]
        pipe.close()
        await self._reader

    async def restart(self) -> None:
        """Start it again, killed first if it still runs."""
        if self.running:
            await self.kill()
        await self.start()

    async def _read(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        while raw := await self._process.stderr.readline():
            text = raw.decode("utf-8", "replace")
            self.text += text
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            self.lines.append(line if isinstance(line, dict) else {"event": text.rstrip("\n"), "level": "raw"})
            self._bell.ring()
        self._ended = True
        self._bell.ring()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """The process id; that of the prefix's command if there is one."""
        assert self._process is not None
        return self._process.pid

    def prober_pids(self) -> list[int]:
        """The daemon's children that probe, from /proc."""
        return [pid for pid in _children(self.pid) if b"notify_server.processes.prober" in _cmdline(pid)]

    def keeper_pid(self) -> int:
        """The daemon's child that keeps the record on SQLite, from /proc."""
        (pid,) = [pid for pid in _children(self.pid) if b"notify_server.processes.keeper" in _cmdline(pid)]
        return pid

    def send(self, number: signal.Signals) -> None:
        """Send the process, and it alone, a signal."""
        os.kill(self.pid, number)

    async def exit_code(self, seconds: float = SECONDS) -> int:
        """Wait for the end of the process and of its log."""
        assert self._process is not None and self._reader is not None
        async with asyncio.timeout(seconds):
            code = await self._process.wait()
            await self._reader
        return code

    async def terminate(self, number: signal.Signals = signal.SIGTERM, seconds: float = SECONDS) -> int:
        """Ask it to stop; the exit code."""
        self.send(number)
        return await self.exit_code(seconds)

    async def kill(self, *, alone: bool = False) -> None:
        """kill -9 of all its processes, as when the power fails, or of the daemon alone; wait until all are gone."""
        assert self._process is not None
        children = _children(self.pid)
        keepers = [pid for pid in children if b"notify_server.processes.keeper" in _cmdline(pid)]
        # Popen's own kill would reap a process that has just ended, and asyncio would not learn how.
        for pid in [self.pid] if alone else [*keepers, self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self.exit_code()
        for pid in children:
            await process_gone(pid)

    # What it says

    async def wait_for_line(self, wanted: Callable[[Line], bool], seconds: float = SECONDS, number: int = 1) -> Line:
        """The first (second, …) line of the current process's log that is wanted, once it is there."""
        found: list[Line] = []
        seen = 0

        def there() -> bool:
            nonlocal seen
            fresh, seen = self.lines[seen:], len(self.lines)
            found.extend(line for line in fresh if wanted(line))
            return len(found) >= number or self._ended

        try:
            await self._bell.until(there, seconds)
        except TimeoutError:
            raise AssertionError(f"the line did not come within {seconds} s; the log ends:\n{self._tail()}") from None
        if len(found) < number:
            raise AssertionError(f"the daemon ended without the line:\n{self._tail()}")
        return found[number - 1]

    async def line(self, event: str, seconds: float = SECONDS, number: int = 1, **fields: object) -> Line:
        """The line of this event with these fields."""
        return await self.wait_for_line(lambda line: _is(line, event, fields), seconds, number)

    def count(self, event: str, **fields: object) -> int:
        """How many such lines there are."""
        return sum(_is(line, event, fields) for line in self.lines)

    async def verdict(self, batch_id: str, seconds: float = SECONDS, number: int = 1) -> Line:
        """The batch's first (second, …) verdict."""
        return await self.line("verdict", seconds, number, batch_id=batch_id)

    def _tail(self) -> str:
        return self.text[-4000:]

    # What it is asked

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=SECONDS)
            )
        return self._session

    async def post(self, body: bytes, **headers: str) -> Reply:
        """Send a callback. Raises aiohttp.ClientError when there is no answer."""
        async with self._client().post(
            self.callback, data=io.BytesIO(body), headers={"Content-Type": "application/json", **headers}
        ) as response:
            return Reply(response.status, response.headers, await response.read())

    async def deliver(self, batch_id: str, entries: Iterable[dict[str, Any] | str]) -> None:
        """Post a batch, which must be acked."""
        reply = await self.post(notification(batch_id, entries))
        assert (reply.status, reply.code) == (200, "000"), reply

    async def get(self, path: str) -> Reply:
        """Ask the daemon for a path."""
        async with self._client().get(f"{self.callback.removesuffix('/notify')}{path}") as response:
            return Reply(response.status, response.headers, await response.read())

    async def settle(self, batch_id: str, entries: Iterable[dict[str, Any] | str]) -> dict[str, sqlite3.Row]:
        """Post a batch, wait for its verdict, and return its files by the objects' keys."""
        number = self.count("verdict", batch_id=batch_id) + 1
        await self.deliver(batch_id, entries)
        await self.verdict(batch_id, number=number)
        return self.files(batch_id)

    # What it keeps

    def sql(self, query: str, *parameters: object) -> list[sqlite3.Row]:
        """Read the database."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=5)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA query_only = 1")
            return connection.execute(query, parameters).fetchall()

    def value(self, query: str, *parameters: object) -> Any:
        """The one value that the query has."""
        ((value,),) = self.sql(query, *parameters)
        return value

    def files(self, batch_id: str) -> dict[str, sqlite3.Row]:
        """The files of a batch, by the objects' keys."""
        rows = self.sql(
            "SELECT file.* FROM file JOIN batch ON batch.id = file.batch WHERE batch.batch_id = ?", batch_id
        )
        return {row["oss_object_name"]: row for row in rows}

    def attempts(self, file: sqlite3.Row) -> list[sqlite3.Row]:
        """The requests made for a file, in their order."""
        return self.sql("SELECT * FROM attempt WHERE file = ? ORDER BY id", file["id"])

    async def eventually(self, query: str, *parameters: object, seconds: float = SECONDS) -> None:
        """Return once the query's one value is true: for what no line of the log tells."""
        async with asyncio.timeout(seconds):
            while not self.value(query, *parameters):
                await asyncio.sleep(0.005)


def _is(line: Line, event: str, fields: Mapping[str, object]) -> bool:
    return line["event"] == event and all(line.get(name) == value for name, value in fields.items())


def _processes() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                # The command's name, in parentheses, may hold anything; state, parent, group and session follow it.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    yield int(folder.name), fields


def _children(parent: int) -> list[int]:
    return [pid for pid, fields in _processes() if int(fields[1]) == parent]


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def session_members(leader: int) -> list[int]:
    """The processes, dead ones aside, of the session that this process has led, from /proc."""
    return [pid for pid, fields in _processes() if int(fields[3]) == leader]
