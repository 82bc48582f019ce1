"""Lists of submissions as people have them, and how they are compared with the record."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from notify_server.model import Verdict
from notify_server.store.reading.types import BatchItem
from notify_server.submissions.listed import LINE_BYTES, ListError, Submitted, read_submissions
from notify_server.submissions.reconciliation import Reconciliation, Result

AT = datetime(2026, 1, 1, tzinfo=UTC)


def read(content: bytes) -> list[dict[str, Any]]:
    return [each.fields for each in read_submissions(io.BytesIO(content), "list.csv", lambda number: None)]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", []),
        (b"\n \n", []),
        (b"batch_id\nx\n\ny\n", [{"batch_id": "x"}, {"batch_id": "y"}]),
        (b"\xef\xbb\xbfReference,Files,other\r\nr,3,z\r\n", [{"reference": "r", "files": 3}]),
        (b"batch_id;api_code;files\nx;a;2\n", [{"batch_id": "x", "api_code": "a", "files": 2}]),
        (b"batch_id\tfiles\nx\t2\n", [{"batch_id": "x", "files": 2}]),
        (b'batch_id,reference\n"x","a, b"\n', [{"batch_id": "x", "reference": "a, b"}]),
        (b"x\ny", [{"batch_id": "x"}, {"batch_id": "y"}]),
        (b"x,a\ny,b", [{"batch_id": "x", "api_code": "a"}, {"batch_id": "y", "api_code": "b"}]),
        (b"x,3\ny,4", [{"batch_id": "x", "files": 3}, {"batch_id": "y", "files": 4}]),
        (b"x,a,3,r", [{"batch_id": "x", "api_code": "a", "files": 3, "reference": "r"}]),
        (b"x,,,r", [{"batch_id": "x", "reference": "r"}]),
        (b'{"reference":"r","files":["k"],"more":1}\n\n{"batch_id":"x"}', [
            {"reference": "r", "files": ["k"]}, {"batch_id": "x"},
        ]),
        ("reference,api_code\n订单一,房源".encode(), [{"reference": "订单一", "api_code": "房源"}]),
    ],
)  # fmt: skip
def test_lists_are_read_as_people_have_them(content: bytes, found: list[dict[str, Any]]) -> None:
    assert read(content) == found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("reference\n订单一\n".encode("gb18030"), "list.csv, line 2: is GBK, not UTF-8: save it as CSV UTF-8"),
        ("reference\n".encode("utf-16"), "list.csv: is UTF-16: save it as UTF-8"),
        (b"reference\n\xff\xff\n", "list.csv, line 2: is not UTF-8"),
        (b"batch_id,files\nx,1\ny,many\n", "list.csv, line 3: files: must be a whole number, not 'many'"),
        (b'{"batch_id":"x"}\nnothing\n', "list.csv, line 2: is not JSON"),
        (b'{"batch_id":"x"}\n[]\n', "list.csv, line 2: must be an object"),
        (b"x" * (LINE_BYTES + 2), "list.csv, line 1: is longer than"),
    ],
)
def test_wrong_lists_are_refused_with_the_line_and_the_remedy(content: bytes, said: str) -> None:
    with pytest.raises(ListError) as refused:
        read(content)
    assert str(refused.value).startswith(said)


def batch(batch_id: str, verdict: str, files: int = 2, api_code: str = "a") -> BatchItem:
    available = files if verdict == "complete" else 0
    values: dict[str, Any] = dict.fromkeys(BatchItem.__struct_fields__, 0)
    values |= {
        "batch_id": batch_id, "api_code": api_code, "verdict": Verdict(verdict), "files": files,
        "available": available, "first_received_at": AT, "last_received_at": AT, "completed_at": None,
    }  # fmt: skip
    return BatchItem(**values)


def results(
    tmp_path: Path, submitted: list[dict[str, Any]], batches: list[BatchItem], api_code: str | None = None
) -> Any:
    reconciliation = Reconciliation(tmp_path / "r.db")
    try:
        lines = (Submitted(line, fields) for line, fields in enumerate(submitted, 1))
        reconciliation.add_submissions(lines, api_code)
        reconciliation.add_batches(batches)
        return [(each.result, each.batch_id) for each in reconciliation.results()]
    finally:
        reconciliation.close()


def test_every_submission_and_every_unknown_batch_has_one_result(tmp_path: Path) -> None:
    submitted: list[dict[str, Any]] = [
        {"batch_id": "never"}, {"batch_id": "short", "files": 3}, {"batch_id": "keys", "files": ["a", "b", "c"]},
        {"batch_id": "bad"}, {"batch_id": "open"}, {"batch_id": "good", "files": 2}, {"batch_id": "more", "files": 1},
    ]  # fmt: skip
    batches = [
        batch("short", "complete"), batch("keys", "complete"), batch("bad", "incomplete"), batch("open", "pending"),
        batch("good", "complete"), batch("more", "complete"), batch("extra", "complete"),
    ]  # fmt: skip
    assert results(tmp_path, submitted, batches) == [
        (Result.NEVER_NOTIFIED, "never"), (Result.SHORT, "short"), (Result.SHORT, "keys"), (Result.INCOMPLETE, "bad"),
        (Result.PENDING, "open"), (Result.COMPLETE, "good"), (Result.COMPLETE, "more"),
        (Result.NOT_SUBMITTED, "extra"),
    ]  # fmt: skip


def test_api_code_tells_batches_of_the_same_name_apart(tmp_path: Path) -> None:
    batches = [batch("x", "complete", api_code="b")]
    assert results(tmp_path, [{"batch_id": "x"}], batches, "a") == [
        (Result.NEVER_NOTIFIED, "x"),
        (Result.NOT_SUBMITTED, "x"),
    ]
