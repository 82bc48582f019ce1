"""Tells from its first bytes what kind of file something is."""

from __future__ import annotations

import re

import filetype

# The signatures that `filetype` knows need that many bytes.
_ENOUGH = 64
_BLANK = b"\xef\xbb\xbf \t\r\n\f\v"
_SVG = re.compile(rb"<svg[\s>]", re.IGNORECASE).search


def sniff(beginning: bytes) -> str | None:
    """Return the media type of a file that begins like this, None when that is unknown.

    What begins with `<` is taken for HTML unless it is SVG, and what begins with `{` for JSON: neither is a picture.
    """
    known: str | None = filetype.guess_mime(beginning.ljust(_ENOUGH, b"\0"))
    if known is not None:
        return known
    text = beginning.lstrip(_BLANK)
    if text.startswith(b"<"):
        return "image/svg+xml" if _SVG(text) else "text/html"
    return "application/json" if text.startswith(b"{") else None
