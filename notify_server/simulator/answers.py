"""Reads the recorded answers of storage vendors, servers and CDNs, each with the result that is expected of it.

They are written from the vendors' documents, one file for each of them.
"""

from __future__ import annotations

from collections import Counter
from importlib.resources import files

import msgspec

from notify_server.model import FileState

# A key of the platform's form; `{}` is the kind of file.
KEY = "8ZAFUPII49GQN2AB/{kind}/{hash}/L2FwdF9jb21tb24vb18xZmRsdXNzNWkx"


class Reply(msgspec.Struct, frozen=True):
    """What is answered to one method. `body` is Latin-1; zeros follow up to the Content-Length."""

    status: int
    headers: dict[str, str]
    body: str = ""

    def payload(self, method: str) -> bytes:
        """Return the bytes of the answer."""
        body = self.body.encode("latin-1")
        length = self.headers.get("Content-Length")
        if length is not None:
            body = body.ljust(int(length), b"\0")
        head = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        if method == "HEAD":
            return f"HTTP/1.1 {self.status} Recorded\r\n{head}\r\n".encode("latin-1")
        if length is None:
            head += f"Content-Length: {len(body)}\r\n"
        return f"HTTP/1.1 {self.status} Recorded\r\n{head}\r\n".encode("latin-1") + body


class Expected(msgspec.Struct, frozen=True):
    """What the file comes to once its schedule is spent, or earlier."""

    state: FileState
    reason: str | None
    flags: list[str]
    vendor_code: str | None = None
    vendor_request_id: str | None = None


class RecordedAnswer(msgspec.Struct, frozen=True):
    """A file and its answers. `get` is what a GET is answered, by default the object; `query` is the address's."""

    name: str
    kind: str
    head: Reply
    expect: Expected
    get: Reply | None = None
    query: str = ""
    vendor: str = ""

    def reply(self, method: str) -> Reply:
        """Return the answer to this method."""
        if method == "HEAD":
            return self.head
        return self.get or Reply(206, {**self.head.headers, "Content-Length": "1", "Content-Range": "bytes 0-0/48213"})

    def key(self, number: int) -> str:
        """Return the key of the file as number `number`."""
        return KEY.format(kind=self.kind, hash=number)


def answers_named(names: str) -> tuple[RecordedAnswer, ...]:
    """Return the answers of these vendors, with commas between them, or `all`. Raises ValueError."""
    answers = load_answers()
    counts = Counter(answer.vendor for answer in answers)
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    if unknown := sorted(wanted - counts.keys() - {"all"}):
        known = ", ".join(f"{vendor} ({count})" for vendor, count in counts.items())
        raise ValueError(f"--answers: no responses of {unknown[0]} are recorded: choose all, or from {known}")
    return tuple(answer for answer in answers if "all" in wanted or answer.vendor in wanted)


def load_answers() -> list[RecordedAnswer]:
    """Return all answers, in a fixed order."""
    folder = files("notify_server.simulator") / "recorded"
    found: list[RecordedAnswer] = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        answers = msgspec.json.decode(entry.read_bytes(), type=list[RecordedAnswer])
        vendor = entry.name.removesuffix(".json")
        found += [msgspec.structs.replace(answer, vendor=vendor) for answer in answers]
    return found
