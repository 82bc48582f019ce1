"""The server as a service: signals, addresses, closed streams, a reader of its log that stalls."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import ssl
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from yarl import URL

from tests.support.daemon import Daemon, clean_environment, to_toml
from tests.support.waiting import SECONDS, free_port


def write(folder: Path, **sections: dict[str, object]) -> None:
    base: dict[str, dict[str, object]] = {
        "server": {"host": "127.0.0.1", "port": 0},
        "store": {"url": f"sqlite:///{folder / 'notify.db'}"},
        "log": {"format": "json"},
    }
    for name, keys in sections.items():
        base[name] = base.get(name, {}) | keys
    (folder / "config.toml").write_text(to_toml(base), encoding="utf-8")


async def test_sighup_applies_what_can_change_and_names_what_cannot(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        write(tmp_path, retention={"completed": "7d"}, log={"level": "debug"}, verify={"timeout": "9s"})
        daemon.send(signal.SIGHUP)
        line = await daemon.line("configuration reloaded")
        assert set(line["changed"]) == {"[retention] completed", "[log] level"}
        line = await daemon.line("restart the server to change these")
        assert "[verify] timeout" in line["keys"]
        assert "[retention] completed" not in line["keys"]
        assert daemon.running
        assert await daemon.terminate() == 0


async def test_sighup_with_a_wrong_file_changes_nothing_and_names_the_key(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        write(tmp_path, retention={"completed": "soon"})
        daemon.send(signal.SIGHUP)
        line = await daemon.line("configuration not reloaded, nothing is changed")
        assert line["problems"][0].startswith("[retention] completed: ")
        (tmp_path / "config.toml").write_text("[server\n", encoding="utf-8")
        daemon.send(signal.SIGHUP)
        await daemon.line("configuration not reloaded, nothing is changed", number=2)
        assert await daemon.terminate() == 0


def issue(authority: trustme.CA, folder: Path, ends: datetime) -> None:
    issued = authority.issue_cert("localhost", "127.0.0.1", not_after=ends)
    issued.private_key_pem.write_to_path(folder / "tls.key")
    (folder / "tls.crt").write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))


async def serial(port: int, authority: trustme.CA) -> str:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    certificate = writer.get_extra_info("peercert")
    writer.close()
    return str(certificate["serialNumber"])


async def test_sighup_takes_a_renewed_certificate_without_a_restart(tmp_path: Path) -> None:
    authority = trustme.CA()
    issue(authority, tmp_path, datetime.now(UTC) + timedelta(days=10))
    files = {"ssl_certificate": str(tmp_path / "tls.crt"), "ssl_key": str(tmp_path / "tls.key")}
    async with Daemon(tmp_path, {"server": files}) as daemon:
        port = URL(daemon.callback).port
        assert port is not None
        first = await serial(port, authority)
        issue(authority, tmp_path, datetime.now(UTC) + timedelta(days=90))
        daemon.send(signal.SIGHUP)
        await daemon.line("configuration reloaded", certificate=True)
        second = await serial(port, authority)
        assert second != first
        # Half of a pair is refused, and the pair in use stays.
        (tmp_path / "tls.key").write_text("no key", encoding="utf-8")
        daemon.send(signal.SIGHUP)
        await daemon.line("configuration not reloaded, nothing is changed")
        assert await serial(port, authority) == second
        assert await daemon.terminate() == 0


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
@pytest.mark.parametrize("hosts", ["::", ["127.0.0.1", "::1"]])
async def test_both_families_are_listened_on(tmp_path: Path, hosts: object) -> None:
    port = free_port()
    async with Daemon(tmp_path, {"server": {"host": hosts, "port": port}}):
        for host in ("127.0.0.1", "::1"):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()


@pytest.mark.parametrize("closed", [(0,), (2,), (0, 1, 2)])
async def test_a_server_starts_with_closed_standard_streams(tmp_path: Path, closed: tuple[int, ...]) -> None:
    port = free_port()
    write(tmp_path, server={"port": port})
    shell = "exec " + " ".join(f"{number}>&-" for number in closed) + ' "$@"'
    process = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", shell, "sh", sys.executable, "-m", "notify_server"), cwd=tmp_path, env=clean_environment()
    )
    try:
        async with asyncio.timeout(SECONDS):
            while True:
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                except ConnectionRefusedError:
                    assert process.returncode is None
                    await asyncio.sleep(0.05)
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
            assert answer.startswith(b"HTTP/1.1 200 "), answer
            # No file of the server has the number of a standard stream.
            targets = {str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in closed}
            assert targets == {"/dev/null"}
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def answered(reader: asyncio.StreamReader) -> bytes:
    """Read one answer, and return its head."""
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
    return head


async def test_a_reader_of_the_log_that_stalls_does_not_stop_acks(tmp_path: Path) -> None:
    port = free_port()
    write(tmp_path, server={"port": port}, log={"level": "debug"}, verify={"allowed_hosts": ["files.invalid"]})
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "notify_server"),
        cwd=tmp_path, env=clean_environment(), stderr=asyncio.subprocess.PIPE, limit=1,
    )  # fmt: skip
    try:
        async with asyncio.timeout(SECONDS):
            while True:
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                except ConnectionRefusedError:
                    await asyncio.sleep(0.05)
            # Far more than a pipe holds, and what asyncio reads ahead: each of these is a line of the log.
            ask = f"GET /{'x' * 2000} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
            for _ in range(200):
                writer.write(ask)
                assert b" 404 " in await answered(reader)
            body = json.dumps({"batch_id": "b" * 40, "api_code": "c", "file_list": []})
            head = f"POST /notify HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            writer.write(f"{head}\r\n\r\n{body}".encode())
            assert b" 200 " in await answered(reader)
            writer.close()
    finally:
        process.kill()
        await process.communicate()
