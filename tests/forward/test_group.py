"""Robots: digests, reminders, recovery and throttles, with a fake robot that answers as the real ones do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from notify_server.forward.sender import Sender
from notify_server.store.sqlite.store import SqliteStore
from tests.forward.conftest import Receiver, Send, Time, until
from tests.forward.test_sender import rows, settled, verdict
from tests.store.builders import claim, found, missing, take_in
from tests.store.builders import finished as a_file
from tests.support.waiting import eventually

OK = {"errcode": 0, "errmsg": "ok"}
GROUP = 30_000


def robot(receiver: Receiver, **keys: Any) -> dict[str, Any]:
    return {
        "name": "bot",
        "bot": "dingtalk",
        "url": f"{receiver.url}robot/send?access_token=t",
        "secret": "SECabc",
        "allowed_networks": ["127.0.0.0/8"],
        "language": "en",
        **keys,
    }


@pytest.fixture(autouse=True)
def accepting(receiver: Receiver) -> None:
    receiver.answer(200, OK)


def texts(receiver: Receiver) -> list[str]:
    return [json.loads(hit.body)["markdown"]["text"] for hit in receiver.hits]


def titles(receiver: Receiver) -> list[str]:
    return [json.loads(hit.body)["markdown"]["title"] for hit in receiver.hits]


def move(time: Time, sender: Sender, ms: int) -> None:
    time.at += ms
    sender.wake()


async def at_rest(sender: Sender) -> None:
    """Return when no message is under way."""
    queue = sender.queue("bot")
    assert queue is not None
    await eventually(lambda: not queue.in_flight)


async def break_batch(store: SqliteStore, time: Time, batch_id: str) -> int:
    await take_in(store, a_file("k"), batch_id=batch_id, now=time())
    (file,) = await claim(store, now=time())
    await store.record([missing(file)], time())
    return file.id


async def heal(store: SqliteStore, time: Time, file_id: int) -> None:
    await store.recheck([file_id], time())
    (file,) = await claim(store, now=time())
    await store.record([found(file)], time())


async def test_what_happens_within_group_wait_is_one_message(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    sender = await send(robot(receiver))
    await verdict(store, sender, time, batch_id="b1")
    move(time, sender, GROUP - 10)
    await verdict(store, sender, time, batch_id="b2")
    assert receiver.hits == []
    move(time, sender, 10)
    await receiver.reached(1)
    await settled(store, "delivered", "delivered")
    assert titles(receiver) == ["2 batches have missing files"]
    assert "b1" in texts(receiver)[0]
    assert "b2" in texts(receiver)[0]


async def test_complete_batches_are_not_reported(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    sender = await send(robot(receiver))
    await take_in(store, a_file("k"), batch_id="good", now=time())
    (file,) = await claim(store, now=time())
    await store.record([found(file)], time())
    assert await rows(store, "SELECT count(*) FROM forward") == [(0,)]
    await verdict(store, sender, time, batch_id="bad")
    move(time, sender, GROUP)
    await receiver.reached(1)
    assert "good" not in texts(receiver)[0]


async def test_batch_that_recovers_within_group_wait_is_not_reported(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    sender = await send(robot(receiver))
    await heal(store, time, await break_batch(store, time, "b1"))
    await settled(store, "superseded")
    await verdict(store, sender, time, batch_id="b2")
    move(time, sender, GROUP)
    await receiver.reached(1)
    assert "b1" not in texts(receiver)[0]


async def test_one_message_tells_when_all_have_recovered(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    sender = await send(robot(receiver))
    files = [await break_batch(store, time, f"b{number}") for number in range(3)]
    move(time, sender, GROUP)
    await receiver.reached(1)
    await settled(store, *["delivered"] * 3)
    for number, file in enumerate(files):
        await heal(store, time, file)
        move(time, sender, GROUP)
        await settled(store, *["delivered"] * (4 + number))
    await receiver.reached(2)
    assert titles(receiver) == ["3 batches have missing files", "Recovered: all 3 batches are complete"]


async def test_open_problems_are_repeated(send: Send, store: SqliteStore, receiver: Receiver, time: Time) -> None:
    sender = await send(robot(receiver, repeat="1h"))
    file = await break_batch(store, time, "b1")
    move(time, sender, GROUP)
    await receiver.reached(1)
    await settled(store, "delivered")
    move(time, sender, 3_600_000)
    await receiver.reached(2)
    assert titles(receiver)[1] == "Reminder: 1 batch has missing files"
    await at_rest(sender)
    move(time, sender, 3_600_000)
    await receiver.reached(3)
    await at_rest(sender)
    await heal(store, time, file)
    move(time, sender, GROUP)
    await receiver.reached(4)
    assert titles(receiver)[3] == "Recovered: the batch is complete"


async def test_error_code_in_a_200_is_a_failure_with_its_text(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    receiver.answer(200, {"errcode": -1, "errmsg": "system busy"})
    sender = await send(robot(receiver))
    await verdict(store, sender, time)
    move(time, sender, GROUP)

    async def recorded() -> bool:
        return await rows(store, "SELECT state, last_error FROM forward") == [("pending", "error -1: system busy")]

    await until(recorded)
    receiver.answer(200, OK)
    move(time, sender, 5_000)
    await settled(store, "delivered")


async def test_throttled_robot_is_left_alone_and_no_attempt_is_spent(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    receiver.answer(200, {"errcode": 130101, "errmsg": "send too fast"})
    sender = await send(robot(receiver))
    await verdict(store, sender, time)
    move(time, sender, GROUP)

    async def recorded() -> bool:
        return await rows(store, "SELECT state, attempts, next_attempt_at FROM forward") == [
            ("pending", 0, time.at + 600_000)
        ]

    await until(recorded)
    receiver.answer(200, OK)
    move(time, sender, 600_000)
    await settled(store, "delivered")
    assert len(receiver.hits) == 2


async def test_robot_that_needs_a_person_is_stopped(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time
) -> None:
    receiver.answer(200, {"errcode": 310000, "errmsg": "sign not match"})
    sender = await send(robot(receiver))
    await verdict(store, sender, time)
    move(time, sender, GROUP)

    async def stopped() -> bool:
        return (await store.outbox.endpoint_states())[0].stopped_at is not None

    await until(stopped)
    reason = (await store.outbox.endpoint_states())[0].stopped_reason
    assert reason is not None
    assert "310000" in reason
    assert "check the secret" in reason


async def test_test_is_sent_at_once(send: Send, store: SqliteStore, receiver: Receiver, time: Time) -> None:
    sender = await send(robot(receiver))
    await verdict(store, sender, time)
    attempt = await sender.test("bot")
    assert attempt is not None
    assert attempt.delivered
    assert titles(receiver) == ["Test message from notify_server"]


@pytest.mark.parametrize(
    ("bot", "answer", "secret"),
    [("wecom", OK, None), ("feishu", {"code": 0, "msg": "success"}, "demo")],
)
async def test_other_robots_get_their_own_form(
    send: Send, store: SqliteStore, receiver: Receiver, time: Time, bot: str, answer: dict[str, Any], secret: str | None
) -> None:
    receiver.answer(200, answer)
    keys = robot(receiver, bot=bot, language="zh")
    keys.pop("secret")
    sender = await send(keys | ({"secret": secret} if secret else {}))
    await verdict(store, sender, time, batch_id="批次")
    move(time, sender, GROUP)
    await settled(store, "delivered")
    assert "批次" in json.dumps(json.loads(receiver.hits[0].body), ensure_ascii=False)
