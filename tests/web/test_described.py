"""The running daemon against its own description: whatever is sent, the answer is one that is described."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Ok

from tests.support.daemon import Daemon
from tests.support.notification import batch_body
from tests.support.waiting import SECONDS

TOKEN = "correct-horse-battery"
EXAMPLES = 15
# Ends only with its listener.
STREAM = "/api/v1/stream"
MAX_LINE = 8000

load_all_checks()
WANTED: list[Any] = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "allow_header_conformance",
        "ignored_auth",
    ]
)


def _sent(case: Case[Any], url: str) -> dict[str, Any]:
    return {"method": case.method, "url": url + case.formatted_path, "params": case.query}


def check(url: str, token: str) -> int:
    """Send what fits the description, and what does not; how many requests that was. Raises what a check finds."""
    asked = 0
    headers = {"Authorization": f"Bearer {token}"}
    with requests.Session() as session:
        session.headers.update(headers)
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
        for found in schema.exclude(path=STREAM).get_all_operations():
            assert isinstance(found, Ok)
            operation = found.ok()
            for mode in GenerationMode:
                # Where there is nothing to send there is nothing to send wrongly.
                if mode is GenerationMode.NEGATIVE and not (operation.query or operation.body):
                    continue

                @settings(
                    max_examples=EXAMPLES,
                    derandomize=True,
                    database=None,
                    deadline=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=operation.as_strategy(mode))
                def send(case: Case[Any]) -> None:
                    nonlocal asked
                    # Longer lines are refused before they are a request.
                    assume(len(str(session.prepare_request(requests.Request(**_sent(case, url))).url)) < MAX_LINE)
                    asked += 1
                    case.call_and_validate(session=session, headers=headers, checks=WANTED, timeout=SECONDS)

                send()
    return asked


async def test_every_answer_is_one_that_is_described(tmp_path: Path) -> None:
    config: dict[str, dict[str, Any]] = {
        "verify": {"allowed_hosts": ["nowhere.invalid"]},
        "auth": {"admin_token": TOKEN},
    }
    async with Daemon(tmp_path, config) as daemon:
        await daemon.settle("batch", ["http://elsewhere.invalid/1", "http://elsewhere.invalid/2"])
        assert (await daemon.post(batch_body("", []))).status == 400
        asked = await asyncio.to_thread(check, daemon.callback.removesuffix("/notify"), TOKEN)
        assert asked > 200
        assert not [line for line in daemon.lines if line["level"] in ("error", "critical")]
