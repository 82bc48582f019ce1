"""Runs a command as a receiver: the body on standard input, exit code 0 is delivered."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence

from notify_server.forward.outcome import ANSWER_BYTES, Attempt, printable

MAX_AT_ONCE = 4
# How long a killed process may take to go.
REAP_SECONDS = 5.0
_INHERITED = ("PATH", "LANG", "TZ")


class Scripts:
    """Runs commands, at most MAX_AT_ONCE of all endpoints together."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)

    async def run(self, command: Sequence[str], limit: float, *, kind: str, key: str, body: bytes) -> Attempt:
        """Run the command once. It is killed with its process group after `limit` seconds."""
        async with self._slots:
            environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
            environment |= {"NOTIFY_TYPE": kind, "NOTIFY_ID": key}
            began = asyncio.get_running_loop().time()
            with _input(body) as stdin, _output() as (kept, stdout):
                try:
                    # Not asyncio's pipes: it waits for them too, and a background child may hold one open.
                    process = await asyncio.create_subprocess_exec(
                        *command, stdin=stdin, stdout=stdout, stderr=stdout, env=environment, start_new_session=True
                    )
                except (OSError, ValueError) as error:
                    why = getattr(error, "strerror", None) or str(error)
                    return Attempt(None, f"cannot run {command[0]}: {why}", None, 0.0)
                error_line = await _wait(process, limit)
                # The last output is in the pipe by now.
                await asyncio.sleep(0)
            elapsed_ms = (asyncio.get_running_loop().time() - began) * 1000
            return Attempt(process.returncode, error_line, printable(bytes(kept)), elapsed_ms)


async def _wait(process: asyncio.subprocess.Process, limit: float) -> str | None:
    """Wait for the process; return the error, None when it has ended with exit code 0."""
    try:
        async with asyncio.timeout(limit):
            code = await process.wait()
    except TimeoutError:
        return f"killed: still running after {limit:g} s"
    finally:
        # Children that it has left behind go too, also when this task is cancelled.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REAP_SECONDS):
                await process.wait()
    if code == 0:
        return None
    return f"exit code {code}" if code > 0 else f"ended by signal {-code}"


@contextlib.contextmanager
def _input(body: bytes) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(body)
        file.seek(0)
        yield file.fileno()


@contextlib.contextmanager
def _output() -> Iterator[tuple[bytearray, int]]:
    """Collects the beginning of the data written to a pipe, and owns its write end; the rest is read and dropped."""
    kept = bytearray()
    source, sink = os.pipe()
    os.set_blocking(source, False)
    loop = asyncio.get_running_loop()

    def read() -> None:
        with contextlib.suppress(BlockingIOError):
            part = os.read(source, 65536)
            if not part:
                loop.remove_reader(source)
            kept.extend(part[: ANSWER_BYTES - len(kept)])

    loop.add_reader(source, read)
    try:
        yield kept, sink
        read()
    finally:
        loop.remove_reader(source)
        os.close(source)
        os.close(sink)
