"""Long tasks: one that ends without being cancelled is logged and can be seen."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

import pytest
import structlog

from notify_server import supervise
from notify_server.supervise import Grace, ended_tasks, let_end, start_task, stop_tasks

STOPPED = "a part of the daemon has stopped, restart it"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    # The loop, and with it what has ended on it, may be shared with other tests.
    monkeypatch.setattr(supervise, "_ended", WeakKeyDictionary())


async def forever() -> None:
    await asyncio.Event().wait()


async def returns() -> None:
    pass


async def fails() -> None:
    raise ValueError("a mistake")


async def test_cancelled_task_is_no_error() -> None:
    tasks = [start_task(forever(), name) for name in ("a", "b")]
    with structlog.testing.capture_logs() as lines:
        await stop_tasks(*tasks)
    assert all(task.cancelled() for task in tasks)
    assert lines == []
    assert ended_tasks() == {}


@pytest.mark.parametrize(("run", "why"), [(returns, "it returned"), (fails, "ValueError: a mistake")])
async def test_task_that_ends_by_itself_is_logged_and_named_and_its_owner_is_called(run: object, why: str) -> None:
    called = asyncio.Event()
    with structlog.testing.capture_logs() as lines:
        start_task((returns if run is returns else fails)(), "lease", on_failure=called.set)
        async with asyncio.timeout(30):
            await called.wait()
    assert [(line["event"], line["log_level"], line["part"], line["why"]) for line in lines] == [
        (STOPPED, "critical", "lease", why)
    ]
    assert ended_tasks() == {"lease": why}


async def test_task_that_was_let_to_end_may_return_but_not_fail() -> None:
    for run, ended in ((returns, {}), (fails, {"writer": "ValueError: a mistake"})):
        task = start_task(run(), "writer")
        let_end(task)
        await asyncio.wait([task])
        await asyncio.sleep(0)
        assert ended_tasks() == ended


async def test_stop_waits_for_tasks_that_fail_while_they_are_cancelled() -> None:
    async def fails_late() -> None:
        try:
            await forever()
        finally:
            raise ValueError("late")

    task = start_task(fails_late(), "late")
    await asyncio.sleep(0)
    await stop_tasks(task)
    assert task.done()


def test_grace_runs_from_its_beginning_and_is_never_negative() -> None:
    assert Grace(-1).left() == 0
    grace = Grace(1000)
    grace.begin()
    first = grace.left()
    grace.begin()
    assert 0 < grace.left() <= first <= 1000
