"""The daemon with a certificate of its own."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
import trustme

from tests.support.daemon import Daemon, clean_environment

BODY = b'{"batch_id":"b","api_code":"a","file_list":[]}'


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def certificate(authority: trustme.CA, tmp_path: Path) -> dict[str, str]:
    issued = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    for blob in issued.cert_chain_pems:
        blob.write_to_path(chain, append=True)
    issued.private_key_pem.write_to_path(key)
    return {"ssl_certificate": str(chain), "ssl_key": str(key)}


@pytest.fixture
def trusting(authority: trustme.CA) -> Iterator[ssl.SSLContext]:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    yield context


def server(certificate: dict[str, str], **more: object) -> dict[str, dict[str, object]]:
    return {"server": {"host": "127.0.0.1", "port": 0, **certificate, **more}}


async def test_with_a_certificate_callbacks_are_taken_over_tls(
    tmp_path: Path, certificate: dict[str, str], trusting: ssl.SSLContext
) -> None:
    async with Daemon(tmp_path, server(certificate)) as daemon:
        assert daemon.callback.startswith("https://127.0.0.1:")
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                daemon.callback, data=BODY, headers={"Content-Type": "application/json"}, ssl=trusting
            ) as answer,
        ):
            assert (answer.status, (await answer.json())["code"]) == (200, "000")


async def test_nothing_older_than_tls_1_2_is_spoken(
    tmp_path: Path, certificate: dict[str, str], trusting: ssl.SSLContext
) -> None:
    async with Daemon(tmp_path, server(certificate)) as daemon:
        port = int(daemon.callback.split(":")[2].split("/")[0])
        for version, name in ((ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")):
            trusting.minimum_version = trusting.maximum_version = version
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
            assert writer.get_extra_info("ssl_object").version() == name
            writer.close()
            await writer.wait_closed()
        old = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_1", "-cipher", "DEFAULT:@SECLEVEL=0"],
            input="",
            capture_output=True,
            text=True,
        )
        assert "Cipher is (NONE)" in old.stdout + old.stderr


async def test_a_handshake_that_never_comes_is_cut_off_with_the_headers_deadline(
    tmp_path: Path, certificate: dict[str, str]
) -> None:
    async with Daemon(tmp_path, server(certificate, header_timeout="0.5s")) as daemon:
        port = int(daemon.callback.split(":")[2].split("/")[0])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()


async def test_handshakes_that_never_finish_count_as_silent_connections_of_their_source(
    tmp_path: Path, certificate: dict[str, str], trusting: ssl.SSLContext
) -> None:
    config = server(certificate, max_connections=20, header_timeout="60s")
    async with Daemon(tmp_path, config) as daemon:
        port = int(daemon.callback.split(":")[2].split("/")[0])
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        # The first bytes of a handshake that goes no further.
        for _, writer in silent[:10]:
            writer.write(b"\x16\x03\x01\x02\x00")
        request = b"POST /notify HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
        for _ in range(25):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=trusting, server_hostname="127.0.0.1", local_addr=("127.0.0.2", 0)
            )
            writer.write(request)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            writer.close()
        # Each newcomer has taken the place of the oldest one, long before the deadline of a handshake.
        async with asyncio.timeout(10):
            assert await silent[0][0].read() == b""
        for _, writer in silent:
            writer.close()


async def test_caller_beyond_max_connections_can_read_the_refusal_over_tls(
    tmp_path: Path, certificate: dict[str, str], trusting: ssl.SSLContext
) -> None:
    async with (
        Daemon(tmp_path, server(certificate, max_connections=1)) as daemon,
        aiohttp.ClientSession() as session,
        session.post(daemon.callback, data=BODY, ssl=trusting) as answer,
        # The first session keeps its connection.
        aiohttp.ClientSession() as another,
        another.post(daemon.callback, data=BODY, ssl=trusting) as refusal,
    ):
        assert answer.status == 200
        assert (refusal.status, refusal.headers["Retry-After"]) == (503, "1")


def test_a_key_of_another_certificate_is_refused_in_one_line(
    tmp_path: Path, authority: trustme.CA, certificate: dict[str, str]
) -> None:
    other = tmp_path / "other.pem"
    authority.issue_cert("elsewhere.example").private_key_pem.write_to_path(other)
    run = subprocess.run(
        [sys.executable, "-m", "notify_server"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        env={
            **clean_environment(),
            "NOTIFY_SERVER__SERVER__PORT": "0",
            "NOTIFY_SERVER__SERVER__SSL_CERTIFICATE": certificate["ssl_certificate"],
            "NOTIFY_SERVER__SERVER__SSL_KEY": str(other),
        },
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("notify_server: [server] ssl_certificate and ssl_key: cannot be used")
    assert "Traceback" not in run.stderr
