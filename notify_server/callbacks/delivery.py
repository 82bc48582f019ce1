"""Checks the body of a callback: its coding, its signature and its contract."""

from __future__ import annotations

import math
from collections.abc import Callable

from notify_server.callbacks.access import Headers
from notify_server.callbacks.errors import RefusedError, forget_frames
from notify_server.config import Config
from notify_server.contract import signature, wire
from notify_server.contract.envelope import Envelope, open_envelope
from notify_server.contract.trace_context import TraceParent
from notify_server.errors import ContractError, SignatureError
from notify_server.model import UNSIGNED, Delivery

# Codings that change the bytes of a body. A name such as "utf-8" in Content-Encoding is a sender's slip.
COMPRESSIONS = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"})


class DeliveryReader:
    """Turns bodies into deliveries. Both clocks give Unix ms; timestamps of signatures are checked against `wall`."""

    def __init__(self, config: Config, now: Callable[[], int], wall: Callable[[], int]) -> None:
        self._auth = config.auth
        self._max_files = config.contract.max_files
        self._now = now
        self._wall = wall

    def read(self, headers: Headers, body: bytes, request_id: str, caller: str, parent: TraceParent | None) -> Delivery:
        """Return the body as a delivery. Raises RefusedError, ContractError, SignatureError.

        Content-Type is ignored: the platform's document specifies none. Any body that parses as a notification is one.
        """
        if "Content-Encoding" in headers:
            codings = {coding.strip().lower() for coding in headers["Content-Encoding"].split(",")}
            if codings & COMPRESSIONS:
                raise RefusedError(415, "415", "Content-Encoding: send the body as it is, not compressed", keep=True)
        now = self._now()
        envelope = problem = None
        try:
            # Nearly every body is bare; what has a file_list of its own is no envelope.
            notification = wire.parse_notification(body, max_files=self._max_files)
        except ContractError as error:
            # The frames hold the body and, in a variable, the error itself.
            problem = error
            forget_frames(problem)
            envelope = open_envelope(body)
        proven_by, nonce = UNSIGNED, None
        if self._auth.signature != "off" and (envelope is not None or self._auth.signature == "required"):
            proven_by, nonce = self._prove(envelope, now)
        if envelope is not None:
            try:
                notification = wire.parse_notification(envelope.notification, max_files=self._max_files)
                problem = None
            except ContractError as error:
                problem = error
                forget_frames(problem)
        if problem is not None:
            raise RefusedError(400, "400", str(problem), keep=True, proven=proven_by != UNSIGNED) from None
        return Delivery(
            notification.batch_id,
            notification.api_code,
            body,
            len(notification.file_list),
            now,
            caller,
            proven_by,
            request_id,
            nonce,
            parent.text if parent is not None else None,
        )

    def _prove(self, envelope: Envelope | None, now: int) -> tuple[str, tuple[str, int]]:
        """Verify the signature; return the fingerprint of its key, and the nonce with the time until it is kept."""
        if envelope is None:
            raise SignatureError(signature.SIGNATURE_WRONG, "the body is not signed")
        wall = self._wall()
        window_ms = round(self._auth.timestamp_window * 1000)
        key = signature.verify(envelope, self._auth.platform_keys, now_ms=wall, window_ms=window_ms)
        # A nonce is kept at least as long as its timestamp is inside the window.
        good_ms = envelope.timestamp + window_ms - wall
        expires_at = now + max(math.ceil(self._auth.nonce_ttl * 1000), good_ms)
        return key.fingerprint, (signature.nonce_key(envelope), expires_at)
