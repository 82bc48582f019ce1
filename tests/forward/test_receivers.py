"""The receivers of docs/receivers against a live daemon, through the commands that people use."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
import pytest

from notify_server.clock import unix_ms
from notify_server.forward.standard_webhooks import Signer
from tests.support.daemon import Daemon, clean_environment, run_command
from tests.support.notification import batch_body, failed
from tests.support.waiting import eventually, free_port

DOCS = Path(__file__).parents[2] / "docs" / "receivers"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
RECEIVERS = {
    "aiohttp": [sys.executable, "receiver_aiohttp.py"],
    "fastapi": [sys.executable, "receiver_fastapi.py"],
    "node": ["node", "receiver.mjs"],
    "java": ["java", "Receiver.java"],
}


@contextlib.asynccontextmanager
async def receiver(command: Sequence[str], port: int) -> AsyncIterator[bytearray]:
    """Run a receiver; what it prints is in the bytes that this yields."""
    environ = {**os.environ, "WEBHOOK_SECRET": SECRET, "PORT": str(port)}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=DOCS, env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    printed = bytearray()

    async def read() -> None:
        assert process.stdout is not None
        while part := await process.stdout.read(4096):
            printed.extend(part)

    reading = asyncio.create_task(read())
    try:
        await eventually(lambda: _listens(port, process))
        yield printed
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await reading


def _listens(port: int, process: asyncio.subprocess.Process) -> bool:
    assert process.returncode is None, "the receiver has ended"
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def is_runnable(name: str) -> bool:
    """Return whether this machine has what the receiver runs on."""
    if name == "fastapi":
        return all(importlib.util.find_spec(module) is not None for module in ("fastapi", "uvicorn"))
    return shutil.which(RECEIVERS[name][0]) is not None


@pytest.mark.parametrize("name", [name for name in RECEIVERS if is_runnable(name)])
async def test_receiver_accepts_signed_deliveries_and_refuses_altered_ones(tmp_path: Path, name: str) -> None:
    port = free_port()
    hook = f"http://127.0.0.1:{port}/hooks/files"
    endpoint = {
        "name": "listings",
        "url": hook,
        "secrets": [SECRET],
        "allowed_networks": ["127.0.0.0/8"],
    }
    environ = clean_environment() | {"NOTIFY_SERVER__FORWARD": json.dumps([endpoint])}
    async with receiver(RECEIVERS[name], port) as printed, Daemon(tmp_path, environ=environ) as daemon:
        url = daemon.callback.removesuffix("/notify")
        tested = await run_command("forward", "test", "listings", "--url", url, cwd=tmp_path, environ=environ)
        assert tested.code == 0, tested.stderr
        assert "listings: delivered" in tested.stdout
        async with aiohttp.ClientSession() as session:
            body = batch_body("receiver-batch", [failed("k")])
            async with session.post(daemon.callback, data=body, headers={"Content-Type": "application/json"}) as answer:
                assert answer.status == 200
            await eventually(lambda: b"receiver-batch" in printed)
            payload = b'{"type":"test.ping","timestamp":"2026-01-01T00:00:00.000Z","data":{}}'
            headers = Signer([SECRET]).headers("evt_a", unix_ms(), payload) | {"Content-Type": "application/json"}
            async with session.post(hook, data=payload + b" ", headers=headers) as answer:
                assert answer.status == 401
            async with session.post(hook, data=payload, headers=headers) as answer:
                assert answer.status == 204
        listed = await run_command("forward", "list", "--json", "--url", url, cwd=tmp_path, environ=environ)
        assert (listed.code, json.loads(listed.stdout)["state"]) == (0, "ok")
        shown = await run_command("events", "--json", "--url", url, cwd=tmp_path, environ=environ)
        assert "receiver-batch" in shown.stdout
        replayed = await run_command(
            "forward", "replay", "listings", "--since", "1h", "--dry-run", "--url", url, cwd=tmp_path, environ=environ
        )
        assert replayed.stdout == "listings: 1 events would be sent again\n"
        for what in ("stop", "start"):
            changed = await run_command("forward", what, "listings", "--url", url, cwd=tmp_path, environ=environ)
            assert changed.code == 0
        unknown = await run_command("forward", "test", "nobody", "--url", url, cwd=tmp_path, environ=environ)
        assert unknown.code != 0
        assert "no endpoint is called" in unknown.stderr


@pytest.mark.parametrize("path", [path for path in DOCS.iterdir() if path.suffix != ".md"], ids=lambda path: path.name)
def test_receiver_has_at_most_forty_lines(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 40
