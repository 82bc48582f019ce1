"""Reads from a signed address when its signature ends, and from the flags of a file when its object is deleted.

Each rule follows the query that the vendor's own package writes. The same name has two meanings in two of them:
`x-oss-expires` is a moment in OSS V2, and a number of seconds in OSS V4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from urllib.parse import unquote_plus

# The flag of an object that a lifecycle rule deletes: `deleted_on:YYYY-MM-DD`.
DELETED_ON = "deleted_on:"
# A time outside of 2000 to 2100 is a mistake of the signer and is ignored.
EARLIEST, LATEST = 946_684_800, 4_102_444_800

_MARKS = re.compile(r"[?&](?:[^=&]*expires|e|q-sign-time|q-key-time|auth_key|sign)=", re.IGNORECASE).search
_NUMBER = re.compile(r"[0-9]{1,10}").fullmatch
_PERIOD = re.compile(r"([0-9]{1,10});([0-9]{1,10})").fullmatch
_QINIU_TOKEN = re.compile(r"[^:]+:[^:]+").fullmatch
_ACCESS_KEYS = ("ossaccesskeyid", "accesskeyid", "awsaccesskeyid")
# Signatures of CDNs, which hold the time of issue but not the lifetime.
_CDN_SIGNATURES = ("auth_key", "sign")


def expiry(url: str) -> int | None:
    """Return the moment (Unix ms) from which the address is refused, None when no signature has a lifetime.

    With a temporary security token the address may end earlier, with the token. The smallest end counts where there are
    several. A name that is repeated with another value is ignored.
    """
    if "?" not in url or _MARKS(url) is None:
        return None
    ends = [end for end in _ends(_query(url)) if end is not None and EARLIEST <= end <= LATEST]
    return min(ends) * 1000 if ends else None


def is_signed(url: str) -> bool:
    """Return True for an address with a signature whose end is unknown."""
    if "?" not in url or _MARKS(url) is None:
        return False
    query = _query(url)
    signed = any(query.get(name) for name in _CDN_SIGNATURES) or bool(_ends(query))
    return signed and expiry(url) is None


def deletion(flags: Sequence[str]) -> int | None:
    """Return the moment (Unix ms) at which the day begins (UTC) that a flag `deleted_on` names, None without one."""
    day = next((flag.removeprefix(DELETED_ON) for flag in flags if flag.startswith(DELETED_ON)), None)
    if day is None:
        return None
    try:
        return round(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp() * 1000)
    except ValueError:
        return None


def _query(url: str) -> dict[str, str]:
    """Return the parameters by their name in lower case, without the contradictory ones."""
    found: dict[str, str] = {}
    contradictory: set[str] = set()
    for part in url.partition("?")[2].partition("#")[0].split("&"):
        name, _, value = part.partition("=")
        name, value = unquote_plus(name).lower(), unquote_plus(value)
        if found.setdefault(name, value) != value:
            contradictory.add(name)
    return {name: value for name, value in found.items() if name not in contradictory}


def _ends(query: Mapping[str, str]) -> list[int | None]:
    """Return for each signature of the query the second at which it ends, None where that cannot be read."""
    ends: list[int | None] = []
    if query.get("expires") and query.get("signature") and any(query.get(name) for name in _ACCESS_KEYS):
        ends.append(_seconds(query["expires"]))  # OSS V1, OBS, S3 V2
    version = query.get("x-oss-signature-version", "").upper()
    if version == "OSS2" and "x-oss-expires" in query:
        ends.append(_seconds(query["x-oss-expires"]))
    elif version == "OSS4-HMAC-SHA256" and "x-oss-expires" in query:
        ends.append(_after(query.get("x-oss-date", ""), query["x-oss-expires"]))
    ends += [  # S3 V4, R2, MinIO, OBS; TOS
        _after(query[f"x-{vendor}-date"], query[f"x-{vendor}-expires"])
        for vendor in ("amz", "tos")
        if f"x-{vendor}-date" in query and f"x-{vendor}-expires" in query
    ]
    periods = [query[name] for name in ("q-sign-time", "q-key-time") if name in query]
    if periods and query.get("q-signature"):  # COS
        ends += [int(period[2]) if (period := _PERIOD(text)) else None for text in periods]
    if "e" in query and _QINIU_TOKEN(query.get("token", "")):
        ends.append(_seconds(query["e"]))
    return ends


def _seconds(text: str) -> int | None:
    return int(text) if _NUMBER(text) else None


def _after(date: str, seconds: str) -> int | None:
    """Return the second that is so many seconds after a date such as 20260131T235959Z."""
    if not _NUMBER(seconds):
        return None
    try:
        start = datetime.strptime(date.upper(), "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None
    return int(start.timestamp()) + int(seconds)
