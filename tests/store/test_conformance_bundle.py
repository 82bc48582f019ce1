"""The dispute bundle has the notifications byte for byte, the results and the requests, and its sums are right."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from datetime import UTC, datetime

import pytest

from notify_server.store.base import Engine
from notify_server.store.bundle import without_queries, write_bundle
from notify_server.store.reading.types import BatchFilter, Records
from tests.store.backends import Backend
from tests.store.builders import (
    API_CODE,
    HOST,
    NOW,
    chunk,
    claim,
    delivery,
    failed,
    finished,
    found,
    missing,
    request,
    take_in,
)

WRITTEN = datetime(2026, 11, 27, 22, 0, 0, tzinfo=UTC)
BODY = b'{"batch_id": "batch", "file_list": [{"target_url": "https://h/a.jpg?Signature=hidden-7&x=1"}]}'


async def fill(store: Engine, backend: Backend) -> None:
    """Take a batch in twice, settle it, and put another one beside it."""
    await take_in(store, finished("other"), batch_id="other")
    for body, signature in ((BODY, "none"), (b'{"second": "\xe7\xad\xbe\xe5\x90\x8d"}', "a1b2")):
        id = await store.accept(delivery("batch", body=body, signature=signature, request_id=f"r-{signature}", files=3))
        (item,) = [item for item in await store.inbox(1000) if item.id == id]
        files = [finished("a", url=f"https://{HOST}/a?Signature=hidden-7"), finished("b"), failed("c")]
        await store.expand([chunk(item, *files)], NOW)
    for file in await claim(store):
        outcome = found if file.target_url.endswith("/b") else missing
        hop = request(url=f"https://{HOST}/hop?Signature=hidden-7", http_status=404, reason="http_404")
        await store.record([outcome(file, requests=(request(), hop), final_url="https://h/f?Signature=hidden-7")], NOW)


async def bundle(records: Records, *, with_secrets: bool) -> dict[str, bytes]:
    """Write a bundle, check its sums, and return its files."""
    page = await records.batches(BatchFilter(batch_id="batch"), None, 10)
    batch = await records.batch(page.items[0].id)
    assert batch is not None
    target = io.BytesIO()
    await write_bundle(records, batch, target, WRITTEN, with_secrets=with_secrets)
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        entries = {name: archive.read(name) for name in archive.namelist()}
    sums = dict(line.split("  ")[::-1] for line in entries.pop("SHA256SUMS").decode().splitlines())
    assert sums == {name: hashlib.sha256(content).hexdigest() for name, content in entries.items()}
    return entries


async def test_bundle_has_what_was_said_and_what_was_found(store: Engine, backend: Backend) -> None:
    await fill(store, backend)
    records = await backend.records()
    entries = await bundle(records, with_secrets=True)
    assert sorted(entries) == [
        "README.txt", "attempts.ndjson", "files.csv", "notifications/1.json", "notifications/1.meta.json",
        "notifications/2.json", "notifications/2.meta.json",
    ]  # fmt: skip
    assert entries["notifications/1.json"] == BODY
    assert json.loads(entries["notifications/2.meta.json"]) == {
        "received_at": "2025-10-09T08:53:20.123Z",
        "remote_addr": "198.18.0.1",
        "key_fingerprint": "a1b2",
        "request_id": "r-a1b2",
        "files": 3,
        "as_received": True,
        "sha256_as_received": hashlib.sha256(entries["notifications/2.json"]).hexdigest(),
    }
    rows = list(csv.DictReader(io.StringIO(entries["files.csv"].decode())))
    assert [(row["oss_object_name"], row["state"]) for row in rows] == [
        ("a", "unavailable"), ("b", "available"), ("c", "upload_failed"),
    ]  # fmt: skip
    assert rows[0]["target_url"] == f"https://{HOST}/a?Signature=hidden-7"
    attempts = [json.loads(line) for line in entries["attempts.ndjson"].splitlines()]
    assert [(each["oss_object_name"], each["http_status"]) for each in attempts] == [
        ("a", 200), ("a", 404), ("b", 200), ("b", 404),
    ]  # fmt: skip
    readme = entries["README.txt"].decode("utf-8-sig")
    for text in (
        f"batch batch ({API_CODE})",
        "批次 batch",
        "r-none",
        "a1b2",
        "permanently deleted",
        "5F7C0A1B2C3D4E5F60718293",
    ):
        assert text in readme


async def test_bundle_without_secrets_has_no_query_of_an_address(store: Engine, backend: Backend) -> None:
    await fill(store, backend)
    entries = await bundle(await backend.records(), with_secrets=False)
    assert not [name for name, content in entries.items() if b"hidden-7" in content]
    meta = json.loads(entries["notifications/1.meta.json"])
    assert (meta["as_received"], meta["sha256_as_received"]) == (False, hashlib.sha256(BODY).hexdigest())
    assert json.loads(entries["notifications/1.json"])["file_list"] == [{"target_url": "https://h/a.jpg"}]


@pytest.mark.parametrize(
    ("body", "cut"),
    [
        ('{"u": "https://h/a?s=1", "v": 2}', '{"u": "https://h/a", "v": 2}'),
        ('{"u": "https:\\/\\/h\\/a?s=1\\/2", "v": 2}', '{"u": "https:\\/\\/h\\/a", "v": 2}'),
        ('{"u": "https://h/a\\u003fs=1\\u0026t", "v": "?"}', '{"u": "https://h/a", "v": "?"}'),
        (r'{"c": "{\"u\": \"https://h/a?s=1\", \"v\": 2}"}', r'{"c": "{\"u\": \"https://h/a\", \"v\": 2}"}'),
        ('{"u": "https://h/a#f", "v": "a?b"}', '{"u": "https://h/a", "v": "a?b"}'),
        ('{"u": "https://h/a", "v": "https://h/b"}', '{"u": "https://h/a", "v": "https://h/b"}'),
    ],
)
def test_queries_are_cut_out_of_a_body(body: str, cut: str) -> None:
    assert without_queries(body.encode()).decode() == cut
