"""The real daemon as a child process, its log and its database."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import aiohttp

from notify_server.store.admin_token import read_token
from tests.support.http import Reply
from tests.support.notification import batch_body
from tests.support.waiting import SECONDS, Bell, eventually

READY = "ready for notifications"

Line = Mapping[str, Any]
# The tables of `[[forward]]` are a list.
Config = Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]]


def to_toml(config: Config) -> str:
    """Tables of scalars and lists, and two levels of tables in them, and lists of tables, as TOML."""
    parts: list[str] = []
    for section, keys in config.items():
        if not isinstance(keys, Mapping):
            for table in keys:
                parts.append(f"[[{section}]]")
                parts += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
            continue
        parts.append(f"[{section}]")
        nested = {key: value for key, value in keys.items() if isinstance(value, Mapping)}
        parts += [f"{key} = {json.dumps(value)}" for key, value in keys.items() if key not in nested]
        for key, table in nested.items():
            for name, values in table.items():
                parts.append(f"[{section}.{key}.{json.dumps(name)}]")
                parts += [f"{inner} = {_inline(value)}" for inner, value in values.items()]
    return "\n".join(parts) + "\n"


def _inline(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{json.dumps(key)} = {json.dumps(inner)}' for key, inner in value.items())} }}"
    return json.dumps(value)


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
        base: dict[str, Any] = {
            "server": {"host": "127.0.0.1", "port": 0},
            "store": {"url": f"sqlite:///{folder / 'notify.db'}"},
            "verify": {"allowed_networks": ["127.0.0.0/8"], "allowed_ports": [], "jitter": 0},
            "log": {"format": "json"},
        }
        for section, keys in (config or {}).items():
            base[section] = base.get(section, {}) | dict(keys) if isinstance(keys, Mapping) else list(keys)
        self._token = base.get("auth", {}).get("admin_token")
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
        reply = await self.post(batch_body(batch_id, entries))
        assert (reply.status, reply.code) == (200, "000"), reply

    @property
    def url(self) -> str:
        """Its address, without a path."""
        return self.callback.removesuffix("/notify")

    @property
    def admin(self) -> dict[str, str]:
        """The header with the admin_token, configured or made by the server for a record on SQLite; none without."""
        token = self._token or read_token(self.database)
        return {"Authorization": f"Bearer {token}"} if token else {}

    async def get(self, path: str) -> Reply:
        """Ask the daemon for a path, with the admin_token."""
        async with self._client().get(f"{self.url}{path}", headers=self.admin) as response:
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
        await eventually(lambda: self.value(query, *parameters), seconds)


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
