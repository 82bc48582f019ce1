"""Rows of the README's table that are no other module's subject, with the real daemon and real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sqlite3
import ssl
import struct
from pathlib import Path

import aiohttp
import trustme

from tests.support.daemon import Daemon, process_gone
from tests.support.notification import API_CODE, batch_body, finished
from tests.support.origin import Answer, Origin
from tests.support.waiting import eventually
from tests.web.test_api import make_record

MIB = 2**20
# SQLite truncates a WAL that has grown beyond this at the next checkpoint: notify_server/store/sqlite/database.py.
WAL_LIMIT = 64 * MIB
# As large as a callback may be, nearly.
LARGE = 7_500_000


def port_of(daemon: Daemon) -> int:
    found = re.search(r":([0-9]+)/", daemon.callback)
    assert found
    return int(found[1])


def page(daemon: Daemon, path: str) -> str:
    return daemon.callback.removesuffix("/notify") + path


def post_without_reading(daemon: Daemon, body: bytes) -> socket.socket:
    """Post a notification, and return its connection, from which nothing has been read."""
    connection = socket.create_connection(("127.0.0.1", port_of(daemon)), timeout=10)
    head = f"POST /notify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


async def assert_merged(daemon: Daemon, origin: Origin, batch_id: str, path: str) -> None:
    """The batch came twice; it has one file, requested once, and one verdict."""
    await daemon.eventually("SELECT sum(deliveries) = 2 FROM batch WHERE batch_id = ?", batch_id)
    # Deliveries are expanded in the order of their arrival: when this one is through, so are those.
    await daemon.settle(f"{batch_id}-after", [])
    (row,) = daemon.sql("SELECT verdict, files, available FROM batch WHERE batch_id = ?", batch_id)
    assert tuple(row) == ("complete", 1, 1)
    (file,) = daemon.files(batch_id).values()
    assert (file["state"], file["attempts"]) == ("available", 1)
    assert daemon.count("verdict", batch_id=batch_id) == 1
    assert origin.count[path] == 1


# --- Addresses ---


async def test_a_name_in_any_script_is_one_host_in_the_record_by_its_ascii_form(tmp_path: Path) -> None:
    """Row 22: what looks like another name is shown as what it is."""
    spelled = {
        "xn--bcher-kva.localhost": ["bücher.localhost", "bu\u0308cher.localhost", "ＢÜＣＨＥＲ.localhost"],
        "xn--80ak6aa92e.localhost": ["аррӏе.localhost"],  # Cyrillic.
    }
    async with Origin() as origin, Daemon(tmp_path) as daemon, aiohttp.ClientSession() as session:
        wanted = {
            origin.url(f"/{number}", name): f"{ascii_form}:{origin.port}"
            for ascii_form, names in spelled.items()
            for number, name in enumerate(names)
        }
        files = await daemon.settle("b", wanted)
        assert {url: (file["state"], file["host"]) for url, file in files.items()} == {
            url: ("available", host) for url, host in wanted.items()
        }
        assert {hit.headers["host"] for hit in origin.hits} == set(wanted.values())
        async with session.get(page(daemon, "/api/v1/export"), headers=daemon.admin) as response:
            exported = await response.text()
        assert all(f",{host}," in exported for host in wanted.values())
        assert daemon.text.isascii()


async def test_a_redirect_from_https_to_http_is_followed_and_recorded(tmp_path: Path) -> None:
    """Row 28."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    config = {"verify": {"allowed_networks": ["127.0.0.0/8"], "ca_file": str(tmp_path / "ca.pem")}}
    async with Origin(tls=context) as secure, Origin() as plain, Daemon(tmp_path, config) as daemon:
        secure.on("/file", Answer(302, {"Location": plain.url("/moved")}))
        (file,) = (await daemon.settle("b", [secure.url("/file")])).values()
        assert (file["state"], file["target_url"], file["final_url"]) == (
            "available",
            secure.url("/file"),
            plain.url("/moved"),
        )
        first, second = daemon.attempts(file)
        assert (first["http_status"], first["url"], first["tls_ms"] > 0) == (302, None, True)
        assert (second["http_status"], second["url"], second["tls_ms"]) == (200, plain.url("/moved"), None)


# --- Callbacks ---


async def test_a_batch_whose_ack_was_lost_is_acked_when_it_comes_again_and_counts_once(tmp_path: Path) -> None:
    """Row 39."""
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        body = batch_body("b", [origin.url("/file")])
        with post_without_reading(daemon, body) as connection:
            await daemon.eventually("SELECT count(*) = 1 FROM notification")
            # Reset: of what was sent meanwhile, nothing arrives.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await daemon.verdict("b")
        assert (await daemon.post(body)).status == 200
        await assert_merged(daemon, origin, "b", "/file")
        assert [line for line in daemon.lines if line["level"] not in ("info", "debug")] == []


async def test_a_request_with_two_hosts_is_refused_and_the_next_caller_served(tmp_path: Path) -> None:
    """Row 48: which of them a proxy in front has gone by is anybody's guess."""
    async with Daemon(tmp_path) as daemon:
        body = batch_body("b", [])
        for hosts in (b"Host: a\r\nHost: b\r\n", b"Host: a\r\nhost: a\r\n", b""):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(daemon))
            writer.write(b"POST /notify HTTP/1.1\r\n" + hosts + b"Content-Type: application/json\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            answer = await reader.read()
            assert re.match(rb"HTTP/1\.[01] 400 ", answer), answer
            writer.close()
            await writer.wait_closed()
        assert daemon.value("SELECT count(*) FROM notification") == 0
        assert (await daemon.post(body)).status == 200


# --- Crash and storage ---


def bytes_written(pid: int) -> int:
    """Return how much a process has written to files, pipes and sockets."""
    found = re.search(r"wchar: ([0-9]+)", Path(f"/proc/{pid}/io").read_text())
    assert found
    return int(found[1])


async def kill_between_commit_and_ack(daemon: Daemon, body: bytes) -> None:
    """Post a body, let the keeper commit it while the main process is stopped, and kill that."""
    keeper = daemon.keeper_pid()
    os.kill(keeper, signal.SIGSTOP)
    before = bytes_written(daemon.pid)
    with post_without_reading(daemon, body) as connection:
        await eventually(lambda: bytes_written(daemon.pid) - before >= len(body))
        daemon.send(signal.SIGSTOP)
        os.kill(keeper, signal.SIGCONT)
        await daemon.eventually("SELECT count(*) = 1 FROM notification")
        daemon.send(signal.SIGKILL)
        assert await daemon.exit_code() == -signal.SIGKILL
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""


async def test_a_kill_between_commit_and_ack_loses_nothing_and_the_resent_notification_is_merged(
    tmp_path: Path,
) -> None:
    """Row 69."""
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        # Less than a pipe holds, and more than anything else that is written.
        body = batch_body("b", [origin.url("/1")]).ljust(40_000)
        probers = daemon.prober_pids()
        await kill_between_commit_and_ack(daemon, body)
        for pid in probers:
            await process_gone(pid)
        await daemon.start()
        assert (await daemon.verdict("b"))["verdict"] == "complete"
        assert (await daemon.post(body)).status == 200
        await assert_merged(daemon, origin, "b", "/1")
        assert daemon.value("PRAGMA integrity_check") == "ok"


async def test_a_reader_of_another_program_that_lasts_keeps_no_callback_waiting_and_the_log_is_cut_afterwards(
    tmp_path: Path,
) -> None:
    """Row 78."""
    async with Daemon(tmp_path) as daemon:
        wal = daemon.database.with_name(daemon.database.name + "-wal")
        await daemon.settle("before", [])
        with contextlib.closing(sqlite3.connect(daemon.database, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM batch").fetchone() == (1,)
            for number in range(12):
                assert (await daemon.post(batch_body(f"large-{number}", []).ljust(LARGE))).status == 200
            # It still sees what was there when it began, and nothing of that could be written over.
            assert reader.execute("SELECT count(*) FROM batch").fetchone() == (1,)
            assert wal.stat().st_size > 1.2 * WAL_LIMIT
        for number in range(3):
            await daemon.settle(f"after-{number}", [])
        assert wal.stat().st_size <= WAL_LIMIT
        assert daemon.value("SELECT count(*) FROM batch") == 16


async def test_reads_of_the_daemon_itself_that_never_cease_do_not_let_the_log_grow(tmp_path: Path) -> None:
    """Row 78: as long as somebody reads it the log cannot begin anew, so there must be moments when nobody does."""
    make_record(tmp_path / "notify.db", 5_000)
    async with Daemon(tmp_path) as daemon, aiohttp.ClientSession() as session:
        wal = daemon.database.with_name(daemon.database.name + "-wal")
        exports = 0

        async def read() -> None:
            nonlocal exports
            while True:
                async with session.get(page(daemon, "/api/v1/export"), headers=daemon.admin) as response:
                    assert (await response.read()).count(b"\n") == 5_001
                exports += 1

        readers = [asyncio.create_task(read()) for _ in range(2)]
        largest = 0
        for number in range(20):
            assert (await daemon.post(batch_body(f"large-{number}", []).ljust(LARGE))).status == 200
            largest = max(largest, wal.stat().st_size)
        assert [task for task in readers if task.done()] == []
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        # It is truncated only at a restart. One that never restarted would hold everything written through it.
        assert largest < 0.7 * 20 * LARGE
        assert exports > 0


# --- Exports ---


def most_memory(pid: int) -> int:
    """The most memory that a process has had, in bytes."""
    found = re.search(r"VmHWM:\s+([0-9]+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


async def test_an_export_of_a_huge_record_takes_no_more_memory_than_one_of_a_small_one(tmp_path: Path) -> None:
    """Row 56."""
    files = 40_000
    make_record(tmp_path / "notify.db", files)
    async with Daemon(tmp_path) as daemon, aiohttp.ClientSession() as session:
        async with session.get(page(daemon, "/api/v1/export?reason=http_418"), headers=daemon.admin) as response:
            assert (await response.read()).count(b"\n") == 1
        before = most_memory(daemon.pid)
        for kind in ("csv", "ndjson"):
            size = lines = 0
            async with session.get(page(daemon, f"/api/v1/export?format={kind}"), headers=daemon.admin) as response:
                async for chunk in response.content.iter_any():
                    size += len(chunk)
                    lines += chunk.count(b"\n")
            assert lines == files + (kind == "csv")
            assert size > 10 * MIB
        assert most_memory(daemon.pid) - before < 16 * MIB
        assert (await daemon.post(batch_body("after", []))).status == 200


async def test_secrets_are_in_no_listing_export_or_metric(tmp_path: Path) -> None:
    """Row 87: the platform's own in an address, and the daemon's."""
    secrets = ["hunter-two-of-the-platform", "token-of-the-platform", "token-of-the-administrator"]
    in_address, callback_token, admin_token = secrets
    config = {"auth": {"callback_token": callback_token, "admin_token": admin_token}, "log": {"level": "debug"}}
    async with Origin() as origin, Daemon(tmp_path, config) as daemon:
        origin.on("/moved", Answer(302, {"Location": f"http://someone:{in_address}@127.0.0.1/"}))
        entries = [
            finished(f"http://someone:{in_address}@127.0.0.1/", "direct"),
            finished(origin.url("/moved"), "redirected"),
        ]
        reply = await daemon.post(batch_body("b", entries), Authorization=f"Bearer {callback_token}")
        assert reply.status == 200
        await daemon.verdict("b")
        paths = [
            *("export?format=csv", "export?format=ndjson", "batches", "batches/1", "batches/1/files", "files/1"),
            *("files/2", "files?reason=invalid_url", f"search?q={API_CODE}", "totals", "status", "hosts", "rejections"),
        ]
        asked = [*(f"/api/v1/{path}" for path in paths), "/metrics", "/readyz", "/openapi.json"]
        shown = {}
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {admin_token}"}) as session:
            for path in asked:
                async with session.get(page(daemon, path)) as response:
                    assert response.status == 200, path
                    shown[path] = await response.text() + str(response.headers)
        # They were there to be shown.
        assert "invalid_url" in shown["/api/v1/export?format=csv"]
        assert daemon.value("SELECT count(*) FROM notification WHERE instr(body, ?)", in_address) == 1
        shown["the log"] = daemon.text
        assert [(path, secret) for path, text in shown.items() for secret in secrets if secret in text] == []


async def test_keeper_blocks_new_files_in_refused_networks(tmp_path: Path) -> None:
    """Row 121: before a prober sees their addresses."""
    config = {"verify": {"refused_networks": ["127.0.0.7"], "processes": 1}}
    async with Daemon(tmp_path, config) as daemon:
        (prober,) = daemon.prober_pids()
        os.kill(prober, signal.SIGSTOP)
        await daemon.deliver("b", ["http://127.0.0.7:8000/a"])
        assert (await daemon.verdict("b"))["verdict"] == "incomplete"
        assert daemon.value("SELECT state || ' ' || reason FROM file") == "blocked private_address"
