"""Writes the dispute bundle of a batch: a ZIP with the platform's notifications, the check results and their times.

`sha256sum -c SHA256SUMS` checks it. Queries of addresses are included only on request, because they may hold
signatures. It is written page by page, in bounded memory.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import AsyncIterator
from datetime import datetime
from typing import IO

import msgspec

from notify_server.events.payload import rfc3339
from notify_server.events.texts import reason_text
from notify_server.model import FileState
from notify_server.store.export import csv_header, csv_lines
from notify_server.store.reading.evidence import DeliveryRow
from notify_server.store.reading.types import BatchDetail, BatchItem, FileFilter, FileItem, Records

PAGE_ROWS = 500
# Missing files that README.txt lists; files.csv has all.
MAX_LISTED = 200

# An address up to its query, and the query up to the end of the JSON string, which may be inside another one.
_QUERY = re.compile(
    rb"""(https?:(?:\\*/){2}(?:(?!\\+u003f)[^"?#\\]|\\+/)*)(?:[?#]|\\+u003f)(?:[^"\\]|\\+(?!\\*"))*""", re.IGNORECASE
)


class _Writer:
    """Writes the entries of the ZIP, and sums them."""

    def __init__(self, target: IO[bytes], now: datetime) -> None:
        self._archive = zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED)
        self._date = now.timetuple()[:6]
        self._sums: list[str] = []

    async def write(self, name: str, parts: AsyncIterator[bytes]) -> None:
        """Write an entry as its parts come."""
        info = zipfile.ZipInfo(name, self._date)
        info.compress_type = zipfile.ZIP_DEFLATED
        digest = hashlib.sha256()
        with self._archive.open(info, "w", force_zip64=True) as entry:
            async for part in parts:
                digest.update(part)
                entry.write(part)
        self._sums.append(f"{digest.hexdigest()}  {name}\n")

    async def close(self) -> None:
        """Write the sums, and end the ZIP."""
        await self.write("SHA256SUMS", _whole("".join(self._sums).encode()))
        self._archive.close()


async def write_bundle(
    records: Records, batch: BatchDetail, target: IO[bytes], now: datetime, *, with_secrets: bool = False
) -> None:
    """Write the bundle of a batch to `target`. Raises StoreUnavailableError when the record cannot be read."""
    writer = _Writer(target, now)
    deliveries = await records.evidence.deliveries(batch.id, batch.deliveries)
    missing = [file async for file in _missing(records, batch)]
    await writer.write("README.txt", _whole(_readme(batch, deliveries, missing, now, with_secrets=with_secrets)))
    for number, delivery in enumerate(deliveries, 1):
        body = await records.evidence.body(delivery.id)
        if body is not None:
            shown = body if with_secrets else without_queries(body)
            await writer.write(f"notifications/{number}.json", _whole(shown))
            await writer.write(f"notifications/{number}.meta.json", _whole(_meta(delivery, body, shown)))
    await writer.write("files.csv", _files_csv(records, batch, with_secrets=with_secrets))
    await writer.write("attempts.ndjson", _attempts(records, batch, with_secrets=with_secrets))
    await writer.close()


def without_queries(body: bytes) -> bytes:
    """Return the body of a notification with the queries of all addresses cut."""
    return _QUERY.sub(rb"\1", body)


def without_query(url: str | None) -> str | None:
    """Return an address without its query and fragment."""
    return None if url is None else url.partition("#")[0].partition("?")[0]


async def _whole(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def _pages(records: Records, wanted: FileFilter) -> AsyncIterator[list[FileItem]]:
    page = await records.files(wanted, None, PAGE_ROWS)
    yield page.items
    while page.next is not None:
        page = await records.files(wanted, page.next, PAGE_ROWS)
        yield page.items


async def _missing(records: Records, batch: BatchItem) -> AsyncIterator[FileItem]:
    count = 0
    for state in (FileState.UNAVAILABLE, FileState.BLOCKED, FileState.UPLOAD_FAILED, FileState.PENDING):
        if not getattr(batch, state) or count >= MAX_LISTED:
            continue
        for file in (await records.files(FileFilter(batch=batch.id, state=state), None, MAX_LISTED - count)).items:
            count += 1
            yield file


async def _files_csv(records: Records, batch: BatchItem, *, with_secrets: bool) -> AsyncIterator[bytes]:
    yield csv_header()
    async for files in _pages(records, FileFilter(batch=batch.id)):
        yield csv_lines(files if with_secrets else map(_cut, files))


def _cut(file: FileItem) -> FileItem:
    return msgspec.structs.replace(
        file, target_url=without_query(file.target_url), final_url=without_query(file.final_url)
    )


async def _attempts(records: Records, batch: BatchItem, *, with_secrets: bool) -> AsyncIterator[bytes]:
    async for files in _pages(records, FileFilter(batch=batch.id)):
        names = {file.id: file.oss_object_name for file in files}
        lines = []
        for attempt in await records.evidence.attempts(list(names)):
            row = {"oss_object_name": names[attempt.file], **msgspec.structs.asdict(attempt)}
            row["started_at"] = rfc3339(attempt.started_at)
            row["url"] = attempt.url if with_secrets else without_query(attempt.url)
            del row["file"]
            lines.append(msgspec.json.encode(row) + b"\n")
        yield b"".join(lines)


def _meta(delivery: DeliveryRow, body: bytes, shown: bytes) -> bytes:
    """Return what is known of a delivery beside its body, and the sum of the body as it was received."""
    return msgspec.json.format(
        msgspec.json.encode(
            {
                "received_at": rfc3339(delivery.received_at),
                "remote_addr": delivery.remote_addr,
                "key_fingerprint": None if delivery.signature == "none" else delivery.signature,
                "request_id": delivery.request_id,
                "files": delivery.files,
                "as_received": shown == body,
                "sha256_as_received": hashlib.sha256(body).hexdigest(),
            }
        ),
        indent=2,
    )


# How the notifications of a bundle differ from what was received: with and without the queries of addresses.
WHOLE = (
    "原始报文与收到时逐字节相同。地址含查询参数，可能带签名，请勿外传。",
    "Notifications are byte for byte as received. Queries of addresses may hold signatures: keep this private.",
)
CUT = (
    "所有地址的查询参数（可能带签名）均已去除，包括原始报文中的地址；报文的其余部分与收到时逐字节相同。",
    "收到的原文的 SHA-256 见 N.meta.json；需要完整原文时，请用 notify-server bundle --with-secrets 重新导出。",
    "Queries of addresses, which may hold signatures, are cut, in notifications too. The rest of a body",
    "is byte for byte as received. N.meta.json has the SHA-256 of the body as received. For whole bodies run",
    "notify-server bundle --with-secrets.",
)


def _readme(
    batch: BatchItem, deliveries: list[DeliveryRow], missing: list[FileItem], now: datetime, *, with_secrets: bool
) -> bytes:
    counts = f"{batch.files} / {batch.available} / {batch.unavailable + batch.blocked} / {batch.upload_failed}"
    lines = [
        f"批次 {batch.batch_id}（{batch.api_code}）的核实记录",
        f"Check record of batch {batch.batch_id} ({batch.api_code})",
        "",
        f"生成时间 / written at: {_utc(now)}",
        f"结论 / verdict: {batch.verdict}, {_utc(batch.completed_at)}",
        f"文件数 / 可用 / 不可用 / 平台上报失败 = files / available / unavailable / reported FAILED: {counts}",
        "",
        "平台的通知 / What the platform reported:",
    ]
    for number, each in enumerate(deliveries, 1):
        signature = "未签名 / unsigned" if each.signature == "none" else f"签名密钥 / key {each.signature}"
        lines.append(
            f"  {number}. {rfc3339(each.received_at)}  {each.remote_addr}  {each.files} 个文件 / files  {signature}  "
            f"request_id {each.request_id}"
        )
    if len(deliveries) < batch.deliveries:
        gone = batch.deliveries - len(deliveries)
        lines.append(f"  {gone} 条已超过保留期 / {gone} deleted by retention")
    lines += ["", "检查结果（未确认的文件）/ What was found (files that are not confirmed):"]
    for file in missing:
        zh, en = (reason_text(language, file.reason, file.state) for language in ("zh", "en"))
        lines += [
            f"  {file.oss_object_name}",
            f"    {without_query(file.target_url) or '-'}",
            f"    {zh} / {en} ({file.reason or file.state}), HTTP {file.http_status or '-'}, {_utc(file.verified_at)}"
            + (f", RequestId {file.vendor_request_id}" if file.vendor_request_id else ""),
        ]
    if not missing:
        lines.append("  无 / none")
    lines += [
        "",
        "文件说明 / Contents:",
        "  notifications/N.json       平台的原始报文 / what the platform sent",
        "  notifications/N.meta.json  接收时间、来源、签名密钥、request_id、原文 SHA-256 / metadata",
        "  files.csv                  所有文件的结果 / every file with its result",
        "  attempts.ndjson            所有请求 / every request",
        "  SHA256SUMS                 校验：sha256sum -c SHA256SUMS / check the files with it",
        "",
        *(WHOLE if with_secrets else CUT),
        "时间均为 UTC。 / Times are UTC.",
    ]
    return ("\ufeff" + "\r\n".join(lines) + "\r\n").encode()


def _utc(moment: datetime | None) -> str:
    return "-" if moment is None else rfc3339(round(moment.timestamp() * 1000))
