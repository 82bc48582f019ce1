"""The text for the platform has what its support needs, and no query of an address."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from notify_server.model import FileState, ReportedStatus
from notify_server.store.reading.types import FileItem
from notify_server.web.dashboard.report import text_for_platform, without_query
from notify_server.web.language import LANGUAGES

AT = datetime(2026, 11, 27, 21, 0, 0, 5000, UTC)


def item(**changes: Any) -> FileItem:
    fields: dict[str, Any] = dict.fromkeys(FileItem.__struct_fields__)
    fields |= {
        "id": 1, "batch": 2, "batch_id": "b1", "api_code": "rent.add", "oss_object_name": "APP/IMAGE/1/a",
        "target_url": "https://files.example.com/a.jpg?Signature=secret#x", "host": "files.example.com",
        "reported_status": ReportedStatus.FINISHED, "state": FileState.UNAVAILABLE, "reason": "http_404",
        "attempts": 8, "http_status": 404, "verified_at": AT, "vendor_request_id": "5F7C", "vendor_code": "NoSuchKey",
        "flags": [],
    }  # fmt: skip
    return FileItem(**fields | changes)


def test_text_has_what_support_needs() -> None:
    assert text_for_platform(LANGUAGES["en"], [item()], AT) == (
        "batch_id: b1\napi_code: rent.add\nreceived: 2026-11-27T21:00:00.005Z\n\n"
        "oss_object_name: APP/IMAGE/1/a\ntarget_url: https://files.example.com/a.jpg\nstatus: FINISHED\n"
        "result: file not found (http_404), HTTP 404\nchecked at: 2026-11-27T21:00:00.005Z\n"
        "Code: NoSuchKey\nRequestId: 5F7C\n"
    )


def test_text_is_in_the_language_of_the_page() -> None:
    assert "检查结果: 文件不存在" in text_for_platform(LANGUAGES["zh"], [item(), item()])


def test_file_reported_failed_has_no_result() -> None:
    failed = item(
        state=FileState.UPLOAD_FAILED, reason=None, reported_status=ReportedStatus.FAILED, target_url=None,
        vendor_code=None, vendor_request_id=None,
    )  # fmt: skip
    text = text_for_platform(LANGUAGES["en"], [failed])
    assert text.endswith("oss_object_name: APP/IMAGE/1/a\nstatus: FAILED\n")


def test_query_and_fragment_are_cut() -> None:
    assert without_query("https://h/a?b#c") == without_query("https://h/a#c?b") == without_query("https://h/a")
