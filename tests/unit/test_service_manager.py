"""States are reported to systemd over a real socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from notify_server.service_manager import ServiceManager


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that systemd would read."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
        reader.bind(str(tmp_path / "notify"))
        reader.setblocking(False)
        yield reader


def test_each_state_is_one_datagram_of_lines(systemd: socket.socket) -> None:
    manager = ServiceManager.from_environment({"NOTIFY_SOCKET": systemd.getsockname()})
    manager.ready("ready for\nnotifications")
    manager.status("waiting")
    manager.stopping()
    assert [systemd.recv(1000) for _ in range(3)] == [
        b"READY=1\nSTATUS=ready for notifications",
        b"STATUS=waiting",
        b"STOPPING=1\nSTATUS=stopping",
    ]


def test_an_abstract_address_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
        reader.bind(f"\0notify-server-{os.getpid()}")
        ServiceManager(f"@notify-server-{os.getpid()}").status("here")
        assert reader.recv(100) == b"STATUS=here"


@pytest.mark.parametrize("named", [False, True])
async def test_heartbeats_are_sent_within_the_period_of_the_watchdog(systemd: socket.socket, named: bool) -> None:
    environ = {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "30000"}
    if named:
        environ["WATCHDOG_PID"] = str(os.getpid())
    task = asyncio.create_task(ServiceManager.from_environment(environ).send_heartbeats())
    async with asyncio.timeout(30):
        heard = [await asyncio.get_running_loop().sock_recv(systemd, 100) for _ in range(4)]
    assert set(heard) == {b"WATCHDOG=1"}
    task.cancel()


@pytest.mark.parametrize("environ", [{}, {"WATCHDOG_USEC": "30000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}])
async def test_without_a_watchdog_for_this_process_no_heartbeat_is_sent(
    systemd: socket.socket, environ: dict[str, str]
) -> None:
    manager = ServiceManager.from_environment({"NOTIFY_SOCKET": systemd.getsockname(), **environ})
    task = asyncio.create_task(manager.send_heartbeats())
    await asyncio.sleep(0)
    assert not task.done()
    with pytest.raises(BlockingIOError):
        systemd.recv(100)
    task.cancel()


def test_without_a_service_manager_nothing_is_sent() -> None:
    ServiceManager.from_environment({}).ready("ready")


def test_a_socket_that_is_gone_is_logged_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manager = ServiceManager(str(tmp_path / "gone"))
    manager.status("one")
    manager.status("two")
    assert capsys.readouterr().out.count("cannot report to the service manager") == 1
