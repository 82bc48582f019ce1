"""A flood from one source is answered 429 before its bodies are read, and other sources are served (row 52)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.app import AppServer, Events, Start


async def post_as(daemon: AppServer, address: str) -> tuple[int, str | None]:
    answer = await daemon.post(daemon.notification(), {"X-Forwarded-For": address, "Content-Type": "application/json"})
    return answer.status, answer.headers.get("Retry-After")


async def test_without_a_limit_no_source_is_refused(start: Start) -> None:
    daemon = await start()
    assert {(await daemon.post(daemon.notification())).status for _ in range(200)} == {200}


async def test_beyond_the_limit_a_source_gets_retry_after_and_others_go_on(start: Start, events: Events) -> None:
    daemon = await start(server={"rate_limit": 1, "trusted_proxies": ["127.0.0.1"]})
    assert await post_as(daemon, "192.0.2.1") == (200, None)
    assert await post_as(daemon, "192.0.2.1") == (429, "1")
    assert await post_as(daemon, "192.0.2.2") == (200, None)
    assert await post_as(daemon, "2001:db8::1") == (200, None)
    assert await post_as(daemon, "2001:db8::2") == (429, "1")
    assert (daemon.count("notification"), daemon.count("rejection")) == (3, 0)
    assert events.find("callbacks beyond [server] rate_limit are answered 429", remote="192.0.2.1") is not None
    assert events.find("callbacks beyond [server] rate_limit are answered 429", remote="2001:db8::2") is None


async def test_a_refusal_has_the_platforms_form_for_any_path(start: Start) -> None:
    daemon = await start(server={"rate_limit": 1})
    (await daemon.post(daemon.notification())).accepted()
    assert "429" not in (await daemon.post(b"[]")).refusal(429, "429")
    (await daemon.get("/notify")).refusal(429, "429")
    assert (await daemon.get("/healthz")).status == 200


async def test_a_body_is_not_waited_for(start_server: Start) -> None:
    daemon = await start_server(server={"rate_limit": 1, "body_timeout": "1h"})
    (await daemon.post(daemon.notification())).accepted()
    connection = await daemon.connect()
    await connection.send(
        b"POST /notify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{"
    )
    (await connection.answer()).refusal(429, "429")
