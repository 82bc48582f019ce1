"""The gateway's signed envelope, opened. What proves who sent it is in signature.py.

Everything here follows the platform's gateway document, which describes signed requests in general; that callbacks are
signed alike is not published, so whether an envelope must be there is the operator's choice and not decided here.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

import msgspec

from notify_server.contract.wire import BOM, MAX_API_CODE, contract_error
from notify_server.errors import ContractError

# The gateway's forms have 16 and 6 characters; loose deviations of senders are accepted.
MAX_APP_ID: Final = 64
MAX_NONCE: Final = 64
# Base64 of a signature by the longest key that `load_platform_key` takes, 16,384 bits.
MAX_SIGN: Final = 2732

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_str = msgspec.json.Decoder(str).decode

# Without a leading zero, so that the number's text is the text that was signed.
_MILLISECONDS = re.compile(r"[1-9][0-9]{12}")


class Spelling(NamedTuple):
    """The names of the fields that differ between the two published spellings of the envelope."""

    app_id: str
    api_code: str
    parameters: str


NEWER: Final = Spelling("app_id", "api_code", "request_content")
OLDER: Final = Spelling("appId", "apiCode", "params")


class Envelope(msgspec.Struct, frozen=True):
    """An opened envelope; nothing in it is proven until `verify` has returned.

    `timestamp` is Unix milliseconds. `sign` is base64, or empty when the envelope came without one. `scalars` holds the
    business parameters that the signature covers, each value as the text that is signed. `notification` is the business
    parameters as UTF-8 JSON, for `parse_notification`; where they lack an `api_code` it has the envelope's.
    """

    spelling: Spelling
    app_id: str
    nonce: str
    timestamp: int
    sign: str
    api_code: str
    scalars: dict[str, str]
    notification: bytes


def open_envelope(body: bytes) -> Envelope | None:
    """Open the signed envelope in `body`, in either spelling; None when `body` is not an envelope.

    An envelope is a JSON object with business parameters under `request_content` or `params` and no `file_list` of its
    own. When it has both, `request_content` counts and so does its spelling. None says nothing about what `body` is
    instead, which is for `parse_notification` to judge.

    Raises `ContractError`, with `field` in the sender's spelling, when it is an envelope but malformed: the id and
    `nonce` are 1-64 characters without `&`, the code 1-50, `timestamp` 13 digits (a number, or a string of them),
    `sign` at most 2732 characters, the parameters an object or a string holding one as JSON. A missing or empty `sign`
    is not malformed but unproven: `verify` refuses it.
    """
    # Nearly every body is bare. Looking for the two names spares those a second decode; a name spelled with escapes is
    # missed, which makes the body a bare notification without a file_list.
    if b'"request_content"' not in body and b'"params"' not in body:
        return None
    body = body.removeprefix(BOM)
    try:
        body.decode()
        fields = _decode_fields(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    fields = _present(fields)
    spelling = next((names for names in (NEWER, OLDER) if names.parameters in fields), None)
    if spelling is None or "file_list" in fields:
        return None

    app_id = _identifier(fields, spelling.app_id, MAX_APP_ID)
    nonce = _identifier(fields, "nonce", MAX_NONCE)
    timestamp = _scalar(_required(fields, "timestamp")) or ""
    if not _MILLISECONDS.fullmatch(timestamp):
        raise ContractError("timestamp", "must be 13 digits, Unix milliseconds")
    sign = _text(fields["sign"], "sign", MAX_SIGN) if "sign" in fields else ""
    api_code = _text(_required(fields, spelling.api_code), spelling.api_code, MAX_API_CODE)
    if not api_code:
        raise ContractError(spelling.api_code, "empty")

    parameters, notification = _open_parameters(fields[spelling.parameters], spelling.parameters)
    if "api_code" not in parameters:
        notification = msgspec.json.encode({**parameters, "api_code": api_code})
    scalars = {name: text for name, raw in parameters.items() if (text := _scalar(raw)) is not None}
    return Envelope(spelling, app_id, nonce, int(timestamp), sign, api_code, scalars, notification)


def _present(fields: dict[str, msgspec.Raw]) -> dict[str, msgspec.Raw]:
    """The fields without those that are null: throughout the envelope, null says that a field is not there."""
    return {name: raw for name, raw in fields.items() if bytes(raw) != b"null"}


def _required(fields: dict[str, msgspec.Raw], name: str) -> msgspec.Raw:
    if name not in fields:
        raise ContractError(name, "missing")
    return fields[name]


def _text(raw: msgspec.Raw, name: str, longest: int) -> str:
    try:
        value = _decode_str(raw)
    except msgspec.DecodeError as error:
        raise contract_error(error, bytes(raw), whole=name) from None
    if len(value) > longest:
        raise ContractError(name, f"longer than {longest} characters")
    if "\0" in value:
        raise ContractError(name, "contains a NUL character")
    return value


def _identifier(fields: dict[str, msgspec.Raw], name: str, longest: int) -> str:
    value = _text(_required(fields, name), name, longest)
    if not value:
        raise ContractError(name, "empty")
    # Values are joined with & and never escaped. A nonce of "n&remark=x" would stand for the nonce n followed by a
    # parameter, so one signature would fit several nonces, and a captured request could be sent again.
    if "&" in value:
        raise ContractError(name, "must not contain &")
    return value


def _open_parameters(raw: msgspec.Raw, name: str) -> tuple[dict[str, msgspec.Raw], bytes]:
    text = bytes(raw)
    try:
        if text.startswith(b'"'):
            text = _decode_str(text).encode()
        return _present(_decode_fields(text)), text
    except (msgspec.DecodeError, RecursionError) as error:
        raise contract_error(error, text, whole=name) from None


def _scalar(raw: msgspec.Raw) -> str | None:
    """The text that is signed for a JSON value other than null; None for objects and arrays, which are not signed."""
    text = bytes(raw)
    if text.startswith(b'"'):
        return _decode_str(text)
    return None if text.startswith((b"{", b"[")) else text.decode()
