"""Decides from an answer whether the file can be used, beyond that it is there. Pure.

`empty` and `not_media` apply only if the object's key, or `[verify.usable] expect`, marks the file as a picture or a
video and the answer contradicts that. `archived` and `hotlink` come from the storage vendor's headers and error codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from typing import NamedTuple

from notify_server.config import UsableConfig
from notify_server.contract.expiry import DELETED_ON, is_signed
from notify_server.contract.object_key import decode_object_key
from notify_server.model import DueFile, Evidence, Reason

# Vendors' defaults for objects that were stored without a type.
OCTET_STREAM = frozenset({"application/octet-stream", "binary/octet-stream"})
_UNTYPED = ("application/octet", "binary/octet")
# Smaller than this, an object is likelier a message than a picture.
DOUBTFUL_BYTES = 1024
# x-oss-ec: the Referer is empty, on the blacklist, or not on the whitelist.
HOTLINK = frozenset({"0003-00000501", "0003-00000502", "0003-00000503"})
ARCHIVED_CODE = "InvalidObjectState"

# Objects of these classes cannot be read before they are restored.
_COLD = frozenset({"coldarchive", "deepcoldarchive", "glacier", "deep_archive"})
# An object of this class can be read where its bucket has real-time access.
_ARCHIVE = "archive"
_READABLE = frozenset({"Standard", "IA", "STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING"})
_KINDS = {"IMAGE": ("image/*",), "VIDEO": ("video/*",)}
# The kind in a key, `APPID/KIND/HASH/NAME`, and how the media types of the kind begin.
_KIND = slice(16, 23)
_PREFIXES = {"/IMAGE/": "image/", "/VIDEO/": "video/"}
_MARKUP = re.compile(r"text/.*|application/(?:json|xml|xhtml\+xml|.*\+json)")
_NONE: Mapping[str, str] = {}
_EXPIRY_DATE = re.compile(r'expiry-date="([^"]{1,64})"').search


class Problem(NamedTuple):
    """A contradiction. `final` ends the schedule; `undecided` leaves it to a GET."""

    reason: Reason
    final: bool = False
    undecided: bool = False


def media_types(key: str, rules: UsableConfig) -> Sequence[str]:
    """Return patterns of the media types that the file should have; none for a key that says nothing."""
    if rules.expect:
        return rules.expect
    decoded = decode_object_key(key) if key[16:17] == "/" else None
    return () if decoded is None else _KINDS.get(decoded.file_type, ())


def problem(key: str, evidence: Evidence, rules: UsableConfig, *, accepted: bool, method: str) -> Problem | None:
    """Return the first contradiction that is to fail the file."""
    for found in _problems(key, evidence, rules, accepted=accepted, method=method):
        if rules.action(found.reason) == "fail":
            return found
    return None


def wants_look(key: str, evidence: Evidence, rules: UsableConfig) -> bool:
    """Return True if the first bytes of the object are to decide, because the headers of an accepted answer do not."""
    if rules.sniff == "off" or rules.not_media == "off" or evidence.sniffed is not None:
        return False
    type, length = _type(evidence), evidence.content_length
    doubtful = not type or type in OCTET_STREAM or (length is not None and 0 < length < DOUBTFUL_BYTES)
    return (doubtful or rules.sniff == "all") and bool(media_types(key, rules))


def flags(
    file: DueFile, evidence: Evidence, rules: UsableConfig, *, accepted: bool, method: str, plain: bool
) -> tuple[str, ...]:
    """Return what is remarkable and no reason to fail, in a fixed order. `plain` is the result of `is_plain`."""
    found: list[str] = []
    key, url = file.oss_object_name, file.target_url
    type, headers = evidence.content_type, evidence.headers or _NONE
    if plain and type is not None and not type.startswith(_UNTYPED):
        if "content-disposition" in headers and _is_attachment(headers):
            found.append("attachment")
    else:
        problems = _problems(key, evidence, rules, accepted=accepted, method=method)
        found += [each.reason.value for each in problems if rules.action(each.reason) == "flag"]
        if accepted:
            found += _remarks(key, evidence, rules)
    if (day := deleted_on(evidence)) is not None:
        found.append(DELETED_ON + day)
    if url.startswith("http:"):
        found.append("plain_http")
    if file.expires_at is None and "?" in url and is_signed(url):
        found.append("signed")
    return tuple(found)


def deleted_on(evidence: Evidence) -> str | None:
    """Return the day (UTC, YYYY-MM-DD) on which a lifecycle rule deletes the object, as OSS and S3 announce it."""
    headers = evidence.headers
    if not headers:
        return None
    announced = headers.get("x-oss-expiration") or headers.get("x-amz-expiration")
    if not announced or (match := _EXPIRY_DATE(announced)) is None:
        return None
    try:
        return parsedate_to_datetime(match[1]).astimezone(UTC).date().isoformat()
    except (ValueError, OverflowError):
        return None


def is_plain(key: str, evidence: Evidence, rules: UsableConfig) -> bool:
    """Return True for the usual good answer, in which no rule can find anything, at the least cost."""
    if rules.expect or evidence.sniffed is not None:
        return False
    if headers := evidence.headers:
        storage = headers.get("x-oss-storage-class") or headers.get("x-amz-storage-class")
        if storage is not None and storage not in _READABLE:
            return False
    prefix = _PREFIXES.get(key[_KIND])
    if prefix is None:
        return True
    type, length = evidence.content_type, evidence.content_length
    return type is not None and type.startswith(prefix) and length is not None and length >= DOUBTFUL_BYTES


def _problems(key: str, evidence: Evidence, rules: UsableConfig, *, accepted: bool, method: str) -> Iterator[Problem]:
    headers = evidence.headers or _NONE
    if not accepted:
        if evidence.status == 403 and headers.get("x-oss-ec") in HOTLINK:
            yield Problem(Reason.HOTLINK, final=True)
        elif evidence.status == 403 and evidence.vendor_code == ARCHIVED_CODE:
            yield Problem(Reason.ARCHIVED, final=_restore(headers) != "true")
        return
    if media := media_types(key, rules):
        type = _type(evidence)
        if evidence.content_length == 0:
            yield Problem(Reason.EMPTY)
        elif any(_is_markup(each) and not _matches(each, media) for each in (type, _sniffed(evidence))):
            yield Problem(Reason.NOT_MEDIA)
    if method != "HEAD":
        return  # A GET was answered, so the object is not archived.
    storage = (headers.get("x-oss-storage-class") or headers.get("x-amz-storage-class") or "").lower()
    restore = _restore(headers)
    if storage in _COLD and restore != "false":
        yield Problem(Reason.ARCHIVED, final=restore is None)
    elif storage == _ARCHIVE and restore != "false":
        yield Problem(Reason.ARCHIVED, undecided=restore is None)


def _remarks(key: str, evidence: Evidence, rules: UsableConfig) -> list[str]:
    type, found = _type(evidence), []
    if type in OCTET_STREAM:
        found.append("octet_stream")
        type = ""
    media = media_types(key, rules)
    if media and any(
        each and not _is_markup(each) and not _matches(each, media) for each in (type, _sniffed(evidence))
    ):
        found.append("type_differs")
    if _is_attachment(evidence.headers or _NONE):
        found.append("attachment")
    return found


def _is_attachment(headers: Mapping[str, str]) -> bool:
    return headers.get("content-disposition", "")[:10].lower() == "attachment"


def _restore(headers: Mapping[str, str]) -> str | None:
    """Return "true" while a restore is under way, "false" when one has finished, None without one."""
    restore = headers.get("x-oss-restore") or headers.get("x-amz-restore") or ""
    return next((value for value in ("true", "false") if f'ongoing-request="{value}"' in restore), None)


def _type(evidence: Evidence) -> str:
    return (evidence.content_type or "").partition(";")[0].strip().lower()


def _sniffed(evidence: Evidence) -> str | None:
    """Return what the first bytes show, unless they are of a compressed body."""
    return None if "content-encoding" in (evidence.headers or {}) else evidence.sniffed


def _is_markup(type: str | None) -> bool:
    return bool(type) and _MARKUP.fullmatch(type or "") is not None


def _matches(type: str | None, patterns: Sequence[str]) -> bool:
    return type is not None and any(fnmatchcase(type, pattern) for pattern in patterns)
