"""The turns of the scheduler, with the clock in the test's hands."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import pytest

from notify_server.config import VerifyConfig
from notify_server.model import DueFile, Request
from notify_server.processes.prober_client import ProberLink
from notify_server.store.base import FileQueue
from notify_server.verify.guard import Guard
from notify_server.verify.scheduler import Scheduler

HOST = "files.example.com"
FILES = 50


class Link:
    """A prober that takes requests and answers none."""

    alive = True

    def __init__(self) -> None:
        self.sent: list[Request] = []

    @property
    def busy(self) -> int:
        return len(self.sent)

    def send(self, requests: Sequence[Request]) -> None:
        self.sent += requests


class Clock:
    """A clock that goes on by `step` seconds each time that it is read. A loop without an end reads it too often."""

    def __init__(self, step: float) -> None:
        self._step = step
        self._now = 1000.0
        self._reads = 0

    def __call__(self) -> float:
        self._reads += 1
        assert self._reads < 100 * FILES, "the scheduler goes round in circles"
        self._now += self._step
        return self._now


@pytest.mark.parametrize("step", [0.0005, 0.002, 0.01])
async def test_a_host_whose_moment_comes_while_files_are_started_is_given_its_turn_and_the_work_ends(
    monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    config = VerifyConfig(per_host_interval=0.001, allowed_hosts=(HOST,))
    link = Link()
    scheduler = Scheduler(
        cast(FileQueue, None),
        Guard(),
        config,
        [cast(ProberLink, link)],
        now=lambda: 0,
        chance=lambda: 0.5,
        on_verdicts=_ignore,
        on_recorded=_ignore,
        limit_of=lambda host, settings: FILES,
    )
    host = scheduler._claims.host(HOST)
    assert host is not None
    host.exhausted = True
    host.queue.extend(DueFile(number, 1, HOST, f"https://{HOST}/{number}", 0) for number in range(FILES))
    monkeypatch.setattr(time, "monotonic", Clock(step))
    scheduler._ready(host)
    scheduler.pump()
    # It has started files, and either all of them or a timer is set for the next.
    assert link.sent
    assert len(link.sent) == FILES or host.timer is not None
    assert len({request.id for request in link.sent}) + len(host.queue) == FILES
    if host.timer is not None:
        host.timer.cancel()


def _ignore(results: Sequence[Any]) -> None:
    pass
