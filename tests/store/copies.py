"""Records to be copied, and the checks of a copy."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from notify_server.store.sqlite.database import connect
from tests.store.builders import API_CODE, NOW

STATES = ("pending", "available", "unavailable", "blocked", "upload_failed")
TEXTS = ("", "签名", "'\"\\;--", "e\u0301 \U0001f3e0", "\x7f\x01\t\r\n", "\U0010ffff\ud7ff\ue000", " trailing ", "NULL")
FLOATS = (0.1, 1 / 3, 5.0, 1e-9, 123456789.987654321, 1.7976931348623157e308, 5e-324)
LARGE = 3 * 1024 * 1024


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a record of the latest schema, made if it is not there; what is done is one transaction."""
    with closing(connect(path)) as connection:
        connection.execute("BEGIN")
        yield connection
        connection.execute("COMMIT")


def fill(path: Path, files: int = 100) -> None:
    """Something of everything in every table, in values where engines differ if they do anywhere: every state, texts of
    all kinds, floats that have no short name, bodies of any bytes, gaps between ids, ids given out and deleted, and
    deliveries that have not been expanded, one of them by halves.
    """
    chance = random.Random(files)
    with writing(path) as connection:
        for n in range(1, 8):
            body = f'{{"batch_id":"b{n}","说明":"{chance.choice(TEXTS[1:2])}{"x" * (LARGE if n < 5 else 0)}"}}'
            row = (
                10 * n,
                f"b{n}",
                API_CODE,
                NOW + n,
                "2001:db8::1",
                "none",
                f"r-{n}",
                files,
                NOW if n < 6 else None,
                body,
            )
            connection.execute(
                "INSERT INTO notification (id, batch_id, api_code, received_at, remote_addr, signature, request_id,"
                " files, expanded_at, body, traceparent) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                (*row, None if n % 2 else f"00-{n:032x}-{n:016x}-01"),
            )
        connection.execute("DELETE FROM notification WHERE id = 70")
        of_state = [chance.choice(STATES) for _ in range(files)]
        counts = [of_state.count(state) for state in STATES]
        for batch, expanding in ((4, None), (2**40, 60)):
            connection.execute(
                "INSERT INTO batch (id, batch_id, api_code, first_received_at, last_received_at, deliveries, verdict,"
                " completed_at, files, pending, available, unavailable, blocked, upload_failed, expanding,"
                " last_notification) VALUES (?,?,?,?,?,?,'pending',NULL,?,?,?,?,?,?,?,?)",
                (batch, f"b{batch}", API_CODE, NOW, NOW + 5, 1, files, *counts, expanding, 10),
            )
        for batch in (4, 2**40):
            for n, state in enumerate(of_state):
                file = batch * 2 + n * 3
                connection.execute(
                    f"INSERT INTO file VALUES ({','.join('?' * 24)})",
                    (
                        file, batch, f"{n} {chance.choice(TEXTS)}", chance.choice([None, f"https://h/{n}"]),
                        chance.choice(TEXTS), "FINISHED", state, chance.choice([None, "timeout"]), chance.randrange(9),
                        NOW if state == "pending" else None, chance.choice([None, 200]), chance.choice([None, 2**62]),
                        *(chance.choice([None, *TEXTS]) for _ in range(5)), chance.choice([None, *FLOATS]),
                        chance.choice([None, NOW]), *(chance.choice([None, *TEXTS]) for _ in range(2)),
                        chance.choice([None, NOW]), *(chance.choice([None, *TEXTS]) for _ in range(2)),
                    ),
                )  # fmt: skip
                connection.execute(
                    "INSERT INTO attempt (file, started_at, method, url, http_status, reason, dns_ms, connect_ms,"
                    " tls_ms, first_byte_ms, total_ms, remote_addr) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                    (
                        file, NOW, "HEAD", chance.choice([None, "https://h/"]), 404, None,
                        *(chance.choice([None, *FLOATS]) for _ in range(4)), chance.choice(FLOATS), "198.18.0.1",
                    ),
                )  # fmt: skip
        for n in range(12):
            batch_or_none = None if n == 0 else 4
            connection.execute(
                "INSERT INTO event (id, key, type, batch, revision, occurred_at, payload) VALUES (?,?,?,?,?,?,?)",
                (5 * n + 1, f"evt_{n}", "batch.complete", batch_or_none, n, NOW, f'{{"data":"{TEXTS[1]}"}}'),
            )
            connection.execute(
                "INSERT INTO forward (id, event, endpoint, batch, state, attempts, next_attempt_at, last_status,"
                " last_error, last_response, delivered_at) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                (
                    3 * n + 1, 5 * n + 1, "listings", batch_or_none, "delivered" if n % 2 else "pending", n,
                    None if n % 2 else NOW, chance.choice([None, 200]), chance.choice([None, *TEXTS]),
                    chance.choice([None, *TEXTS]), NOW if n % 2 else None,
                ),
            )  # fmt: skip
            connection.execute(
                "INSERT INTO forward_attempt (forward, started_at, status, error, total_ms) VALUES (?,?,?,?,?)",
                (3 * n + 1, NOW, chance.choice([None, 500]), chance.choice([None, *TEXTS]), chance.choice(FLOATS)),
            )
        for n in range(6):
            connection.execute(
                "INSERT INTO expectation (id, reference, api_code, batch_id, files, keys, notify_by, verdict_by, state,"
                " matched_by, batch, created_at, away_ms, due_at) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    7 * n + 1, f"{chance.choice(TEXTS)}{n}", API_CODE, chance.choice([None, *TEXTS]),
                    chance.choice([None, 2**40]), chance.choice([None, '["k"]']), NOW, NOW + n,
                    ("waiting", "late", "short", "met")[n % 4], "order" if n == 3 else None, 4 if n == 3 else None,
                    NOW, n, None if n % 2 else NOW - n,
                ),
            )  # fmt: skip
        connection.execute("INSERT INTO ready_clock (id, ready_at, away_ms) VALUES (1, ?, 5000)", (NOW,))
        connection.execute("INSERT INTO quiet_clock (id, ready_at, away_ms) VALUES (1, ?, 7000)", (NOW,))
        for n, text in enumerate(TEXTS):
            arrival = f"{text}{n}", None if n == 0 else NOW, NOW - n, NOW if n % 2 else None
            connection.execute(
                "INSERT INTO arrival (api_code, received_at, quiet_since, told_at) VALUES (?,?,?,?)", arrival
            )
        connection.execute(
            "INSERT INTO endpoint (name, types, api_codes, failures, last_success_at)"
            " VALUES ('listings', '[\"batch.complete\"]', '[]', 3, ?)",
            (NOW,),
        )
        for n in range(7):
            connection.execute(
                "INSERT INTO action (id, at, who, what, filter, files) VALUES (?,?,?,?,?,?)",
                (4 * n + 1, NOW + n, "page ::1", "recheck", f'{{"host":"{n}"}}', chance.choice([None, 2**40])),
            )
            connection.execute(
                "INSERT INTO acknowledgement (id, at, who, note, rejection, reason, host, state, last_file)"
                " VALUES (?,?,?,?,?,?,?,?,?)",
                (6 * n + 1, NOW + n, "page ::1", chance.choice(TEXTS), n if n % 2 else None,
                 *((None,) * 4 if n % 2 else ("timeout", f"h{n}", "pending", n))),
            )  # fmt: skip
            connection.execute(
                "INSERT INTO history (id, step, at, server, sample) VALUES (?,?,?,?,?)",
                (9 * n + 1, 60, NOW + n, "one", f'{{"accepted":{n}}}'),
            )
        for n in range(20):
            bytes_ = bytes(range(256)) * n + b"\xff\xfe\0"
            refused = NOW + n, "::1", "400", chance.choice(TEXTS), bytes_, None if n % 3 else f"r-{n}"
            connection.execute(
                "INSERT INTO rejection (received_at, remote_addr, code, detail, body, request_id) VALUES (?,?,?,?,?,?)",
                refused,
            )
            connection.execute("INSERT INTO nonce VALUES (?, ?)", (f"{chance.choice(TEXTS)}&{n}", NOW + n))


def dump(path: Path) -> list[str]:
    """The whole database as SQL; the counter of ids that are never given twice is a part of it."""
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())
