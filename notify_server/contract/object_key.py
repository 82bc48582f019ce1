"""Decodes an object's key, so that a person can see which source file it was."""

from __future__ import annotations

import base64
import codecs
import re
from typing import Final

import msgspec

# Standard and URL-safe base64 differ in two characters; no key seen so far has either. A "/" of the standard alphabet
# is part of the name: the first three segments cannot contain one.
_KEY = re.compile(
    r"(?P<app_id>[0-9A-Za-z]{16})/(?P<file_type>IMAGE|FILE|VIDEO|VR)/(?P<hash>0|-?[1-9][0-9]{0,9})"
    r"/(?P<name>[0-9A-Za-z+/_-]{32})"
)
_URL_SAFE_TO_STANDARD: Final = str.maketrans("-_", "+/")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class ObjectKey(msgspec.Struct, frozen=True):
    """A decoded object key, `APPID/TYPE/HASH/NAME`.

    `app_id` is the application's 16 characters, `file_type` one of IMAGE, FILE, VIDEO and VR, `hash_number` a signed
    32-bit integer. `source_path` is the beginning of the source file's path: the key holds its first 24 bytes only, so
    it is usually cut short, and a character that the cut divides is left out.
    """

    app_id: str
    file_type: str
    hash_number: int
    source_path: str


def decode_object_key(key: str) -> ObjectKey | None:
    """Read `key` (`oss_object_name`), or return None when it is not of the form seen in the platform's sample.

    The form is observed, not promised: nothing but display may depend on it. Never raises.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    hash_number = int(match["hash"])
    if not -(2**31) <= hash_number < 2**31:
        return None
    name = match["name"].translate(_URL_SAFE_TO_STANDARD)
    try:
        source_path = codecs.getincrementaldecoder("utf-8")().decode(base64.b64decode(name))
    except UnicodeDecodeError:
        return None
    if _CONTROL.search(source_path):
        return None
    return ObjectKey(match["app_id"], match["file_type"], hash_number, source_path)
