"""The body that `doctor --from` posts to try the public address: no notification, so no server stores it. Only a server
with the same admin_token answers it.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

import msgspec
from msgspec import Struct

# Long enough for clocks that differ, short enough that a body that was logged is soon worth nothing.
MAX_AGE_MS: Final = 300_000
MAX_BYTES: Final = 512
_FIELD: Final = b'{"notify_server_check":'


class Check(Struct, frozen=True):
    """A check: when it was made (Unix ms), a random text, and a MAC of both."""

    at: int
    nonce: str
    mac: str


class _Body(Struct, frozen=True):
    notify_server_check: Check


class Seen(Struct, frozen=True):
    """What the server saw of a check: the caller, by its reading of the proxy headers, and these headers. `proof` shows
    that the answer is from a server with the same admin_token.
    """

    proof: str
    caller: str
    forwarded_for: str
    forwarded: str
    proto: str


def check_body(token: bytes, at_ms: int, nonce: str) -> bytes:
    """Return the body of a check."""
    return msgspec.json.encode(_Body(Check(at_ms, nonce, _mac(token, f"check.{at_ms}.{nonce}"))))


def genuine_check(body: bytes, token: bytes, now_ms: int) -> Check | None:
    """Return the check that the body is, None for any other body, a MAC with another token, or one too old."""
    if len(body) > MAX_BYTES or not body.startswith(_FIELD):
        return None
    try:
        check = msgspec.json.decode(body, type=_Body).notify_server_check
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    expected = _mac(token, f"check.{check.at}.{check.nonce}")
    if not hmac.compare_digest(check.mac.encode("utf-8", "replace"), expected.encode()):
        return None
    return check if abs(now_ms - check.at) <= MAX_AGE_MS else None


def proof(token: bytes, nonce: str) -> str:
    """Return what shows the one who made the check that the answer is from a server with the same token."""
    return _mac(token, f"seen.{nonce}")


def _mac(token: bytes, text: str) -> str:
    return hmac.new(token, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()
