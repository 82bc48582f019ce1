"""The sender against a real store and a real receiver; the schedule's time is moved by hand."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from standardwebhooks import Webhook
from structlog.testing import capture_logs

from notify_server.forward.sender import Sender
from notify_server.model import DueFile
from notify_server.store.sqlite.store import SqliteStore
from tests.forward.conftest import Receiver, Send, Time, until
from tests.store.builders import claim, failed, finished, found, missing, take_in
from tests.support.waiting import eventually, free_port

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
LOOPBACK = ["127.0.0.0/8"]


def endpoint(receiver: Receiver, name: str = "a", **keys: Any) -> dict[str, Any]:
    return {"name": name, "url": f"{receiver.url}{name}", "secrets": [SECRET], "allowed_networks": LOOPBACK, **keys}


async def verdict(store: SqliteStore, sender: Sender, time: Time, batch_id: str = "b") -> None:
    """Bring a batch to its verdict: incomplete."""
    await take_in(store, failed("k"), batch_id=batch_id, now=time())
    sender.wake()


async def rows(store: SqliteStore, query: str) -> list[Any]:
    return await store._writer.read(lambda connection: connection.execute(query).fetchall())


async def states(store: SqliteStore) -> list[str]:
    return [state for (state,) in await rows(store, "SELECT state FROM forward ORDER BY id")]


async def settled(store: SqliteStore, *wanted: str) -> None:
    async def check() -> bool:
        return await states(store) == list(wanted)

    await until(check)


async def test_event_arrives_signed_and_is_recorded(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    sender = await send(endpoint(receiver))
    await verdict(store, sender, time)
    await receiver.reached(1)
    hit = receiver.hits[0]
    assert hit.path == "/a"
    assert Webhook(SECRET).verify(hit.body, dict(hit.headers))["data"]["batch_id"] == "b"
    assert hit.headers["webhook-id"].startswith("evt_")
    await settled(store, "delivered")
    assert await rows(store, "SELECT last_status, last_error, attempts FROM forward") == [(200, None, 1)]


async def test_cloudevents_carry_the_data_and_sign_the_body(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    sender = await send(endpoint(receiver, format="cloudevents"))
    await verdict(store, sender, time, batch_id="批 1")
    await receiver.reached(1)
    hit = receiver.hits[0]
    assert Webhook(SECRET).verify(hit.body, dict(hit.headers))["batch_id"] == "批 1"
    assert hit.headers["ce-subject"] == "%E6%89%B9%201"
    assert hit.headers["ce-type"] == "batch.incomplete"
    assert hit.headers["ce-source"] == "/notify_server/a"
    assert hit.headers["ce-id"] == hit.headers["webhook-id"]


async def test_failure_is_tried_again_on_schedule_under_the_same_id(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    receiver.answers = [(500, b"boom\x00", {}), (302, b"", {"Location": "/elsewhere"}), (200, b"", {})]
    sender = await send(endpoint(receiver))
    await verdict(store, sender, time)
    for number, wait in ((1, 5), (2, 300)):
        await receiver.reached(number)
        await until(partial(_attempts, store, number))
        time.at += wait * 1000 - 1
        sender.wake()
        (at,) = (await rows(store, "SELECT next_attempt_at FROM forward"))[0]
        assert at == time.at + 1
        time.at += 1
        sender.wake()
    await settled(store, "delivered")
    assert len({hit.headers["webhook-id"] for hit in receiver.hits}) == 1
    assert [hit.path for hit in receiver.hits] == ["/a"] * 3
    assert await rows(store, "SELECT status, error FROM forward_attempt ORDER BY id") == [
        (500, "answered HTTP 500"), (302, "answered HTTP 302"), (200, None),
    ]  # fmt: skip


async def _attempts(store: SqliteStore, number: int) -> bool:
    return await rows(store, "SELECT attempts FROM forward") == [(number,)]


async def test_answer_that_is_not_accepted_is_a_failure_and_is_kept(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    receiver.answer(200, {"code": "500", "msg": "not today"})
    sender = await send(endpoint(receiver, accept="json:code=000"))
    await verdict(store, sender, time)
    await until(lambda: _attempts(store, 1))
    ((state, status, error, response),) = await rows(
        store, "SELECT state, last_status, last_error, last_response FROM forward"
    )
    assert (state, status) == ("pending", 200)
    assert error == "answered HTTP 200, but its body does not match accept = json:code=000"
    assert json.loads(response)["msg"] == "not today"


async def test_retry_after_is_honoured(send: Send, store: SqliteStore, receiver: Receiver, time: Time) -> None:
    receiver.answer(503, Retry_After="60")
    sender = await send(endpoint(receiver))
    await verdict(store, sender, time)
    await until(lambda: _attempts(store, 1))
    assert await rows(store, "SELECT next_attempt_at FROM forward") == [(time.at + 60_000,)]


async def test_gone_endpoint_is_stopped_until_it_is_started(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    receiver.answer(410)
    sender = await send(endpoint(receiver))
    await verdict(store, sender, time)
    await until(lambda: _attempts(store, 1))
    await verdict(store, sender, time, batch_id="c")
    assert await states(store) == ["pending", "pending"]
    assert len(receiver.hits) == 1
    receiver.answer(200)
    assert await store.outbox.stop_endpoint("a", None, time())
    sender.wake()
    await settled(store, "delivered", "delivered")


async def test_dead_endpoint_costs_the_others_nothing(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    dead = {"name": "dead", "url": f"http://127.0.0.1:{free_port()}/", "allowed_networks": LOOPBACK}
    sender = await send(dead, endpoint(receiver, events=["batch.*"]))
    for number in range(20):
        await verdict(store, sender, time, batch_id=str(number))
    await receiver.reached(20)

    async def good_done() -> bool:
        return await rows(store, "SELECT count(*) FROM forward WHERE endpoint = 'a' AND state = 'delivered'") == [(20,)]

    await until(good_done)
    queue = sender.queue("dead")
    assert queue is not None
    await eventually(lambda: queue.circuit.open_until is not None)
    # The circuit spends no attempts: those under way when it opened are all that there are.
    ((spent,),) = await rows(store, "SELECT sum(attempts) FROM forward WHERE endpoint = 'dead'")
    assert spent <= 12


async def test_slow_receiver_has_eight_requests_at_most(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    receiver.gate.clear()
    sender = await send(endpoint(receiver))
    for number in range(12):
        await verdict(store, sender, time, batch_id=str(number))
    await receiver.reached(8)
    await asyncio.sleep(0)
    assert receiver.busiest == 8
    receiver.gate.set()
    await settled(store, *["delivered"] * 12)
    assert receiver.busiest == 8


async def test_last_word_of_a_batch_arrives_once_and_in_order_after_an_outage(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    receiver.answer(500)
    sender = await send(endpoint(receiver, events=["batch.*"]))
    files: dict[str, DueFile] = {}
    for batch in ("a", "b", "c"):
        await take_in(store, finished("k"), batch_id=batch, now=time())
        (files[batch],) = await claim(store, now=time())
        await store.record([missing(files[batch])], time())
    sender.wake()
    await receiver.reached(1)
    # The verdicts of "a" change three times during the hour, that of "b" once.
    for minutes, changes in ((5, {"a": found, "b": found}), (30, {"a": missing}), (25, {"a": found})):
        time.at += minutes * 60_000
        sender.wake()
        await store.recheck([files[batch].id for batch in changes], time())
        for file in await claim(store, now=time()):
            batch = next(name for name, each in files.items() if each.id == file.id)
            await store.record([changes[batch](file)], time())
    receiver.answer(200)
    before = len(receiver.hits)

    async def settled_all() -> bool:
        # The circuit rests, and what was in flight as the hour passed is due later.
        time.at += 60_000
        sender.wake()
        return Counter(await states(store)) == {"delivered": 3, "superseded": 4}

    await until(settled_all)
    last = [hit.payload for hit in receiver.hits[before:]]
    assert sorted((each["data"]["batch_id"], each["data"]["revision"], each["type"]) for each in last) == [
        ("a", 4, "batch.complete"), ("b", 2, "batch.complete"), ("c", 1, "batch.incomplete"),
    ]  # fmt: skip


async def test_newer_event_waits_for_the_one_that_is_under_way(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    receiver.gate.clear()
    sender = await send(endpoint(receiver))
    await take_in(store, finished("k"), now=time())
    (file,) = await claim(store, now=time())
    await store.record([missing(file)], time())
    sender.wake()
    await receiver.reached(1)
    await store.recheck([file.id], time())
    (file,) = await claim(store, now=time())
    await store.record([found(file)], time())
    sender.wake()
    await verdict(store, sender, time, batch_id="other")
    await receiver.reached(2)
    assert receiver.hits[1].payload["data"]["batch_id"] == "other"
    receiver.gate.set()
    await receiver.reached(3)
    assert [hit.payload["data"]["revision"] for hit in receiver.hits] == [1, 1, 2]


async def test_what_was_cut_off_is_sent_again_after_a_restart(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    receiver.gate.clear()
    sender = await send(endpoint(receiver))
    await verdict(store, sender, time)
    await receiver.reached(1)
    await sender.stop(0.0)
    receiver.gate.set()
    store.outbox._sending.clear()
    await send(endpoint(receiver))
    await receiver.reached(2)
    assert receiver.hits[0].headers["webhook-id"] == receiver.hits[1].headers["webhook-id"]


async def test_script_gets_the_event(send: Send, store: SqliteStore, tmp_path: Path, time: Time) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys; open({str(tmp_path / 'got')!r}, 'w').write(sys.stdin.read())")
    sender = await send({"name": "s", "command": [sys.executable, str(script)]})
    await verdict(store, sender, time)
    await settled(store, "delivered")
    assert json.loads((tmp_path / "got").read_text())["type"] == "batch.incomplete"


async def test_test_of_an_endpoint_returns_its_answer(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    sender = await send(endpoint(receiver))
    attempt = await sender.test("a")
    assert attempt is not None
    assert (attempt.status, attempt.error) == (200, None)
    assert receiver.hits[0].payload == {
        "type": "test.ping",
        "timestamp": receiver.hits[0].payload["timestamp"],
        "data": {"endpoint": "a", "text": "test"},
    }
    receiver.answer(500, b"no")
    attempt = await sender.test("a")
    assert attempt is not None
    assert (attempt.status, attempt.response) == (500, "no")


async def test_test_is_made_although_the_circuit_is_open(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    receiver.answer(500)
    sender = await send(endpoint(receiver))
    for number in range(4):
        await verdict(store, sender, time, batch_id=str(number))
    queue = sender.queue("a")
    assert queue is not None
    await eventually(lambda: queue.circuit.open_until is not None)
    receiver.answer(200)
    attempt = await sender.test("a")
    assert attempt is not None
    assert attempt.delivered


async def test_failing_endpoint_is_reported_to_the_others(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    dead = {"name": "dead", "url": f"http://127.0.0.1:{free_port()}/", "allowed_networks": LOOPBACK}
    sender = await send(dead, endpoint(receiver, events=["endpoint.*"]))
    for number in range(4):
        await verdict(store, sender, time, batch_id=str(number))
    await receiver.reached(1)
    payload = receiver.hits[0].payload
    assert (payload["type"], payload["data"]["endpoint"]) == ("endpoint.failing", "dead")


async def test_without_endpoints_nothing_runs(send: Send, store: SqliteStore) -> None:
    before = asyncio.all_tasks()
    sender = await send()
    assert asyncio.all_tasks() == before
    sender.wake()
    await sender.stop(0.0)


async def test_other_endpoints_in_the_store_are_logged_once(send: Send, receiver: Receiver) -> None:
    sender = await send(endpoint(receiver, "a"), endpoint(receiver, "b"))
    with capture_logs() as logs:
        for present in (["a", "b"], ["a", "c"], ["a", "c"], ["a", "b"], ["a"]):
            sender.compare(present)
    assert [(line["log_level"], line["endpoints"]) for line in logs] == [("warning", "b, c"), ("warning", "b")]
