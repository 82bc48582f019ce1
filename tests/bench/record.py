"""Stores made by SQL in one large transaction, in a fraction of the time that the daemon would take, and what is asked
of a store while the daemon has it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from notify_server.clock import unix_ms
from notify_server.store.sqlite.database import connect

FILES_A_BATCH = 100
API_CODE = "rent.dcentralize.room.add"
WAIT_SECONDS = 300.0
# Of a record's files, one of so many is not there: of each such batch one file of ten.
MISSING_BATCHES = 10
MISSING_FILES = 10

_BODY_MARK = "\N{BULLET}"


def object_name(number: int) -> str:
    """A key of the platform's form and length."""
    return f"8ZAFUPII49GQN2AB/IMAGE/{number:010}/L2FwdF9jb21tb24vb18xZmRsdXNzNWkx"


def batch_name(number: int) -> str:
    """A batch_id of the platform's form and length."""
    return f"b452c50b50614fd697aa6c2b75563de0.{number % 100:02}.{16408499070570077 + number}"


def body_of(number: int, addresses: Sequence[str]) -> str:
    """The notification of a batch with a file at each address."""
    entries = [
        {"status": "FINISHED", "oss_object_name": address.split("/", 3)[3], "target_url": address}
        for address in addresses
    ]
    return msgspec.json.encode({"batch_id": batch_name(number), "api_code": API_CODE, "file_list": entries}).decode()


@contextmanager
def _in_bulk(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for one large transaction without protection: no other process uses the file meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connect(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "locking_mode = EXCLUSIVE", "cache_size = -262144"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("BEGIN")
        yield connection
        connection.execute("COMMIT")


def add_settled(path: Path, files: int) -> None:
    """A record of so many files, a multiple of FILES_A_BATCH, that are all settled: what months of work leave behind.

    One file of MISSING_BATCHES x MISSING_FILES is unavailable, the others are there. Each has one attempt.
    """
    batches = files // FILES_A_BATCH
    now = unix_ms()
    host = "files.example.com"
    template = body_of(0, [f"https://{host}/{object_name(number)}" for number in range(FILES_A_BATCH)])
    # The keys of a batch have its number where the template has zeros.
    template = template.replace(batch_name(0), _BODY_MARK).replace("IMAGE/00000000", "IMAGE/%08d")
    start, end = template.split(_BODY_MARK)
    pieces = end.split("%08d")
    with _in_bulk(path) as connection:
        connection.executemany(
            "INSERT INTO notification (id, batch_id, api_code, received_at, remote_addr, signature, request_id, files,"
            " expanded_at, body) VALUES (?, ?, ?, ?, '127.0.0.1', 'none', '914036a6-3423-451a-8817-bdd8ae7f9089',"
            f" {FILES_A_BATCH}, ?, ?)",
            (
                (
                    number + 1, batch_name(number), API_CODE, now - batches + number, now,
                    start + batch_name(number) + f"{number:08}".join(pieces),
                )
                for number in range(batches)
            ),
        )  # fmt: skip
        connection.execute(
            "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ?)"
            " INSERT INTO batch (id, batch_id, api_code, first_received_at, last_received_at, deliveries, verdict,"
            " completed_at, files, pending, available, unavailable, blocked, upload_failed, last_notification)"
            " SELECT n, batch_id, api_code, received_at, received_at, 1,"
            " iif(missing, 'incomplete', 'complete'), :now, :files, 0, :files - missing, missing, 0, 0, n"
            " FROM (SELECT n, iif(n % :batches, 0, :files / :each) AS missing FROM n)"
            " JOIN notification ON notification.id = n".replace("?", ":count"),
            {
                "count": batches, "now": now, "files": FILES_A_BATCH, "batches": MISSING_BATCHES,
                "each": MISSING_FILES,
            },
        )  # fmt: skip
        connection.execute(
            "WITH RECURSIVE n (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM n WHERE n < :count - 1),"
            " named (n, batch, missing, key) AS (SELECT n, n / :files + 1,"
            " (n / :files + 1) % :batches = 0 AND n % :each = 0,"
            " printf('8ZAFUPII49GQN2AB/IMAGE/%010d/L2FwdF9jb21tb24vb18xZmRsdXNzNWkx', n) FROM n)"
            " INSERT INTO file (id, batch, oss_object_name, target_url, host, reported_status, state, reason, attempts,"
            " http_status, content_length, content_type, etag, remote_addr, elapsed_ms, verified_at)"
            " SELECT n + 1, batch, key, 'https://' || :host || '/' || key, :host, 'FINISHED',"
            " iif(missing, 'unavailable', 'available'), iif(missing, 'http_404', NULL), 1, iif(missing, 404, 200),"
            " 240137, 'image/jpeg', '\"0123456789abcdef\"', '203.0.113.7', 1.234, :now FROM named",
            {
                "count": files, "now": now, "files": FILES_A_BATCH, "batches": MISSING_BATCHES, "each": MISSING_FILES,
                "host": host,
            },
        )  # fmt: skip
        connection.execute(
            "INSERT INTO attempt (file, started_at, method, http_status, reason, first_byte_ms, total_ms, remote_addr)"
            " SELECT id, verified_at - 2, 'HEAD', http_status, reason, 0.987, 1.234, remote_addr FROM file ORDER BY id"
        )


def add_pending(path: Path, addresses: Sequence[str], due_at: int) -> None:
    """Batches of FILES_A_BATCH files that wait to be requested at these addresses, from `due_at` (Unix ms) on."""
    now = unix_ms()
    with _in_bulk(path) as connection:
        (known,) = connection.execute("SELECT coalesce(max(id), 0) FROM notification").fetchone()
        (batches,) = connection.execute("SELECT coalesce(max(id), 0) FROM batch").fetchone()
        for place, start in enumerate(range(0, len(addresses), FILES_A_BATCH), 1):
            part = addresses[start : start + FILES_A_BATCH]
            # Numbers that no settled batch has.
            name = batch_name(900_000_000 + known + place)
            body = body_of(900_000_000 + known + place, part)
            connection.execute(
                "INSERT INTO notification (id, batch_id, api_code, received_at, remote_addr, signature, request_id,"
                " files, expanded_at, body) VALUES (?, ?, ?, ?, '127.0.0.1', 'none', '-', ?, ?, ?)",
                (known + place, name, API_CODE, now, len(part), now, body),
            )
            connection.execute(
                "INSERT INTO batch (id, batch_id, api_code, first_received_at, last_received_at, deliveries, files,"
                " pending, last_notification) VALUES (?, ?, ?, ?, ?, 1, ?, ?, ?)",
                (batches + place, name, API_CODE, now, now, len(part), len(part), known + place),
            )
            connection.executemany(
                "INSERT INTO file (batch, oss_object_name, target_url, host, reported_status, state, next_attempt_at)"
                " VALUES (?, ?, ?, ?, 'FINISHED', 'pending', ?)",
                (
                    (batches + place, address.split("/", 3)[3], address, address.split("/", 3)[2], due_at)
                    for address in part
                ),
            )


def forget_pending(path: Path) -> None:
    """Nothing waits any more, as if all had been found."""
    with _in_bulk(path) as connection:
        connection.execute("UPDATE file SET state = 'available', next_attempt_at = NULL WHERE state = 'pending'")
        connection.execute(
            "UPDATE batch SET verdict = 'complete', completed_at = last_received_at, available = available + pending,"
            " pending = 0 WHERE verdict = 'pending'"
        )


# --- While the daemon runs ---


def reading(path: Path) -> closing[sqlite3.Connection]:
    """A connection that only reads."""
    return closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10))


def until(path: Path, query: str, pause: float = 0.05, seconds: float = WAIT_SECONDS) -> object:
    """The one value of the query, once it is true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    with reading(path) as connection:
        while not (value := connection.execute(query).fetchone()[0]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s: {query}")
            time.sleep(pause)
    return value


def until_expanded(path: Path) -> None:
    """Return once every notification that was taken has become batches and files."""
    newest = "SELECT expanded_at FROM notification ORDER BY id DESC LIMIT 1"
    until(path, f"SELECT NOT EXISTS (SELECT 1 FROM ({newest}) WHERE expanded_at IS NULL)")


def until_settled(path: Path) -> None:
    """Return once no batch waits for its verdict."""
    until(path, "SELECT NOT EXISTS (SELECT 1 FROM batch WHERE verdict = 'pending')")


def size_mib(path: Path) -> float:
    """The database and what belongs to it, in MiB."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")) / 2**20
