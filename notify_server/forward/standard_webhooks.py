"""Signs requests as Standard Webhooks 1.0.0 prescribes, with the reference library."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from datetime import UTC, datetime

from standardwebhooks import Webhook

# The specification asks for 24 to 64 random bytes.
MIN_SECRET_BYTES = 24
MAX_SECRET_BYTES = 64
PREFIX = "whsec_"


def check_secret(secret: str) -> None:
    """Raise ValueError, whose text does not contain the secret, unless it has the form `whsec_<base64>`."""
    wanted = f"must be {PREFIX} and the base64 of {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} random bytes"
    if not secret.startswith(PREFIX):
        raise ValueError(wanted)
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(wanted) from None
    if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise ValueError(wanted)


class Signer:
    """Makes the three `webhook-` headers of a request. Every secret signs, so a rotation loses no delivery."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._webhooks = [Webhook(secret) for secret in secrets]

    def headers(self, key: str, now: int, body: bytes) -> dict[str, str]:
        """Return the headers for one attempt at `now` (Unix ms). `body` is the bytes that are sent, UTF-8.

        Without secrets there is no signature; id and timestamp are sent all the same.
        """
        seconds = now // 1000
        headers = {"webhook-id": key, "webhook-timestamp": str(seconds)}
        if self._webhooks:
            # The library replaces the time zone, so the time has to be UTC already.
            at, text = datetime.fromtimestamp(seconds, UTC), body.decode()
            headers["webhook-signature"] = " ".join(webhook.sign(key, at, text) for webhook in self._webhooks)
        return headers
