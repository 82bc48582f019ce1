"""Reports the daemon's state to systemd (sd_notify(3)) if that started it with Type=notify.

The protocol is one datagram of `NAME=value` lines to the socket in NOTIFY_SOCKET.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping

import structlog

log = structlog.get_logger("notify_server")

# Heartbeats in each period of the watchdog.
HEARTBEATS = 3


class ServiceManager:
    """Sends states to the socket at `address`, and does nothing without one. systemd kills the process when it has sent
    no heartbeat for `watchdog` seconds.
    """

    def __init__(self, address: str | None, watchdog: float | None = None) -> None:
        # A leading @ stands for the NUL of Linux's abstract addresses.
        self._address = f"\0{address[1:]}" if address is not None and address.startswith("@") else address
        self._watchdog = watchdog
        self._failed = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> ServiceManager:
        """Read the address and the watchdog's period from the variables that systemd sets for this process."""
        microseconds = environ.get("WATCHDOG_USEC", "")
        mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog = int(microseconds) / 1_000_000 if mine and microseconds.isdigit() else None
        return cls(environ.get("NOTIFY_SOCKET") or None, watchdog or None)

    def ready(self, status: str) -> None:
        """Report that start-up is over."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """Set the line that `systemctl status` shows."""
        self._send(f"STATUS={status}")

    def stopping(self) -> None:
        """Report that the daemon is stopping."""
        self._send("STOPPING=1", "STATUS=stopping")

    async def send_heartbeats(self) -> None:
        """Send heartbeats until cancelled. They stop when the event loop hangs, and systemd restarts the daemon."""
        if self._watchdog is None:
            await asyncio.Event().wait()
            return
        while True:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self._watchdog / HEARTBEATS)

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        message = "\n".join(" ".join(line.splitlines()) for line in lines)
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as sender:
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            # A full or missing socket must not stop the daemon.
            if not self._failed:
                log.warning("cannot report to the service manager (NOTIFY_SOCKET)", error=str(error))
            self._failed = True
