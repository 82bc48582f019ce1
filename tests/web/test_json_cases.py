"""The JSON parsing cases against the callback endpoint: 200 or 400, never 5xx, and every connection goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.json_cases import json_cases

if TYPE_CHECKING:
    from tests.support.app import AppServer


async def test_every_case_is_acked_or_refused_with_400(daemon: AppServer) -> None:
    statuses = {case.name: (await daemon.post(case.body)).status for case in json_cases()}
    assert statuses == {case.name: 200 if case.accepted else 400 for case in json_cases()}
