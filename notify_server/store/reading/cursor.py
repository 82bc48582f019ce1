"""Encodes the sort key of a page's last item as an opaque cursor."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

UNKNOWN_CURSOR = "cursor: is not one that was given out, begin again without it"


def encode_cursor(*keys: int | str) -> str:
    """Encode the sort key of the last item of a page as text that is safe in a URL."""
    return msgspec.json.encode(keys).hex()


def decode_cursor(cursor: str, kinds: Sequence[type]) -> list[int | str]:
    """Return the keys given to `encode_cursor`. Raises ValueError unless they have these types."""
    try:
        keys = msgspec.json.decode(bytes.fromhex(cursor), type=tuple[*kinds])  # type: ignore[valid-type]
    except (ValueError, msgspec.MsgspecError):
        raise ValueError(UNKNOWN_CURSOR) from None
    return list(keys)
