"""Supervision of child processes: real processes, each a few lines of Python."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from notify_server.processes import child
from notify_server.processes.child import Child
from notify_server.supervise import ended_tasks
from tests.support.daemon import process_gone
from tests.support.waiting import Bell

# Answers the first frame, then runs `work(payloads)` for what it reads; `stay` keeps it running after the end of input.
SCRIPT = """
import select, signal, sys, time
from notify_server.processes.worker import Input, Output
output = Output(1)
input = Input(0, output)
output.send(b"up " + input.first())
def read():
    select.select([0], [], [])
    return input.read()
"""
ECHO = """
try:
    while True:
        for payload in read():
            output.send(payload)
except EOFError:
    pass
"""
STAY = """
while True:
    time.sleep(60)
"""
# Answers pings, but no work.
IDLE = """
while True:
    read()
"""


class Watched:
    """A child and what it has reported, in order."""

    def __init__(self, script: str, is_overdue: Callable[[int], bool] = lambda ticks: False) -> None:
        self.events: list[object] = []
        self._bell = Bell()
        self.child = Child(
            "child",
            [sys.executable, "-c", script],
            b"first",
            on_up=lambda payload: self._note(payload),
            on_frame=lambda payload: self._note(payload),
            on_death=lambda: self._note("died"),
            on_silent=lambda: self._note("silent"),
            is_overdue=is_overdue,
        )

    def _note(self, event: object) -> None:
        self.events.append(event)
        self._bell.ring()

    async def seen(self, event: object, number: int = 1) -> None:
        await self._bell.until(lambda: self.events.count(event) >= number)

    @property
    def pid(self) -> int:
        assert self.child.pid is not None
        return self.child.pid


@asynccontextmanager
async def running(script: str, is_overdue: Callable[[int], bool] = lambda ticks: False) -> AsyncIterator[Watched]:
    watched = Watched(script, is_overdue)
    watched.child.start()
    await watched.seen(b"up first")
    try:
        yield watched
    finally:
        await watched.child.stop(0)
        assert ended_tasks() == {}


async def test_child_answers_first_frame_and_later_ones_and_ends_when_its_input_closes() -> None:
    async with running(SCRIPT + ECHO) as watched:
        pid = watched.pid
        assert watched.child.up
        assert watched.child.answers
        watched.child.send(b"one")
        watched.child.send(b"two")
        await watched.seen(b"two")
        assert watched.events == [b"up first", b"one", b"two"]
        assert await watched.child.stop(30)
        await process_gone(pid)
        assert (watched.child.restarts, watched.child.up, watched.child.pid) == (0, False, None)


async def test_stopped_child_is_silent_then_killed_and_replaced() -> None:
    async with running(SCRIPT + ECHO) as watched:
        stopped = watched.pid
        os.kill(stopped, signal.SIGSTOP)
        await watched.seen("silent")
        # Whoever asks now is refused, while the process is still there.
        assert (watched.child.up, watched.child.answers, watched.pid) == (True, False, stopped)
        await watched.seen("died")
        await process_gone(stopped)
        await watched.seen(b"up first", 2)
        assert watched.pid != stopped
        watched.child.send(b"again")
        await watched.seen(b"again")
        assert watched.events == [b"up first", "silent", "died", b"up first", b"again"]
        assert watched.child.restarts == 1


async def test_child_that_runs_again_before_it_is_killed_stays() -> None:
    async with running(SCRIPT + ECHO) as watched:
        pid = watched.pid
        os.kill(pid, signal.SIGSTOP)
        watched.child.send(b"late")
        await watched.seen("silent")
        os.kill(pid, signal.SIGCONT)
        await watched.seen(b"late")
        assert watched.child.answers
        assert watched.pid == pid


async def test_stopped_daemon_does_not_take_its_children_for_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "TICK_SECONDS", 0.02)
    async with running(SCRIPT + ECHO) as watched:
        # The loop stands still for longer than a child may be silent.
        subprocess.run(["sleep", str(child.TICK_SECONDS * child.HUNG_TICKS * 2)], check=True)
        watched.child.send(b"still there")
        await watched.seen(b"still there")
        assert "died" not in watched.events


async def test_child_that_ignores_the_end_of_its_input_is_killed_when_the_grace_is_over() -> None:
    async with running(SCRIPT + STAY) as watched:
        pid = watched.pid
        assert not await watched.child.stop(0.1)
        await process_gone(pid)


async def test_stopped_child_does_not_hold_up_a_stop() -> None:
    async with running(SCRIPT + ECHO) as watched:
        pid = watched.pid
        os.kill(pid, signal.SIGSTOP)
        assert not await watched.child.stop(0.1)
        await process_gone(pid)


async def test_child_that_answers_pings_but_not_its_work_is_replaced() -> None:
    overdue = False
    async with running(SCRIPT + IDLE, lambda ticks: overdue) as watched:
        first = watched.pid
        overdue = True
        await watched.seen("died")
        overdue = False
        await watched.seen(b"up first", 2)
        await process_gone(first)
        assert "silent" not in watched.events


async def test_child_that_never_answers_its_first_frame_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "START_TICKS", 1)
    watched = Watched("import time; time.sleep(600)")
    watched.child.start()
    async with asyncio.timeout(30):
        while watched.child.restarts < 2:
            await asyncio.sleep(0.01)
    await watched.child.stop(0)
    assert watched.events == []


async def test_child_whose_program_cannot_be_started_is_tried_again_and_stops_at_once() -> None:
    watched = Watched("")
    watched.child._command = ["/nonexistent"]
    watched.child.start()
    await asyncio.sleep(0)
    assert await watched.child.stop(30)
    assert ended_tasks() == {}


async def test_child_is_stopped_while_it_is_being_started() -> None:
    watched = Watched(SCRIPT + ECHO)
    watched.child.start()
    await asyncio.sleep(0)
    assert await watched.child.stop(30)


async def test_frames_that_cannot_be_handled_replace_the_child() -> None:
    async with running(SCRIPT + ECHO) as watched:

        def refuse(payload: bytes) -> None:
            raise ValueError(payload)

        watched.child._on_frame = refuse
        watched.child.send(b"strange")
        await watched.seen(b"up first", 2)
        assert "died" in watched.events


@pytest.mark.parametrize("program", ["keeper", "prober"])
@pytest.mark.parametrize("given", [b"", b"\x05\x00", b"\x05\x00\x00\x00ab"])
def test_program_ends_when_its_input_ends_before_the_first_frame(program: str, given: bytes) -> None:
    command = [sys.executable, "-m", f"notify_server.processes.{program}"]
    ended = subprocess.run(command, input=given, capture_output=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
