"""Every engine finds batches, files and rejections by what people know of them."""

from __future__ import annotations

import base64
from uuid import uuid4

import pytest

from notify_server.model import FileState
from notify_server.store.base import Engine
from notify_server.store.reading.queries import SORTS
from notify_server.store.reading.types import BatchFiles, FileFilter, Found
from tests.store.backends import Backend
from tests.store.builders import API_CODE, NOW, claim, failed, finished, found, missing, rejection, take_in

SOURCE = "/apt_common/o_3bc10191pi.jpg"
KEY = f"8ZAFUPII49GQN2AB/IMAGE/-109/{base64.b64encode(SOURCE.encode()[:24]).decode()}"
URL = "https://files.example.com/elsewhere/photo.jpg?x=1"
HOUR = 3_600_000


def names(results: Found) -> tuple[list[str], list[str], int, list[str]]:
    return (
        [batch.batch_id for batch in results.batches],
        [file.oss_object_name for file in results.files],
        len(results.rejections),
        results.api_codes,
    )


@pytest.mark.parametrize("text", ["room-2026-11", "room-2026-11-23", "2026-11-23", "-11-23"])
async def test_batch_is_found_by_its_beginning_and_by_a_part(store: Engine, backend: Backend, text: str) -> None:
    await take_in(store, finished("a"), batch_id="room-2026-11-23")
    await take_in(store, finished("a"), batch_id="other")
    results = await (await backend.records()).search(text, 10)
    assert names(results)[:2] == (["room-2026-11-23"], [])


@pytest.mark.parametrize("text", [KEY, KEY[:30], KEY[4:20], SOURCE, SOURCE[:14], "/apt_common/o_3bc10191pi", URL])
async def test_file_is_found_by_key_source_path_url_and_their_parts(store: Engine, backend: Backend, text: str) -> None:
    await take_in(store, finished(KEY, url=URL), finished("unrelated"))
    results = await (await backend.records()).search(text, 10)
    assert names(results)[:2] == ([], [KEY])


async def test_request_id_leads_to_the_batch_or_the_rejection(store: Engine, backend: Backend) -> None:
    accepted, refused, unknown = (str(uuid4()) for _ in range(3))
    await take_in(store, finished("a"), batch_id="one", request_id=accepted)
    await take_in(store, finished("a"), batch_id="one", request_id=str(uuid4()))
    await store.reject(rejection(request_id=refused))
    records = await backend.records()
    assert names(await records.search(accepted, 10))[:3] == (["one"], [], 0)
    assert names(await records.search(refused, 10))[:3] == ([], [], 1)
    assert names(await records.search(unknown, 10)) == ([], [], 0, [])


async def test_api_codes_are_known_and_found_by_their_beginning(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a"))
    records = await backend.records()
    assert await records.api_codes(10) == [API_CODE]
    assert names(await records.search(API_CODE[:6], 10))[3] == [API_CODE]
    assert names(await records.search("x\0y", 10)) == ([], [], 0, [])


async def test_files_of_a_batch_are_sorted_filtered_and_numbered(store: Engine, backend: Backend) -> None:
    await take_in(store, *(finished(f"k{n:02}") for n in range(10)), finished(KEY), failed("reported"), batch_id="big")
    files = sorted(await claim(store), key=lambda file: file.id)
    await store.record(
        [found(file, content_length=1000 - n) if n % 2 else missing(file) for n, file in enumerate(files[:8])], NOW
    )
    records = await backend.records()
    batch = files[0].batch

    async def keys(**wanted: object) -> list[str]:
        page = await records.batch_files(BatchFiles(batch, **wanted))  # type: ignore[arg-type]
        return [file.oss_object_name for file in page.items]

    everything = await keys()
    assert everything == sorted(everything, key=str.encode) and len(everything) == 12
    assert await keys(descending=True) == everything[::-1]
    assert await keys(offset=5, limit=3) == everything[5:8]
    assert (await keys(sort="size"))[:4] == ["k07", "k05", "k03", "k01"]
    assert (await keys(sort="size", descending=True))[:4] == ["k01", "k03", "k05", "k07"]
    assert await keys(state=FileState.UPLOAD_FAILED) == ["reported"]
    assert await keys(reason="http_410") == ["k00", "k02", "k04", "k06"]
    assert await keys(text="k0", limit=2) == ["k00", "k01"]
    assert await keys(text=SOURCE[:15]) == [KEY]
    assert await keys(text="x\0y") == []
    assert (await records.batch_files(BatchFiles(batch, text="k0", limit=2))).total == 10
    for sort in SORTS:
        assert len(await keys(sort=sort, descending=True)) == 12
    (counted,) = await records.batch_reasons(batch, 5)
    assert (counted.reason, counted.files) == ("http_410", 4)


async def test_files_are_filtered_by_the_api_code_and_arrival_of_their_batch(store: Engine, backend: Backend) -> None:
    for n in range(4):
        await take_in(
            store, finished("a"), failed("f"), batch_id=f"b{n}", now=NOW + n * HOUR, received_at=NOW + n * HOUR
        )
    records = await backend.records()
    later = FileFilter(api_code=API_CODE, received_from=NOW + 2 * HOUR)
    page = await records.files(later, None, 3)
    rest = await records.files(later, page.next, 3)
    found_in = [file.batch_id for file in [*page.items, *rest.items]]
    assert found_in == ["b3", "b3", "b2", "b2"]
    assert await records.count(later) == 4
    reported = FileFilter(state=FileState.UPLOAD_FAILED, received_before=NOW + HOUR)
    assert [file.batch_id for file in (await records.files(reported, None, 10)).items] == ["b0"]
    assert await records.count(reported) == 1
    assert await records.count(FileFilter(api_code="nowhere")) == 0
