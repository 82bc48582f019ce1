"""The gateway's signed envelope: opening it, and proving who sent it.

Everything here follows the platform's gateway document, which describes signed requests in general; that callbacks are
signed alike is not published, so whether an envelope must be there is the operator's choice and not decided here.

**The signature does not cover `file_list`**, nor any other object or array, so it never vouches for a `target_url`: it
says who sent the batch, and the guard judges the addresses as if anybody had sent them.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_private_key,
    load_der_public_key,
)

from notify_server.contract.wire import MAX_API_CODE, contract_error
from notify_server.errors import ContractError, SignatureError

# The gateway's forms are 16 and 6 characters; senders that keep to them loosely are let in.
MAX_APP_ID: Final = 64
MAX_NONCE: Final = 64
MAX_SIGN: Final = 255
MIN_KEY_BITS: Final = 1024

SIGNATURE_WRONG: Final = "401001"
TIMESTAMP_EXPIRED: Final = "403001"

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_str = msgspec.json.Decoder(str).decode

# Without a leading zero, so that the number's text is the text that was signed.
_MILLISECONDS = re.compile(r"[1-9][0-9]{12}")
_PEM = re.compile(r"-----BEGIN (?P<label>[A-Z0-9 ]+)-----(?P<base64>.*?)-----END (?P=label)-----", re.DOTALL)


class Spelling(NamedTuple):
    """How one of the two published spellings of the envelope calls what differs between them."""

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


class PlatformKey(msgspec.Struct, frozen=True):
    """A public key that the platform signs with.

    `fingerprint` is the first 16 hexadecimal digits of the SHA-256 of the key's DER SubjectPublicKeyInfo.
    """

    fingerprint: str
    public_key: rsa.RSAPublicKey

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` is this key's over `message`: SHA1withRSA, PKCS#1 v1.5 (gateway document)."""
        try:
            # SHA-1 is the platform's choice. A collision serves only someone who may choose what the platform signs.
            self.public_key.verify(signature, message, padding.PKCS1v15(), hashes.SHA1())  # noqa: S303
        except InvalidSignature:
            return False
        return True


def open_envelope(body: bytes) -> Envelope | None:
    """Open the signed envelope in `body`, in either spelling; None when `body` is not an envelope.

    An envelope is a JSON object with business parameters under `request_content` or `params` and no `file_list` of its
    own. When it has both, `request_content` counts and so does its spelling. None says nothing about what `body` is
    instead, which is for `parse_notification` to judge.

    Raises `ContractError`, with `field` in the sender's spelling, when it is an envelope but malformed: the id and
    `nonce` are 1-64 characters without `&`, the code 1-50, `timestamp` 13 digits (a number, or a string of them),
    `sign` at most 255 characters, the parameters an object or a string holding one as JSON. A missing or empty `sign`
    is not malformed but unproven: `verify` refuses it.
    """
    # Nearly every body is bare. Looking for the two names spares those a second decode; a name spelled with escapes is
    # missed, which makes the body a bare notification without a file_list.
    if b'"request_content"' not in body and b'"params"' not in body:
        return None
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


def canonical_strings(envelope: Envelope) -> list[str]:
    """The strings, one or two, whose UTF-8 bytes the envelope's signature may be over (gateway document).

    The envelope's id, nonce, timestamp and code and every scalar business parameter are sorted by name and joined as
    `name=value` with `&`. Strings stand as they are, numbers and booleans as in the JSON text, and null, which says
    that a parameter is not there, is left out; adding or removing one changes nothing, as `batch_id` may not be null.

    In the newer spelling the envelope and the notification both have an `api_code`, and which one is signed is not
    published. Where they differ the second string has the notification's. The price is that the code which the
    signature is not over is unproven. No other business parameter may take the place of the envelope's own: a
    parameter called `nonce` would leave the real one unsigned, and a captured request could be sent again.
    """
    covered = {
        **envelope.scalars,
        envelope.spelling.app_id: envelope.app_id,
        "nonce": envelope.nonce,
        "timestamp": str(envelope.timestamp),
        envelope.spelling.api_code: envelope.api_code,
    }
    strings = [_join(covered)]
    inner_code = envelope.scalars.get(envelope.spelling.api_code, envelope.api_code)
    if inner_code != envelope.api_code:
        strings.append(_join({**covered, envelope.spelling.api_code: inner_code}))
    return strings


def verify(envelope: Envelope, keys: Sequence[PlatformKey], *, now_ms: int, window_ms: int) -> PlatformKey:
    """Prove that the platform sent `envelope`, and lately; return the one of `keys` that verified it.

    `now_ms` is the server's time in Unix milliseconds. A timestamp may lie `window_ms` before or after it, inclusive.
    That the nonce is new is not checked here: see `nonce_key`.

    Raises `SignatureError` with the platform's code: 401001 when no key verifies the signature, 403001 when one does
    but the timestamp is outside the window. In that order, so that who cannot sign learns nothing of the clock.
    """
    if not envelope.sign:
        raise SignatureError(SIGNATURE_WRONG, "sign is missing")
    try:
        signature = base64.b64decode(envelope.sign, validate=True)
    except ValueError:
        raise SignatureError(SIGNATURE_WRONG, "sign is not base64") from None
    messages = [text.encode() for text in canonical_strings(envelope)]
    signer = next((key for key in keys if any(key.verifies(signature, message) for message in messages)), None)
    if signer is None:
        raise SignatureError(SIGNATURE_WRONG, f"sign verifies with none of {len(keys)} platform keys")
    off_ms = envelope.timestamp - now_ms
    if abs(off_ms) > window_ms:
        when = "ahead of" if off_ms > 0 else "behind"
        raise SignatureError(
            TIMESTAMP_EXPIRED, f"timestamp is {abs(off_ms)} ms {when} this clock, of {window_ms} allowed"
        )
    return signer


def nonce_key(envelope: Envelope) -> str:
    """The text under which the envelope's nonce is consumed: one for each pair of application id and nonce."""
    return f"{envelope.app_id}&{envelope.nonce}"


def load_platform_key(text: str) -> PlatformKey:
    """Read an RSA public key as the platform publishes it, bare base64 of a DER SubjectPublicKeyInfo, or as PEM.

    White space is ignored. Raises `ValueError` with one line for the operator, which repeats nothing of `text`: it may
    be a private key, pasted by mistake.
    """
    label, encoded = "", text
    if pem := _PEM.search(text):
        label, encoded = pem["label"], pem["base64"]
    if "PRIVATE KEY" in label:
        raise ValueError("a private key: put the platform's public key here, and treat this one as disclosed")
    if "CERTIFICATE" in label:
        raise ValueError("a certificate: put the public key inside it here (openssl x509 -pubkey -noout)")
    try:
        der = base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        raise ValueError("neither base64 of a DER public key nor PEM") from None
    if not der:
        raise ValueError("empty")
    try:
        public_key = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        if _is_private_key(der):
            raise ValueError(
                "a private key: put the platform's public key here, and treat this one as disclosed"
            ) from None
        raise ValueError("not a public key: the base64 holds no DER SubjectPublicKeyInfo") from None
    if not isinstance(public_key, rsa.RSAPublicKey):
        raise ValueError("not an RSA key: the platform signs with RSA")  # noqa: TRY004
    if public_key.key_size < MIN_KEY_BITS:
        raise ValueError(f"an RSA key of {public_key.key_size} bits: fewer than {MIN_KEY_BITS} can be forged")
    spki = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return PlatformKey(hashlib.sha256(spki).hexdigest()[:16], public_key)


def _is_private_key(der: bytes) -> bool:
    try:
        load_der_private_key(der, password=None)
    except TypeError:
        # cryptography's way to say that the key is encrypted.
        return True
    except (ValueError, UnsupportedAlgorithm):
        return False
    return True


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


def _join(covered: dict[str, str]) -> str:
    return "&".join(f"{name}={value}" for name, value in sorted(covered.items()))
