"""Sends mutated bodies, envelopes and requests to the daemon, and holds every answer against another reading of them.

That other reading (`Document`, `acceptable`, `proven`) is written from the platform's document with Python's own json,
and shares nothing with the daemon. Where it says yes the answer must be 200, where it says no a refusal that names the
field; what the contract leaves open, it leaves open.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support.daemon import Config, Daemon
from tests.support.notification import batch_body
from tests.torture.figures import Figure, Setting

BODIES = 100_000
# Of these, so many for each daemon that checks signatures.
SIGNED_SHARE = 0.03
BURST = 50
CALLERS = 12
SIGNED_CALLERS = 2
# Far beyond what any answer takes; only a body that never ends may take the daemon's body_timeout.
DEADLINE = 10.0
BODY_TIMEOUT = 0.5
MAX_FILES = 500
BODY_LIMIT = 2_000_000
ACCEPTED_SHARE = 0.15
MESSAGES = 60
GROWTH_MIB = 48
# Characters of each thing that should not be, for whoever has to find out why.
EXAMPLE = 4000

SAMPLES = Path(__file__).parents[1] / "samples"
SAMPLE = (SAMPLES / "notification.json").read_bytes()
VECTOR = json.dumps(json.loads((SAMPLES / "signature_vector.json").read_bytes())["envelope"]).encode()


# --- Another reading of the contract ---


class Number(str):
    """A JSON number as it was written."""


class Document(dict[str, Any]):
    """A JSON object; of a name given twice the last counts, and `repeats` tells that there was one."""

    repeats = False


def _document(pairs: list[tuple[str, Any]]) -> Document:
    made = Document(pairs)
    made.repeats = len(made) < len(pairs)
    return made


def _no_constant(name: str) -> None:
    raise ValueError(name)


_decoder = json.JSONDecoder(
    object_pairs_hook=_document, parse_int=Number, parse_float=Number, parse_constant=_no_constant
)


def _read(text: str) -> Any:
    """RFC 8259, and no more than that. Raises ValueError, RecursionError."""
    # What json takes for white space around the value is no more than the RFC does.
    stripped = text.strip(" \t\r\n")
    value, end = _decoder.raw_decode(stripped)
    if end != len(stripped):
        raise ValueError("trailing characters")
    return value


_surrogate = re.compile("[\ud800-\udfff]").search


def _is_text(value: Any, longest: int, shortest: int = 1) -> bool:
    return (
        isinstance(value, str)
        and not isinstance(value, Number)
        and shortest <= len(value) <= longest
        and "\0" not in value
        and _surrogate(value) is None
    )


_http_address = re.compile(r"[Hh][Tt][Tt][Pp][Ss]?://[^/?#]").match


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, Document) or not _is_text(entry.get("oss_object_name"), 1024):
        return False
    url = entry.get("target_url")
    if entry.get("status") == "FAILED":
        return url is None or _is_text(url, 300, 0)
    return entry.get("status") == "FINISHED" and _is_text(url, 300) and _http_address(str(url)) is not None


def _is_notification(value: Any) -> bool:
    if not isinstance(value, Document):
        return False
    files = value.get("file_list")
    return (
        _is_text(value.get("batch_id"), 80)
        and _is_text(value.get("api_code"), 50)
        and isinstance(files, list)
        and len(files) <= MAX_FILES
        and all(map(_is_entry, files))
    )


class Opened(NamedTuple):
    """An envelope in one of its spellings: its own fields, and the business parameters."""

    code_name: str
    id_name: str
    head: Document
    parameters: Any
    text: str


def _open(body: bytes, value: Any) -> Opened | None:
    """The envelope that a JSON value is, None when it is none. Raises ValueError, RecursionError."""
    if not isinstance(value, Document) or value.get("file_list") is not None:
        return None
    for name, id_name, code_name in (("request_content", "app_id", "api_code"), ("params", "appId", "apiCode")):
        # A name spelled with escapes is not looked for.
        if value.get(name) is not None and f'"{name}"'.encode() in body:
            inner = value[name]
            if isinstance(inner, str) and not isinstance(inner, Number):
                return Opened(code_name, id_name, value, _read(inner), inner)
            return Opened(code_name, id_name, value, inner, "")
    return None


def _well_formed(envelope: Opened) -> bool:
    head = envelope.head
    moment = head.get("timestamp")
    return (
        all(_is_text(head.get(name), 64) and "&" not in head[name] for name in (envelope.id_name, "nonce"))
        and _is_text(head.get(envelope.code_name), 50)
        and (head.get("sign") is None or _is_text(head["sign"], 255, 0))
        and isinstance(moment, str)
        and re.fullmatch(r"[1-9][0-9]{12}", moment, re.ASCII) is not None
        and isinstance(envelope.parameters, Document)
    )


def _repeats(value: Any) -> bool:
    return any(isinstance(node, Document) and node.repeats for node in _nodes(value))


def _half_pairs(value: Any) -> bool:
    texts = (text for node in _nodes(value) for text in ((node,) if isinstance(node, str) else node))
    return any(isinstance(text, str) and _surrogate(text) is not None for text in texts)


def _nodes(value: Any) -> Iterator[Any]:
    """All objects, arrays and strings in a value."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str | dict | list):
            yield node
        if isinstance(node, dict | list):
            waiting.extend(node.values() if isinstance(node, dict) else node)


def acceptable(body: bytes) -> bool | None:
    """Whether the contract takes this body, signed or not; None where it leaves that open.

    Open is whether the first of two fields of one name must be right as well, and whether a string in a field that is
    ignored may spell half a surrogate pair.
    """
    body = body.removeprefix(b"\xef\xbb\xbf")
    try:
        value = _read(body.decode())
        envelope = _open(body, value)
    except (ValueError, RecursionError):
        return False
    bare = value
    if envelope is not None:
        if not _well_formed(envelope):
            return False if not _repeats(value) else None
        bare = envelope.parameters
        if bare.get("api_code") is None:
            bare = _document([*bare.items(), ("api_code", envelope.head[envelope.code_name])])
    if not _is_notification(bare):
        return False if not _repeats(value) else None
    return None if _repeats(value) or _repeats(bare) or _half_pairs(value) or _half_pairs(bare) else True


def proven(body: bytes, key: rsa.RSAPublicKey) -> bool:
    """Whether the body is an envelope whose signature verifies, by the published recipe."""
    try:
        envelope = _open(body, _read(body.decode()))
        if envelope is None or not _well_formed(envelope):
            return False
        sign = base64.b64decode(envelope.head["sign"], validate=True)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    for text in _signed_texts(envelope):
        with contextlib.suppress(InvalidSignature, UnicodeEncodeError):
            key.verify(sign, text.encode(), padding.PKCS1v15(), hashes.SHA1())
            return True
    return False


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _signed_texts(envelope: Opened) -> Iterator[str]:
    own = {name: envelope.head[name] for name in (envelope.id_name, "nonce", "timestamp", envelope.code_name)}
    business = {name: value for name, value in envelope.parameters.items() if not isinstance(value, dict | list | None)}
    for covered in (business | own, own | business):
        # Only the code may be the notification's instead of the envelope's.
        fields = covered | {name: own[name] for name in own if name != envelope.code_name}
        yield "&".join(f"{name}={_scalar(fields[name])}" for name in sorted(fields))


# --- Requests ---


class Shot(NamedTuple):
    """A request. `expected` has the statuses that are right; None leaves it to the other reading of `body`.

    `framed` tells whether it is sound HTTP, so that its refusal is the daemon's own and names the field; `ends` that
    the connection is of no use afterwards.
    """

    kind: str
    request: bytes
    body: bytes
    expected: frozenset[int] | None = None
    framed: bool = True
    ends: bool = False


HEAD = b"POST /notify HTTP/1.1\r\nHost: fuzz\r\n"
JSON_TYPE = b"Content-Type: application/json\r\n"


def posted(kind: str, body: bytes, expected: frozenset[int] | None = None, head: bytes = HEAD + JSON_TYPE) -> Shot:
    """A body in a request that is all right."""
    return Shot(kind, b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body), body, expected)


# JSON that json.dumps would not write. A string "@raw3@" in a document stands for the third.
RAW = [
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, "-" + "9" * 5000, "1e-400", "0.1e1", "-0", "-0.0"),
    *("01", "+1", "1.", ".5", "0x10", "1_000", "--1", "1e", "tru", "None", "undefined", "'x'", "", ",", "/**/1"),
    *(
        r'"\ud800"',
        r'"\udc00\ud800"',
        r'"\ud83d\ude00"',
        r'"\u0000"',
        r'"a\u0000b"',
        r'"\x41"',
        r'"\u12"',
        '"\t"',
        '"\n"',
    ),
    *("[" * 600 + "]" * 600, "[" * 2000 + "]" * 2000, '{"x":' * 2000 + "1" + "}" * 2000, "[" * 5000),
    *('{"batch_id":"x","batch_id":1}', '{"a":1,"a":2,}', "[1,]", "[,1]", '{"a"}', '{"a":}', "{1:2}", '"x', "[1 2]"),
    *("9223372036854775808", "18446744073709551616", "-9223372036854775809", "1.7976931348623159e308", "\ufeff1"),
]
NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 1.5, 2**63, 2**64, -(2**63) - 1, 10**30, "", " ", "0", "null", "x", [], {}),
    *(
        [None],
        [[]],
        [{}],
        {"": ""},
        {"x": 1},
        "\0",
        "a\0b",
        "\ud800",
        "\udfff",
        "\ud83d\ude00",
        "\ufeff",
        "\u202e",
        "\x7f",
    ),
    *("\x1b[31m", "\r\n", "\t", "'\"", "\\", "\\u0000", "</script>", "'; DROP TABLE file; --", "=1+1", "%00", "${x}"),
    *(
        "批次",
        "é" * 80,
        "x" * 50,
        "x" * 51,
        "x" * 80,
        "x" * 81,
        "x" * 300,
        "x" * 301,
        "x" * 1024,
        "x" * 1025,
        "😀" * 80,
    ),
    *("FINISHED", "FAILED", "finished", "FINISHED ", "UPLOADING", "rent.dcentralize.room.add", "b&nonce=2", "1" * 13),
    *("http://h", "HTTPS://h/", "http://", "https:///x", "//h/x", "ftp://h/", "javascript:alert(1)", "http://h\\@x/"),
    *(
        "http://[::1/",
        "http://127.0.0.1/",
        "http://a b/",
        "http://\0/",
        "httpſ://h/",
        "http://u:p@h/",
        "http:/h",
        " http://h",
    ),
    *(
        "https://h/" + "x" * 290,
        "https://h/" + "x" * 291,
        "https://h/" + "é" * 290,
        "http://h:99999/",
        "http://\ud800/",
    ),
    *(f"@raw{number}@" for number in range(len(RAW))),
]
# Each of these weighs as much as hundreds of the others, and is sent accordingly seldom.
HUGE: list[Any] = [
    "x" * 1_000_000,
    "https://h/" + "x" * 1_000_000,
    [{"oss_object_name": str(n), "target_url": "https://h/", "status": "FINISHED"} for n in range(MAX_FILES)],
    [{"oss_object_name": str(n), "target_url": "https://h/", "status": "FINISHED"} for n in range(MAX_FILES + 1)],
    [None] * 10_001,
    {str(n): n for n in range(10_000)},
    "\0" * 50_000,
    "@raw-deep@",
]
DEEP = "[" * 100_000
NAMES = ["batch_id", "api_code", "file_list", "oss_object_name", "target_url", "status", "params", "request_content"]
NAMES += ["sign", "nonce", "timestamp", "app_id", "appId", "apiCode", "client_sign", "", "x", "\0", "__proto__"]
LETTERS = "abcXYZ0123456789-_./ é批😀\u202e"
TOKENS = [b'"', b"\\", b"\\u0000", b"\\ud800", b"{", b"}", b"[", b"]", b",", b":", b"null", b"NaN", b"1e999", b"\xff"]
TOKENS += [
    b"\xef\xbb\xbf",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\0",
    b"\r\n",
    b" ",
    b"\t",
    b'"file_list":',
    b'"params":{}',
    b"9" * 5000,
]

BAD_TYPES = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/xml",
    "json",
]
BAD_TYPES += [
    "application/json; charset=utf-16",
    "application/json;charset=gbk",
    "*/*",
    "application/",
    "/",
    "\xff\xfe",
]
GOOD_TYPES = [
    "application/json",
    "application/json; charset=utf-8",
    'APPLICATION/JSON; charset="UTF-8"',
    "text/json",
    "",
]
GOOD_TYPES += ["application/problem+json", "application/json;;", ";", "application/json; charset=us-ascii"]
METHODS = ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"]
REFUSED = frozenset({400, 405, 408, 411, 413, 414, 415, 417, 431, 501, 505})


class Mutator:
    """Makes requests without end, the same ones from the same `chance`."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self._bases = [
            SAMPLE,
            VECTOR,
            batch_body("fuzz", ["https://h/1"]),
            batch_body("fuzz", []),
            b'{"batch_id":"b","api_code":"a","file_list":[{"oss_object_name":"k","status":"FAILED"}],"extra":{"a":[1]}}',
            *(self._envelope(newer, as_text) for newer in (True, False) for as_text in (True, False)),
        ]

    def _envelope(self, newer: bool, as_text: bool) -> bytes:
        inner: Any = json.loads(batch_body("fuzz", ["https://h/1"]))
        parameters: Any = json.dumps(inner) if as_text else inner
        names = ("app_id", "api_code", "request_content") if newer else ("appId", "apiCode", "params")
        values = ("8ZAFUPII49GQN2AB", "code", parameters)
        head = dict(zip(names, values, strict=True)) | {
            "nonce": "123AO9",
            "timestamp": 1_604_990_109_987,
            "sign": "AAAA",
        }
        return json.dumps(head).encode()

    def shot(self) -> Shot:
        """The next request."""
        chance = self.chance.random()
        if chance < 0.35:
            return posted("structure", self.structural())
        if chance < 0.65:
            return posted("bytes", self.bytewise(self.chance.choice(self._bases)))
        if chance < 0.85:
            return posted("plausible", self.plausible())
        if chance < 0.89:
            return posted("encoding", self.recoded())
        if chance < 0.9925:
            return self.request()
        if chance < 0.9975:
            return self.unfinished()
        return posted("huge", self.huge())

    # Documents

    def written(self, document: Any) -> bytes:
        """The document as JSON, in one of its spellings."""
        text = json.dumps(
            document,
            ensure_ascii=self.chance.random() < 0.5,
            indent=self.chance.choice((None, None, 1)),
            separators=self.chance.choice((None, (",", ":"))),
        )
        if "@raw" in text:
            text = re.sub(r'"@raw(\d+)@"', lambda found: RAW[int(found[1])], text).replace('"@raw-deep@"', DEEP)
        return text.encode("utf-8", "surrogatepass")

    def structural(self, document: Any = None) -> bytes:
        """A document of which some nodes were replaced, deleted, doubled, swapped or named otherwise."""
        chance = self.chance
        if document is None:
            document = json.loads(chance.choice(self._bases))
        for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
            places = list(_places(document))
            if not places:
                break
            holder, key = chance.choice(places)
            act = chance.randrange(7)
            if act <= 1:
                holder[key] = _fresh(chance.choice(NASTY))
            elif act == 2:
                del holder[key]
            elif act == 3:
                other, there = chance.choice(places)
                # Not into itself: the copy is written out first.
                holder[key] = json.loads(json.dumps(other[there]))
            elif act == 4 and isinstance(holder, list):
                holder.insert(chance.randrange(len(holder) + 1), _fresh(chance.choice([*NASTY, holder[key]])))
            elif act == 5 and isinstance(holder, dict):
                holder[chance.choice(NAMES)] = holder.pop(key)
            elif isinstance(holder, dict):
                holder[chance.choice(NAMES)] = _fresh(chance.choice(NASTY))
        body = self.written(document)
        if chance.random() < 0.05:
            # A name given twice, which no dict can say.
            name = json.dumps(chance.choice(NAMES)).encode()
            value = self.written(_fresh(chance.choice(NASTY)))
            body = body.replace(b"{", b"{" + name + b":" + value + b",", chance.choice((1, 1, -1)))
        return body

    def bytewise(self, body: bytes) -> bytes:
        """A body of which some bytes are others."""
        chance = self.chance
        data = bytearray(body)
        for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
            at = chance.randrange(len(data) + 1)
            act = chance.randrange(8)
            if act == 0 and at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            elif act == 1 and at < len(data):
                data[at] = chance.randrange(256)
            elif act == 2:
                data[at:at] = chance.choice(TOKENS)
            elif act == 3:
                del data[at : at + chance.choice((1, 1, 2, 10, 100))]
            elif act == 4:
                other = chance.choice(self._bases)
                cut = chance.randrange(len(other))
                data[at : at + chance.choice((0, 20))] = other[cut : cut + chance.choice((1, 10, 200))]
            elif act == 5 and chance.random() < 0.3:
                del data[at:]
            elif act == 6:
                # Letters for letters leave it as right as it was.
                data = bytearray(re.sub(rb"[a-f]", lambda _: b"%c" % chance.choice(b"abcdef"), bytes(data), count=3))
            elif act == 7:
                data[:0] = chance.choice((b" ", b"\r\n", b"\t", b" "))
        return bytes(data)

    def _text(self, longest: int) -> str:
        length = self.chance.choice(
            (1, 2, 5, longest // 2, longest - 1, longest, longest, longest + (self.chance.random() < 0.1))
        )
        return "".join(self.chance.choices(LETTERS, k=max(1, length)))

    def plausible(self) -> bytes:
        """A notification that is right, or wrong by a hair, at the edges of the contract."""
        chance = self.chance
        files: list[dict[str, Any]] = []
        for _ in range(chance.choice((0, 1, 1, 2, 7, 20))):
            status = chance.choice(("FINISHED", "FINISHED", "FAILED"))
            entry: dict[str, Any] = {"oss_object_name": self._text(chance.choice((20, 1024))), "status": status}
            if status == "FINISHED" or chance.random() < 0.5:
                entry["target_url"] = chance.choice(("http://h/", "https://h/", "HTTP://h?")) + self._text(290)
            if status == "FAILED" and chance.random() < 0.3:
                entry["target_url"] = chance.choice((None, "", "n/a"))
            if chance.random() < 0.1:
                entry[chance.choice(("size", "etag"))] = _fresh(chance.choice(NASTY[:18]))
            files.append(entry)
        document = {"batch_id": self._text(80), "api_code": self._text(50), "file_list": files}
        if chance.random() < 0.2:
            document[chance.choice(("extra", "\0", "ext"))] = _fresh(chance.choice(NASTY))
        return self.written(dict(chance.sample(list(document.items()), len(document))))

    def recoded(self) -> bytes:
        """A body in another encoding, or of another kind altogether."""
        text = self.chance.choice(self._bases).decode()
        encodings = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "utf-8-sig", "utf-7", "cp037")
        whole = (
            b"",
            b" ",
            b"[]",
            b'"x"',
            b"null",
            b"1",
            b"batch_id=b",
            b"<xml/>",
            b"\0" * 10,
            b"{}",
            b"[{}]",
            b"\x1f\x8b\x08",
        )
        if self.chance.random() < 0.5:
            return self.chance.choice(whole)
        return text.encode(self.chance.choice(encodings))

    def huge(self) -> bytes:
        """A body with something very large in it, or a very large body."""
        document = json.loads(self.chance.choice(self._bases))
        document[self.chance.choice(NAMES)] = self.chance.choice(HUGE)
        return self.written(document)

    # Requests

    def request(self) -> Shot:
        """A body that is all right most of the time, in a request that is not."""
        chance = self.chance
        body = self.plausible() if chance.random() < 0.5 else SAMPLE
        return chance.choice(
            (self._typed, self._typed, self._method, self._encoded, self._expecting, self._chunked, self._chunked,
             self._badly_chunked, self._lengths, self._headers)
        )(body)  # fmt: skip

    def _typed(self, body: bytes) -> Shot:
        good = self.chance.random() < 0.5
        value = self.chance.choice(GOOD_TYPES if good else BAD_TYPES).encode("latin-1")
        # What it says does not matter.
        return posted("type", body, None, HEAD + b"Content-Type: " + value + b"\r\n")

    def _method(self, body: bytes) -> Shot:
        head = self.chance.choice(METHODS).encode() + HEAD[4:]
        return posted("method", body, frozenset({405}), head + JSON_TYPE)

    def _encoded(self, body: bytes) -> Shot:
        value = self.chance.choice((b"gzip", b"deflate", b"br", b"identity", b"", b"x, gzip", b"GZIP"))
        body = self.chance.choice((body, b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + body, b"\x78\xda" + body))
        refused = None if value in (b"identity", b"") else frozenset({415})
        return posted("encoding header", body, refused, HEAD + JSON_TYPE + b"Content-Encoding: " + value + b"\r\n")

    def _expecting(self, body: bytes) -> Shot:
        good = self.chance.random() < 0.7
        value = self.chance.choice((b"100-continue", b"100-Continue", b"") if good else (b"200-ok", b"100-continue, x"))
        shot = posted(
            "expect", body, None if good else frozenset({417}), HEAD + JSON_TYPE + b"Expect: " + value + b"\r\n"
        )
        return shot._replace(ends=not good)

    def _chunked(self, body: bytes) -> Shot:
        chunks: list[bytes] = []
        rest = body
        while rest:
            size = self.chance.choice((1, 2, 7, 100, 1000, 5000)) if len(chunks) < 40 else len(rest)
            part, rest = rest[:size], rest[size:]
            digits = self.chance.choice(("%x", "%X", "%04x", "0000000%x")) % len(part)
            extension = self.chance.choice(("", "", ";x=y", ';x="a b"'))
            chunks.append(f"{digits}{extension}\r\n".encode() + part + b"\r\n")
        trailer = self.chance.choice((b"", b"", b"X-Trailer: 1\r\n"))
        stream = b"".join(chunks) + b"0\r\n" + trailer + b"\r\n"
        return Shot("chunked", HEAD + JSON_TYPE + b"Transfer-Encoding: chunked\r\n\r\n" + stream, body)

    def _badly_chunked(self, body: bytes) -> Shot:
        size = b"%x" % len(body)
        stream = self.chance.choice(
            (
                *(b"zz\r\n" + body, b"-1\r\n" + body, b"F" * 17 + b"\r\n" + body, b"\r\n" + body, b"0x10\r\n" + body),
                *(
                    size + b"\r\n" + body + b"XX0\r\n\r\n",
                    b" " + size + b"\r\n" + body + b"\r\n0\r\n\r\n",
                    b"+1\r\n{\r\n0\r\n\r\n",
                ),
                *(
                    size + b"\n" + body + b"\n0\n\n",
                    b"1_0\r\n" + body + b"\r\n0\r\n\r\n",
                    size + b";" + b"x" * 9000 + b"\r\n",
                ),
            )
        )
        head = HEAD + JSON_TYPE + b"Transfer-Encoding: chunked\r\n\r\n"
        return Shot("bad chunks", head + stream, body, REFUSED, framed=False, ends=True)

    def _lengths(self, body: bytes) -> Shot:
        right = b"%d" % len(body)
        lines, expected = self.chance.choice(
            [
                *(
                    ([value], REFUSED)
                    for value in (b"-1", b"+5", b"abc", b"", b"1e3", b"0x10", b"5,5", b"5 5", b"\xb2", b"1_0")
                ),
                *(([value], frozenset({413})) for value in (b"99999999", b"%d" % (BODY_LIMIT + 1))),
                ([b"9" * 30], REFUSED),
                ([b"0"], frozenset({400})),
                ([b"%d" % (len(body) // 2)], REFUSED),
                ([right, b"5"], REFUSED),
                ([right, right], REFUSED | {200}),
                ([b"000" + right], REFUSED | {200}),
                ([b" " + right + b" "], REFUSED | {200}),
                ([right + b"\r\nTransfer-Encoding: chunked"], REFUSED),
                ([right + b"\r\nTransfer-Encoding: identity"], REFUSED),
                ([b"5\r\nTransfer-Encoding: xchunked"], REFUSED),
            ]
        )
        head = HEAD + JSON_TYPE + b"".join(b"Content-Length: " + line + b"\r\n" for line in lines)
        return Shot("lengths", head + b"\r\n" + body, body, frozenset(expected), framed=False, ends=True)

    def _headers(self, body: bytes) -> Shot:
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        either = REFUSED | {200, 404}
        start, expected = self.chance.choice(
            [
                (HEAD + b"".join(b"X-%d: y\r\n" % n for n in range(200)), either),
                (HEAD + b"X: " + b"y" * 9000 + b"\r\n", REFUSED),
                (HEAD + b"X: " + b"y" * 100_000 + b"\r\n", REFUSED),
                (HEAD + b"Host: other\r\n", either),
                (b"POST /notify HTTP/1.1\r\n", either),
                (b"POST /notify HTTP/1.0\r\nHost: x\r\n", either),
                (b"POST /notify HTTP/3.7\r\nHost: x\r\n", either),
                (b"POST /notify\r\nHost: x\r\n", either),
                (b"POST\r\nHost: x\r\n", REFUSED),
                (b"P\xd6ST /notify HTTP/1.1\r\nHost: x\r\n", REFUSED),
                (b"POST /notify HTTP/1.1 x\r\nHost: x\r\n", REFUSED),
                (b"POST http://elsewhere/notify HTTP/1.1\r\nHost: x\r\n", either),
                (b"POST /notify?" + b"q" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n", REFUSED),
                (b"POST /notify/../notify HTTP/1.1\r\nHost: x\r\n", either),
                (b"POST /%00\xff HTTP/1.1\r\nHost: x\r\n", REFUSED | {404}),
                (HEAD + b"X y: z\r\n", REFUSED),
                (HEAD + b"X: a\0b\r\n", REFUSED),
                (HEAD + b": empty\r\n", REFUSED),
                (HEAD + b"no colon\r\n", REFUSED),
                (HEAD + b"X: a\r\n folded\r\n", either),
                (HEAD + b"X: a\rb\r\n", REFUSED),
                (HEAD + b"Upgrade: websocket\r\nConnection: Upgrade\r\n", either),
                (HEAD + b"Connection: close\r\n", frozenset({200, 400})),
                (HEAD + b"Authorization: Bearer \xff\xfe\r\nX-Forwarded-For: \xff, ::1%x\r\n", frozenset({200, 400})),
            ]
        )
        request = start + JSON_TYPE + length + body
        return Shot("headers", request, body, frozenset(expected), framed=False, ends=True)

    def unfinished(self) -> Shot:
        """A request whose body never comes to its end: answered when its time is up."""
        body = SAMPLE[: self.chance.randrange(len(SAMPLE))]
        if self.chance.random() < 0.5:
            request = HEAD + JSON_TYPE + b"Content-Length: %d\r\n\r\n" % len(SAMPLE) + body
        else:
            request = HEAD + JSON_TYPE + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(SAMPLE) + body
        return Shot("unfinished", request, body, frozenset({408}), ends=True)


Place = tuple[Any, Any]


def _places(document: Any) -> Iterator[Place]:
    """Every node below the root, as what holds it and its name or number there."""
    waiting = [document]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                yield node, key
                waiting.append(node[key])


def _fresh(value: Any) -> Any:
    """The value; a container as a copy, so that later changes do not reach the pool."""
    return json.loads(json.dumps(value)) if isinstance(value, dict | list) else value


class SignedMutator(Mutator):
    """Makes envelopes that are signed, and changed before or after that."""

    def __init__(self, chance: random.Random, key: rsa.RSAPrivateKey, *, bare: frozenset[int] | None) -> None:
        super().__init__(chance)
        self._key = key
        self._bare = bare
        self._number = 0
        self._tag = f"{chance.randrange(1 << 40):x}"
        self._sent = b""

    def shot(self) -> Shot:
        """The next request. Timestamps are those of now, so it is to be sent at once."""
        chance = self.chance.random()
        if chance < 0.2:
            self._sent = self.envelope({})
            return posted("signed", self._sent, frozenset({200}))
        if chance < 0.25 and self._sent:
            return posted("repeated", self._sent, frozenset({403}))
        if chance < 0.4:
            # The signature does not cover the list, so who reads it last has the last word.
            return posted("signed, list changed", self.envelope({"file_list": self.plausible_list()}))
        if chance < 0.5:
            return posted("signed, changed", self.envelope({"batch_id": "another"}), frozenset({401}))
        if chance < 0.55:
            return posted(
                "signed long ago", self.envelope({}, age_ms=self.chance.choice((60_000, -60_000))), frozenset({403})
            )
        if chance < 0.7:
            return posted("signed, bytes", self.bytewise(self.envelope({})), self._anything())
        if chance < 0.85:
            return posted("signed, structure", self.structural(json.loads(self.envelope({}))), self._anything())
        if chance < 0.9:
            return posted("not signed", batch_body("bare", ["https://h/1"]), self._bare)
        return posted("plausible, not signed", self.plausible(), None if self._bare is None else self._anything())

    def _anything(self) -> frozenset[int]:
        return frozenset({200, 400, 401, 403})

    def plausible_list(self) -> Any:
        """A file_list, right or wrong by a hair."""
        while True:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(self.plausible())["file_list"]

    def envelope(self, changes: dict[str, Any], age_ms: int = 0) -> bytes:
        """An envelope signed so long ago, whose parameters were changed after that."""
        self._number += 1
        newer, as_text = self.chance.random() < 0.5, self.chance.random() < 0.5
        id_name, code_name, name = (
            ("app_id", "api_code", "request_content") if newer else ("appId", "apiCode", "params")
        )
        head = {
            id_name: "8ZAFUPII49GQN2AB",
            "nonce": f"{self._tag}-{self._number}",
            "timestamp": time.time_ns() // 1_000_000 - age_ms,
            code_name: "code",
        }
        business = {
            "batch_id": f"signed-{self._tag}-{self._number % 100}",
            "api_code": "code",
            "size": 1.5,
            "flag": True,
        }
        covered = business | head
        text = "&".join(f"{key}={_scalar(covered[key])}" for key in sorted(covered))
        sign = base64.b64encode(self._key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA1())).decode()
        parameters: Any = business | {"file_list": json.loads(SAMPLE)["file_list"]} | changes
        return json.dumps(head | {name: json.dumps(parameters) if as_text else parameters, "sign": sign}).encode()


# --- Sending it ---


class Answer(NamedTuple):
    """What came back, and after how many seconds."""

    status: int
    body: bytes
    seconds: float
    last: bool


class Line:
    """A connection to the daemon, made when it is needed, kept as long as the daemon keeps it."""

    def __init__(self, host: str, port: int) -> None:
        self._to = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, shot: Shot) -> Answer | None:
        """Send it and read the answer, None when the connection ended without one. Raises TimeoutError."""
        for fresh in (False, True):
            reused = self._writer is not None
            if self._writer is None:
                self._reader, self._writer = await asyncio.open_connection(*self._to, limit=1 << 20)
            began = time.monotonic()
            try:
                async with asyncio.timeout(DEADLINE):
                    self._writer.write(shot.request)
                    answer = await self._read(shot.request.startswith(b"HEAD "), began)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                self.drop()
                # The daemon may close a connection that waits for a request (RFC 9112 9.3.1): that one is sent again.
                if fresh or not reused or (isinstance(error, asyncio.IncompleteReadError) and error.partial):
                    return None
                continue
            except TimeoutError:
                self.drop()
                raise
            if shot.ends or answer.last:
                self.drop()
            return answer
        return None

    async def _read(self, headless: bool, began: float) -> Answer:
        assert self._reader is not None
        while True:
            head = await self._reader.readuntil(b"\r\n\r\n")
            status = int(head[9:12])
            if status >= 200:
                break
        length = re.search(rb"\r\ncontent-length: *([0-9]+)\r\n", head, re.IGNORECASE)
        size = 0 if headless or length is None else int(length[1])
        body = await self._reader.readexactly(size)
        last = re.search(rb"\r\nconnection: *close\r\n", head, re.IGNORECASE) is not None
        return Answer(status, body, time.monotonic() - began, last)

    def drop(self) -> None:
        """Close it."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None


@dataclass
class Tally:
    """What was seen. The lists keep a few of each for whoever has to find out why."""

    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    accepted_by_kind: Counter[str] = field(default_factory=Counter)
    sent_by_kind: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    hung: int = 0
    silent: int = 0
    good: int = 0
    good_refused: int = 0
    judged: int = 0
    left_open: int = 0
    wrong: int = 0
    nameless: int = 0
    examples: list[str] = field(default_factory=list)

    def note(self, what: str, shot: Shot, answer: Answer | None) -> None:
        """Keep an example of what should not be."""
        if len(self.examples) < 20:
            text = "" if answer is None else f"{answer.status} {answer.body[:200]!r}"
            self.examples.append(f"{what}: {shot.kind}: {text} to {shot.request[:120]!r} … {shot.body!r}")


# A field by its path, or "body", or a header, and the fault in it.
_names_a_field = re.compile(r"[A-Za-z_-]+(\[[0-9]+\])?(\.[A-Za-z_]+)*: .{3}", re.DOTALL).match
NO_FIELD = frozenset({401, 403, 405, 408})


class Campaign:
    """Sends to one daemon, and judges. `key` is the platform's when the daemon checks signatures."""

    def __init__(self, daemon: Daemon, tally: Tally, *, key: rsa.RSAPublicKey | None = None, name: str = "") -> None:
        found = re.fullmatch(r"http://([0-9.]+):([0-9]+)/notify", daemon.callback)
        assert found
        self._to = found[1], int(found[2])
        self._daemon = daemon
        self._tally = tally
        self._key = key
        self._name = name
        self._goods = 0
        self.acked = 0
        self.complaints = 0

    async def run(self, mutators: Sequence[Mutator], bodies: int, good: Callable[[str], bytes]) -> None:
        """Send so many, each mutator's on a connection of its own."""
        shares = [bodies // len(mutators) + (n < bodies % len(mutators)) for n in range(len(mutators))]
        await asyncio.gather(
            *(self._caller(mutator, share, good) for mutator, share in zip(mutators, shares, strict=True))
        )

    async def _caller(self, mutator: Mutator, bodies: int, good: Callable[[str], bytes]) -> None:
        line = Line(*self._to)
        try:
            for number in range(1, bodies + 1):
                shot = mutator.shot()
                self._judge(shot, await self._ask(line, shot))
                if number % BURST == 0 or number == bodies:
                    await self._good(line, good)
        finally:
            line.drop()

    async def _ask(self, line: Line, shot: Shot) -> Answer | None:
        tally = self._tally
        tally.sent += 1
        tally.sent_by_kind[shot.kind] += 1
        try:
            answer = await line.ask(shot)
        except TimeoutError:
            tally.hung += 1
            tally.note("no answer in time", shot, None)
            return None
        if answer is None:
            tally.silent += 1
            tally.note("closed without an answer", shot, None)
        return answer

    async def _good(self, line: Line, good: Callable[[str], bytes]) -> None:
        self._goods += 1
        self.skim()
        shot = posted("good", good(f"good-{self._name}-{self._goods}"))
        answer = None
        with contextlib.suppress(TimeoutError):
            answer = await line.ask(shot)
        self._tally.good += 1
        if answer is not None and answer.status == 200:
            self.acked += 1
        else:
            self._tally.good_refused += 1
            self._tally.note("a good one was refused", shot, answer)

    def skim(self) -> None:
        """Look through the log so far for what should not be in it, and forget it: it has a line for each refusal."""
        complaints = [line for line in self._daemon.lines if line["level"] not in ("info", "warning")]
        for line in complaints[:3]:
            print(ascii(line)[:EXAMPLE], file=sys.stderr)
        self.complaints += len(complaints)
        self._daemon.lines.clear()
        self._daemon.text = ""

    def _judge(self, shot: Shot, answer: Answer | None) -> None:
        tally = self._tally
        if answer is None:
            return
        tally.statuses[answer.status] += 1
        tally.longest = max(tally.longest, answer.seconds)
        if answer.status == 200:
            self.acked += 1
            tally.accepted_by_kind[shot.kind] += 1
        elif shot.framed and not self._names_what_is_wrong(shot, answer):
            tally.nameless += 1
            tally.note("names nothing", shot, answer)
        self._compare(shot, answer)

    def _names_what_is_wrong(self, shot: Shot, answer: Answer) -> bool:
        if shot.request.startswith(b"HEAD "):
            return True
        try:
            reply = json.loads(answer.body)
            message = reply["msg"]
            whole = set(reply) == {"request_id", "code", "msg", "data"} and str(answer.status) == reply["code"][:3]
        except (ValueError, KeyError, TypeError):
            return False
        self._tally.messages[re.sub(r"[0-9]+", "N", message)[:80]] += 1
        return whole and (answer.status in NO_FIELD or _names_a_field(message) is not None)

    def _compare(self, shot: Shot, answer: Answer) -> None:
        tally = self._tally
        accepted = answer.status == 200
        fits = shot.expected is None or answer.status in shot.expected
        reading = acceptable(shot.body) if accepted or shot.expected is None else None
        if self._key is not None and shot.expected is None:
            # Only the status shows whether the content or the proof was refused.
            fits = answer.status in {200, 400, 401, 403}
        if accepted:
            fits = fits and reading is not False
            if self._key is not None and _looksenvelope(shot.body):
                fits = fits and proven(shot.body, self._key)
        elif shot.expected is None and reading is True and (self._key is None or answer.status not in {401, 403}):
            fits = False
        tally.left_open += reading is None and shot.expected is None
        tally.judged += 1
        if not fits:
            tally.wrong += 1
            tally.note(f"the other reading says {reading}", shot, answer)


def _looksenvelope(body: bytes) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        return _open(body, _read(body.decode())) is not None
    return False


# --- The part ---


def settings(**auth: Any) -> Config:
    """The daemon's configuration: all hosts but one that does not exist are refused, so nothing is asked for."""
    return {
        "server": {"body_timeout": BODY_TIMEOUT, "body_limit_bytes": BODY_LIMIT},
        "contract": {"max_files": MAX_FILES},
        "verify": {"allowed_hosts": ["files.invalid"]},
        "log": {"format": "json"},
        "auth": auth,
    }


def resident_mib(pid: int) -> float:
    """The memory that a process has, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


async def run(setting: Setting) -> list[Figure]:
    """Send 100,000 bodies at scale 1 and judge every answer."""
    bodies = setting.times(BODIES)
    signed = setting.times(round(BODIES * SIGNED_SHARE))
    chance = random.Random(setting.seed)
    private = rsa.generate_private_key(65537, 1024)
    public = private.public_key()
    text = base64.b64encode(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()
    tally = Tally()
    keys = [text]

    def chances(number: int) -> Iterable[random.Random]:
        return [random.Random(chance.getrandbits(64)) for _ in range(number)]

    async with (
        Daemon(setting.work / "bare", settings()) as bare,
        Daemon(setting.work / "optional", settings(signature="optional", platform_keys=keys)) as optional,
        Daemon(setting.work / "required", settings(signature="required", platform_keys=keys)) as required,
    ):
        plain = [Mutator(each) for each in chances(CALLERS)]
        either = [SignedMutator(each, private, bare=frozenset({200})) for each in chances(SIGNED_CALLERS)]
        only = [SignedMutator(each, private, bare=frozenset({401})) for each in chances(SIGNED_CALLERS)]
        campaigns = [
            Campaign(bare, tally, name="bare"),
            Campaign(optional, tally, key=public, name="optional"),
            Campaign(required, tally, key=public, name="required"),
        ]

        def unsigned(batch_id: str) -> bytes:
            return batch_body(batch_id, ["https://h/1"])

        half = (bodies - 2 * signed) // 2
        began = time.monotonic()
        memory = [resident_mib(bare.pid)]
        await campaigns[0].run(plain, half, unsigned)
        memory.append(resident_mib(bare.pid))
        await asyncio.gather(
            campaigns[0].run(plain, bodies - 2 * signed - half, unsigned),
            campaigns[1].run(either, signed, unsigned),
            campaigns[2].run(only, signed, lambda _: only[0].envelope({})),
        )
        memory.append(resident_mib(bare.pid))
        seconds = time.monotonic() - began
        rows, complaints = 0, 0
        for daemon, campaign in zip((bare, optional, required), campaigns, strict=True):
            await daemon.eventually("SELECT count(*) = 0 FROM notification WHERE expanded_at IS NULL", seconds=60)
            rows += daemon.value("SELECT count(*) FROM notification")
            complaints += daemon.value("SELECT count(*) FROM batch WHERE verdict = 'pending'")
            complaints += await daemon.terminate() != 0
            campaign.skim()
            complaints += campaign.complaints
    for example in tally.examples:
        print(ascii(example)[:EXAMPLE], file=sys.stderr)
    return _figures(tally, bodies, sum(each.acked for each in campaigns), rows, complaints, memory, seconds)


def _figures(
    tally: Tally, bodies: int, acked: int, rows: int, complaints: int, memory: list[float], seconds: float
) -> list[Figure]:
    accepted = sum(tally.accepted_by_kind.values())
    share = accepted / max(1, tally.sent)
    growth = memory[2] - memory[1]
    kinds = {f"sent, {kind}": number for kind, number in sorted(tally.sent_by_kind.items())}
    taken = {f"accepted, {kind}": number for kind, number in sorted(tally.accepted_by_kind.items())}
    statuses = {f"status {status}": number for status, number in sorted(tally.statuses.items())}
    fives = sum(number for status, number in tally.statuses.items() if status >= 500)
    # A short run does not get to all of them.
    wanted_messages = MESSAGES if tally.sent >= 20_000 else MESSAGES // 3
    return [
        Figure("bodies sent", f"{bodies:,}", f"{tally.sent:,} in {seconds:.0f} s", tally.sent == bodies, kinds),
        Figure("answers of 5xx", "0", f"{fives:,}", fives == 0, statuses),
        Figure(
            "no answer",
            f"0 in {DEADLINE:.0f} s, 0 closed without one",
            f"{tally.hung} and {tally.silent}, longest {tally.longest:.2f} s",
            tally.hung == tally.silent == 0 and sum(tally.statuses.values()) == tally.sent,
            {"hung": tally.hung, "closed": tally.silent, "longest_seconds": tally.longest},
        ),
        Figure(
            "a good one after each burst",
            "all acked",
            f"{tally.good - tally.good_refused:,} of {tally.good:,}",
            tally.good > 0 and tally.good_refused == 0,
            {"good": tally.good, "refused": tally.good_refused},
        ),
        Figure(
            "answers that another reading of the contract does not share",
            "0",
            f"{tally.wrong} of {tally.judged:,}",
            tally.wrong == 0 and tally.judged > 0 and tally.left_open < tally.judged / 10,
            {"wrong": tally.wrong, "judged": tally.judged, "left_open": tally.left_open},
        ),
        Figure(
            "refusals that do not name what is wrong",
            "0",
            f"{tally.nameless}, {len(tally.messages)} different messages",
            tally.nameless == 0,
            {"nameless": tally.nameless, "messages": len(tally.messages)},
        ),
        Figure(
            "the mutator reaches both sides",
            f"at least {ACCEPTED_SHARE:.0%} accepted, {wanted_messages} messages",
            f"{share:.0%} accepted, {len(tally.messages)} messages",
            share >= ACCEPTED_SHARE and len(tally.messages) >= wanted_messages,
            taken,
        ),
        Figure(
            "notifications stored",
            "as many as were acked, all of them settled, nothing to report",
            f"{rows:,} of {acked:,}, {complaints} left or complained of",
            rows == acked and complaints == 0,
            {"rows": rows, "acked": acked, "complaints": complaints},
        ),
        Figure(
            "memory gained in the second half",
            f"less than {GROWTH_MIB} MiB",
            f"{growth:.0f} MiB, {memory[2]:.0f} in the end",
            growth < GROWTH_MIB,
            {"before_mib": memory[0], "half_mib": memory[1], "after_mib": memory[2]},
        ),
    ]
