"""The gateway's signed envelope: proving who sent it (gateway document; envelope.py opens it).

**The signature does not cover `file_list`**, nor any other object or array, so it never vouches for a `target_url`: it
says who sent the batch, and the guard judges the addresses as untrusted.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from notify_server.contract.envelope import Envelope
from notify_server.errors import SignatureError

# cryptography takes 3 MiB, so it is imported where a key is used: most servers have none.
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

MIN_KEY_BITS: Final = 1024

SIGNATURE_WRONG: Final = "401001"
TIMESTAMP_EXPIRED: Final = "403001"

_PEM = re.compile(r"-----BEGIN (?P<label>[A-Z0-9 ]+)-----(?P<base64>.*?)-----END (?P=label)-----", re.DOTALL)


class PlatformKey(msgspec.Struct, frozen=True):
    """A public key that the platform signs with.

    `fingerprint` is the first 16 hexadecimal digits of the SHA-256 of the key's DER SubjectPublicKeyInfo.
    """

    fingerprint: str
    public_key: RSAPublicKey

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Return whether `signature` is this key's over `message`: SHA1withRSA, PKCS#1 v1.5 (gateway document)."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
        from cryptography.hazmat.primitives.hashes import SHA1

        try:
            # SHA-1 is the platform's choice. A collision helps only someone who can choose the text that the platform
            # signs.
            self.public_key.verify(signature, message, PKCS1v15(), SHA1())  # noqa: S303
        except InvalidSignature:
            return False
        return True


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
    but the timestamp is outside the window. In that order, so that a sender without a key learns nothing of the clock.
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
    """Return the text under which the envelope's nonce is consumed: one for each pair of application id and nonce."""
    return f"{envelope.app_id}&{envelope.nonce}"


def load_platform_key(text: str) -> PlatformKey:
    """Read an RSA public key as the platform publishes it, bare base64 of a DER SubjectPublicKeyInfo, or as PEM.

    White space is ignored. Raises `ValueError` with one line for the operator, which repeats nothing of `text`: it may
    be a private key, pasted by mistake.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

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
    if not isinstance(public_key, RSAPublicKey):
        raise ValueError("not an RSA key: the platform signs with RSA")  # noqa: TRY004
    if public_key.key_size < MIN_KEY_BITS:
        raise ValueError(f"an RSA key of {public_key.key_size} bits: fewer than {MIN_KEY_BITS} can be forged")
    spki = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return PlatformKey(hashlib.sha256(spki).hexdigest()[:16], public_key)


def _is_private_key(der: bytes) -> bool:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_der_private_key

    try:
        load_der_private_key(der, password=None)
    except TypeError:
        # cryptography raises this for an encrypted key.
        return True
    except (ValueError, UnsupportedAlgorithm):
        return False
    return True


def _join(covered: dict[str, str]) -> str:
    return "&".join(f"{name}={value}" for name, value in sorted(covered.items()))
