"""CloudEvents 1.0 over HTTP, binary content mode: attributes in headers, `data` as the body."""

from __future__ import annotations

import re
from urllib.parse import quote

# HTTP protocol binding 3.1.3.2: everything but U+0021 to U+007E is percent-encoded, and the quote and the percent sign.
_ENCODED = re.compile('[^!-~]|["%]')


def header_value(text: str) -> str:
    """Encode an attribute's value for a header. A lone surrogate becomes U+FFFD."""

    def encode(found: re.Match[str]) -> str:
        raw = found[0].encode("utf-8", "replace") if not "\ud800" <= found[0] <= "\udfff" else "\ufffd".encode()
        return quote(raw, safe="")

    return _ENCODED.sub(encode, text)


def headers(*, key: str, endpoint: str, type: str, time: str, subject: str | None) -> dict[str, str]:
    """Return the `ce-` headers of an event; `time` is RFC 3339, `subject` the batch_id if the event has a batch."""
    attributes = {
        "ce-specversion": "1.0",
        "ce-id": header_value(key),
        "ce-source": header_value(f"/notify_server/{endpoint}"),
        "ce-type": header_value(type),
        "ce-time": header_value(time),
    }
    if subject is not None:
        attributes["ce-subject"] = header_value(subject)
    return attributes
