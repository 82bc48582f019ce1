"""Compares submissions with the record. Both are kept in a temporary database, so that memory is bounded."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path

from msgspec import Struct

from notify_server.store.reading.expectations import ExpectationItem
from notify_server.store.reading.types import BatchItem
from notify_server.submissions.listed import Submitted


class Result(StrEnum):
    """The result for a submission, or for a batch that is not in the list."""

    NEVER_NOTIFIED = "never_notified"
    SHORT = "short"
    INCOMPLETE = "incomplete"
    PENDING = "pending"
    COMPLETE = "complete"
    NOT_SUBMITTED = "not_submitted"


PROBLEMS = (Result.NEVER_NOTIFIED, Result.SHORT, Result.INCOMPLETE)


class Reconciled(Struct, frozen=True):
    """A submission and its batch, or a batch without a submission. `line` is that of the list."""

    result: Result
    line: int | None
    reference: str | None
    api_code: str | None
    batch_id: str | None
    files: int | None
    listed: int | None
    available: int | None
    verdict: str | None


_SCHEMA = """
CREATE TABLE submitted (line INTEGER, reference TEXT, api_code TEXT, batch_id TEXT, files INTEGER);
CREATE TABLE batch (batch_id TEXT, api_code TEXT, verdict TEXT, files INTEGER, available INTEGER);
CREATE TABLE named (reference TEXT, api_code TEXT, batch_id TEXT, files INTEGER);
"""
_INDEXES = """
CREATE INDEX batch_named ON batch (batch_id, api_code);
CREATE INDEX named_reference ON named (reference, api_code);
UPDATE submitted SET (batch_id, files) = (
    SELECT named.batch_id, coalesce(submitted.files, named.files) FROM named
    WHERE named.reference = submitted.reference
        AND (submitted.api_code IS NULL OR named.api_code = submitted.api_code)
    LIMIT 1
) WHERE batch_id IS NULL AND EXISTS (
    SELECT 1 FROM named WHERE named.reference = submitted.reference
        AND (submitted.api_code IS NULL OR named.api_code = submitted.api_code)
);
CREATE INDEX submitted_named ON submitted (batch_id, api_code);
"""
_SUBMITTED = """
SELECT
    CASE
        WHEN batch.batch_id IS NULL THEN 'never_notified'
        WHEN batch.files < submitted.files THEN 'short'
        ELSE batch.verdict
    END AS result,
    line, reference, coalesce(submitted.api_code, batch.api_code), submitted.batch_id, submitted.files, batch.files,
    batch.available, batch.verdict
FROM submitted
LEFT JOIN batch ON batch.batch_id = submitted.batch_id
    AND (submitted.api_code IS NULL OR batch.api_code = submitted.api_code)
ORDER BY line
"""
_NOT_SUBMITTED = """
SELECT 'not_submitted', NULL, NULL, api_code, batch_id, NULL, files, available, verdict FROM batch
WHERE NOT EXISTS (
    SELECT 1 FROM submitted WHERE submitted.batch_id = batch.batch_id
        AND (submitted.api_code IS NULL OR submitted.api_code = batch.api_code)
)
ORDER BY batch_id
"""


class Reconciliation:
    """Add submissions, batches and expectations, then read the results. Close it when done."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the temporary database."""
        self._connection.close()

    def add_submissions(self, submissions: Iterable[Submitted], api_code: str | None) -> None:
        """Add submissions; `api_code` is that of those without one. A reference that is not given is the batch_id."""
        rows = (
            (
                each.line,
                _text(each.fields.get("reference", each.fields.get("batch_id"))),
                _text(each.fields.get("api_code", api_code)),
                _text(each.fields.get("batch_id")),
                _number(each.fields.get("files")),
            )
            for each in submissions
        )
        self._write("INSERT INTO submitted VALUES (?, ?, ?, ?, ?)", rows)

    def add_batches(self, batches: Iterable[BatchItem]) -> None:
        """Add batches of the record."""
        rows = ((b.batch_id, b.api_code, str(b.verdict), b.files, b.available) for b in batches)
        self._write("INSERT INTO batch VALUES (?, ?, ?, ?, ?)", rows)

    def add_expectations(self, items: Iterable[tuple[ExpectationItem, str | None]]) -> None:
        """Add expectations with the batch_id of their batch, for submissions of which only the reference is known."""
        rows = ((item.reference, item.api_code, batch_id, item.files) for item, batch_id in items)
        self._write("INSERT INTO named VALUES (?, ?, ?, ?)", rows)

    @property
    def lacks_batch_ids(self) -> bool:
        """True if a submission has no batch_id."""
        return self._connection.execute("SELECT 1 FROM submitted WHERE batch_id IS NULL LIMIT 1").fetchone() is not None

    def results(self) -> Iterator[Reconciled]:
        """Yield the results, submissions in the order of the list first."""
        self._connection.executescript(_INDEXES)
        for query in (_SUBMITTED, _NOT_SUBMITTED):
            for result, *rest in self._connection.execute(query):
                yield Reconciled(Result(result), *rest)

    def _write(self, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
        self._connection.execute("BEGIN")
        self._connection.executemany(statement, rows)
        self._connection.execute("COMMIT")


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _number(value: object) -> int | None:
    return len(value) if isinstance(value, list) else value if isinstance(value, int) else None
