"""Every refusal has one shape, the platform's response convention, whatever it was that refused."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from notify_server.callbacks.errors import error_response
from notify_server.store.sqlite.client import SqliteClient

if TYPE_CHECKING:
    from tests.support.app import AppServer, Clock, Signer, Start
    from tests.support.http import Reply
    from tests.web.conftest import Locked

TOKEN = "token-of-the-platform"


def test_an_error_has_the_keys_of_the_convention_in_their_order_and_no_others() -> None:
    response = error_response("id", 400, "401001", 'a "quoted"\n\x1b text 成功', {"Retry-After": "5"})
    assert response.status == 400
    assert response.content_type == "application/json"
    assert response.headers["Retry-After"] == "5"
    assert isinstance(response.body, bytes)
    assert json.loads(response.body) == {
        "request_id": "id",
        "code": "401001",
        "msg": 'a "quoted"\n\x1b text 成功',
        "data": None,
    }
    assert list(json.loads(response.body)) == ["request_id", "code", "msg", "data"]


async def ask(daemon: AppServer, request: bytes) -> Reply:
    connection = await daemon.connect()
    await connection.send(request)
    return await connection.answer()


async def test_refusals_before_the_contract_have_the_shape(daemon: AppServer) -> None:
    body = daemon.notification()
    (await daemon.post(b"[]")).refusal(400, "400")
    (await daemon.get("/nothing/here")).refusal(404, "404")
    (await daemon.get("/notify")).refusal(405, "405")
    (await daemon.post(b"x" * 9_000_000)).refusal(413, "413")
    (await daemon.post(body, {"Content-Type": "application/json", "Content-Encoding": "br"})).refusal(415, "415")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_a_method_that_the_servers_own_pages_do_not_have_is_refused_in_the_shape(
    daemon: AppServer, path: str, method: str
) -> None:
    answer = await daemon.ask(method, path)
    answer.refusal(answer.status, str(answer.status))
    assert answer.status in (404, 405)


async def test_refusals_for_want_of_authority_have_the_shape(start: Start, signer: Signer, clock: Clock) -> None:
    auth = {"signature": "required", "platform_keys": [signer.public], "callback_token": TOKEN}
    daemon = await start(clock=clock, auth=auth)
    path = f"/notify?token={TOKEN}"
    envelope = signer.seal(daemon.notification(), timestamp=clock())
    late = signer.seal(daemon.notification(), timestamp=clock() - 60_000)
    (await daemon.post(envelope)).refusal(401, "401001")
    (await daemon.post(daemon.notification(), path=path)).refusal(401, "401001")
    (await daemon.post(late, path=path)).refusal(403, "403001")
    (await daemon.post(envelope, path=path)).accepted()
    (await daemon.post(envelope, path=path)).refusal(403, "403002")


async def test_a_refusal_by_network_has_the_shape(start: Start) -> None:
    daemon = await start(auth={"callback_networks": ["192.0.2.0/24"]})
    (await daemon.post(daemon.notification())).refusal(403, "401002")


async def test_refusals_for_want_of_room_have_the_shape(start: Start) -> None:
    verify = {"backlog_limit": 1, "allowed_networks": ["127.0.0.1"], "allowed_ports": [1]}
    daemon = await start(verify=verify)
    (await daemon.post(daemon.notification(daemon.entry(target_url="http://127.0.0.1:1/")))).accepted()
    (await daemon.post(daemon.notification())).refusal(503, "503")


async def test_refusals_by_a_store_that_cannot_commit_have_the_shape(
    start: Start, locked: Locked, impatient_store: None
) -> None:
    daemon = await start()
    with locked(daemon):
        (await daemon.post(daemon.notification())).refusal(503, "503")
        (await daemon.post(b"[]")).refusal(503, "503")


async def test_a_body_that_comes_too_slowly_is_refused_in_the_shape(start: Start) -> None:
    daemon = await start(server={"body_timeout": 0.1})
    request = b"POST /notify HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n{"
    (await ask(daemon, request)).refusal(408, "408")


async def test_an_expectation_that_cannot_be_met_is_refused_in_the_shape(served: AppServer) -> None:
    request = b"POST /notify HTTP/1.1\r\nHost: h\r\nExpect: the impossible\r\nContent-Length: 0\r\n\r\n"
    answer = await ask(served, request)
    answer.refusal(417, "417")


@pytest.mark.parametrize("verb", ["accept", "reject"])
async def test_an_unexpected_error_is_answered_in_the_documented_form_and_logged(
    daemon: AppServer, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    async def fail(self: SqliteClient, given: Any) -> int:
        raise RuntimeError("the inside story")

    since = len(daemon.events.all)
    with monkeypatch.context() as patch:
        patch.setattr(SqliteClient, verb, fail)
        answer = await daemon.post(daemon.notification() if verb == "accept" else b"[]")
    message = answer.refusal(500, "500")
    assert "inside story" not in message
    assert [event for event in daemon.events.all[since:] if event["level"] in ("error", "exception", "critical")]
    await daemon.serves()


async def test_answers_to_requests_that_run_at_once_have_ids_of_their_own(daemon: AppServer) -> None:
    answers = await asyncio.gather(*(daemon.post(b"[]") for _ in range(20)))
    assert len({answer.json["request_id"] for answer in answers}) == 20
    assert {answer.refusal(400, "400") for answer in answers} == {answers[0].json["msg"]}
