"""The result of one attempt at a delivery."""

from __future__ import annotations

from typing import NamedTuple

# Kept of an answer or of a script's output.
ANSWER_BYTES = 2048


class Attempt(NamedTuple):
    """`status` is the HTTP status or the exit code; `error` is None only when the event was delivered; `response` is
    the printable beginning of the answer. `retry_after_ms` is the wait that the receiver requested, `fatal` stops the
    endpoint, and `throttled` means that a robot limits its messages.
    """

    status: int | None
    error: str | None
    response: str | None
    elapsed_ms: float
    retry_after_ms: int | None = None
    fatal: bool = False
    throttled: bool = False

    @property
    def delivered(self) -> bool:
        return self.error is None


def printable(raw: bytes) -> str:
    """Return bytes from outside as text that can be stored and shown: no control characters but line ends and tabs."""
    text = raw[:ANSWER_BYTES].decode("utf-8", "replace").replace("\r\n", "\n")
    return "".join(ch if ch.isprintable() or ch in "\n\t" else "\ufffd" for ch in text)
