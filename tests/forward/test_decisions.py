"""The pure decisions of forwarding: acceptance, schedule, circuit."""

from __future__ import annotations

import pytest

from notify_server.config.accept import parse_accept
from notify_server.forward.circuit import Circuit
from notify_server.forward.schedule import SCHEDULE, after_attempt
from notify_server.model import CircuitState


@pytest.mark.parametrize(
    ("rule", "body", "accepted"),
    [
        ("status", b"", True),
        ("status", b"<html>", True),
        ("json:code=000", b'{"code":"000","msg":"ok"}', True),
        ("json:code=000", b'{"code":"500"}', False),
        ("json:code=000", b'{"code":0}', False),
        ("json:code=0", b'{"code":0}', True),
        ("json:success=true", b'{"success":true}', True),
        ("json:success=true", b'{"success":false}', False),
        ("json:success=true", b'{"success":"true"}', True),
        ("json:data.ok=1", b'{"data":{"ok":1}}', True),
        ("json:data.ok=1", b'{"data":[1]}', False),
        ("json:error=null", b'{"error":null}', True),
        ("json:code=", b'{"code":""}', True),
        ("json:code=a=b", b'{"code":"a=b"}', True),
        ("json:code=000", b"not json", False),
        ("json:code=000", b"[]", False),
        ("json:code=000", b"\xff", False),
        ("json:code=000", b"[" * 5000, False),
        ("text:success", b"<p>success</p>", True),
        ("text:success", b"SUCCESS", False),
        ("text:\u6210\u529f", "\u6210\u529f".encode(), True),
    ],
)
def test_answer_is_accepted_by_rule(rule: str, body: bytes, accepted: bool) -> None:
    assert parse_accept(rule).matches(body) is accepted
    assert str(parse_accept(rule)) == rule


@pytest.mark.parametrize("rule", ["", "Status", "json:", "json:code", "json:=1", "json:a..b=1", "text:", "regex:.*"])
def test_wrong_rule_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_accept(rule)


def test_success_ends_the_delivery() -> None:
    assert after_attempt(delivered=True, status=200, attempts=1, now=0, chance=0.5) == ("delivered", None, False)


@pytest.mark.parametrize("attempts", range(1, len(SCHEDULE)))
def test_schedule_is_followed_with_jitter(attempts: int) -> None:
    wait = SCHEDULE[attempts] * 1000
    for chance, factor in ((0.0, 0.8), (0.5, 1.0), (0.999999, 1.2)):
        found = after_attempt(delivered=False, status=500, attempts=attempts, now=1_000, chance=chance)
        assert found.state == "pending"
        assert found.next_attempt_at == pytest.approx(1_000 + wait * factor, rel=1e-4)


def test_spent_schedule_fails() -> None:
    assert after_attempt(delivered=False, status=500, attempts=10, now=0, chance=0.5).state == "failed"
    assert len(SCHEDULE) == 10


@pytest.mark.parametrize(
    ("status", "asked", "wait"),
    [
        (429, 60_000, 60_000),
        (503, 60_000, 60_000),
        (500, 60_000, 5_000),
        (None, 60_000, 5_000),
        (429, 10, 5_000),
        (503, None, 5_000),
        (429, 10**12, 86_400_000),
    ],
)
def test_retry_after_counts_on_429_and_503(status: int | None, asked: int | None, wait: int) -> None:
    found = after_attempt(delivered=False, status=status, attempts=1, now=0, chance=0.5, retry_after_ms=asked)
    assert found.next_attempt_at == wait


def test_410_stops_the_endpoint_and_keeps_the_delivery() -> None:
    assert after_attempt(delivered=False, status=410, attempts=1, now=7, chance=0.5) == ("pending", 7, True)


def test_circuit_opens_after_four_failures_in_a_row() -> None:
    circuit = Circuit()
    for _ in range(3):
        circuit.failed(0)
    assert circuit.slots(0, 8) == 8
    circuit.succeeded()
    for _ in range(4):
        circuit.failed(0)
    assert circuit.state(0) is CircuitState.OPEN
    assert circuit.slots(999, 8) == 0


def test_circuit_lets_one_trial_through_after_its_rest() -> None:
    circuit = Circuit()
    for _ in range(4):
        circuit.failed(0)
    assert circuit.state(1_000) is CircuitState.HALF_OPEN
    assert circuit.slots(1_000, 8) == 1
    circuit.started(1_000)
    assert circuit.slots(1_000, 8) == 0
    circuit.succeeded()
    assert (circuit.state(1_000), circuit.slots(1_000, 8), circuit.failures) == (CircuitState.CLOSED, 8, 0)


def test_trial_that_is_given_back_leaves_room_for_another() -> None:
    circuit = Circuit()
    for _ in range(4):
        circuit.failed(0)
    circuit.started(1_000)
    circuit.released()
    assert circuit.slots(1_000, 8) == 1


def test_rest_doubles_to_a_minute() -> None:
    circuit = Circuit()
    now = 0
    for _ in range(4):
        circuit.failed(now)
    rests = []
    for _ in range(8):
        assert circuit.open_until is not None
        rests.append(circuit.open_until - now)
        now = circuit.open_until
        circuit.started(now)
        circuit.failed(now)
    assert rests == [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]


def test_failures_of_deliveries_under_way_do_not_lengthen_the_rest() -> None:
    circuit = Circuit()
    for _ in range(8):
        circuit.failed(0)
    assert circuit.open_until == 1_000
