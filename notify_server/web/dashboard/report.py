"""Writes the text about missing files that people send to the platform, without the queries of addresses."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from notify_server.model import FileState
from notify_server.store.reading.types import FileItem
from notify_server.web.language import Texts


def text_for_platform(t: Texts, files: Sequence[FileItem], received_at: datetime | None = None) -> str:
    """Return what the platform's or the storage vendor's support needs to find these files of one batch."""
    lines = [f"batch_id: {files[0].batch_id}", f"api_code: {files[0].api_code}"]
    if received_at is not None:
        lines.append(f"{t('batch.report_received')}: {_time(received_at)}")
    for file in files:
        reason = t.reason(file.reason, "what", file.state)
        lines += ["", f"oss_object_name: {file.oss_object_name}"]
        if file.target_url is not None:
            lines.append(f"target_url: {without_query(file.target_url)}")
        lines.append(f"status: {file.reported_status}")
        if file.state is not FileState.UPLOAD_FAILED:
            status = "-" if file.http_status is None else str(file.http_status)
            lines += [
                f"{t('batch.report_result')}: {reason} ({file.reason or '-'}), HTTP {status}",
                f"{t('batch.report_checked')}: {_time(file.verified_at)}",
            ]
        if file.vendor_code is not None:
            lines.append(f"Code: {file.vendor_code}")
        if file.vendor_request_id is not None:
            lines.append(f"RequestId: {file.vendor_request_id}")
    return "\n".join(lines) + "\n"


def without_query(url: str) -> str:
    """Return the address without its query and fragment."""
    return url.partition("#")[0].partition("?")[0]


def _time(moment: datetime | None) -> str:
    return "-" if moment is None else moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
