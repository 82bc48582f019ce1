"""Expectations over the API of a running daemon: registration, the events about them, and the gate."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from notify_server.web.api.expectations import MAX_LINES
from tests.support.app import AppServer, Start
from tests.support.notification import API_CODE
from tests.support.waiting import SECONDS

PATH = "/api/v1/expectations"
NDJSON = {"Content-Type": "application/x-ndjson"}


async def ask(daemon: AppServer, method: str, path: str, body: Any = None, status: int = 200) -> Any:
    headers = {"Content-Type": "application/json"} if body is not None else {}
    data = None if body is None else json.dumps(body)
    reply = await daemon.ask(method, path, data=data, headers=headers)
    assert reply.status == status, reply.body
    return json.loads(reply.body)


async def register(daemon: AppServer, status: int = 201, **fields: Any) -> Any:
    return await ask(daemon, "POST", PATH, {"api_code": API_CODE, **fields}, status)


async def lines(daemon: AppServer, *submissions: Any, status: int = 201) -> Any:
    data = "".join(json.dumps(each) + "\n" for each in submissions)
    reply = await daemon.ask("POST", PATH, data=data.encode(), headers=NDJSON)
    assert reply.status == status, reply.body
    return json.loads(reply.body)


async def notify(daemon: AppServer, batch_id: str, files: int = 1) -> None:
    entries = [{"oss_object_name": f"k{n}", "target_url": None, "status": "FAILED"} for n in range(files)]
    (await daemon.post({"batch_id": batch_id, "api_code": API_CODE, "file_list": entries})).accepted()
    await daemon.settled(batch_id)


async def events(daemon: AppServer, after: int = 0, types: str = "*") -> list[Any]:
    items: list[Any] = (await ask(daemon, "GET", f"/api/v1/events?after={after}&types={types}"))["items"]
    return items


async def test_registration_is_idempotent_and_a_conflict_names_the_field(start: Start) -> None:
    daemon = await start()
    first = await register(daemon, reference="r", files=12, notify_within="90s", verdict_within=7200)
    assert (first["state"], first["files"], first["batch"]) == ("waiting", 12, None)
    again = await register(daemon, 200, reference="r", files=12, notify_within=90, verdict_within="2h")
    assert again == first
    refused = await register(daemon, 409, reference="r", files=13, notify_within="90s")
    assert refused["msg"].startswith("files: ")
    assert (await ask(daemon, "GET", f"{PATH}?reference=r"))["items"] == [first]


async def test_wrong_submissions_are_refused_by_field_and_line(start: Start) -> None:
    daemon = await start()
    for fields, name in (
        ({}, "reference"),
        ({"reference": ""}, "reference"),
        ({"reference": "a\0b"}, "reference"),
        ({"reference": "w", "files": 0}, "files"),
        ({"reference": "w", "files": []}, "files"),
        ({"reference": "w", "notify_within": "soon"}, "notify_within"),
        ({"reference": "w", "verdict_within": 0}, "verdict_within"),
        ({"reference": "w", "notify_in": "5m"}, "notify_in"),
    ):
        assert (await register(daemon, 400, **fields))["msg"].startswith(f"{name}:"), fields
    good = {"reference": "w1", "api_code": API_CODE}
    answer = await lines(daemon, good, {"reference": "w2", "api_code": API_CODE, "files": "many"}, status=400)
    assert answer["msg"].startswith("line 2: files:")
    assert (await ask(daemon, "GET", f"{PATH}?reference=w1"))["items"] == []
    await lines(daemon, good)
    answer = await lines(daemon, {**good, "reference": "w3"}, {**good, "files": 3}, status=409)
    assert answer["msg"].startswith("line 2: files:")
    too_many = b"\n".join([json.dumps(good).encode()] * (MAX_LINES + 1))
    assert (await daemon.ask("POST", PATH, data=too_many, headers=NDJSON)).status == 413
    assert (await daemon.ask("POST", PATH, data=b"\n", headers=NDJSON)).status == 400
    assert (await daemon.ask("PUT", PATH)).headers["Allow"] == "GET, POST, DELETE"


async def test_many_are_registered_at_once_and_paged(start: Start) -> None:
    daemon = await start()
    many = [{"reference": f"many-{n}", "api_code": "many", "batch_id": f"m{n}"} for n in range(1_200)]
    assert await lines(daemon, *many) == {"created": 1_200, "existing": 0}
    assert await lines(daemon, *many, status=200) == {"created": 0, "existing": 1_200}
    seen: list[str] = []
    cursor = ""
    while True:
        page = await ask(daemon, "GET", f"{PATH}?api_code=many&state=waiting&limit=500{cursor}")
        seen += [each["reference"] for each in page["items"]]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert sorted(seen) == sorted(each["reference"] for each in many)
    (one,) = (await ask(daemon, "GET", f"{PATH}?batch_id=m7"))["items"]
    assert await ask(daemon, "GET", f"{PATH}/{one['id']}") == one
    assert await ask(daemon, "DELETE", f"{PATH}/{one['id']}") == {"deleted": 1}
    await ask(daemon, "DELETE", f"{PATH}/{one['id']}", status=404)
    assert await ask(daemon, "DELETE", f"{PATH}?reference=many-8&api_code=many") == {"deleted": 1}
    assert await ask(daemon, "DELETE", f"{PATH}?reference=many-8") == {"deleted": 0}


async def test_late_and_short_raise_events_and_later_arrivals_meet_them(start: Start) -> None:
    daemon = await start()
    (last,) = (await events(daemon))[-1:] or [{"id": 0}]
    await register(daemon, reference="late", batch_id="late", notify_within="100ms")
    await register(daemon, reference="short", batch_id="short", files=3)
    await notify(daemon, "short", 2)

    async def told(types: str) -> list[Any]:
        return await events(daemon, last["id"], types)

    async with asyncio.timeout(SECONDS):
        while not await told("batch.late"):
            await asyncio.sleep(0.05)
    (late,) = await told("batch.late")
    assert (late["data"]["reference"], late["data"]["batch_id"], late["data"]["limit"]) == (
        "late",
        "late",
        "notify_within",
    )
    (short,) = await told("batch.short")
    assert (short["data"]["reference"], short["data"]["expected_files"], short["data"]["files"]) == ("short", 3, 2)
    await notify(daemon, "late")
    await notify(daemon, "short", 3)
    for reference in ("late", "short"):
        async with asyncio.timeout(SECONDS):
            while (item := (await ask(daemon, "GET", f"{PATH}?reference={reference}"))["items"][0])["state"] != "met":
                await asyncio.sleep(0.05)
        assert (item["state"], item["matched_by"], item["verdict"]) == ("met", "batch_id", "incomplete")
    verdicts = await told("batch.incomplete")
    assert [(each["data"]["reference"], each["revision"]) for each in verdicts] == [
        ("short", 1),
        ("late", 1),
        ("short", 3),
    ]


async def test_gate_knows_expected_batches_and_waits_for_their_verdict(start: Start) -> None:
    daemon = await start()
    await ask(daemon, "GET", "/api/v1/verdict?batch_id=gated", status=404)
    await register(daemon, reference="g", batch_id="gated", files=2)
    answer = await ask(daemon, "GET", "/api/v1/verdict?batch_id=gated")
    assert (answer["verdict"], answer["reference"], answer["expected_files"], answer["files"]) == (
        "expected",
        "g",
        2,
        0,
    )
    waiting = asyncio.create_task(ask(daemon, "GET", f"/api/v1/verdict?batch_id=gated&api_code={API_CODE}&wait=30s"))
    await notify(daemon, "gated", 2)
    answer = await waiting
    assert (answer["verdict"], answer["reference"], answer["expected_files"]) == ("incomplete", "g", 2)


async def test_page_deletes_a_submission_after_confirmation_and_with_its_csrf_token_only(start: Start) -> None:
    daemon = await start()
    item = await register(daemon, reference="gone <b>", batch_id="gone")
    path = f"/ui/expected/{item['id']}/delete"
    login = await daemon.ask("POST", "/ui/login", data={"token": daemon.token}, anonymous=True, allow_redirects=False)
    # As a browser: a request with the token itself needs no CSRF token.
    browser = {"Cookie": login.headers["Set-Cookie"].partition(";")[0]}

    async def browse(method: str, path: str, **form: str) -> tuple[int, str]:
        options = {"data": form} if method == "POST" else {}
        reply = await daemon.ask(method, path, anonymous=True, headers=browser, **options)
        return reply.status, reply.body.decode()

    assert path in (await browse("GET", "/ui/expected?reference=gone <b>"))[1]
    _, page = await browse("GET", path)
    assert "gone &lt;b&gt;" in page
    csrf = re.search(r'name="csrf" value="([^"]+)"', page)
    assert csrf is not None
    assert (await browse("POST", path, csrf="wrong"))[0] == 403
    await ask(daemon, "GET", f"{PATH}/{item['id']}")
    status, page = await browse("POST", path, csrf=csrf[1])
    assert (status, "The submission is deleted." in page) == (200, True)
    await ask(daemon, "GET", f"{PATH}/{item['id']}", status=404)
    assert (await browse("GET", path))[0] == 404
