"""Commands that are watched while they run: on a terminal, or with pipes that stay open."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path

from tests.support.daemon import clean_environment
from tests.support.waiting import SECONDS

PIPE = asyncio.subprocess.PIPE


@contextlib.asynccontextmanager
async def running(*arguments: str, cwd: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`notify-server` with these arguments and pipes; killed at the end when it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "notify_server", *arguments),
        cwd=cwd,
        env=clean_environment(),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def on_terminal(*arguments: str, cwd: Path, columns: int = 100) -> tuple[int, str]:
    """Run it to its end on a terminal; the exit code and all that was written there."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "notify_server", *arguments),
            cwd=cwd,
            env=clean_environment(TERM="xterm", COLUMNS=str(columns)),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
    finally:
        os.close(slave)
    written = bytearray()

    def read() -> None:
        # A terminal whose other end is closed ends in an error.
        with contextlib.suppress(OSError):
            while block := os.read(master, 1 << 16):
                written.extend(block)

    try:
        async with asyncio.timeout(SECONDS):
            await asyncio.to_thread(read)
            code = await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        os.close(master)
    return code, written.decode()
