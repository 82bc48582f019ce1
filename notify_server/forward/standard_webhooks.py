"""Signs requests as Standard Webhooks 1.0.0 prescribes, with the reference library."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from standardwebhooks import Webhook


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
