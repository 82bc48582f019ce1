"""Encodes the beginning of a source path as object keys hold it, to find a file by the path that pages show."""

from __future__ import annotations

import base64

# A key holds the first bytes of the path only.
KEPT_BYTES = 24


def encoded_beginning(path: str) -> str | None:
    """Return the characters that a key has after its last `/` for a source path that begins like this; None when the
    text is too short to tell anything.
    """
    kept = path.encode("utf-8", "replace")[:KEPT_BYTES]
    # Four characters hold three bytes; the last ones of an incomplete group depend on what follows.
    whole = len(kept) * 8 // 6
    return base64.b64encode(kept).decode()[:whole] if len(kept) >= 3 else None
