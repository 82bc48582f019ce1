"""Counts a connection while its TLS handshake is under way.

An event loop with a certificate calls a protocol only after the handshake, so connections that never finish one would
not be counted: one source could hold all descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from typing import cast

from notify_server.callbacks.connection import MAX_LINGERING, CallbackConnection, Connection


class Handshake(asyncio.Protocol):
    """Shakes hands on a new connection; its `Connection` takes its place afterwards.

    It counts like a silent connection. Beyond `max_connections` it goes on uncounted, so that the caller can read the
    refusal, unless too many do already.
    """

    # For ConnectionLimit and for draining: the caller is the one who is waited for.
    awaits_request = True
    is_idle = False
    under_way = False

    def __init__(self, front: CallbackConnection, context: ssl.SSLContext) -> None:
        self.peer = ""
        self.since = 0.0
        self._front = front
        self._context = context
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        front = self._front
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self.since = front.loop.time()
        counted = front.limit.join(self)
        if counted or front.lingering < MAX_LINGERING:
            # A transport may have read before it can be made one of TLS, so another one is made of its socket.
            accepted = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
            front.open.add(self)
            front.lingering += not counted
            self._task = front.loop.create_task(self._shake_hands(accepted, counted=counted))
        else:
            front.on_refused()
        cast(asyncio.Transport, transport).abort()

    def close(self) -> None:
        """Close the connection, whatever is under way."""
        if self._task is not None:
            self._task.cancel()

    async def _shake_hands(self, accepted: socket.socket, *, counted: bool) -> None:
        front = self._front
        try:
            # Not TLS, no protocol in common, too late, or the caller has gone: no answer could be read.
            with contextlib.suppress(OSError, EOFError):
                await front.loop.connect_accepted_socket(
                    lambda: Connection(front, self if counted else None),
                    accepted,
                    ssl=self._context,
                    ssl_handshake_timeout=front.config.header_timeout,
                )
        finally:
            front.limit.leave(self)
            front.open.discard(self)
            front.lingering -= not counted
